"""One suite for every kind of source: the same images give the same keys, labels and latents."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

import ci2p_cache as cc
from ci2p_cache.cache.summary import describe_sample
from ci2p_cache.cache.verify import verify
from ci2p_cache.encoding.reencode import reencode
from ci2p_cache.errors import SourceError
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource
from ci2p_cache.loader.pixels import OnlineLoader
from tests.support.sources import IN_SEQUENCE, KINDS, entries, pack, samples, tar_bytes

OPTIONS = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=8, val_fraction=0.3)


@pytest.fixture(scope="module")
def images(image_folder: Path) -> list[tuple[str, bytes, str]]:
    return entries(image_folder)


def some_kinds(*default: str) -> pytest.MarkDecorator:
    """All kinds, all but the given ones in the slow tier: for what takes seconds."""
    cases = [
        kind if kind in default else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
    ]
    return pytest.mark.parametrize("kind", cases)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def location(kind: str, images: list[tuple[str, bytes, str]], tmp_path: Path) -> str:
    (tmp_path / "src").mkdir()
    return str(KINDS[kind](tmp_path / "src", images))


@pytest.fixture
def source(location: str) -> ImageSource:
    return open_source(location)


def test_keys_labels_and_classes_are_those_of_the_folder(
    source: ImageSource, images: list[tuple[str, bytes, str]]
) -> None:
    refs = list(source.scan())
    assert source.classes == ("ant", "bee", "cat") == source.class_titles
    assert {(r.key, source.classes[r.label]) for r in refs} == {(k, n) for k, _, n in images}
    assert len(refs) == len(images)
    assert {ref.split for ref in refs} == {None}


def test_classes_are_known_before_the_scan(source: ImageSource) -> None:
    assert source.classes == ("ant", "bee", "cat")


def test_a_scan_repeats_itself_also_from_the_location(source: ImageSource) -> None:
    refs = list(source.scan())
    assert list(source.scan()) == refs == list(open_source(source.location()).scan())
    assert Path(source.location()).is_absolute()
    assert open_source(source.location()).location() == source.location()


def test_bytes_are_those_of_the_files_in_any_order_and_from_any_thread(
    source: ImageSource, images: list[tuple[str, bytes, str]]
) -> None:
    contents = {key: content for key, content, _ in images}
    refs = list(source.scan())
    # As a repair does: another object, which has not listed anything.
    fresh = open_source(source.location())
    for ref in reversed(refs):
        assert fresh.read(ref.path) == contents[ref.key]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(fresh.read, [ref.path for ref in refs * 3]))
    assert read == [contents[ref.key] for ref in refs * 3]


@some_kinds("tar.gz folder", "csv")
def test_paths_are_enough_in_another_process(source: ImageSource, kind: str) -> None:
    ref = list(source.scan())[-1]
    code = (
        "import sys, os; from ci2p_cache.images.locate import open_source\n"
        "sys.stdout.buffer.write(open_source(sys.argv[1]).read(os.fsencode(sys.argv[2])))"
    )
    argv = [sys.executable, "-W", "ignore", "-c", code, source.location(), ref.path.decode()]
    assert subprocess.run(argv, check=True, capture_output=True).stdout == source.read(ref.path)


def test_order_is_given_where_reading_in_sequence_pays(source: ImageSource, kind: str) -> None:
    orders = [ref.order for ref in source.scan()]
    assert orders == (list(range(len(orders))) if kind in IN_SEQUENCE else [None] * len(orders))


@pytest.mark.parametrize(
    "path", [b"../x.jpg", b"/etc/passwd", b"ant/../../x.jpg", b"a\0b", b"../all.tar#512+10",
             b"/x/all.tar#512+10", b"../x.parquet#0"],
)  # fmt: skip
def test_paths_that_lead_out_are_refused(source: ImageSource, path: bytes) -> None:
    with pytest.raises(SourceError, match="below"):
        source.read(path)


@some_kinds("tar.gz folder", "parquet", "csv")
def test_latents_labels_and_splits_are_those_of_the_folder(
    location: str, kind: str, image_folder: Path, tmp_path: Path
) -> None:
    cc.encode(location, tmp_path / "out", OPTIONS)
    assert verify(tmp_path / "out") == []
    found = latents(tmp_path / "out")
    assert found == latents(reference(image_folder, tmp_path))
    assert {split for split, _ in found} == {"train", "val"}
    # Run again it lists nothing and encodes nothing; --rescan lists and finds nothing new.
    assert cc.encode(location, tmp_path / "out", OPTIONS).encoded_now == 0
    again = dataclasses.replace(OPTIONS, rescan=True)
    assert cc.encode(location, tmp_path / "out", again).encoded_now == 0
    if kind in IN_SEQUENCE:
        order = [ref.key for ref in open_source(location).scan()]
        for split in ("train", "val"):
            rows = [key for own, key in found if own == split]
            assert rows == [key for key in order if (split, key) in found]


@some_kinds("tar.gz folder")
def test_a_cache_is_repaired_checked_and_loaded_from_it(
    location: str, kind: str, run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("encode", location, "--out", out, "--encoder", "bundled", "--size", "32",
               "--shard-samples", "8", "--dry-run").code == 0  # fmt: skip
    assert not out.exists()
    cc.encode(location, out, OPTIONS)
    shard = out / "latents.zarr/train/latents/c.0.0.0.0.0"
    whole, plan = shard.read_bytes(), (out / "plan.parquet").read_bytes()
    shard.write_bytes(whole[:100] + b"x" + whole[101:])
    (out / "plan.parquet").unlink()
    (out / "index/train-000001.parquet").unlink()
    ran = run("verify", out, "--repair")
    assert ran.code == 0, ran.err
    assert shard.read_bytes() == whole
    assert (out / "plan.parquet").read_bytes() == plan
    summary = reencode(out, 6)
    assert (summary.compared, summary.differing_values) == (6, 0)
    cache = cc.open_cache(out)
    told = describe_sample(cache, "train", row=0).source_file
    assert Path(told).is_file() or f" in {cache.manifest.source}" in told
    cached = cc.LatentLoader(cache["train"], batch_size=4, seed=3)
    with cached, OnlineLoader(cache["train"], batch_size=4, seed=3) as online:
        for one, other in zip(cached, online, strict=True):
            assert one.rows.tolist() == other.rows.tolist()
            assert (one.stored == other.stored).all()


def latents(out: Path) -> dict[tuple[str, str], tuple[str, list[int]]]:
    """(split, key) -> class and checksums of the latent, in the order of rows."""
    found = {}
    for split in ("train", "val"):
        for part in sorted((out / "index").glob(f"{split}-*.parquet")):
            columns = pq.read_table(part).to_pydict()
            for key, name, crc in zip(
                columns["key"], columns["class"], columns["latent_crc32c"], strict=True
            ):
                found[split, key] = (name, crc)
    return found


_REFERENCE: dict[Path, Path] = {}


def reference(image_folder: Path, tmp_path: Path) -> Path:
    """The cache of the folder itself, encoded once for the module."""
    if image_folder not in _REFERENCE:
        out = image_folder.parent / "reference of sources"
        cc.encode(image_folder, out, OPTIONS)
        _REFERENCE[image_folder] = out
    return _REFERENCE[image_folder]


def test_an_archive_that_is_added_follows_as_new_rows(
    images: list[tuple[str, bytes, str]], tmp_path: Path
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    pack(source / "b.tar", tar_bytes(samples(images[:12])))
    options = dataclasses.replace(OPTIONS, val_fraction=0.0)
    cc.encode(source, out, options)
    before = list(latents(out))
    # By its name it comes first; rows that are there keep their places.
    pack(source / "a.tar", tar_bytes(samples(images[12:])))
    assert cc.encode(source, out, options).encoded_now == 0
    cc.encode(source, out, dataclasses.replace(options, rescan=True))
    assert list(latents(out)) == before + [("train", key) for key, _, _ in images[12:]]
    assert verify(out) == []


# It leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_groups_a_tar_as_we_do(
    images: list[tuple[str, bytes, str]], tmp_path: Path
) -> None:
    odd = [("x.y/1.a.jpg", b"\xff\xd8\xff 1", "ant"), ("2.jpg", b"\xff\xd8\xff 2", "bee")]
    path = pack(tmp_path / "x.tar", tar_bytes([*samples([*images, *odd]), ("3.txt", b"no image")]))
    source = open_source(path)
    ours = [(ref.key, source.read(ref.path), source.classes[ref.label]) for ref in source.scan()]
    stock = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        for name, content in sample.items():
            if name.endswith("jpg"):
                key = f"{sample['__key__']}.{name}"
                stock.append((key, content, sample["cls"].decode()))
    assert ours == stock
