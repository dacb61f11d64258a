#!/usr/bin/env bash
# timm and torchvision number the classes of the same folder differently.
#
# Expected: both read a folder per class and number the classes by their sorted names, so a head
# trained with one can be evaluated with the other.
# Seen: torchvision sorts names as text, capitals first. timm sorts them without regard to case, and
# digits in them by value. Where names have digits of unequal length, or capitals, the same image has
# another label. ImageNet's names are alike for both.
#
# timm 1.0.31, torchvision 0.29.2, torch 2.15.0, Python 3.12, Linux; 2026-11-30. Output seen:
#   torchvision: 1 10 2; timm: 1 2 10
#   torchvision: Rose daisy; timm: daisy Rose
#   torchvision: img10 img9; timm: img9 img10
#   torchvision: n01440764 n02119789; timm: n01440764 n02119789
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/classes.py" <<'CLASSES'
import sys
from pathlib import Path

from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

sets = ("1", "2", "10"), ("daisy", "Rose"), ("img9", "img10"), ("n01440764", "n02119789")
for number, names in enumerate(sets):
    root = Path(sys.argv[1], str(number))
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "a.png")
    numbers = create_dataset("", root=str(root)).reader.class_to_idx
    ordered = sorted(numbers, key=numbers.get)
    print(f"torchvision: {' '.join(ImageFolder(root).classes)}; timm: {' '.join(ordered)}")
CLASSES
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy torch==2.15.0 torchvision==0.29.2 timm==1.0.31
"$folder/venv/bin/python" "$folder/classes.py" "$folder/images" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
torchvision: 1 10 2; timm: 1 2 10
torchvision: Rose daisy; timm: daisy Rose
torchvision: img10 img9; timm: img9 img10
torchvision: n01440764 n02119789; timm: n01440764 n02119789
KNOWN
diff "$folder/known" "$folder/seen"
