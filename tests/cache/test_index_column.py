"""The index says the split of each row; caches of before do not, and keep their own bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.index import INDEX_SCHEMA
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.summary import describe_sample
from ci2p_cache.parquet import parquet_bytes
from tests.support import format_reader
from tests.support.caches import (
    SMALL,
    data_digests,
    flip,
    keys_of,
    make_cache,
    make_old,
    with_options,
)
from tests.support.pictures import picture, write_image_folder
from tests.support.seals import reseal, write_json
from tests.support.tiers import thinned

COUNTS = {"train": {"ant": 12, "bee": 9}, "val": {"ant": 2, "bee": 3}}
FORMS = ("new", "old")


@pytest.fixture(params=FORMS)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    root = make_cache(tmp_path / "shards", COUNTS, bad={"train": (3,)})
    return make_old(root) if request.param == "old" else root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"), {"ant": 9, "bee": 7})


@pytest.fixture(scope="module")
def old_encoded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of real images as it was written before; read only."""
    root = tmp_path_factory.mktemp("old") / "shards"
    cc.encode(source, root, with_options(split="hashed"))
    return make_old(root)


def has_column(root: Path) -> set[bool]:
    return {"split" in pq.read_schema(part).names for part in (root / "index").iterdir()}


def test_new_parts_have_it_and_old_ones_do_not(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "shards", COUNTS)
    assert has_column(root) == {True}
    assert pq.read_schema(root / "index/train-000000.parquet").names == INDEX_SCHEMA.names
    assert has_column(make_old(root)) == {False}
    assert "names_split" not in (root / "cache.json").read_text()


def test_a_cache_of_either_form_is_whole_and_read_the_same(shards: Path, tmp_path: Path) -> None:
    assert cc.verify(shards) == []
    cache = cc.open_cache(shards)
    for name, split in cache.items():
        for shard in range(split.record.num_shards):
            table = split.read_index(shard)
            assert table.column_names == INDEX_SCHEMA.names
            assert set(table["split"].to_pylist()) == {name}
            assert split.read_index(shard, ["split"]).to_pydict() == {
                "split": [name] * len(split.record.rows_of(shard))
            }
            assert split.read_index(shard, ["key", "split"]).column_names == ["split", "key"]
            assert split.read_index(shard, ["key"]).column_names == ["key"]
        assert len(list(split)) == len(split.valid_rows)
        assert len(list(format_reader.read_rows(shards, name, range(split.num_rows)))) == len(split)


def test_readers_of_the_whole_folder_take_either_form(shards: Path) -> None:
    pandas = pytest.importorskip("pandas")
    duckdb = pytest.importorskip("duckdb")

    table = pandas.read_parquet(shards / "index")
    assert len(table) == 26
    count = duckdb.sql(f"SELECT count(*) FROM '{shards}/index/*.parquet'").fetchall()
    assert count == [(26,)]
    if has_column(shards) == {True}:
        query = f"SELECT split, count(*) FROM '{shards}/index/*.parquet' GROUP BY 1 ORDER BY 1"
        assert duckdb.sql(query).fetchall() == [("train", 21), ("val", 5)]
        assert table.groupby("split").size().to_dict() == {"train": 21, "val": 5}


def test_a_conversion_has_it_whatever_it_was_made_from(shards: Path, tmp_path: Path) -> None:
    cc.convert(shards, tmp_path / "out", format="both")
    assert has_column(tmp_path / "out") == {True}
    assert cc.verify(tmp_path / "out") == []
    cc.convert(shards, tmp_path / "arrays", format="npy")
    names = pq.read_table(tmp_path / "arrays/val.parquet")["split"].to_pylist()
    assert names == ["val"] * 5


def test_a_conversion_that_older_software_began_goes_on_in_its_form(
    shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cc.convert(shards, out, format="zarr", codec="none")
    make_old(out)
    data = json.loads((out / "cache.json").read_text())
    write_json(out / "cache.json", data | {"state": "encoding", "files": []})
    (out / "commits/train-000001.json").unlink()
    (out / "index/train-000001.parquet").unlink()
    cc.convert(shards, out, format="zarr", codec="none")
    assert has_column(out) == {False}
    assert cc.verify(out) == []


@pytest.mark.parametrize(
    "damaged",
    thinned(
        [
            ["index/train-000000.parquet", "plan.parquet"],
            ["index/train-000001.parquet"],
            ["commits/train-000001.json"],
            ["latents.zarr/train/latents/c.1.0.0.0.0", "latents.zarr/train/labels/c.0"],
        ],
        step=4,
    ),
)
def test_an_old_cache_is_repaired_to_its_own_bytes(
    old_encoded: Path, source: Path, tmp_path: Path, damaged: list[str]
) -> None:
    root = tmp_path / "shards"
    shutil.copytree(old_encoded, root)
    before = data_digests(root)
    for path in damaged:
        flip(root / path)
    summary = cc.repair(root, source=source)
    assert (summary.remaining, summary.identical) == ((), True)
    found = data_digests(root)
    # The manifest now says which form it is.
    assert before.keys() == found.keys()
    changed = {path for path in before if before[path] != found[path]}
    assert changed <= {"cache.json"}
    assert has_column(root) == {False}


def test_a_sample_of_an_old_cache_is_described(old_encoded: Path) -> None:
    card = describe_sample(cc.open_cache(old_encoded), "train", row=4)
    assert (card.split, card.row, card.status) == ("train", 4, "ok")


def test_an_old_cache_that_was_begun_or_grows_keeps_one_form(
    old_encoded: Path, source: Path, tmp_path: Path
) -> None:
    root, images = tmp_path / "shards", tmp_path / "src"
    shutil.copytree(old_encoded, root)
    shutil.copytree(source, images)
    for number in range(6):
        picture(900 + number).save(images / "ant" / f"new{number}.jpg")
    cc.encode(images, root, with_options(rescan=True))
    assert sum(len(split) for split in cc.open_cache(root).values()) == 22
    assert has_column(root) == {False}
    assert cc.verify(root) == []
    assert {s.names_split for s in read_manifest(root).splits.values()} == {False}
    # It was drawn by hash, and so are its new images, as the same command drew them before.
    assert read_manifest(root).layout.split == "hashed"
    cc.encode(images, tmp_path / "fresh", with_options(split="hashed"))
    found, fresh = keys_of(root), keys_of(tmp_path / "fresh")
    assert {name: sorted(keys) for name, keys in found.items()} == {
        name: sorted(keys) for name, keys in fresh.items()
    }

    begun = tmp_path / "begun"
    shutil.copytree(old_encoded, begun)
    data = json.loads((begun / "cache.json").read_text())
    write_json(begun / "cache.json", data | {"state": "encoding", "files": []})
    (begun / "commits/train-000000.json").unlink()
    cc.encode(source, begun, SMALL)
    assert has_column(begun) == {False}
    assert cc.verify(begun) == []


def test_a_part_that_names_another_split_is_found(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "shards", COUNTS)
    path = root / "index/val-000000.parquet"
    table = pq.read_table(path)
    wrong = table.set_column(0, table.schema.field(0), [["train"] * table.num_rows])
    path.write_bytes(parquet_bytes(wrong))
    # Without the list of checksums, which would tell already.
    (root / "checksums.sha256").unlink()
    reseal(root)
    assert any("another split" in finding.problem for finding in cc.verify(root))


def test_splits_of_two_forms_are_refused(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "shards", COUNTS)
    data = json.loads((root / "cache.json").read_text())
    del data["splits"]["val"]["names_split"]
    write_json(root / "cache.json", data)
    with pytest.raises(errors.ManifestError, match="some without"):
        cc.open_cache(root)
    manifest = read_manifest(make_cache(tmp_path / "other", COUNTS))
    changed = dataclasses.replace(manifest.splits["val"], names_split=False)
    with pytest.raises(errors.UsageError, match="one form"):
        dataclasses.replace(manifest, splits=manifest.splits | {"val": changed})
