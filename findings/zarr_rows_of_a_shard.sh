#!/usr/bin/env bash
# A list of rows of a sharded zarr array takes a hundred times the memory of the rows, or fails.
#
# Expected: `array[rows, 0]` with a list of rows gives what numpy gives, in about the memory and time
# of reading them one by one; sharding is a matter of storage.
# Seen: an integer beside the list makes zarr keep coordinates of every element: over 100 bytes for
# each byte read, and up to 6 times the time of single rows. Up to 3.1.6 the list alone does so too, and
# with 3.1.5 the integer is an error. With 3.4.2 the list alone, or beside `0:1`, is good, and faster
# than single rows. See zarr-developers/zarr-python 3691 (closed) and 3829 (open).
#
# zarr 3.1.5, 3.1.6 and 3.4.2, numpy 2.5.5, Python 3.12, Linux; 2026-11-30. Output seen:
#   zarr 3.1.5: one by one light; [rows] heavy; [rows, 0:1] heavy; [rows, 0] ValueError
#   zarr 3.1.6: one by one light; [rows] heavy; [rows, 0:1] heavy; [rows, 0] heavy
#   zarr 3.4.2: one by one light; [rows] light; [rows, 0:1] light; [rows, 0] heavy
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/read.py" <<'READ'
import sys
import time
import tracemalloc

import numpy as np
import zarr

shape = (192, 16, 16)
array = zarr.create_array(
    sys.argv[1], shape=(128, 1, *shape), chunks=(1, 1, *shape), shards=(64, 1, *shape), dtype="int8"
)
array[:] = np.random.default_rng(0).integers(-2, 3, array.shape).astype("int8")
rows = list(range(1, 65, 2))
ways = {
    "one by one": lambda: np.stack([array[row] for row in rows]),
    "[rows]": lambda: array[rows],
    "[rows, 0:1]": lambda: array[rows, 0:1],
    "[rows, 0]": lambda: array[rows, 0],
}
found = []
for name, read in ways.items():
    try:
        read()
        started = time.perf_counter()
        read()
        seconds = time.perf_counter() - started
        tracemalloc.start()
        size = read().nbytes
        share = tracemalloc.get_traced_memory()[1] / size
        tracemalloc.stop()
        print(f"{name}: {seconds * 1e3:.0f} ms, {share:.0f} times the rows", file=sys.stderr)
        found.append(f"{name} {'heavy' if share > 50 else 'light' if share < 15 else 'between'}")
    except ValueError as error:
        found.append(f"{name} {type(error).__name__}")
print(f"zarr {zarr.__version__}: {'; '.join(found)}")
READ
for version in 3.1.5 3.1.6 3.4.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet numpy==2.5.5 "zarr==$version"
    "$folder/$version/bin/python" -W ignore "$folder/read.py" "$folder/array-$version"
done | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
zarr 3.1.5: one by one light; [rows] heavy; [rows, 0:1] heavy; [rows, 0] ValueError
zarr 3.1.6: one by one light; [rows] heavy; [rows, 0:1] heavy; [rows, 0] heavy
zarr 3.4.2: one by one light; [rows] light; [rows, 0:1] light; [rows, 0] heavy
KNOWN
diff "$folder/known" "$folder/seen"
