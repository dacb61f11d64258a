#!/usr/bin/env bash
# An empty zarr v3 group has other metadata bytes with zarr 3.1.3 and 3.1.4.
#
# Expected: two patch releases write the same zarr.json for the same call; what a group does not have
# is left out, as the specification of zarr v3 does not know `consolidated_metadata`.
# Seen: up to 3.1.3 the file says "consolidated_metadata": null. From 3.1.4 that line is not there, so
# a digest of the store's metadata changes with a patch release, although the content is the same.
#
# zarr 3.1.3, 3.1.4 and 3.4.2, Python 3.12, Linux; 2026-11-30. Output seen:
#   zarr 3.1.3: 99 bytes, attributes consolidated_metadata node_type zarr_format
#   zarr 3.1.4: 66 bytes, attributes node_type zarr_format
#   zarr 3.4.2: 66 bytes, attributes node_type zarr_format
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/write.py" <<'WRITE'
import json
import sys
from pathlib import Path

import zarr

zarr.create_group(sys.argv[1])
text = (Path(sys.argv[1]) / "zarr.json").read_text()
print(f"zarr {zarr.__version__}: {len(text)} bytes, {' '.join(sorted(json.loads(text)))}")
WRITE
for version in 3.1.3 3.1.4 3.4.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "zarr==$version"
    "$folder/$version/bin/python" -W ignore "$folder/write.py" "$folder/group-$version"
done | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
zarr 3.1.3: 99 bytes, attributes consolidated_metadata node_type zarr_format
zarr 3.1.4: 66 bytes, attributes node_type zarr_format
zarr 3.4.2: 66 bytes, attributes node_type zarr_format
KNOWN
diff "$folder/known" "$folder/seen"
