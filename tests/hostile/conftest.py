"""A good cache and run, copies of them to be attacked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ci2p_cache as cc
from tests.support.nano import nano_models
from tests.support.pictures import write_image_folder


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `src`, a cache `shards` of 16 + 4 images and a run `runs/run`; read only."""
    root = tmp_path_factory.mktemp("good")
    write_image_folder(root / "src" / "train", {"ant": 9, "bee": 7})
    write_image_folder(root / "src" / "val", {"ant": 2, "bee": 2}, quality=60)
    options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=8)
    cc.encode(root / "src", root / "shards", options)
    spec = cc.TrainSpec(model="vitds_nano", epochs=1, batch_size=8)
    with nano_models():
        cc.train(root / "shards", spec=spec, runs_dir=root / "runs", name="run", device="cpu")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy to be attacked, with an `outside` beside it that nothing may touch."""
    shutil.copytree(good, tmp_path / "place", symlinks=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text('{"secret": 1}')
    (outside / "epoch-0009-step-000000").mkdir()
    return tmp_path / "place"
