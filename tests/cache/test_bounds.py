"""No cache is begun that cannot be opened, and no claim takes long to check."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.manifest import SplitRecord, read_manifest
from ci2p_cache.encoding.plan import build_plan
from ci2p_cache.images.source import ImageRef
from ci2p_cache.specs import Fingerprint, LatentSpec, LayoutSpec, ViewSpec
from tests.support.caches import with_options
from tests.support.pictures import write_image_folder
from tests.support.seals import write_json

LATENT = LatentSpec(channels=192, height=4, width=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bounds")
    write_image_folder(root / "src", {"ant": 9, "bee": 7})
    cc.encode(root / "src", root / "shards", with_options(shard_samples=2))
    return root / "shards"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


def claim(root: Path, **changes: Any) -> None:
    data = json.loads((root / "cache.json").read_text())
    data["splits"]["train"] |= {"valid_rows": None, **changes}
    write_json(root / "cache.json", data)


class Listed:
    """A source that only lists."""

    classes = class_titles = ("one",)
    notices = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def location(self) -> str:
        return "nowhere"

    def scan(self) -> Iterator[ImageRef]:
        return (ImageRef(f"one/{i}", "train", 0, b"one/%d" % i) for i in range(self.count))

    def file_of(self, path: bytes) -> None:
        """None has a file."""

    def read(self, path: bytes) -> bytes:
        raise NotImplementedError


class TestBeforeEncoding:
    def test_more_rows_than_can_be_opened_are_refused_when_planned(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ci2p_cache.cache.manifest._MAX_ROWS", 99)
        layout = LayoutSpec(val_fraction=0)
        build_plan(Listed(99), layout, ViewSpec(), LATENT)
        with pytest.raises(errors.UsageError, match="`rows` is 100; 0 to 99 are possible"):
            build_plan(Listed(100), layout, ViewSpec(), LATENT)

    def test_more_shards_than_can_be_opened_are_refused_when_planned(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ci2p_cache.cache.manifest._MAX_SHARDS", 10)
        layout = LayoutSpec(val_fraction=0, shard_samples=2)
        build_plan(Listed(20), layout, ViewSpec(), LATENT)
        with pytest.raises(errors.UsageError, match="21 rows has 11 shards") as caught:
            build_plan(Listed(21), layout, ViewSpec(), LATENT)
        assert "--shard-samples" in str(caught.value.hint)

    @pytest.mark.parametrize(
        ("rows", "shard_rows"),
        [(14_197_122, 1024), (14_197_122, 14), (10_000_000, 1024), (1_281_167, 2), (0, 1)],
    )
    def test_the_data_sets_of_the_field_are_possible(self, rows: int, shard_rows: int) -> None:
        assert SplitRecord(rows=rows, views=2, shard_rows=shard_rows).rows == rows

    @pytest.mark.parametrize(
        ("rows", "shard_rows"), [(-1, 1), (2**24 + 1, 1024), (2**21, 1), (1, 0), (1, 2**21)]
    )
    def test_an_absurd_split_is_a_usage_error(self, rows: int, shard_rows: int) -> None:
        with pytest.raises(errors.UsageError, match="are possible"):
            SplitRecord(rows=rows, views=1, shard_rows=shard_rows)

    def test_a_latent_that_fits_no_shard_is_refused_before_anything_is_made(
        self, whole: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(errors.UsageError, match=r"one latent has \d+ bytes.*--size"):
            cc.encode(
                whole.parent / "src", tmp_path / "out",
                with_options(size=16384, dtype="float32", resize_side=None),
            )  # fmt: skip
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("asked", "match"),
        [
            ({"fold": True, "dtype": "float16"}, "`fold` is for symbols"),
            ({"fold": True, "codec": "none"}, "`codec` none does not compress"),
            ({"level": 10}, "`level` is 10; 1 to 9"),
            ({"level": 0, "codec": "lz4"}, "`level` is 0; 1 to 9"),
        ],
    )
    def test_what_no_codec_can_do_is_refused_before_anything_is_made(
        self, whole: Path, tmp_path: Path, asked: dict[str, Any], match: str
    ) -> None:
        with pytest.raises(errors.UsageError, match=match):
            cc.encode(whole.parent / "src", tmp_path / "out", with_options(**asked))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"splits": {}}, "0 splits"),
            ({"offset": (float("nan"),) * 192}, "not finite"),
            ({"offset": (0.0,)}, "1 offsets for 192"),
            ({"classes": ("x" * 9 * 2**20,), "class_titles": ("y",)}, "names of 1 classes take"),
            ({"class_titles": ()}, "0 class titles for 2"),
            ({"format_version": 3}, "format version 3"),
        ],
        ids=lambda value: "" if isinstance(value, dict) else value,
    )
    def test_what_could_not_be_read_again_cannot_be_made(
        self, whole: Path, change: dict[str, Any], match: str
    ) -> None:
        with pytest.raises(errors.UsageError, match=match):
            dataclasses.replace(read_manifest(whole), **change)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"views": 3}, "train has 3 views"),
            ({"shard_rows": 5}, "5 rows per shard, its layout makes 2"),
            ({"valid_rows": 99}, "99 valid rows of"),
        ],
    )
    def test_a_split_that_does_not_fit_its_layout_cannot_be_made(
        self, whole: Path, change: dict[str, Any], match: str
    ) -> None:
        manifest = read_manifest(whole)
        with pytest.raises(errors.UsageError, match=match):
            train = dataclasses.replace(manifest.splits["train"], **change)
            dataclasses.replace(manifest, splits={"train": train})

    def test_a_split_name_is_a_plain_word(self, whole: Path) -> None:
        manifest = read_manifest(whole)
        with pytest.raises(errors.UsageError, match=r"split name '\.\./x'"):
            dataclasses.replace(manifest, splits={"../x": manifest.splits["train"]})

    def test_latents_are_a_sixteenth_of_their_images(self, whole: Path) -> None:
        made: Fingerprint = read_manifest(whole).fingerprint
        other = dataclasses.replace(made.latent, height=5)
        with pytest.raises(errors.UsageError, match="latents of 5 x 2 from images of 32"):
            dataclasses.replace(made, latent=other)

    def test_every_refusal_of_a_manifest_names_the_file_when_it_is_read(self, cache: Path) -> None:
        for change in ({"rows": 2**25}, {"shard_rows": 3}, {"views": 9}, {"valid_rows": -1}):
            backup = (cache / "cache.json").read_bytes()
            claim(cache, **change)
            with pytest.raises(errors.ManifestError, match=r"cache\.json is damaged"):
                read_manifest(cache)
            (cache / "cache.json").write_bytes(backup)


class TestClaims:
    @pytest.mark.parametrize("quick", [True, False])
    def test_a_million_claimed_shards_are_named_in_ranges_within_seconds(
        self, cache: Path, quick: bool
    ) -> None:
        claim(cache, rows=2**21)
        (cache / "commits/train-000003.json").unlink()
        told: list[tuple[int, int]] = []
        started = time.monotonic()
        findings = cc.verify(cache, quick=quick, on_shard=lambda *done: told.append(done))
        assert time.monotonic() - started < 5
        assert len(findings) < 20
        (far,) = (f for f in findings if f.last_shard is not None)
        assert (far.kind, far.split, far.last_shard) == ("missing", "train", 2**20 - 1)
        assert (far.first_row, far.last_row) == (2 * (far.shard or 0), 2**21 - 1)
        assert f"to {2**20 - 1}, have no commit record and no files" in far.problem
        # One whose files still lie there is looked at by itself.
        assert ("commits/train-000003.json", "missing") in {(f.path, f.kind) for f in findings}
        assert told[-1][0] == told[-1][1]

    def test_repair_of_such_a_claim_ends_within_seconds_too(self, cache: Path) -> None:
        claim(cache, rows=2**21)
        started = time.monotonic()
        with pytest.raises(errors.ManifestError, match=r"plan\.parquet"):
            cc.repair(cache)
        assert time.monotonic() - started < 5

    def test_an_unfinished_cache_says_which_shards_are_missing(self, cache: Path) -> None:
        data = json.loads((cache / "cache.json").read_text())
        write_json(cache / "cache.json", data | {"state": "encoding", "files": []})
        for number in (1, 2, 5):
            (cache / f"commits/train-{number:06d}.json").unlink()
        (finding,) = cc.verify(cache)
        assert (finding.path, finding.kind) == ("cache.json", "unfinished")
        assert "3 shards are not committed (train 1-2, 5)" in finding.problem

    def test_an_unfinished_cache_that_claims_a_million_shards_names_ranges(
        self, cache: Path
    ) -> None:
        claim(cache, rows=2**21)
        data = json.loads((cache / "cache.json").read_text())
        write_json(cache / "cache.json", data | {"state": "encoding", "files": []})
        for number in (0, 2, 4):
            (cache / f"commits/train-{number:06d}.json").unlink()
        started = time.monotonic()
        (finding,) = (f for f in cc.verify(cache) if f.kind == "unfinished")
        assert time.monotonic() - started < 5
        assert "(train 0, 2, 4, " in finding.problem

    def test_many_gaps_are_counted(self, tmp_path: Path) -> None:
        from ci2p_cache.cache.survey import gaps, named_ranges

        holes = gaps(20, range(1, 20, 2))
        assert named_ranges({"train": holes, "val": []}) == (
            "train 0, 2, 4, 6, 8 and 5 more ranges"
        )

    def test_shards_of_which_nothing_is_left_are_encoded_again(
        self, cache: Path, whole: Path
    ) -> None:
        # Nor do the checksums know of them.
        (cache / "checksums.sha256").unlink()
        for number in (2, 3, 4):
            (cache / f"commits/train-{number:06d}.json").unlink()
            (cache / f"index/train-{number:06d}.parquet").unlink()
            (cache / f"latents.zarr/train/latents/c.{number}.0.0.0.0").unlink()
        found = {(f.path, f.shard, f.last_shard) for f in cc.verify(cache)}
        assert ("commits/train-000002.json", 2, 4) in found
        summary = cc.repair(cache)
        assert (summary.shards, summary.remaining) == (3, ())
        assert cc.verify(cache) == []
        for path in sorted(p for p in whole.rglob("c.*") if p.is_file()):
            assert (cache / path.relative_to(whole)).read_bytes() == path.read_bytes()
