#!/usr/bin/env bash
# webdataset: `seed=` of the data set orders the shards, and `.shuffle()` stays random.
#
# Expected: WebDataset(..., seed=0).shuffle(100) gives the same order in every process, and another in
# each epoch.
# Seen: the seed reaches the order of the shards alone, and that is the same in every epoch, with a
# seed or without one. `.shuffle()` draws from the clock; its own `seed=` gives every epoch the same
# order. Only `rng=` gives every process the same orders, another in each epoch. See
# webdataset/webdataset 39, 372 and 502.
#
# webdataset 1.0.2, Python 3.12, Linux; 2026-11-30. Output seen:
#   shards, no seed: processes differ, epochs alike
#   shards, seed=0: processes alike, epochs alike
#   seed=0 and .shuffle(100): processes differ, epochs differ
#   .shuffle(100, seed=0): processes alike, epochs alike
#   .shuffle(100, rng=random.Random(0)): processes alike, epochs differ
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/epochs.py" <<'EPOCHS'
import json
import random
import sys
from pathlib import Path

import webdataset

root = Path(sys.argv[1])
if not root.exists():
    root.mkdir()
    for shard in range(10):
        with webdataset.TarWriter(str(root / f"{shard}.tar")) as tar:
            for sample in range(6):
                tar.write({"__key__": f"{shard}{sample}", "cls": sample})
tars = sorted(map(str, root.glob("*.tar")))
made = {
    "shards, no seed": webdataset.WebDataset(tars, shardshuffle=100),
    "shards, seed=0": webdataset.WebDataset(tars, shardshuffle=100, seed=0),
    "seed=0 and .shuffle(100)": webdataset.WebDataset(tars, shardshuffle=100, seed=0).shuffle(100),
    ".shuffle(100, seed=0)": webdataset.WebDataset(tars, shardshuffle=False).shuffle(100, seed=0),
    ".shuffle(100, rng=random.Random(0))": webdataset.WebDataset(tars, shardshuffle=False).shuffle(
        100, rng=random.Random(0)
    ),
}
orders = {
    name: [[sample["__key__"] for sample in dataset] for _ in range(2)]
    for name, dataset in made.items()
}
print(json.dumps(orders))
EPOCHS
cat > "$folder/compare.py" <<'COMPARE'
import json
import sys

one, other = (json.load(open(path)) for path in sys.argv[1:])
for name, (first, second) in one.items():
    processes = "alike" if other[name] == [first, second] else "differ"
    print(f"{name}: processes {processes}, epochs {'alike' if first == second else 'differ'}")
COMPARE
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet webdataset==1.0.2
for run in one other; do
    "$folder/venv/bin/python" -W ignore "$folder/epochs.py" "$folder/tars" > "$folder/$run.json"
done
"$python" "$folder/compare.py" "$folder/one.json" "$folder/other.json" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
shards, no seed: processes differ, epochs alike
shards, seed=0: processes alike, epochs alike
seed=0 and .shuffle(100): processes differ, epochs differ
.shuffle(100, seed=0): processes alike, epochs alike
.shuffle(100, rng=random.Random(0)): processes alike, epochs differ
KNOWN
diff "$folder/known" "$folder/seen"
