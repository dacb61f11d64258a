"""Every code block of the READMEs is run as it is printed, or says here why it is not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.pictures import write_image_folder
from tests.support.warm import WarmParent

REPO = Path(__file__).resolve().parents[2]
SETTINGS = {
    # The commands run as printed; only the sizes, of models too, are those of a test.
    "CI2P_CACHE_ENCODE_ENCODER": "bundled",
    "CI2P_CACHE_ENCODE_SIZE": "64",
    "CI2P_CACHE_ENCODE_FORMAT": "both",
    "CI2P_CACHE_ENCODE_VAL_FRACTION": "0.3",
    "CI2P_CACHE_TRAIN_EPOCHS": "1",
    "CI2P_CACHE_TRAIN_BATCH_SIZE": "8",
    "CI2P_CACHE_TRAIN_NAME": "vitds-1a2b3c4d",
    "CI2P_CACHE_BENCH_ENCODE_SIZE": "64",
    "CI2P_CACHE_BENCH_ENCODE_SECONDS": "0.2",
    "CI2P_CACHE_BENCH_LOADER_SECONDS": "0.2",
    "CI2P_CACHE_BENCH_LOADER_BATCH_SIZE": "8",
    "CI2P_CACHE_BENCH_TRAIN_SECONDS": "0.2",
    "CI2P_CACHE_BENCH_TRAIN_BATCH_SIZE": "8",
    "OMP_NUM_THREADS": "1",
}
_NO_BUCKET = "no bucket; tests/images/test_remote_sources.py and tests/cache have a server"
_MINUTES = "minutes; tests/experiment/test_recipes.py makes it"
_OWN = "needs the file above; tests/training/test_own_model.py"
_LOOPS = "needs other packages; tests/long/loops.py runs it"
_READERS = "packages of their own; tests/long/readers.py"
_GPUS = "several GPUs; tests/training/test_distributed.py"

EXCUSED = {
    # File and first words of a line or of a block: why it is not run here.
    ("README.md", "python3 -m venv"): "installs 6 GB; run on a clean clone at each landing",
    ("README.md", "ci2p-cache run pipelines/"): "a day of a GPU",
    ("README.md", "torchrun"): _GPUS,
    ("README.md", "shards/cache.json "): "a listing, held against a cache below",
    ("docs/storage.md", "shards/cache.json "): "a listing",
    ("docs/storage.md", "codes = latents[row]"): "tests/cache/test_zarr_shards.py",
    ("docs/encoders.md", "ci2p-cache encode imagenet/ --out bank/ --views crops:16"): (
        "needs the cache of the block above; tests/encoding/test_growth.py"
    ),
    ("docs/encoders.md", "python pipelines/train_codec.py"): "tests/encoder/test_train_codec.py",
    ("docs/encoders.md", "ci2p-cache encode data/"): "needs the codec of the line above",
    ("docs/training.md", "torchrun"): _GPUS,
    ("docs/training.md", "ci2p-cache train shards/ --model mine.py"): _OWN,
    ("docs/training.md", "ci2p-cache evaluate runs/mine.py"): _OWN,
    ("docs/training.md", "WANDB_MODE=offline"): "needs wandb; tests/long/trackers.py",
    ("docs/training.md", "hf upload"): "needs an account; tests/inference/test_share.py",
    ("docs/training.md", "hf download"): "needs an account; tests/inference/test_share.py",
    ("docs/loops.md", "import lightning"): _LOOPS,
    ("docs/loops.md", "from torch import nn"): _LOOPS,
    ("docs/loops.md", "from pathlib import Path\n\nimport torch\nfrom accelerate"): _LOOPS,
    ("docs/training.md", "import json, numpy as np, onnx"): "tests/inference/test_export.py",
    ("docs/beside_other_tools.md", "import numpy as np, tensorstore"): _READERS,
    ("docs/beside_other_tools.md", "import datasets"): _READERS,
    ("docs/machines.md", "sbatch"): "no Slurm; tests/encoding/test_cluster.py",
    ("docs/machines.md", "spec:"): "a manifest of Kubernetes",
    ("docs/object_stores.md", "ci2p-cache encode 's3:"): _NO_BUCKET,
    ("docs/object_stores.md", "aws s3 sync"): _NO_BUCKET,
    ("docs/object_stores.md", "ci2p-cache train s3:"): _NO_BUCKET,
    ("docs/benchmarks.md", "ci2p-cache bench train"): "minutes; tests/bench/test_bench.py",
    ("docs/benchmarks.md", "python -m tests.benchmarks."): "minutes; tests/bench",
    ("docs/recipes.md", "ci2p-cache run pipelines/flowers.py:"): _MINUTES,
    ("docs/recipes.md", "ci2p-cache run pipelines/animals10.py:"): "a day",
    ("docs/recipes.md", "ci2p-cache run pipelines/imagenet.py:vitds imagenet/ --until"): "GPUs",
    ("docs/recipes.md", "torchrun"): _GPUS,
    ("docs/recipes.md", "ci2p-cache report experiments/"): "needs the runs of the lines above",
    ("docs/contributing.md", "python3 -m venv"): "installs 6 GB, runs this very suite",
    ("docs/contributing.md", "bash findings/"): "installs packages",
    ("pipelines/README.md", "ci2p-cache run pipelines/flowers.py:"): _MINUTES,
    ("pipelines/README.md", "python pipelines/study.py flowers/ --"): "hours",
    ("pipelines/README.md", "python pipelines/systems.py"): "needs transformers, and minutes",
    ("pipelines/README.md", "python pipelines/train_codec.py"): "tests/encoder/test_train_codec.py",
    ("pipelines/README.md", "ci2p-cache encode data/"): "needs the codec of the line above",
    ("ci2p_cache/cache/README.md", "shards/\n"): "a listing",
    ("ci2p_cache/cache/README.md", "{"): "held against real ones by tests/cache/test_format.py",
    ("ci2p_cache/encoder/bundled/README.md", "import sys"): "needs Kodak's 24 photographs",
    ("tests/benchmarks/README.md", "python3 -m venv peers"): "installs the peers",
    ("tests/benchmarks/README.md", "OMP_NUM_THREADS=1 peers/"): "tests/bench/test_benchmarks.py",
}


SLOW = ("import torch", "ci2p-cache bench encode", "ci2p-cache evaluate", "ci2p-cache run")
"""How blocks begin that take many seconds: those of the slow tier, beside those of docs/."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a README."""

    file: str
    number: int
    language: str
    text: str

    def excuse(self, text: str) -> str | None:
        """Returns why a line or the whole block is not run, None where it is."""
        given = [
            why for (f, start), why in EXCUSED.items() if f == self.file and text.startswith(start)
        ]
        return given[0] if given else None


def blocks() -> list[Block]:
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=REPO, capture_output=True, text=True, check=False
    ).stdout.split()
    found = []
    # Filled in for each cache; tests/images/test_tars.py and tests/encoding/test_convert.py see it.
    for file in sorted(set(listed) - {"ci2p_cache/encoding/cache_readme.md"}):
        text = (REPO / file).read_text("utf-8")
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        found += [Block(file, n, *each) for n, each in enumerate(fenced, 1)]
    return found


BLOCKS = blocks()
FIRST = next(block for block in BLOCKS if block.text.startswith("ci2p-cache encode imagenet/"))
"""Encode, train, inspect, evaluate, predict: what the others continue from."""


def commands(text: str) -> list[str]:
    """The commands of a block, each in one line."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def run_line(line: str, folder: Path, warm: WarmParent) -> None:
    """Runs a line: our command in a child of the warm parent, anything else in bash."""
    words = shlex.split(line, comments=True)
    if words[0] == "ci2p-cache" and not set(line.partition("#")[0]) & set("$*?~`|<>;&(){}"):
        ended = warm.start(
            *words[1:], module="tests.support.nano", folder=folder, environment=SETTINGS
        )
        told = ended.wait(300)
        assert ended.returncode == 0, f"{line}\n{told}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SETTINGS, "PATH": path, "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"


@pytest.fixture(scope="module")
def folder(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the READMEs are followed: the pictures they speak of, and their first block run."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("imagenet", "IMAGES", "flowers", "animals10"):
        write_image_folder(root / name, {"ant": 10, "bee": 9})
    write_image_folder(root / "photos", {"ant": 3})
    shutil.copyfile(next((root / "photos").rglob("*.jpg")), root / "photo.jpg")
    (root / "pipelines").symlink_to(REPO / "pipelines")
    for line in commands(FIRST.text):
        run_line(line, root, warm)
    for name in ("one", "two"):
        shutil.copytree(root / "runs/vitds-1a2b3c4d", root / "runs" / name)
    return root


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=pytest.mark.slow)
        if block.file.startswith("docs/") or block.text.startswith(SLOW)
        else block
        for block in BLOCKS
    ],
    ids=lambda block: f"{block.file}-{block.number}",
)
def test_a_block_runs_as_printed_or_says_why_not(
    warm: WarmParent, block: Block, folder: Path, tmp_path: Path
) -> None:
    if why := block.excuse(block.text):
        pytest.skip(why)
    if block.language == "python":
        work = tmp_path / "work"
        work.mkdir()
        (work / "imagenet").symlink_to(folder / "imagenet")
        if "cc.encode" not in block.text:
            shutil.copytree(folder / "shards", work / "shards")
        (work / "block.py").write_text(block.text, "utf-8")
        run_line("python block.py", work, warm)
        return
    if block == FIRST:
        # It has run: without it there would be no folder.
        return
    lines = commands(block.text)
    run = [line for line in lines if block.excuse(line) is None]
    for line in run:
        assert re.match(r"(ci2p-cache|python|bash) ", line), f"what language is {line!r}?"
        run_line(line, folder, warm)
    if not run:
        pytest.skip("; ".join(sorted({str(block.excuse(line)) for line in lines})))


def test_every_excuse_is_still_needed() -> None:
    for file, start in EXCUSED:
        texts = [each for b in BLOCKS if b.file == file for each in (b.text, *commands(b.text))]
        assert any(text.startswith(start) for text in texts), f"nothing begins with {start!r}"


def test_the_listing_of_a_cache_names_what_is_there(folder: Path) -> None:
    listing = next(b for b in BLOCKS if b.file == "README.md" and b.text.startswith("shards/cache"))
    named = re.findall(r"^ *(?:shards/)?(\S+?) {2,}\S", listing.text, re.MULTILINE)
    assert len(named) >= 6
    for each in named:
        assert list((folder / "shards").glob(each)), each
