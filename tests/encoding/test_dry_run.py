"""A dry run: it foretells what a run takes, refuses what a run refuses, and leaves no trace."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.encoding.forecast import DryRunReport, _cut, _draw, dry_run
from ci2p_cache.encoding.plan import read_plan
from ci2p_cache.encoding.progress import EncodeObserver, EncodeProgress
from tests.support.caches import data_digests
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

SMALL = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, val_fraction=0.25)
ENCODE = ("--encoder", "bundled", "--size", "32", "--shard-samples", "4", "--val-fraction", "0.25")
NAMES = ("ant", "bee", "cat")


def with_options(**changes: Any) -> cc.EncodeOptions:
    return dataclasses.replace(SMALL, **changes)


def tree_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def many_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than a dry run encodes on two cores or on eight."""
    return write_image_folder(tmp_path_factory.mktemp("many"), dict.fromkeys(NAMES, 400))


@pytest.fixture
def half_done(image_folder: Path, tmp_path: Path) -> Path:
    """A cache whose first two shards are not committed any more."""
    out = tmp_path / "shards"
    cc.encode(image_folder, out, SMALL)
    for number in range(2):
        (out / "commits" / f"train-{number:06d}.json").unlink()
    return out


@pytest.mark.parametrize("changes", thinned([{"views": "crops:3", "dtype": "float16"}, {}]))
def test_a_small_source_is_encoded_whole_and_weighed_to_the_byte(
    image_folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    options, out = with_options(**changes), tmp_path / "shards"
    report = dry_run(image_folder, out, options)
    assert list(tmp_path.iterdir()) == []
    summary = cc.encode(image_folder, out, options)
    assert report.latent_bytes == summary.cache_bytes
    assert report.disk_bytes == pytest.approx(tree_bytes(out), rel=0.01)
    assert (report.images, report.images_left, report.sampled) == (21, 21, 21)
    assert {name: count for name, count in report.splits.items() if count} == summary.splits
    assert report.images_per_second > 0
    assert report.bottleneck in ("g_a", "decoding", "")
    assert report.blocker() is None


@pytest.mark.slow
def test_of_a_larger_source_a_sample_foretells_the_size(
    many_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine ten seconds would end the sample early, and a small one misses the size.
    monkeypatch.setattr("ci2p_cache.encoding.forecast._SECONDS", math.inf)
    options = with_options(shard_samples=256, devices="cpu:1", workers=1, val_fraction=0.1)
    seen: list[EncodeProgress] = []

    class Watch(EncodeObserver):
        def progress(self, progress: EncodeProgress) -> None:
            seen.append(progress)

    report = dry_run(many_images, tmp_path / "shards", options, observer=Watch())
    assert seen[-1].total < 400
    # How many more are decoded in two seconds is the machine's affair.
    assert 0 < report.sampled < 400
    assert report.sampled <= report.checked <= 1200 == report.images_left
    assert 0 < report.encoder_share <= 1
    assert report.decode_images_per_second >= 0
    assert report.seconds > 0
    summary = cc.encode(many_images, tmp_path / "shards", options)
    assert report.latent_bytes == pytest.approx(summary.cache_bytes, rel=0.03)
    assert report.disk_bytes == pytest.approx(tree_bytes(tmp_path / "shards"), rel=0.03)


def test_the_rest_of_a_begun_cache_is_foretold_and_its_folder_not_touched(
    image_folder: Path, half_done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rest of the machine fills and empties the real disk meanwhile.
    usage = shutil.disk_usage(half_done)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = data_digests(half_done)
    report = dry_run(image_folder, half_done, SMALL)
    assert data_digests(half_done) == before
    assert [path.name for path in half_done.parent.iterdir()] == ["shards"]
    assert (report.shards - report.committed_shards, report.images_left) == (2, 8)
    assert report.sampled == 8
    whole = dry_run(image_folder, half_done, with_options(views="none"), overwrite=True)
    assert (whole.committed_shards, whole.images_left) == (0, 21)
    assert whole.free_bytes > report.free_bytes == usage.free
    assert data_digests(half_done) == before


def test_of_a_complete_cache_nothing_is_left_to_do(image_folder: Path, tmp_path: Path) -> None:
    cc.encode(image_folder, tmp_path / "shards", SMALL)
    report = dry_run(image_folder, tmp_path / "shards", SMALL)
    assert (report.images_left, report.sampled, report.disk_bytes) == (0, 0, 0)
    assert report.bottleneck == ""
    assert report.committed_shards == report.shards


def test_bad_files_are_named_counted_and_held_against_the_budget(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 8, "bee": 1})
    (source / "ant" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    report = dry_run(source, tmp_path / "out", with_options(max_errors="0"))
    assert (report.bad_found, report.checked, report.bad_allowed) == (1, 10, 0)
    assert report.bad_files[0].startswith("ant/bad.jpg: ")
    error = report.blocker()
    assert isinstance(error, errors.TooManyBadImagesError)
    assert "ant/bad.jpg" in str(error)
    assert dry_run(source, tmp_path / "out", SMALL).blocker() is None
    none_good = write_image_folder(tmp_path / "none", {"ant": 69, "bee": 1})
    for path in none_good.rglob("*.jpg"):
        path.write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(errors.TooManyBadImagesError, match="first 64 images"):
        dry_run(none_good, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_told(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    report = dry_run(image_folder, tmp_path / "out", SMALL)
    assert not report.fits
    error = report.blocker()
    assert isinstance(error, errors.DiskFullError)
    assert "0.00 GB are free" in str(error)


def test_symbols_that_do_not_fit_are_refused_as_in_a_run(
    image_folder: Path, tmp_path: Path
) -> None:
    options = with_options(step=0.001)
    for call in (dry_run, cc.encode):
        with pytest.raises(errors.SaturationError, match=r"exceed 127"):
            call(image_folder, tmp_path / "out", options)
    assert not any(path.name.startswith(".ci2p") for path in tmp_path.iterdir())


def test_what_a_run_refuses_a_dry_run_refuses(
    image_folder: Path, half_done: Path, tmp_path: Path
) -> None:
    before = data_digests(half_done)
    with pytest.raises(errors.FingerprintMismatchError, match="'flip' in the folder"):
        dry_run(image_folder, half_done, with_options(views="none"))
    with pytest.raises(errors.UsageError, match="is inside the source"):
        dry_run(image_folder, image_folder / "ant" / "out", SMALL)
    with pytest.raises(errors.UsageError, match="max_errors"):
        dry_run(image_folder, tmp_path / "new", with_options(max_errors="many"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(errors.NotACacheError, match=r"letter\.txt"):
        dry_run(image_folder, tmp_path / "other", SMALL)
    lock = half_done / ".lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(errors.LockedError, match="another process works on"):
            dry_run(image_folder, half_done, SMALL)
    # A lock file that a killed run left behind is no one's, a moment after it was made.
    os.utime(lock, (0, 0))
    assert dry_run(image_folder, half_done, SMALL).images_left == 8
    lock.unlink()
    assert data_digests(half_done) == before


def test_where_nothing_can_be_written_beside_the_folder_the_sample_lies_elsewhere(
    image_folder: Path, half_done: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    made: list[str] = []
    mkdtemp = tempfile.mkdtemp

    def noted(*, prefix: str, dir: Path) -> str:
        made.append(str(dir))
        return mkdtemp(prefix=prefix, dir=dir)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(elsewhere))
    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    dry_run(image_folder, half_done, SMALL)
    assert made == [str(elsewhere)]
    assert not any(elsewhere.iterdir())


@pytest.mark.slow
def test_the_same_seed_draws_the_same_images_and_all_splits_have_their_share(
    many_images: Path, tmp_path: Path
) -> None:
    options = with_options(limit=400, shard_samples=16, views="none", plan_only=True)
    cc.encode(many_images, tmp_path / "shards", options)
    plan = read_plan(tmp_path / "shards", read_manifest(tmp_path / "shards"))
    missing, sizes = list(plan.shard_numbers())[1:], dict.fromkeys(plan.splits, 2)
    drawn = _draw(plan, missing, sizes, seed=3)
    assert drawn == _draw(plan, missing, sizes, seed=3)
    assert drawn != _draw(plan, missing, sizes, seed=4)
    samples = [
        [(shard.split, sample) for shard in _cut(plan, drawn[:count], sizes)
         for sample in shard.samples]
        for count in (50, len(drawn))
    ]  # fmt: skip
    for some in samples:
        assert len({sample.key for _, sample in some}) == len(some)
        assert min(sample.row for split, sample in some if split == "train") >= 16
    for name, record in plan.splits.items():
        share = sum(split == name for split, _ in samples[0]) / (
            record.rows - (16 if name == "train" else 0)
        )
        assert share == pytest.approx(100 / 384, abs=0.03)
    assert len(samples[1]) == 384


def test_the_command_prints_a_table_and_the_command_that_does_it(
    run: Callable[..., Ran], image_folder: Path, tmp_path: Path
) -> None:
    arguments = ("encode", image_folder, "--out", tmp_path / "a b", *ENCODE)
    shown = run(*arguments, "--dry-run")
    assert shown.code == 0, shown.err
    for words in ("nothing was written", "21", "images/s", "fits", "about 0", "bottleneck"):
        assert words in shown.out
    printed = next(line for line in shown.out.splitlines() if line.startswith("run it: "))
    pasted = shlex.split(printed.removeprefix("run it: "))
    assert pasted == ["ci2p-cache", *map(str, arguments)]
    assert not (tmp_path / "a b").exists()
    assert run(*pasted[1:]).code == 0
    assert "0 images left" in run(*arguments, "--dry-run").out


def test_json_of_a_dry_run_is_its_report(
    run: Callable[..., Ran], image_folder: Path, tmp_path: Path
) -> None:
    shown = run("encode", image_folder, "--out", tmp_path / "out", *ENCODE, "--dry-run", "--json")
    assert shown.code == 0, shown.err
    data = json.loads(shown.out)
    assert DryRunReport.from_dict(data).images == 21


def test_errors_end_a_dry_run_with_the_exit_codes_of_a_run(
    run: Callable[..., Ran], half_done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert run("encode", tmp_path / "empty", "--out", out, *ENCODE, "--dry-run").code == 3
    source = write_image_folder(tmp_path / "src", {"ant": 8, "bee": 1})
    other = run("encode", source, "--out", half_done, *ENCODE, "--views", "none", "--dry-run")
    assert other.code == 4
    assert "views.kind" in other.err
    (source / "ant" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    bad = run("encode", source, "--out", out, *ENCODE, "--dry-run", "--max-errors", "0")
    assert bad.code == 3
    assert "bad: ant/bad.jpg" in bad.out
    assert "--max-errors" in bad.err
    allowed = run("encode", source, "--out", out, *ENCODE, "--dry-run", "--max-errors", "1")
    assert allowed.code == 0
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    full = run("encode", source, "--out", out, *ENCODE, "--dry-run", "--max-errors", "1", "--json")
    assert full.code == 6
    assert json.loads(full.out)["bad_found"] == 1
    assert "make space" in full.err
    assert not out.exists()


def test_ctrl_c_leaves_nothing_behind(warm: WarmParent, many_images: Path, tmp_path: Path) -> None:
    arguments = (many_images, "--out", tmp_path / "out", "--encoder", "bundled")
    process = warm.start("encode", *arguments, "--dry-run")
    while process.poll() is None and not any(tmp_path.glob(".ci2p-cache-dry-run-*/*/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told = process.wait()
    assert process.returncode == 130, told
    assert "nothing was written" in told
    assert list(tmp_path.iterdir()) == []
