#!/usr/bin/env bash
# One bfloat16 array in a zarr group, and zarr cannot list the group.
#
# Expected: an array of a data type that zarr does not know fails when it is opened; the arrays beside
# it are listed.
# Seen: every way to list the group, and the question whether it has that name, ends in a ValueError.
# An array of a known type opens by its name. tensorstore writes such arrays, and its data type is
# registered for zarr v3. Support is asked for in zarr-developers/zarr-python 711 and 2656.
#
# zarr 3.4.2, tensorstore 0.1.86, Python 3.12, Linux; 2026-11-30. Output seen:
#   keys: ValueError
#   members: ValueError
#   array_keys: ValueError
#   is "half" there: ValueError
#   open "whole" by name: int8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/list.py" <<'LIST'
import sys

import tensorstore
import zarr

group = zarr.create_group(sys.argv[1])
group.create_array("whole", shape=(4,), chunks=(4,), dtype="int8")
tensorstore.open(
    {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{sys.argv[1]}/half"}},
    create=True,
    dtype=tensorstore.bfloat16,
    shape=[4],
).result().write(1).result()
group = zarr.open_group(sys.argv[1], mode="r")
for name, ask in {
    "keys": lambda: list(group.keys()),
    "members": group.members,
    "array_keys": lambda: list(group.array_keys()),
    'is "half" there': lambda: "half" in group,
    'open "whole" by name': lambda: group["whole"].dtype,
}.items():
    try:
        print(f"{name}: {ask()}")
    except ValueError as error:
        print(f"{name}: {type(error).__name__}")
LIST
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet zarr==3.4.2 tensorstore==0.1.86
"$folder/venv/bin/python" "$folder/list.py" "$folder/group" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
keys: ValueError
members: ValueError
array_keys: ValueError
is "half" there: ValueError
open "whole" by name: int8
KNOWN
diff "$folder/known" "$folder/seen"
