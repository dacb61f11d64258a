#!/usr/bin/env bash
# An attribute that is NaN makes a zarr array unreadable for tensorstore.
#
# Expected: zarr writes NaN so that every reader of zarr v3 can parse zarr.json, as it does for a fill
# value ("NaN", a text), or refuses it.
# Seen: zarr writes the bare word NaN, or Infinity, which JSON does not know, and reads it back.
# tensorstore refuses the whole array, data and all. See zarr-developers/zarr-python 412.
#
# zarr 3.4.2, tensorstore 0.1.86, Python 3.12, Linux; 2026-11-30. Output seen:
#   fill value nan: zarr reads it, tensorstore reads it
#   attribute nan: zarr reads it, tensorstore ValueError, Invalid JSON
#   attribute inf: zarr reads it, tensorstore ValueError, Invalid JSON
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/write.py" <<'WRITE'
import math
import sys
from pathlib import Path

import tensorstore
import zarr


def opened(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    try:
        tensorstore.open(spec, read=True).result().read().result()
    except ValueError as error:
        return f"ValueError, {'Invalid JSON' if 'Invalid JSON' in str(error) else error}"
    return "reads it"


cases = {
    "fill value nan": (math.nan, {}),
    "attribute nan": (0.0, {"mean": math.nan}),
    "attribute inf": (0.0, {"mean": math.inf}),
}
for name, (fill, attributes) in cases.items():
    path = str(Path(sys.argv[1], name.replace(" ", "-")))
    zarr.create_array(
        path, shape=(4,), chunks=(2,), dtype="float32", fill_value=fill, attributes=attributes
    )[:] = 1
    assert zarr.open_array(path, mode="r")[:].all()
    print(f"{name}: zarr reads it, tensorstore {opened(path)}")
WRITE
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet zarr==3.4.2 tensorstore==0.1.86
"$folder/venv/bin/python" "$folder/write.py" "$folder/arrays" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
fill value nan: zarr reads it, tensorstore reads it
attribute nan: zarr reads it, tensorstore ValueError, Invalid JSON
attribute inf: zarr reads it, tensorstore ValueError, Invalid JSON
KNOWN
diff "$folder/known" "$folder/seen"
