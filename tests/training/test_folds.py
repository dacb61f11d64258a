"""Folds of the train split: each row validates once, whatever reads it, and a run has one fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.training.inputs import data_digest
from ci2p_cache.training.loaders import splits_of
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.rank_jobs import numbers

SPEC = cc.TrainSpec(model="vitds_nano", epochs=1, batch_size=6, folds=5, fold=2)
TRAIN = 13
"""Valid rows of 14: five folds of 3, 3, 3, 2 and 2."""


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zarr cache, and tars of the same, of 14 training images, one damaged, and 3 for val."""
    root = tmp_path_factory.mktemp("folds")
    write_image_folder(root / "src" / "train", {"ant": 5, "bee": 4, "cat": 5})
    write_image_folder(root / "src" / "val", {"ant": 1, "bee": 1, "cat": 1}, quality=60)
    (root / "src" / "train" / "bee" / "001.jpg").write_bytes(b"\xff\xd8 no picture")
    options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=4, max_errors="50%")
    cc.encode(root / "src", root / "zarr", options)
    cc.convert(root / "zarr", root / "webdataset", format="webdataset")
    return root


@pytest.fixture(params=["zarr", "webdataset"])
def cache(folder: Path, request: pytest.FixtureRequest) -> cc.Cache:
    return cc.open_cache(folder / request.param)


def folded(fold: int) -> cc.TrainSpec:
    return dataclasses.replace(SPEC, fold=fold)


def test_five_folds_validate_each_row_once_and_train_on_the_others(cache: cc.Cache) -> None:
    validated: list[int] = []
    for fold in range(5):
        train, val = splits_of(cache, folded(fold))
        assert val is not None
        mine = val.valid_rows.tolist()
        assert sorted([*mine, *train.valid_rows]) == cache["train"].valid_rows.tolist()
        assert not set(mine) & set(train.valid_rows.tolist())
        assert len(mine) in (2, 3)
        validated += mine
    assert len(validated) == TRAIN
    assert sorted(validated) == cache["train"].valid_rows.tolist()


def test_folds_are_the_same_in_both_formats_and_leave_the_cache_as_it_was(folder: Path) -> None:
    caches = [cc.open_cache(folder / name) for name in ("zarr", "webdataset")]
    before = [data_digest(cache) for cache in caches]
    rows = [splits_of(cache, SPEC)[0].valid_rows.tolist() for cache in caches]
    assert rows[0] == rows[1]
    assert [data_digest(cache) for cache in caches] == before
    assert [len(cache["train"].valid_rows) for cache in caches] == [TRAIN, TRAIN]


def test_without_folds_train_and_val_are_the_caches_own(cache: cc.Cache) -> None:
    train, val = splits_of(cache, cc.TrainSpec())
    assert train is cache["train"]
    assert val is cache["val"]


@pytest.mark.parametrize(
    "kind", [cc.LatentLoader, cc.ResidentLoader, cc.OnlineLoader, cc.PixelLoader]
)
def test_every_loader_reads_a_subset(
    cache: cc.Cache, kind: type[cc.LatentLoader] | type[cc.PixelLoader]
) -> None:
    whole = cache["train"]
    rows = whole.valid_rows[[7, 1, 4]]
    subset = whole.subset(rows)
    with kind(subset, batch_size=2, shuffle=False, views=0, threads=1) as loader:
        assert (len(loader), loader.num_samples) == (2, 3)
        batches = list(loader)
    assert [row for batch in batches for row in batch.rows.tolist()] == sorted(rows.tolist())
    for batch in batches:
        assert batch.labels.tolist() == whole.labels[batch.rows.numpy()].tolist()
        if not issubclass(kind, cc.PixelLoader):
            wanted = torch.stack([whole[row][0][0] for row in batch.rows.tolist()])
            assert torch.equal(batch.latents, wanted)


def test_a_subset_holds_its_rows_only_and_a_subset_of_it_fewer(cache: cc.Cache) -> None:
    whole = cache["train"]
    first, second, third, outside = whole.valid_rows[:4].tolist()
    subset = whole.subset(np.array([third, first, second]))
    assert subset.valid_rows.tolist() == [first, second, third]
    assert np.flatnonzero(subset.valid).tolist() == [first, second, third]
    assert (subset.num_rows, subset.shape) == (whole.num_rows, whole.shape)
    assert torch.equal(subset[second][0], whole[second][0])
    with pytest.raises(errors.InvalidRowError, match="or is not in this subset"):
        subset[outside]
    assert subset.subset(np.array([second])).valid_rows.tolist() == [second]
    invalid = int(np.flatnonzero(~whole.valid)[0])
    for split, rows in ((subset, [outside]), (whole, [first, first]), (whole, [invalid])):
        with pytest.raises(errors.UsageError, match=f"row {rows[-1]} cannot be in a subset"):
            split.subset(np.array(rows))


def test_more_folds_than_images_and_folds_that_cannot_be_are_refused(cache: cc.Cache) -> None:
    with pytest.raises(errors.InputDataError, match="holds 13 images, which `folds` 14 cannot"):
        splits_of(cache, cc.TrainSpec(folds=14))
    for folds, fold, message in (
        (1, 0, "`folds` is 1; 0 switches it off"),
        (3, 3, "`fold` is 3; wanted at most 2"),
        (0, 1, "`fold` is 1; wanted at most 0"),
    ):
        with pytest.raises(errors.UsageError, match=message):
            cc.TrainSpec(folds=folds, fold=fold)


def test_a_run_trains_one_fold_and_its_folder_is_bound_to_it(
    folder: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    cache = cc.open_cache(folder / "zarr")
    with cc.LatentLoader(cache["train"], batch_size=6) as whole:
        with pytest.raises(errors.UsageError, match=r"reads 13 rows.*the 10 that"):
            cc.train(folder / "zarr", spec=SPEC, runs_dir=tmp_path, loader=whole)
    summary = cc.train(folder / "zarr", spec=SPEC, runs_dir=tmp_path, name="two", device="cpu")
    assert summary.last.images == 10
    assert summary.last.val_top1 is not None
    assert (summary.last.val_top1 * 3) % 1 == 0
    with pytest.raises(errors.RunMismatchError, match="fold: 2 in the folder, 3 asked for"):
        cc.train(folder / "zarr", spec=folded(3), runs_dir=tmp_path, name="two", device="cpu")
    # The encoder in the loop, by flag, takes the same rows: the same losses, to the last bit.
    trained = run(
        "train", folder / "webdataset", "--model", "vitds_nano", "--epochs", "1",
        "--batch-size", "6", "--folds", "5", "--fold", "2", "--from-images", "--out", tmp_path,
        "--name", "online", "--device", "cpu", "--workers", "1",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert numbers(tmp_path / "online") == numbers(tmp_path / "two")
