"""A cache outlives its originals: what is committed stays as it is when new images are taken in."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache import manifest
from ci2p_cache.cache.lock import LOCK, locked
from tests.support.caches import data_digests, flip
from tests.support.commands import Ran
from tests.support.pictures import picture, write_image_folder
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

CLASSES = ("ant", "bee", "cat")
OPTIONS: dict[str, Any] = {
    "encoder": "bundled", "size": 32, "shard_samples": 8, "val_fraction": 0.0, "views": "none",
    "devices": "cpu:1", "workers": 1,
}  # fmt: skip
WORDS = ("--encoder", "bundled", "--size", 32, "--shard-samples", 8, "--val-fraction", 0,
         "--views", "none", "--device", "cpu:1", "--workers", 1)  # fmt: skip


def encode(source: Path, out: Path, **changes: Any) -> tuple[cc.EncodeSummary, str]:
    """Encodes; returns the summary and all notices."""

    class Told(cc.EncodeObserver):
        texts: list[str]

        def notice(self, text: str) -> None:
            self.texts.append(text)

    told = Told()
    told.texts = []
    summary = cc.encode(source, out, cc.EncodeOptions(**(OPTIONS | changes)), observer=told)
    return summary, "\n".join(told.texts)


def put(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, 70, 50).save(path, "JPEG")
    return path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src` of 12 images in three classes, and `out`, a cache of two shards of it; read only."""
    root = tmp_path_factory.mktemp("growth")
    write_image_folder(root / "src", dict.fromkeys(CLASSES, 4))
    encode(root / "src", root / "out")
    return root


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for name in ("src", "out"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path


def rows(out: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    """What the index says of each key."""
    parts = sorted((out / "index").glob(f"{split}-*.parquet"))
    return {entry["key"]: entry for part in parts for entry in pq.read_table(part).to_pylist()}


def latents(out: Path, split: str = "train") -> dict[str, bytes]:
    """Key -> stored bytes of each valid row, read by plain zarr."""
    import zarr

    stored = zarr.open_array(out / "latents.zarr" / split / "latents", mode="r")
    return {
        key: np.asarray(stored[entry["row"]]).tobytes()
        for key, entry in rows(out, split).items()
        if entry["status"] == "ok"
    }


def assert_kept(before: Path, out: Path, *, but: tuple[str, ...] = ()) -> None:
    """Every row of the cache is where it was, with what the index said of it and its latent."""
    old, new = rows(before), rows(out)
    old_latents, new_latents = latents(before), latents(out)
    for key, entry in old.items():
        if key not in but:
            assert {**new[key], "tar_offset": None} == {**entry, "tar_offset": None}, key
            assert old_latents.get(key) == new_latents.get(key), key
    assert cc.verify(out) == []
    assert not (out / ".growth").exists()


class TestOriginalsThatAreGone:
    def test_one_is_gone_and_one_is_new(self, pristine: Path, place: Path) -> None:
        source, out = place / "src", place / "out"
        (source / "ant" / "000.jpg").unlink()
        put(source / "ant" / "new.jpg", 99)
        summary, told = encode(source, out, rescan=True)
        assert (summary.images, summary.bad, summary.encoded_now) == (13, 0, 1)
        assert "1 image (ant/000.jpg) is no longer in the source" in told
        assert_kept(pristine / "out", out)

    def test_all_are_gone_and_a_folder_of_new_ones_is_named(
        self, pristine: Path, place: Path
    ) -> None:
        out = place / "out"
        shutil.rmtree(place / "src")
        write_image_folder(place / "more", {"ant": 3, "dog": 4})
        for number, path in enumerate(sorted((place / "more").rglob("*.jpg"))):
            path.unlink()
            put(path.with_name(f"new{number}.jpg"), 60 + number)
        summary, told = encode(place / "more", out, rescan=True)
        assert (summary.images, summary.bad, summary.encoded_now) == (19, 0, 7)
        assert "12 images (" in told
        assert "new classes come after those of the cache: dog" in told
        assert_kept(pristine / "out", out)
        cache = cc.open_cache(out)
        assert cache.classes == (*CLASSES, "dog")
        for entry in rows(out).values():
            assert cache.classes[cache["train"].labels[entry["row"]]] == entry["class"]

    def test_a_class_that_sorts_before_the_others_moves_no_label(
        self, pristine: Path, place: Path
    ) -> None:
        put(place / "src" / "aardvark" / "1.jpg", 80)
        encode(place / "src", place / "out", rescan=True)
        assert_kept(pristine / "out", place / "out")
        assert cc.open_cache(place / "out").classes == (*CLASSES, "aardvark")
        assert rows(place / "out")["aardvark/1.jpg"]["label"] == 3

    def test_an_original_that_may_not_be_read_is_not_needed(
        self, warm: WarmParent, pristine: Path, place: Path
    ) -> None:
        for path in (place / "src").rglob("*.jpg"):
            path.chmod(0)
        put(place / "src" / "bee" / "new.jpg", 99)
        ran = warm.run(
            *("encode", place / "src", "--out", place / "out", *WORDS, "--rescan"),
            unprivileged=True,
        )
        assert ran.code == 0, ran.told
        assert_kept(pristine / "out", place / "out")
        assert len(rows(place / "out")) == 13

    def test_a_limit_that_rises_takes_in_more_and_reads_no_committed_one(
        self, tmp_path: Path
    ) -> None:
        source, out = tmp_path / "src", tmp_path / "out"
        write_image_folder(source, dict.fromkeys(CLASSES, 4))
        encode(source, out, limit=5)
        shutil.copytree(out, tmp_path / "before")
        committed = set(rows(out))
        for key in committed:
            (source / key).unlink()
        summary, _ = encode(source, out, limit=9)
        assert (summary.images, summary.encoded_now) == (9, 4)
        assert_kept(tmp_path / "before", out)
        summary, _ = encode(source, out, limit=None)
        assert summary.images == 12
        with pytest.raises(
            errors.FingerprintMismatchError, match="limit: None in the folder, 9 asked for"
        ):
            encode(source, out, limit=9)

    def test_a_limit_that_is_reached_hides_nothing_that_is_there(self, tmp_path: Path) -> None:
        source, out = tmp_path / "src", tmp_path / "out"
        write_image_folder(source, dict.fromkeys(CLASSES, 4))
        encode(source, out, limit=5)
        gone, changed, *_ = rows(out)
        _, told = encode(source, out, limit=5, rescan=True)
        assert "no longer" not in told
        (source / gone).unlink()
        put(source / changed, 77)
        _, told = encode(source, out, limit=5, rescan=True)
        assert f"1 image ({gone}) is no longer in the source" in told
        assert f"1 image ({changed}) is not what was encoded" in told

    def test_images_that_failed_are_read_again_and_no_others(self, tmp_path: Path) -> None:
        source, out = tmp_path / "src", tmp_path / "out"
        write_image_folder(source, dict.fromkeys(CLASSES, 4))
        bad = source / "bee" / "bad.jpg"
        bad.write_bytes(b"\xff\xd8 nothing")
        encode(source, out, max_errors="1")
        shutil.copytree(out, tmp_path / "before")
        put(bad, 99)
        for path in source.rglob("0*.jpg"):
            path.unlink()
        summary, _ = encode(source, out, retry_failed=True)
        assert (summary.images, summary.bad, summary.encoded_now) == (13, 0, 1)
        assert_kept(tmp_path / "before", out, but=("bee/bad.jpg",))

    def test_a_damaged_shard_whose_originals_are_gone_is_left_as_it_is(self, place: Path) -> None:
        source, out = place / "src", place / "out"
        shard = out / "latents.zarr/train/latents/c.0.0.0.0.0"
        shard.write_bytes(shard.read_bytes()[:-1])
        shutil.rmtree(source / "ant")
        put(source / "bee" / "new.jpg", 99)
        before = data_digests(out)
        for call in (
            lambda: encode(source, out),
            lambda: encode(source, out, max_errors="100%"),
            lambda: cc.repair(out, source=source),
            lambda: encode(source, out, rescan=True, max_errors="100%"),
        ):
            with pytest.raises((errors.SourceError, errors.ShardError)):
                call()
            assert data_digests(out) == before
        assert {entry["status"] for entry in rows(out).values()} == {"ok"}

    def test_a_range_encodes_nothing_of_a_damaged_cache_anew(self, place: Path) -> None:
        (place / "out" / "index" / "train-000000.parquet").unlink()
        before = data_digests(place / "out")
        with pytest.raises(errors.ShardError, match="complete and damaged"):
            encode(place / "src", place / "out", shard_range="1/2")
        assert data_digests(place / "out") == before


class TestOriginalsThatMoved:
    def test_splits_that_were_not_there_give_no_second_row(
        self, pristine: Path, place: Path
    ) -> None:
        source, out = place / "src", place / "out"
        for name in CLASSES:
            for split, numbers in (("train", range(3)), ("val", range(3, 4))):
                (source / split / name).mkdir(parents=True)
                for number in numbers:
                    image = source / name / f"{number:03}.jpg"
                    image.rename(source / split / name / image.name)
            (source / name).rmdir()
        # Of the same name as one that moved, but another image.
        put(source / "val" / "bee" / "000.jpg", 99)
        summary, told = encode(source, out, rescan=True)
        assert (summary.images, summary.encoded_now) == (13, 1)
        assert "3 images (val: ant/003.jpg, val: bee/003.jpg, val: cat/003.jpg) are in the" in told
        assert "no longer" not in told
        assert set(rows(out, "val")) == {"bee/000.jpg"}
        assert_kept(pristine / "out", out)

    def test_a_file_under_another_key_gives_no_second_row(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path / "src" / "train", dict.fromkeys(CLASSES, 2))
        paths = [f"train/{name}/{number:03}.jpg" for name in CLASSES for number in range(2)]
        table, out = tmp_path / "src" / "list.csv", tmp_path / "out"
        lines = [f"{path},{path.split('/')[1]}" for path in paths]
        table.write_text("\n".join(["path,label", *lines]))
        encode(table, out)
        before = data_digests(out)
        lines = [f"{line},train" for line in lines]
        table.write_text("\n".join(["path,label,split", *lines]))
        _, told = encode(table, out, rescan=True)
        assert "6 images (train: " in told
        assert "nothing new" in told
        assert data_digests(out) == before

    @pytest.mark.parametrize(
        "kind", thinned(["another class", "renamed", "a list beside the folder"])
    )
    def test_the_same_bytes_under_another_name_give_no_second_row(
        self, pristine: Path, place: Path, kind: str
    ) -> None:
        source, out = place / "src", place / "out"
        old = source / "ant" / "001.jpg"
        if kind == "renamed":
            old.rename(old.with_name("x.jpg"))
            named = "1 image (train: ant/x.jpg)"
        elif kind == "another class":
            old.rename(source / "bee" / "x.jpg")
            named = "1 image (train: bee/x.jpg)"
        else:
            paths = [path.relative_to(place) for path in sorted(source.rglob("*.jpg"))]
            lines = [f"{path},{path.parent.name}" for path in paths]
            source = place / "list.csv"
            source.write_text("\n".join(["path,label", *lines]))
            named = "12 images (train: src/"
        put(place / "src" / "cat" / "new.jpg", 99)
        if kind == "a list beside the folder":
            with source.open("a") as file:
                file.write("\nsrc/cat/new.jpg,cat")
        summary, told = encode(source, out, rescan=True)
        assert (summary.images, summary.encoded_now) == (13, 1)
        assert named in told
        assert "no longer" not in told
        assert_kept(pristine / "out", out)
        # One that moved and has changed since is found all the same.
        if kind == "renamed":
            flip(old.with_name("x.jpg"), 0.9)
            _, told = encode(source, out, rescan=True)
            assert "1 image (ant/001.jpg) is no longer in the source" in told

    def test_new_images_of_one_class_are_taken_in(self, pristine: Path, place: Path) -> None:
        for name in ("ant", "cat"):
            shutil.rmtree(place / "src" / name)
        put(place / "src" / "bee" / "new.jpg", 99)
        summary, _ = encode(place / "src", place / "out", rescan=True)
        assert (summary.images, summary.encoded_now) == (13, 1)
        assert_kept(pristine / "out", place / "out")


class TestOriginalsThatChanged:
    def test_one_is_named_and_left_alone_whatever_else_is_new(
        self, pristine: Path, place: Path
    ) -> None:
        source, out = place / "src", place / "out"
        put(source / "cat" / "001.jpg", 77)
        _, told = encode(source, out, rescan=True)
        assert "1 image (cat/001.jpg) is not what was encoded" in told
        assert "nothing new" in told
        put(source / "cat" / "new.jpg", 78)
        _, told = encode(source, out, rescan=True)
        assert "1 image (cat/001.jpg) is not what was encoded" in told
        assert_kept(pristine / "out", out)

    def test_the_same_size_with_a_later_time_is_a_change_and_the_same_bytes_are_none(
        self, place: Path
    ) -> None:
        source = place / "src"
        touched, changed = source / "ant" / "000.jpg", source / "bee" / "000.jpg"
        touched.write_bytes(touched.read_bytes())
        flip(changed, 0.9)
        _, told = encode(source, place / "out", rescan=True)
        assert "bee/000.jpg" in told
        assert "ant/000.jpg" not in told

    def test_it_is_encoded_again_where_that_is_asked_for(self, pristine: Path, place: Path) -> None:
        source, out = place / "src", place / "out"
        put(source / "cat" / "001.jpg", 77)
        put(source / "cat" / "new.jpg", 78)
        summary, _ = encode(source, out, rescan=True, reencode_changed=True)
        assert (summary.images, summary.encoded_now) == (13, 2)
        assert_kept(pristine / "out", out, but=("cat/001.jpg",))
        assert latents(out)["cat/001.jpg"] != latents(pristine / "out")["cat/001.jpg"]
        encode(source, place / "fresh")
        assert latents(out) == latents(place / "fresh")
        with pytest.raises(errors.UsageError, match="rescan"):
            encode(source, out, reencode_changed=True)

    def test_it_is_found_again_after_the_cache_has_grown(self, place: Path) -> None:
        source, out = place / "src", place / "out"
        for path in source.rglob("*.jpg"):
            # The same size in the same place, and no time but that of the change tells.
            flip(path, 0.9)
        put(source / "cat" / "new.jpg", 78)
        _, told = encode(source, out, rescan=True)
        assert "12 images (" in told
        summary, told = encode(source, out, rescan=True, reencode_changed=True)
        assert "12 images (" in told
        assert summary.encoded_now == 12

    def test_another_class_in_a_list_is_named_and_the_label_stays(
        self, pristine: Path, place: Path
    ) -> None:
        table = place / "list.csv"
        paths = sorted((place / "src").rglob("*.jpg"))

        def write(label_of: Callable[[Path], str]) -> None:
            lines = [f"{p.relative_to(place).as_posix()},{label_of(p)}" for p in paths]
            table.write_text("\n".join(["path,label", *lines, ""]))

        write(lambda path: path.parent.name)
        encode(table, place / "listed")
        write(lambda path: "bee" if path == paths[0] else path.parent.name)
        _, told = encode(table, place / "listed", rescan=True)
        assert "1 image (src/ant/000.jpg) is of another class in the source now" in told
        assert rows(place / "listed")["src/ant/000.jpg"]["class"] == "ant"

    def test_a_tar_that_was_packed_anew_is_compared_image_by_image(self, place: Path) -> None:
        from tests.support.sources import pack, samples, tar_bytes

        images = [
            (p.relative_to(place / "src").as_posix(), p.read_bytes(), p.parent.name)
            for p in sorted((place / "src").rglob("*.jpg"))
        ]
        pack(place / "src.tar", tar_bytes(samples(images)))
        encode(place / "src.tar", place / "tarred")
        shutil.copytree(place / "tarred", place / "before")
        other = put(place / "other.jpg", 77).read_bytes()
        images[2] = (images[2][0], other, images[2][2])
        images.insert(0, ("ant/new.jpg", put(place / "new.jpg", 78).read_bytes(), "ant"))
        pack(place / "src.tar", tar_bytes(samples(images)))
        _, told = encode(place / "src.tar", place / "tarred", rescan=True)
        assert f"1 image ({images[3][0]}) is not what was encoded" in told
        assert_kept(place / "before", place / "tarred")
        # It stands elsewhere in the archive now.
        changed = images[3][0]
        encode(place / "src.tar", place / "tarred", rescan=True, reencode_changed=True)
        assert_kept(place / "before", place / "tarred", but=(changed,))
        encode(place / "src.tar", place / "fresh")
        assert latents(place / "tarred")[changed] == latents(place / "fresh")[changed]


class TestWhatWasThereStaysInForce:
    def test_a_growth_that_fails_leaves_the_cache_and_goes_on_later(
        self, pristine: Path, place: Path
    ) -> None:
        source, out = place / "src", place / "out"
        for number in range(10):
            put(source / "ant" / f"new{number}.jpg", 60 + number)
        bad = source / "bee" / "new.jpg"
        bad.write_bytes(b"\xff\xd8 nothing")
        before = data_digests(out)
        with pytest.raises(errors.TooManyBadImagesError):
            encode(source, out, rescan=True, max_errors="0")
        found = {k: v for k, v in data_digests(out).items() if not k.startswith(".growth/")}
        assert found == before
        assert cc.verify(out) == []
        assert len(cc.open_cache(out)["train"]) == 12
        put(bad, 99)
        summary, told = encode(source, out, max_errors="0")
        assert (summary.images, summary.bad) == (23, 0)
        assert "continues with the new images" in told
        assert_kept(pristine / "out", out)

    def test_it_goes_on_from_another_place_only_with_a_word(self, place: Path) -> None:
        put(place / "more" / "ant" / "new.jpg", 99)
        encode(place / "more", place / "out", rescan=True, plan_only=True)
        _, told = encode(place / "src", place / "out", max_errors="0", plan_only=True)
        assert "continues with the new images" in told
        assert f"was planned from {place / 'more'}; {place / 'src'} is taken for the same" in told

    @pytest.mark.parametrize("changes", [{"retry_failed": True}, {"rescan": True}])
    def test_it_is_given_up_only_with_a_word(self, place: Path, changes: dict[str, Any]) -> None:
        new = put(place / "src" / "ant" / "new.jpg", 99)
        encode(place / "src", place / "out", rescan=True, plan_only=True)
        _, told = encode(place / "src", place / "out", rescan=True, plan_only=True)
        assert "was dropped" not in told
        new.rename(new.with_name("newer.jpg"))
        _, told = encode(place / "src", place / "out", plan_only=True, **changes)
        assert "had begun to take into" in told
        assert "was dropped" in told

    def test_status_counts_the_growth_and_says_that_the_cache_is_in_use(
        self, place: Path, run: Callable[..., Ran]
    ) -> None:
        put(place / "src" / "ant" / "new.jpg", 99)
        summary, _ = encode(place / "src", place / "out", rescan=True, plan_only=True)
        assert not summary.complete
        found = json.loads(run("status", place / "out", "--json").out)
        assert (found["growing"], found["complete"], found["rows"]) == (True, False, 13)
        assert (found["committed"], found["shards"]) == (1, 2)
        assert "the cache that is there stays in use" in run("status", place / "out").out
        assert run("verify", place / "out").code == 0
        assert run("inspect", place / "out").code == 0
        for part in ("1/2", "2/2"):
            encode(place / "src", place / "out", shard_range=part)
        assert not json.loads(run("status", place / "out", "--json").out)["growing"]
        assert len(cc.open_cache(place / "out")["train"]) == 13

    def test_whoever_opens_it_next_does_what_was_left_of_taking_its_place(
        self, warm: WarmParent, pristine: Path, place: Path
    ) -> None:
        if not warm.has_shim:
            pytest.skip("the shim needs Linux and a C compiler called cc")
        put(place / "src" / "ant" / "new.jpg", 99)
        shutil.copytree(place / "out", place / "whole")

        def words(out: Path) -> list[object]:
            return ["encode", place / "src", "--out", out, *WORDS, "--rescan"]

        told = warm.run(*words(place / "whole"), root=place / "whole", kind="trace").told
        calls = re.findall(r"^ci2p-fault (\d+) rename (.*)$", told, re.MULTILINE)
        moves = [int(number) for number, path in calls if "/.growth/" not in path]
        ended = warm.run(
            *words(place / "out"), root=place / "out", at=moves[len(moves) // 2], kind="before"
        )
        assert ended.code == -9, ended.told
        assert len(cc.open_cache(place / "out")["train"]) == 13
        assert_kept(pristine / "out", place / "out")

    def test_who_opened_it_before_is_told_to_open_it_again(self, place: Path) -> None:
        split = cc.open_cache(place / "out")["train"]
        put(place / "src" / "ant" / "new.jpg", 99)
        encode(place / "src", place / "out", rescan=True)
        with pytest.raises(errors.ManifestError) as caught:
            _ = split[0]
        assert (
            caught.value.hint == "it was replaced or has grown since it was opened: open it again"
        )

    def test_it_is_not_done_while_another_process_holds_the_folder(self, place: Path) -> None:
        put(place / "src" / "ant" / "new.jpg", 99)
        with locked(place / "out" / LOCK, what="test"), pytest.raises(errors.LockedError):
            encode(place / "src", place / "out", rescan=True)
        assert len(cc.open_cache(place / "out")["train"]) == 12

    def test_a_repair_drops_what_was_begun(self, pristine: Path, place: Path) -> None:
        put(place / "src" / "ant" / "new.jpg", 99)
        encode(place / "src", place / "out", rescan=True, plan_only=True)
        flip(place / "out" / "latents.zarr/train/latents/c.0.0.0.0.0")
        assert cc.repair(place / "out").remaining == ()
        assert data_digests(place / "out") == data_digests(pristine / "out")
        encode(place / "src", place / "out", rescan=True)
        assert_kept(pristine / "out", place / "out")

    @pytest.mark.parametrize("kind", ["link", "noise", "empty"])
    def test_a_growth_that_is_none_is_not_believed(
        self, pristine: Path, place: Path, kind: str
    ) -> None:
        growth = place / "out" / ".growth"
        if kind == "link":
            growth.symlink_to(pristine / "out")
        else:
            growth.mkdir()
            if kind == "noise":
                (growth / "cache.json").write_text("{")
        assert len(cc.open_cache(place / "out")["train"]) == 12
        put(place / "src" / "ant" / "new.jpg", 99)
        encode(place / "src", place / "out", rescan=True)
        assert_kept(pristine / "out", place / "out")
        assert cc.verify(pristine / "out") == []

    def test_a_file_system_without_hard_links_will_do(
        self, pristine: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
        put(place / "src" / "ant" / "new.jpg", 99)
        encode(place / "src", place / "out", rescan=True)
        assert_kept(pristine / "out", place / "out")

    def test_a_dry_run_foretells_it_and_writes_nothing(self, place: Path) -> None:
        put(place / "src" / "ant" / "new.jpg", 99)
        before = data_digests(place / "out")
        options = cc.EncodeOptions(**OPTIONS, rescan=True)
        report = cc.dry_run(place / "src", place / "out", options)
        assert report.images == 13
        assert data_digests(place / "out") == before


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "both", "views": "crops:2"},
        {"dtype": "float16", "codec": "none", "val_fraction": 0.4, "split": "hashed"},
        pytest.param({"format": "webdataset"}, marks=pytest.mark.slow),
        pytest.param({"executor": "processes"}, marks=pytest.mark.slow),
    ],
    ids=["both crops", "float16 raw and val", "tars", "processes"],
)
def test_a_grown_cache_holds_what_a_fresh_one_would(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    write_image_folder(source, dict.fromkeys(CLASSES, 5))
    encode(source, out, **changes)
    for name in CLASSES:
        for number in range(3):
            put(source / name / f"new{number}.jpg", 200 + 10 * len(name) + ord(name[0]) + number)
    kept = {path: path.read_bytes() for path in source.rglob("0*.jpg")}
    for path in kept:
        path.unlink()
    encode(source, out, rescan=True, **changes)
    for path, data in kept.items():
        path.write_bytes(data)
    assert cc.verify(out) == []
    encode(source, tmp_path / "fresh", **changes)
    grown, fresh = cc.open_cache(out), cc.open_cache(tmp_path / "fresh")
    assert grown.splits == fresh.splits
    for name, split in grown.items():
        here, there = rows(out, name), rows(tmp_path / "fresh", name)
        assert here.keys() == there.keys()
        for key, entry in here.items():
            moved = {"row": None, "tar_offset": None}
            assert {**entry, **moved} == {**there[key], **moved}
            ours, label = split[entry["row"]]
            theirs, wanted = fresh[name][there[key]["row"]]
            assert label == wanted
            assert ours.equal(theirs)
        record, other = split.record, fresh[name].record
        assert (record.rows, record.valid_rows, record.source_bytes, record.clipped) == (
            other.rows, other.valid_rows, other.source_bytes, other.clipped
        )  # fmt: skip
    ours, theirs = (pq.read_table(p / "stats/channels.parquet") for p in (out, tmp_path / "fresh"))
    for column in ("count", "min", "max", "zero_share", "clipped"):
        assert ours[column].equals(theirs[column]), column


class TestMoreViews:
    @pytest.mark.parametrize(
        "changes",
        [
            {"augment": "authors", "val_fraction": 0.4, "max_errors": "1"},
            {"format": "both", "codec": "none"},
            pytest.param({"format": "webdataset"}, marks=pytest.mark.slow),
            pytest.param({"executor": "processes"}, marks=pytest.mark.slow),
        ],
        ids=["augmented, val and a bad one", "both", "tars", "processes"],
    )
    def test_a_cache_that_got_them_is_the_one_that_always_had_them(
        self, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        source, out, fresh = tmp_path / "src", tmp_path / "out", tmp_path / "fresh"
        write_image_folder(source, dict.fromkeys(CLASSES, 5))
        if "max_errors" in changes:
            (source / "ant" / "002.jpg").write_bytes(b"\xff\xd8 no image")
        encode(source, out, **changes, views="crops:2")
        had = {(key, v): latent for v in (0, 1) for key, latent in views_of(out, v).items()}
        summary, _ = encode(source, out, **changes, views="crops:5", add_views=True)
        encode(source, fresh, **changes, views="crops:5")
        assert data_digests(out) == data_digests(fresh)
        assert summary.encoded_now == len(cc.open_cache(out)["train"].valid_rows)
        assert had == {(key, v): latent for v in (0, 1) for key, latent in views_of(out, v).items()}
        _, notices = encode(source, out, **changes, views="crops:5", add_views=True)
        assert "nothing new" in notices

    def test_smaller_shards_take_their_rows_from_larger_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # As many rows as fit: 16 views of 192 * 2 * 2 bytes.
        monkeypatch.setattr(manifest, "MAX_SHARD_BYTES", 16 * 768)
        write_image_folder(tmp_path / "src", dict.fromkeys(CLASSES, 7))
        encode(tmp_path / "src", tmp_path / "out", views="crops:2")
        encode(tmp_path / "src", tmp_path / "out", views="crops:5", add_views=True)
        encode(tmp_path / "src", tmp_path / "fresh", views="crops:5")
        assert cc.open_cache(tmp_path / "out")["train"].record.shard_rows == 3
        assert data_digests(tmp_path / "out") == data_digests(tmp_path / "fresh")

    def test_an_original_that_changed_is_named_and_the_cache_stays(self, tmp_path: Path) -> None:
        source, out = tmp_path / "src", tmp_path / "out"
        write_image_folder(source, dict.fromkeys(CLASSES, 3))
        encode(source, out, views="crops:2")
        before = data_digests(out)
        put(source / "ant" / "001.jpg", 77)
        with pytest.raises(errors.SourceError, match=r"ant/001\.jpg is not what"):
            encode(source, out, views="crops:3", add_views=True)
        kept = {path: d for path, d in data_digests(out).items() if ".growth" not in path}
        assert kept == before
        assert cc.verify(out) == []

    def test_they_are_given_where_that_is_asked_for_and_possible(self, tmp_path: Path) -> None:
        source, out = tmp_path / "src", tmp_path / "out"
        write_image_folder(source, dict.fromkeys(CLASSES, 3))
        encode(source, out, views="crops:2")
        before = data_digests(out)
        for refused in (
            {"views": "crops:3"},
            {"views": "crops:1", "add_views": True},
            {"views": "flip", "add_views": True},
            {"views": "crops:3", "add_views": True, "augment": "rand"},
            {"views": "crops:3", "add_views": True, "codec": "none"},
        ):
            with pytest.raises(errors.FingerprintMismatchError):
                encode(source, out, **refused)
        with pytest.raises(errors.UsageError, match="`add_views` changes the plan"):
            encode(source, out, views="crops:3", add_views=True, shard_range="1/2")
        assert data_digests(out) == before


def views_of(out: Path, view: int) -> dict[str, bytes]:
    """Key -> stored bytes of one view of each valid row."""
    train = cc.open_cache(out)["train"]
    stored = {
        key: np.empty(train.latent.shape, train.latent.dtype)
        for key, entry in rows(out).items()
        if entry["status"] == "ok"
    }
    for key, latent in stored.items():
        train.read_into(rows(out)[key]["row"], view, latent)
    return {key: latent.tobytes() for key, latent in stored.items()}
