"""Links in a cache folder: nothing is written or read through them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.staging import StagingArea
from tests.hostile.attacks import snapshot
from tests.support.caches import data_digests
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned

OPTIONS = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, val_fraction=0.25)
FOLDERS = (
    "commits", "index", "stats", "latents.zarr", "latents.zarr/train", "latents.zarr/train/latents",
    "latents.zarr/train/labels", "latents.zarr/val/valid",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("links") / "src", {"ant": 4, "bee": 3})


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("links") / "shards"
    cc.encode(source, out, OPTIONS)
    return out


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that holds something dear."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "dear.txt").write_text("dear")
    return tmp_path / "outside"


def move_out(cache: Path, outside: Path, name: str) -> None:
    """Moves a folder of the cache away and links to it, so that everything is still found."""
    shutil.move(cache / name, outside / "moved")
    (cache / name).symlink_to(outside / "moved")


def a_shard_is_lost(cache: Path) -> None:
    (cache / "latents.zarr/train/latents/c.0.0.0.0.0").unlink()


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("lost", thinned([True, False]), ids=["shard lost", "whole"])
def test_encode_names_a_linked_folder_and_writes_nothing_through_it(
    cache: Path, source: Path, outside: Path, name: str, lost: bool
) -> None:
    if lost:
        a_shard_is_lost(cache)
    move_out(cache, outside, name)
    before = snapshot(outside)
    with pytest.raises(errors.ManifestError, match=rf"shards/{name} is a link"):
        cc.encode(source, cache, OPTIONS)
    assert snapshot(outside) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_repair_names_a_linked_folder_and_writes_nothing_through_it(
    cache: Path, source: Path, outside: Path, name: str
) -> None:
    move_out(cache, outside, name)
    for file in sorted(p for p in outside.rglob("*") if p.is_file() and p.name != "dear.txt")[:1]:
        file.write_bytes(b"damaged")
    before = snapshot(outside)
    with pytest.raises(errors.ManifestError, match=rf"shards/{name} is a link"):
        cc.repair(cache)
    assert snapshot(outside) == before


@pytest.mark.parametrize("state", ["nothing", "half", "whole"])
def test_a_linked_staging_folder_is_replaced_whole(
    cache: Path, source: Path, whole: Path, outside: Path, state: str
) -> None:
    if state == "nothing":
        shutil.rmtree(cache)
        cache.mkdir()
    elif state == "half":
        a_shard_is_lost(cache)
    (cache / ".staging").symlink_to(outside)
    before = snapshot(outside)
    cc.encode(source, cache, OPTIONS)
    assert snapshot(outside) == before
    assert data_digests(cache) == data_digests(whole)
    assert not (cache / ".staging").exists()


@pytest.mark.parametrize(
    "name",
    thinned(
        [".staging", "commits", "index", "stats", "latents.zarr", "latents.zarr/train/latents"]
    ),
)
def test_a_file_in_place_of_a_folder_is_replaced_whole(
    cache: Path, source: Path, whole: Path, name: str
) -> None:
    if (cache / name).is_dir():
        shutil.rmtree(cache / name)
    (cache / name).write_bytes(b"in the way")
    # Where the shards' own files are untouched, encoding would not look at the others.
    a_shard_is_lost(cache) if name in (".staging", "stats") else None
    cc.encode(source, cache, OPTIONS)
    assert data_digests(cache) == data_digests(whole)


@pytest.mark.parametrize("kind", thinned(["empty", "half", "link", "random", "folder"], step=3))
@pytest.mark.parametrize(
    "name",
    [
        "latents.zarr/train/latents/c.0.0.0.0.0", "index/train-000000.parquet",
        "commits/train-000000.json",
    ],
)  # fmt: skip
def test_garbage_at_the_path_of_a_shards_file_is_replaced_whole(
    cache: Path, source: Path, whole: Path, outside: Path, name: str, kind: str
) -> None:
    content = (cache / name).read_bytes()
    (cache / name).unlink()
    if kind == "folder":
        (cache / name).mkdir()
        (cache / name / "x").write_text("x")
    elif kind == "link":
        (outside / "moved").write_bytes(content)
        (cache / name).symlink_to(outside / "moved")
    else:
        parts = {"empty": b"", "half": content[: len(content) // 2], "random": bytes(range(256))}
        (cache / name).write_bytes(parts[kind])
    before = snapshot(outside)
    cc.encode(source, cache, OPTIONS)
    assert snapshot(outside) == before
    assert data_digests(cache) == data_digests(whole)


@pytest.mark.parametrize("name", ["commits", "index", "latents.zarr"])
def test_overwrite_removes_links_and_not_what_they_lead_to(
    cache: Path, source: Path, whole: Path, outside: Path, name: str
) -> None:
    move_out(cache, outside, name)
    before = snapshot(outside)
    cc.encode(source, cache, OPTIONS, overwrite=True)
    assert snapshot(outside) == before
    assert data_digests(cache) == data_digests(whole)


def test_a_lock_that_is_a_link_is_refused_by_name(cache: Path, source: Path, outside: Path) -> None:
    (cache / ".lock").symlink_to(outside / "dear.txt")
    before = snapshot(outside)
    for act in (lambda: cc.encode(source, cache, OPTIONS), lambda: cc.repair(cache)):
        with pytest.raises(errors.ResourceError, match=r"\.lock"):
            act()
    assert snapshot(outside) == before


def test_a_link_that_appears_while_files_are_written_is_refused_by_name(
    tmp_path: Path, outside: Path
) -> None:
    before = snapshot(outside)
    with StagingArea(tmp_path / "out") as staging:
        staging.put("index/a", b"1")
        shutil.rmtree(tmp_path / "out/index")
        (tmp_path / "out/index").symlink_to(outside)
        with pytest.raises(errors.ManifestError, match=r"out/index is a link"):
            staging.put("index/b", b"2")
    assert snapshot(outside) == before


def test_an_encoder_that_is_a_link_is_not_read(cache: Path, outside: Path, tmp_path: Path) -> None:
    shutil.move(cache / "encoder.safetensors", outside / "moved")
    (cache / "encoder.safetensors").symlink_to(outside / "moved")
    from ci2p_cache.pictures.previews import draw_preview

    with pytest.raises(errors.IntegrityError, match=r"encoder\.safetensors is a link"):
        draw_preview(cc.open_cache(cache), tmp_path / "look.png")
    with pytest.raises(errors.IntegrityError, match=r"encoder\.safetensors is a link"):
        cc.reencode(cache, 1)
    (finding,) = cc.verify(cache)
    assert (finding.path, finding.kind) == ("encoder.safetensors", "damaged")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_plan_that_is_no_file_is_refused_and_waited_for_by_nobody(
    cache: Path, source: Path, outside: Path, kind: str
) -> None:
    import os

    shutil.move(cache / "plan.parquet", outside / "moved")
    if kind == "link":
        (cache / "plan.parquet").symlink_to(outside / "moved")
    else:
        os.mkfifo(cache / "plan.parquet")
    with pytest.raises(errors.ManifestError, match=r"plan\.parquet"):
        cc.encode(source, cache, OPTIONS)
    assert cc.repair(cache, source=source).remaining == ()
    assert cc.encode(source, cache, OPTIONS).encoded_now == 0


def test_a_foreign_folder_that_is_a_link_is_named(cache: Path, outside: Path) -> None:
    (cache / "latents.zarr" / "more").symlink_to(outside)
    assert [(f.path, f.kind) for f in cc.verify(cache, quick=True)] == [
        ("latents.zarr/more", "foreign")
    ]
