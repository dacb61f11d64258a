"""Caches of every kind, read by other people's libraries in an environment without ours.

::

    caches: int8, folded, raw, int16, float16, float32, tars
        -> what open_cache reads of them, as numpy files
        -> an environment with the newest zarr, tensorstore, webdataset, datasets, pandas, duckdb
        -> values, labels and listings compared; the snippets of the docs and of the caches run

Which versions are the newest depends on the Python: `--python` names others.

python tests/long/readers.py [--python PYTHON ...]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

READERS = ("zarr", "tensorstore", "webdataset", "datasets", "pandas", "duckdb")

PAGES = ("storage", "beside_other_tools")

KINDS = {
    "int8": {"format": "both"},
    "folded": {"fold": True, "codec": "lz4"},
    "raw": {"codec": "none"},
    "int16": {"dtype": "int16"},
    "float16": {"dtype": "float16", "format": "both"},
    "float32": {"dtype": "float32"},
}

READ = """
import glob, json, sys
from pathlib import Path

import datasets, numpy as np, tensorstore, webdataset, zarr

datasets.disable_progress_bars()
for name in sys.argv[2:]:
    cache, wanted = Path(sys.argv[1], name), dict(np.load(Path(sys.argv[1], name + ".npz")))
    group = zarr.open_group(cache / "latents.zarr", mode="r")
    members = dict(group.members(max_depth=None))
    assert len(members) == 8, sorted(members)
    for path, node in members.items():
        if isinstance(node, zarr.Array):
            spec = {"driver": "file", "path": str(cache / "latents.zarr" / path)}
            opened = tensorstore.open({"driver": "zarr3", "kvstore": spec}, read=True).result()
            np.testing.assert_array_equal(opened.read().result(), node[:])
    stored = group["train/latents"][:]
    if "unfold" in group["train/latents"].attrs:
        code = stored.astype("int32")
        stored = (code >> 1) ^ -(code & 1)
    attributes = group["train/latents"].attrs
    offset = np.float32(attributes["offset"])[:, None, None]
    y = stored.astype("float32") * np.float32(attributes["scale"]) + offset
    np.testing.assert_array_equal(y[wanted["rows"]], wanted["y"])
    np.testing.assert_array_equal(group["train/labels"][:][wanted["rows"]], wanted["labels"])
    tars = sorted(glob.glob(f"{cache}/tar/train-*.tar"))
    if tars:
        loaded = datasets.load_dataset(
            "webdataset", data_files=tars, split="train", cache_dir=sys.argv[1] + "/copies"
        ).with_format("numpy", dtype=None)
        np.testing.assert_array_equal(loaded["latent.npy"][:], stored[wanted["rows"]])
        assert loaded[0]["latent.npy"].dtype == stored.dtype
        np.testing.assert_array_equal(loaded["cls"][:], wanted["labels"])
        keys = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
        assert list(map(int, keys)) == wanted["rows"].tolist()
    print(name, "alike")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="readers-") as temporary:
        folder = Path(temporary)
        make_caches(folder)
        failed = [each for number, python in enumerate(arguments.python)
                  for each in trial(folder, python, folder / f"venv-{number}")]  # fmt: skip
    print("\n".join(f"FAILED: {each}" for each in failed) or "all passed")
    return int(bool(failed))


def make_caches(folder: Path) -> None:
    """Writes a cache of each kind, one image of which is none, and what `open_cache` reads."""
    import numpy as np

    import ci2p_cache as cc
    from tests.support.pictures import write_image_folder

    source = write_image_folder(folder / "imagenet", {"ant": 20, "bee": 19})
    (source / "ant" / "003.jpg").write_bytes(b"no image")
    for name, options in KINDS.items():
        made = cc.EncodeOptions(
            encoder="bundled", size=64, val_fraction=0.3, shard_samples=8, max_errors="1",
            **options,  # type: ignore[arg-type]  # options of each kind
        )  # fmt: skip
        cc.encode(source, folder / name, made)
        train = cc.open_cache(folder / name)["train"]
        y, labels = train[train.valid_rows]
        np.savez(folder / name, rows=train.valid_rows, y=y.numpy(), labels=labels.numpy())


def snippets(folder: Path) -> dict[str, tuple[Path, str]]:
    """Returns what the pages print for readers without ours: where it is run, and the lines."""
    found = {}
    pages = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES))
    for page, place in (
        *((page, folder) for page in pages),
        (folder / "int8/README.md", folder / "int8"),
    ):
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.M)
        for number, block in enumerate(blocks, 1):
            # What needs ours, or the lines before it.
            if "import ci2p_cache" not in block and not block.startswith("codes ="):
                found[f"{page.parent.name}/{page.name} {number}"] = (place, block)
    return found


def trial(folder: Path, python: str, venv: Path) -> list[str]:
    """Returns what failed in a new environment of an interpreter."""
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    inside = str(venv / "bin" / "python")
    subprocess.run([inside, "-m", "pip", "install", "--quiet", *READERS], check=True)
    listed = subprocess.run(
        [inside, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout.split()
    wanted = (*READERS, "numpy", "pyarrow")
    print("==", *(each for each in listed if each.partition("==")[0] in wanted), flush=True)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(venv), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    if not (folder / "shards").exists():
        (folder / "shards").symlink_to("int8")
    tries = {"values": (folder, READ, [str(folder), *KINDS])} | {
        name: (place, "import pandas\n" + code, [])
        for name, (place, code) in snippets(folder).items()
    }
    failed = []
    for name, (place, code, words) in tries.items():
        done = subprocess.run([inside, "-c", code, *words], cwd=place, env=environment, check=False)
        print(f"{name}: {'failed' if done.returncode else 'passed'}", flush=True)
        failed += [f"{python}: {name}"] * bool(done.returncode)
    return failed


if __name__ == "__main__":
    sys.exit(main())
