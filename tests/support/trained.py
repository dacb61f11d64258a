"""Runs for the tests of what is done with a trained model, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ci2p_cache as cc
from tests.support.nano import nano_models
from tests.support.pictures import write_image_folder

__all__ = ["SPEC", "evaluation_of", "folder_of", "make_run", "rewrite_json", "seal_checkpoint"]

SPEC = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=8)


def make_run(root: Path, dtype: str = "int8") -> Path:
    """Encodes 15 + 6 pictures of three classes at 64 px into `root/shards` and trains `runs/run`.

    The pictures are in `root/src/{train,val}/CLASS`.
    """
    write_image_folder(root / "src" / "train", {"ant": 6, "bee": 5, "cat": 4})
    write_image_folder(root / "src" / "val", {"ant": 2, "bee": 3, "cat": 1}, quality=60)
    options = cc.EncodeOptions(
        encoder="bundled",
        size=64,
        shard_samples=4,
        dtype=dtype,  # type: ignore[arg-type]  # one of the dtypes
    )
    cc.encode(root / "src", root / "shards", options)
    with nano_models():
        cc.train(root / "shards", spec=SPEC, runs_dir=root / "runs", name="run", device="cpu")
    return root


def folder_of(run: Path, which: str = "last") -> Path:
    """The folder of the last or best checkpoint."""
    name: str = json.loads((run / "checkpoints" / "last.json").read_text())[which]
    return run / "checkpoints" / name


def evaluation_of(run: Path, split: str = "val", which: str = "last") -> Path:
    """The JSON file of an evaluation; its predictions are beside it."""
    return run / "evaluations" / f"{split}-{folder_of(run, which).name}.json"


def rewrite_json(path: Path, **fields: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def seal_checkpoint(folder: Path) -> None:
    """Makes the digests of a checkpoint fit what is there now."""
    listing = json.loads((folder / "digests.json").read_text())
    for entry in listing["files"]:
        data = (folder / entry["path"]).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "digests.json").write_text(json.dumps(listing))
