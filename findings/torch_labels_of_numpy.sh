#!/usr/bin/env bash
# Small integers of numpy as labels: DataLoader keeps their type, and cross_entropy refuses most.
#
# Expected: a label is a number; the batch of labels is int64, as it is for Python's ints.
# Seen: each scalar of numpy keeps its own type in the batch. cross_entropy takes int64 and uint8, and
# refuses int8, int16 and int32, so labels read from an array file work or not by how they were saved.
#
# torch 2.15.0, numpy 2.5.5, Python 3.12, Linux; 2026-11-30. Output seen:
#   int: torch.int64, taken
#   int64: torch.int64, taken
#   int32: torch.int32, refused
#   int16: torch.int16, refused
#   int8: torch.int8, refused
#   uint8: torch.uint8, taken
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/labels.py" <<'LABELS'
import numpy as np
import torch
from torch.utils.data import DataLoader

for kind in (int, np.int64, np.int32, np.int16, np.int8, np.uint8):
    labels = next(iter(DataLoader([kind(0), kind(2)], batch_size=2)))
    try:
        torch.nn.functional.cross_entropy(torch.zeros(2, 3), labels)
        ended = "taken"
    except RuntimeError:
        ended = "refused"
    print(f"{kind.__name__}: {labels.dtype}, {ended}")
LABELS
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.5.5 torch==2.15.0
"$folder/venv/bin/python" "$folder/labels.py" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
int: torch.int64, taken
int64: torch.int64, taken
int32: torch.int32, refused
int16: torch.int16, refused
int8: torch.int8, refused
uint8: torch.uint8, taken
KNOWN
diff "$folder/known" "$folder/seen"
