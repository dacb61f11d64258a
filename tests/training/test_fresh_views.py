"""Views that no other epoch repeats: cut from the images, as the cache's crops are."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.records import TrainObserver
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.rank_jobs import numbers

SPEC = cc.TrainSpec(model="vitds_nano", epochs=3, batch_size=5, fresh_views=True)

pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in `src`, and caches of them: `one` and `four` augmented crops, and `flip`."""
    root = tmp_path_factory.mktemp("fresh")
    write_image_folder(root / "src", {"ant": 7, "bee": 6})
    for name, views in (("one", "crops:1"), ("four", "crops:4"), ("flip", "flip")):
        options = cc.EncodeOptions(
            encoder="bundled", size=64, views=views, val_fraction=0.2,
            augment="authors" if views != "flip" else None,
        )  # fmt: skip
        cc.encode(root / "src", root / name, options)
    return root


@pytest.mark.parametrize("kind", [cc.OnlineLoader, cc.PixelLoader])
def test_an_epoch_takes_the_crop_of_its_number_also_one_that_the_cache_does_not_hold(
    folder: Path, kind: type[cc.OnlineLoader] | type[cc.PixelLoader]
) -> None:
    def stored(name: str, views: Literal["fresh"] | int, epoch: int) -> list[torch.Tensor]:
        train = cc.open_cache(folder / name)["train"]
        with kind(train, batch_size=4, seed=3, views=views) as loader:
            loader.set_epoch(epoch)
            return [batch.stored for batch in loader]

    seen = [stored("one", "fresh", epoch) for epoch in range(4)]
    for epoch, batches in enumerate(seen):
        for ours, wanted in zip(batches, stored("four", epoch, epoch), strict=True):
            assert torch.equal(ours, wanted)
    with kind(cc.open_cache(folder / "one")["train"], batch_size=4, seed=3, views="fresh") as left:
        left.load_state_dict({"seed": 3, "epoch": 2, "step": 1})
        rest = [batch.stored for batch in left]
    assert all(torch.equal(one, other) for one, other in zip(rest, seen[2][1:], strict=True))


@pytest.mark.parametrize("model", ["vitds_nano", "vit_nano16"])
def test_a_run_with_fresh_views_that_was_stopped_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, model: str
) -> None:
    class Stopping(TrainObserver):
        def epoch(self, record: EpochRecord) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    spec = dataclasses.replace(SPEC, model=model)
    whole = cc.train(folder / "one", spec=spec, runs_dir=tmp_path, name="whole", device="cpu")
    for _ in range(2):
        with pytest.raises(errors.InterruptedRunError):
            cc.train(
                folder / "one", spec=spec, runs_dir=tmp_path, name="again", device="cpu",
                observers=[Stopping()],
            )  # fmt: skip
    again = cc.train(folder / "one", spec=spec, runs_dir=tmp_path, name="again", device="cpu")
    assert again.trained_epochs == 1
    assert numbers(Path(again.path)) == numbers(Path(whole.path))
    banked = dataclasses.replace(spec, fresh_views=False)
    other = cc.train(folder / "one", spec=banked, runs_dir=tmp_path, name="bank", device="cpu")
    assert other.last.train_loss != whole.last.train_loss
    with pytest.raises(errors.RunMismatchError, match=r"fresh_views: True in the folder, False"):
        cc.train(folder / "one", spec=banked, runs_dir=tmp_path, name="whole", device="cpu")


def test_fresh_views_are_refused_where_no_crops_are_cut(
    folder: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    refused = run("train", folder / "flip", "--fresh-views", "--out", tmp_path / "runs")
    assert refused.code == 2
    assert "(--fresh-views) cuts new crops; split 'train'" in refused.err
    assert "--views crops:1" in refused.err
    assert not (tmp_path / "runs").exists()
    with pytest.raises(errors.UsageError, match=r"split 'val' of .* the centre square"):
        cc.PixelLoader(cc.open_cache(folder / "one")["val"], batch_size=2, views="fresh")
    with cc.OnlineLoader(cc.open_cache(folder / "one")["train"], batch_size=5) as given:
        with pytest.raises(errors.UsageError, match="a loader of its own"):
            cc.train(folder / "one", spec=SPEC, runs_dir=tmp_path, loader=given)
    with pytest.raises(errors.UsageError, match="this run reads the images"):
        cc.train(folder / "one", spec=SPEC, runs_dir=tmp_path, resident="yes")
