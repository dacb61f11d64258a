"""`encode` with a source of images that is no part of the package: any object with its members."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ci2p_cache as cc
from ci2p_cache.errors import FingerprintMismatchError, ResourceError, SourceError, UsageError
from ci2p_cache.images.source import ImageRef
from tests.support.decoding import Shelf
from tests.support.pictures import write_image_folder

OPTIONS = cc.EncodeOptions(
    encoder="bundled", size=32, val_fraction=0.0, shard_samples=4, devices="cpu:1", max_errors="50%"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures of two classes and a file that is none."""
    root = write_image_folder(tmp_path / "src", {"ant": 5, "bee": 4})
    (root / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return root


class Failing(Shelf):
    """A shelf that the network takes away after some pictures."""

    left = 6

    def read(self, path: bytes) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ResourceError("the shelf is away")
        return super().read(path)


def test_a_source_of_ones_own_gives_the_cache_of_a_folder(folder: Path, tmp_path: Path) -> None:
    own, from_disk = tmp_path / "own", tmp_path / "disk"
    shelf = Shelf.of(folder)
    cc.encode(shelf, own, OPTIONS)
    cc.encode(folder, from_disk, OPTIONS)
    split, other = cc.open_cache(own)["train"], cc.open_cache(from_disk)["train"]
    assert cc.open_cache(own).manifest.source == "shelf"
    assert cc.open_cache(own).classes == ("ant", "bee")
    assert np.array_equal(split.valid, other.valid)
    for row in split.valid_rows.tolist():
        assert split[row][1] == other[row][1]
        assert np.array_equal(split[row][0], other[row][0])
    errors = pq.read_table(own / "errors.parquet").to_pylist()
    assert [row["key"] for row in errors] == ["ant/broken.jpg"]
    assert not cc.verify(own)


def test_a_run_that_continues_reads_by_its_plan(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    cc.encode(Shelf.of(folder), whole, OPTIONS)
    with pytest.raises(ResourceError, match="the shelf is away"):
        cc.encode(Failing(Shelf.of(folder).pictures), out, OPTIONS)
    shelf = Shelf.of(folder)
    summary = cc.encode(shelf, out, OPTIONS)
    assert shelf.num_scans == 0
    assert summary.bad == 1
    for path in sorted(whole.rglob("*.parquet")):
        if path.name != "errors.parquet":
            assert (out / path.relative_to(whole)).is_file()
    split, other = cc.open_cache(out)["train"], cc.open_cache(whole)["train"]
    assert all(np.array_equal(split[row][0], other[row][0]) for row in split.valid_rows.tolist())


def test_loaders_take_images_from_it(folder: Path, tmp_path: Path) -> None:
    shelf = Shelf.of(folder)
    cc.encode(shelf, tmp_path / "own", OPTIONS)
    cc.encode(folder, tmp_path / "disk", OPTIONS)
    options: dict[str, Any] = {"batch_size": 9, "shuffle": False, "views": 0}
    with (
        cc.PixelLoader(cc.open_cache(tmp_path / "own")["train"], source=shelf, **options) as own,
        cc.PixelLoader(cc.open_cache(tmp_path / "disk")["train"], **options) as other,
    ):
        assert torch.equal(next(iter(own)).stored, next(iter(other)).stored)


def test_a_damaged_shard_is_put_back_from_the_source(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cc.encode(Shelf.of(folder), out, OPTIONS)
    latents = out / "latents.zarr" / "train" / "latents"
    shard = next(path for path in sorted(latents.rglob("*")) if path.name[:1] == "c")
    before = shard.read_bytes()
    shard.unlink()
    cc.encode(Shelf.of(folder), out, OPTIONS)
    assert shard.read_bytes() == before


def test_what_cannot_go_with_such_a_source_is_refused(folder: Path, tmp_path: Path) -> None:
    shelf = Shelf.of(folder)
    with pytest.raises(UsageError, match="object of this process"):
        cc.encode(
            shelf, tmp_path / "out", cc.EncodeOptions(encoder="bundled", executor="processes")
        )
    with pytest.raises(UsageError, match="`root` is"):
        cc.encode(shelf, tmp_path / "out", cc.EncodeOptions(encoder="bundled", root=tmp_path))
    with pytest.raises(UsageError, match="`labels` is none"):
        cc.encode(shelf, tmp_path / "out", cc.EncodeOptions(encoder="bundled", labels="none"))
    assert not (tmp_path / "out").exists()


class Unlabelled(Shelf):
    """Pictures without classes."""

    classes = ()

    def scan(self) -> Iterator[ImageRef]:
        return (replace(ref, label=-1) for ref in Shelf(self.pictures).scan())


def test_a_source_without_classes_is_encoded_and_continued(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shelf = Unlabelled(Shelf.of(folder).pictures)
    cc.encode(shelf, out, OPTIONS)
    (out / "index" / "train-000001.parquet").unlink()
    assert cc.encode(shelf, out, OPTIONS).encoded_now > 0
    assert cc.open_cache(out).classes == ()
    with pytest.raises(FingerprintMismatchError, match="`labels`"):
        cc.encode(Shelf.of(folder), out, OPTIONS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"path": b"/etc/hostname"}, "path that is absolute"),
        ({"path": b"a/../../b"}, "path that is absolute, empty or holds"),
        ({"key": ""}, "key that is absolute, empty"),
        ({"label": 2}, "none of 2 classes"),
        ({"label": -2}, "none of 2 classes"),
    ],
)
def test_what_no_plan_can_hold_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    class Odd(Shelf):
        def scan(self) -> Iterator[ImageRef]:
            first, *others = super().scan()
            yield replace(first, **changes)
            yield from others

    with pytest.raises(SourceError, match=named):
        cc.encode(Odd(Shelf.of(folder).pictures), tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
