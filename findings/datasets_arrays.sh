#!/usr/bin/env bash
# Hugging Face datasets gives an int8 array of a tar as nested lists, and as int64 in numpy's format.
#
# Expected: load_dataset("webdataset") gives the `.npy` of a sample as an array of the type and shape
# that it was saved with; the column's type is known to be int8.
# Seen: the items are lists of lists of Python's ints. with_format("numpy") makes int64 of them, eight
# times the memory; `dtype=None`, which the reference does not name, keeps int8. Both take the way
# through Python's ints, value by value. See huggingface/datasets 7254 and 8639.
#
# datasets 5.2.0, numpy 2.5.5, Python 3.12, Linux; 2026-11-30. Output seen:
#   column: List(List(List(Value('int8'))))
#   item: list
#   with_format("numpy"): int64 (3, 4, 5)
#   with_format("numpy", dtype=None): int8 (3, 4, 5)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/read.py" <<'READ'
import io
import sys
import tarfile

import datasets
import numpy as np

data = io.BytesIO()
np.save(data, np.arange(60, dtype="int8").reshape(3, 4, 5))
with tarfile.open(f"{sys.argv[1]}/a.tar", "w") as tar:
    for name, content in (("0.y.npy", data.getvalue()), ("0.cls", b"1")):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
datasets.disable_progress_bars()
loaded = datasets.load_dataset(
    "webdataset", data_files=f"{sys.argv[1]}/a.tar", split="train", cache_dir=sys.argv[1]
)
print("column:", loaded.features["y.npy"])
print("item:", type(loaded[0]["y.npy"]).__name__)
for words, options in (('"numpy"', {}), ('"numpy", dtype=None', {"dtype": None})):
    array = loaded.with_format("numpy", **options)[0]["y.npy"]
    print(f"with_format({words}): {array.dtype} {array.shape}")
READ
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 numpy==2.5.5
HF_HUB_OFFLINE=1 HF_HOME="$folder" "$folder/venv/bin/python" "$folder/read.py" "$folder" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
column: List(List(List(Value('int8'))))
item: list
with_format("numpy"): int64 (3, 4, 5)
with_format("numpy", dtype=None): int8 (3, 4, 5)
KNOWN
diff "$folder/known" "$folder/seen"
