"""Caches of format 1: read, trained from, continued, repaired and grown as they are; converted."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from tests.support.caches import SMALL, data_digests, keys_of, make_cache, with_options
from tests.support.pictures import picture, write_image_folder
from tests.support.seals import reseal, write_json

KEPT: dict[str, Any] = {
    "shard_samples": 4, "val_fraction": 0.0, "views": "none", "split": "hashed",
}  # fmt: skip


def encode_first(source: Path, out: Path, **changes: Any) -> None:
    """Encodes as the version of before did: into a new folder it writes format 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ci2p_cache.encoding.intent.FORMAT_VERSION", 1)
        cc.encode(source, out, dataclasses.replace(SMALL, **(KEPT | changes)))


def version(root: Path) -> int:
    return cc.open_cache(root).manifest.format_version


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src` of 10 images, `first` and `second`: caches of it in both formats; read only."""
    root = tmp_path_factory.mktemp("first")
    write_image_folder(root / "src", {"ant": 5, "bee": 5})
    encode_first(root / "src", root / "first")
    cc.encode(root / "src", root / "second", dataclasses.replace(SMALL, **KEPT))
    return root


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `src` and `first`."""
    for name in ("src", "first"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path


def test_a_cache_of_format_1_has_its_fields_and_frames_and_the_same_values(pristine: Path) -> None:
    first, second = (cc.open_cache(pristine / name) for name in ("first", "second"))
    text = json.loads((pristine / "first/cache.json").read_text())
    assert (text["format_version"], "fold" in text["layout"]) == (1, False)
    assert json.loads((pristine / "second/cache.json").read_text())["format_version"] == 2
    assert first.fingerprint.digest == second.fingerprint.digest
    frame = (pristine / "first/latents.zarr/train/latents/c.0.0.0.0.0").read_bytes()
    assert frame.startswith(b"\x28\xb5\x2f\xfd")
    np.testing.assert_array_equal(first["train"].latents[:], second["train"].latents[:])
    assert cc.verify(pristine / "first") == []
    assert cc.reencode(pristine / "first", 3).findings == ()


def test_it_grows_in_its_format_to_what_it_would_have_been(place: Path) -> None:
    before = data_digests(place / "first")
    options = dataclasses.replace(SMALL, **KEPT, rescan=True)
    picture(3, 70, 50).save(place / "src/ant/new.jpg", "JPEG")
    assert cc.encode(place / "src", place / "first", options).encoded_now == 1
    assert version(place / "first") == 1
    assert cc.verify(place / "first") == []
    after = data_digests(place / "first")
    carried = [name for name in before if name.startswith("latents.zarr/train/latents/c.0.")]
    assert carried
    assert all(after[name] == before[name] for name in carried)
    commits = [json.loads(path.read_text()) for path in (place / "first/commits").iterdir()]
    assert {commit["format_version"] for commit in commits} == {1}


def test_one_that_is_not_complete_is_continued_to_the_same_bytes(
    pristine: Path, tmp_path: Path
) -> None:
    encode_first(pristine / "src", tmp_path / "out", plan_only=True)
    cc.encode(pristine / "src", tmp_path / "out", dataclasses.replace(SMALL, **KEPT))
    assert data_digests(tmp_path / "out") == data_digests(pristine / "first")


def test_it_is_repaired_to_the_same_bytes(pristine: Path, place: Path) -> None:
    (place / "first/latents.zarr/train/latents/c.1.0.0.0.0").unlink()
    (place / "first/commits/train-000001.json").unlink()
    found = cc.repair(place / "first", source=place / "src")
    assert found.remaining == ()
    assert data_digests(place / "first") == data_digests(pristine / "first")


@pytest.mark.parametrize(
    "asked", [{"codec": "lz4"}, {"fold": True}, {"level": 2}], ids=lambda asked: next(iter(asked))
)
def test_it_takes_nothing_of_format_2(place: Path, asked: dict[str, Any]) -> None:
    before = data_digests(place / "first")
    with pytest.raises(errors.FingerprintMismatchError, match=next(iter(asked))):
        cc.encode(place / "src", place / "first", dataclasses.replace(SMALL, **(KEPT | asked)))
    assert data_digests(place / "first") == before


def test_converting_gives_what_encode_writes(pristine: Path, tmp_path: Path) -> None:
    cc.convert(pristine / "first", tmp_path / "out", format="zarr")
    assert data_digests(tmp_path / "out") == data_digests(pristine / "second")
    cc.convert(pristine / "first", tmp_path / "folded", format="both", fold=True)
    options = dataclasses.replace(SMALL, **KEPT, format="both", fold=True)
    cc.encode(pristine / "src", tmp_path / "encoded", options)
    assert data_digests(tmp_path / "folded") == data_digests(tmp_path / "encoded")
    cc.convert(tmp_path / "folded", tmp_path / "back", format="zarr", fold=False)
    assert data_digests(tmp_path / "back") == data_digests(pristine / "second")


def test_a_conversion_into_a_cache_of_format_1_is_refused(pristine: Path, place: Path) -> None:
    with pytest.raises(errors.FingerprintMismatchError, match="format version 1"):
        cc.convert(pristine / "second", place / "first", format="zarr")
    assert data_digests(place / "first") == data_digests(pristine / "first")


def test_a_commit_record_of_the_other_format_does_not_count(pristine: Path, place: Path) -> None:
    record = place / "first/commits/train-000000.json"
    write_json(record, json.loads(record.read_text()) | {"format_version": 2})
    reseal(place / "first")
    assert any("format version 2" in found.problem for found in cc.verify(place / "first"))
    with pytest.raises(errors.ShardError, match="format version 2"):
        cc.open_cache(place / "first")["train"][0]


@pytest.mark.parametrize(
    "change",
    [{"codec": "lz4"}, {"level": 23}, {"fold": True}],
    ids=lambda change: str(next(iter(change.items()))),
)
def test_a_manifest_of_format_1_with_a_layout_of_format_2_is_refused(
    place: Path, change: dict[str, Any]
) -> None:
    manifest = json.loads((place / "first/cache.json").read_text())
    manifest["layout"] |= change
    write_json(place / "first/cache.json", manifest)
    reseal(place / "first")
    with pytest.raises(errors.ManifestError):
        cc.open_cache(place / "first")


@pytest.mark.usefixtures("one_thread", "nano")
def test_training_loses_the_same_from_every_format_and_codec(tmp_path: Path) -> None:
    counts = {"train": {"ant": 9, "bee": 7, "cat": 8}, "val": {"ant": 3, "bee": 2, "cat": 3}}
    spec = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=5)
    made: dict[str, dict[str, Any]] = {
        "first": {"format_version": 1}, "second": {}, "lz4": {"codec": "lz4"},
        "folded": {"fold": True}, "folded_lz4": {"fold": True, "codec": "lz4"},
        "raw": {"codec": "none"}, "tars": {"format": "webdataset", "fold": True},
    }  # fmt: skip
    found = []
    for name, options in made.items():
        make_cache(tmp_path / name, counts, **options)
        ended = cc.train(tmp_path / name, spec=spec, runs_dir=tmp_path / "runs", name=name,
                         device="cpu")  # fmt: skip
        run = Path(ended.path)
        with (run / "summary.csv").open(newline="") as file:
            losses = [(row["train_loss"], row["val_loss"]) for row in csv.DictReader(file)]
        last = json.loads((run / "checkpoints/last.json").read_text())["last"]
        found.append((losses, (run / "checkpoints" / last / "model.safetensors").read_bytes()))
    assert len(found[0][0]) == 2
    assert found == found[:1] * len(made)


def test_the_command_of_before_goes_on_drawing_by_hash(pristine: Path, tmp_path: Path) -> None:
    source, out, fresh = tmp_path / "src", tmp_path / "out", tmp_path / "fresh"
    shutil.copytree(pristine / "src", source)
    encode_first(source, out, val_fraction=0.25, views="flip")
    assert "split" not in json.loads((out / "cache.json").read_text())["layout"]
    for number in range(6):
        picture(900 + number).save(source / "ant" / f"new{number}.jpg")
    cc.encode(source, out, with_options(rescan=True))
    assert version(out) == 1
    assert "split" not in json.loads((out / "cache.json").read_text())["layout"]
    cc.encode(source, fresh, with_options(split="hashed"))
    grown, drawn = keys_of(out), keys_of(fresh)
    assert {name: sorted(keys) for name, keys in grown.items()} == {
        name: sorted(keys) for name, keys in drawn.items()
    }
