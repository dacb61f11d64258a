"""Several machines on one folder: ranges of shards side by side, and what `status` says of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.lock import LOCK, live_ranges, locked, range_lock
from ci2p_cache.cache.ranges import ShardRange, split_positions
from tests.support.commands import Ran
from tests.support.encode_bench import tree
from tests.support.pictures import write_image_folder
from tests.support.warm import WarmParent

SMALL = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, devices="cpu:1", workers=1)
FLAGS = (*("--encoder", "bundled", "--size", "32", "--shard-samples", "4"),
         *("--device", "cpu:1", "--workers", "1"))  # fmt: skip


SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")


def part(text: str) -> ShardRange:
    return ShardRange.parse(text, {})


def with_options(**changes: object) -> cc.EncodeOptions:
    return dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]  # any field


@pytest.fixture(scope="module")
def whole(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the pictures: six shards or so."""
    out = tmp_path_factory.mktemp("whole") / "out"
    cc.encode(image_folder, out, SMALL)
    return out


@pytest.fixture(scope="module")
def begun(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has a plan and no shard."""
    out = tmp_path_factory.mktemp("begun") / "out"
    summary = cc.encode(image_folder, out, with_options(plan_only=True))
    assert (summary.complete, summary.encoded_now, summary.images) == (False, 0, 0)
    return out


@pytest.fixture
def planned(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "out")
    return tmp_path / "out"


class TestShardRange:
    @pytest.mark.parametrize("num_shards", [0, 1, 2, 5, 12, 1252])
    @pytest.mark.parametrize("of", [1, 2, 3, 7, 12, 2000])
    def test_all_parts_together_are_all_shards_each_once(self, num_shards: int, of: int) -> None:
        places = [at for i in range(1, of + 1) for at in ShardRange(i, i, of).positions(num_shards)]
        assert places == list(range(num_shards))
        if num_shards > 1:
            assert list(ShardRange(1, of, of).positions(num_shards)) == places
            assert split_positions(range(1, num_shards), num_shards).positions(num_shards) == range(
                1, num_shards
            )

    def test_parts_that_do_not_overlap_share_no_shard(self) -> None:
        parts = [ShardRange(i, j, n) for n in (1, 2, 3, 4, 6) for i in range(1, n + 1)
                 for j in range(i, n + 1)]  # fmt: skip
        for one in parts:
            for other in parts:
                shared = any(set(one.positions(n)) & set(other.positions(n)) for n in range(30))
                assert one.overlaps(other) == shared == other.overlaps(one)

    def test_it_is_written_as_it_is_read(self) -> None:
        for text in ("1/1", "2/4", "3-5/12"):
            assert str(part(text)) == text
            assert ShardRange.of_label(part(text).label) == part(text)
        for label in ("", "2/4", "2-of-4", "4-2-of-4", "0-1-of-4"):
            assert ShardRange.of_label(label) is None

    @pytest.mark.parametrize("text", ["", "0/4", "5/4", "4-3/8", "2", "a/b", "-1/4", "1/4/2"])
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(errors.UsageError, match="shard_range"):
            cc.EncodeOptions(shard_range=text)

    @pytest.mark.parametrize(
        ("environment", "wanted"),
        [
            ({"ID": "3", "COUNT": "4", "MIN": "0"}, "4/4"),
            ({"ID": "3", "COUNT": "4", "MIN": "1"}, "3/4"),
            ({"ID": "9", "COUNT": "4", "MIN": "1", "STEP": "4"}, "3/4"),
            ({"ID": "7", "COUNT": "1", "MIN": "7"}, "1/1"),
        ],
    )
    def test_auto_reads_a_slurm_array(self, environment: dict[str, str], wanted: str) -> None:
        slurm = {f"SLURM_ARRAY_TASK_{name}": value for name, value in environment.items()}
        assert str(ShardRange.parse("auto", slurm)) == wanted

    def test_auto_reads_an_indexed_kubernetes_job(self) -> None:
        job = {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "8"}
        assert str(ShardRange.parse("auto", job)) == "1/8"

    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"JOB_COMPLETION_INDEX": "0"},
            {"JOB_COMPLETION_INDEX": "8", "JOB_COMPLETIONS": "8"},
            # --array=1,3,7: which third is 3?
            dict(zip(SLURM, ("7", "3", "1"), strict=True)),
            dict(zip(SLURM, ("x", "3", "1"), strict=True)),
        ],
    )
    def test_auto_guesses_nothing(self, environment: dict[str, str]) -> None:
        with pytest.raises(errors.UsageError, match="shard_range"):
            ShardRange.parse("auto", environment)


@pytest.mark.slow
def test_four_concurrent_ranges_give_the_bytes_of_one_process(
    warm: WarmParent, image_folder: Path, whole: Path, tmp_path: Path
) -> None:
    # Bar R4. No plan is made beforehand: the first one makes it, whichever that is.
    out = tmp_path / "out"
    command = ("encode", image_folder, "--out", out, *FLAGS, "--shard-range")
    processes = [warm.start(*command, f"{number}/4") for number in (1, 2, 3, 4)]
    told = [process.wait(300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert sum("complete\n" in text and "not complete" not in text for text in told) == 1
    # The tree has no lock and no staging of anybody.
    assert tree(out) == tree(whole)


def test_ranges_one_after_another_the_last_finalises(
    image_folder: Path, whole: Path, planned: Path
) -> None:
    first = cc.encode(image_folder, planned, with_options(shard_range="2/2"))
    assert not first.complete
    assert first.shard_range == "2/2"
    assert first.clipped is None
    again = cc.encode(image_folder, planned, with_options(shard_range="2/2"))
    assert (again.encoded_now, again.images) == (0, first.images)
    last = cc.encode(image_folder, planned, with_options(shard_range="1/2"))
    assert last.complete
    assert first.encoded_now + last.encoded_now == last.images == 21
    assert tree(planned) == tree(whole)
    before = tree(planned)
    assert cc.encode(image_folder, planned, with_options(shard_range="1/2")).encoded_now == 0
    assert tree(planned) == before


def test_a_killed_range_is_gone_on_with_and_the_others_are_not_touched(
    warm: WarmParent, image_folder: Path, whole: Path, planned: Path
) -> None:
    cc.encode(image_folder, planned, with_options(shard_range="1/2"))
    before = tree(planned)
    command = ("encode", image_folder, "--out", planned, *FLAGS, "--shard-range", "2/2")
    if not warm.has_shim:
        pytest.skip("the shim needs Linux and a C compiler called cc")
    # Between the files of its shard and the commit.
    ended = warm.run(*command, root=planned, at=15, kind="before")
    assert ended.code == -signal.SIGKILL, ended.told
    assert list(planned.glob(".staging/2-2-of-2-*/*"))
    assert cc.status(planned).working == ()
    lost = planned / ".lock.2-2-of-2"
    assert lost.exists()
    kept = {name: digest for name, digest in tree(planned).items() if name in before}
    assert kept == before
    # A full run does the rest, and removes what the killed one left.
    summary = cc.encode(image_folder, planned, SMALL)
    assert summary.complete
    assert tree(planned) == tree(whole)


def test_overlapping_ranges_and_full_runs_are_refused_while_a_range_runs(
    image_folder: Path, planned: Path
) -> None:
    before = tree(planned)
    path = range_lock(planned, part("1/2"))
    with locked(path, what="range 1/2"):
        for other in ("1/2", "2/4", "2-3/4"):
            with pytest.raises(errors.LockedError, match=f"process {os.getpid()}"):
                cc.encode(image_folder, planned, with_options(shard_range=other))
        for options in (SMALL, with_options(finalise=True), with_options(plan_only=True)):
            with pytest.raises(errors.LockedError, match="range 1/2"):
                cc.encode(image_folder, planned, options)
        with pytest.raises(errors.LockedError, match="range 1/2"):
            cc.repair(planned)
        with pytest.raises(errors.LockedError, match="another process works on"):
            cc.dry_run(image_folder, planned, SMALL)
        assert [str(each) for each, _ in live_ranges(planned)] == ["1/2"]
        # A range beside it runs, and leaves it to the other to finalise.
        assert not cc.encode(image_folder, planned, with_options(shard_range="2/2")).complete
    kept = {name: digest for name, digest in tree(planned).items() if name in before}
    assert kept == before


def test_a_range_beside_a_full_run_is_refused(image_folder: Path, planned: Path) -> None:
    with locked(planned / LOCK, what="encode"):
        with pytest.raises(errors.LockedError, match="encode on host"):
            cc.encode(image_folder, planned, with_options(shard_range="1/2"))
    assert cc.status(planned).committed == 0


def test_a_range_waits_while_another_makes_the_plan(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    held, released = threading.Event(), threading.Event()

    def other() -> None:
        with locked(out / LOCK, what="range 2/2"):
            held.set()
            released.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait(60)
    threading.Timer(1.0, released.set).start()
    assert not cc.encode(image_folder, out, with_options(shard_range="1/2")).complete
    thread.join()
    assert released.is_set()


def test_the_last_range_finalises_only_when_no_other_runs(
    image_folder: Path, whole: Path, planned: Path
) -> None:
    # All is committed, yet another range may be writing one of its shards again.
    cc.encode(image_folder, planned, with_options(shard_range="2/2"))
    with locked(range_lock(planned, part("2/2")), what="range 2/2"):
        assert not cc.encode(image_folder, planned, with_options(shard_range="1/2")).complete
        assert cc.status(planned).committed == cc.status(planned).shards
    assert cc.encode(image_folder, planned, with_options(finalise=True)).complete
    assert tree(planned) == tree(whole)


def test_finalise_names_what_is_missing(image_folder: Path, planned: Path, tmp_path: Path) -> None:
    cc.encode(image_folder, planned, with_options(shard_range="1/3"))
    before = tree(planned)
    with pytest.raises(errors.IncompleteCacheError, match=r"4 of 6 shards \(train 2-") as refused:
        cc.encode(image_folder, planned, with_options(finalise=True))
    assert refused.value.exit_code == 4
    assert "ci2p-cache status" in (refused.value.hint or "")
    assert tree(planned) == before
    with pytest.raises(errors.IncompleteCacheError, match="no plan yet"):
        cc.encode(image_folder, tmp_path / "new", with_options(finalise=True))
    assert not (tmp_path / "new").exists()


def test_the_budget_of_bad_images_holds_for_all_ranges_together(tmp_path: Path) -> None:
    source, out = write_image_folder(tmp_path / "src", {"ant": 11, "bee": 1}), tmp_path / "out"
    for number in range(6):
        (source / "ant" / f"{number:03d}.jpg").write_bytes(b"\xff\xd8 nothing")
    options = with_options(val_fraction=0.0, max_errors="5")
    for number in (1, 2):
        ranged = dataclasses.replace(options, shard_range=f"{number}/3")
        assert not cc.encode(source, out, ranged).complete
    with pytest.raises(errors.TooManyBadImagesError, match=r"6 images .* all ranges together"):
        cc.encode(source, out, dataclasses.replace(options, shard_range="3/3"))
    last = dataclasses.replace(options, shard_range="3/3", max_errors="6")
    assert cc.encode(source, out, last).complete


@pytest.mark.parametrize(
    "changes",
    [
        {"plan_only": True, "finalise": True},
        {"shard_range": "1/2", "finalise": True},
        {"shard_range": "1/2", "rescan": True},
        {"executor": "dask"},
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(errors.UsageError):
        with_options(**changes)


def test_a_range_overwrites_nothing_and_a_dry_run_takes_none(
    image_folder: Path, planned: Path
) -> None:
    with pytest.raises(errors.UsageError, match="overwrite"):
        cc.encode(image_folder, planned, with_options(shard_range="1/2"), overwrite=True)
    with pytest.raises(errors.UsageError, match="dry run"):
        cc.dry_run(image_folder, planned, with_options(shard_range="1/2"))


def test_a_range_takes_in_no_more_images(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cc.encode(image_folder, out, with_options(plan_only=True, limit=8))
    before = tree(out)
    with pytest.raises(errors.UsageError, match="larger `limit` changes the plan"):
        cc.encode(image_folder, out, with_options(shard_range="1/2", limit=12))
    assert tree(out) == before


class TestStatus:
    def test_begun_half_done_and_complete(
        self, run: Callable[..., Ran], image_folder: Path, planned: Path
    ) -> None:
        at_first = cc.status(planned)
        assert (at_first.committed, at_first.shards, at_first.complete) == (0, 6, False)
        assert at_first.retry == ("1-6/6",)
        cc.encode(image_folder, planned, with_options(shard_range="2/3"))
        half = cc.status(planned)
        assert half.committed == 2
        assert half.retry == ("1-2/6", "5-6/6")
        assert half.missing.startswith("train 0-1, 4")
        assert half.bytes == sum(
            path.stat().st_size for name in ("index", "latents.zarr")
            for path in (planned / name).rglob("*") if path.is_file()
        )  # fmt: skip
        shown = run("status", planned)
        assert shown.code == 0, shown.err
        commands = [line for line in shown.out.splitlines() if "--shard-range" in line]
        assert commands[-1].strip() == (
            f"ci2p-cache encode {image_folder} --out {planned} --size 32 --shard-samples 4 "
            "--shard-range 5-6/6"
        )
        # Pasted, with the encoder that is not in cache.json, they do the rest.
        for line in commands[-2:]:
            words = line.split()[1:]
            assert run(*words, "--encoder", "bundled").code == 0
        done = json.loads(run("status", planned, "--json").out)
        assert (done["complete"], done["share"], done["missing"]) == (True, 1.0, "")
        assert "ci2p-cache train" in run("status", planned).out
        assert done == {**cc.status(planned).to_dict(), "damaged": [], "retry": [], "working": [],
                        "share": 1.0}  # fmt: skip

    def test_who_works_on_it(self, run: Callable[..., Ran], planned: Path) -> None:
        with locked(range_lock(planned, part("1-2/3")), what="range 1-2/3"):
            found = cc.status(planned)
            (working,) = found.working
            assert (working.shard_range, working.pid, working.shards) == ("1-2/3", os.getpid(), 4)
            assert working.host
            assert found.retry == ("5-6/6",)
            assert f"{os.getpid()}" in run("status", planned).out
        with locked(planned / LOCK, what="encode"):
            (working,) = cc.status(planned).working
            assert (working.shard_range, working.what) == (None, "encode")
            assert cc.status(planned).retry == ()

    def test_damaged_folders_are_told_and_not_changed(
        self, run: Callable[..., Ran], whole: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        shutil.copytree(whole, out)
        (out / "commits" / "train-000000.json").write_bytes(b"{}")
        (out / "index" / "train-000001.parquet").write_bytes(b"short")
        (out / "commits" / "train-000002.json").unlink()
        before = tree(out)
        found = cc.status(out)
        assert (found.committed, found.num_damaged, found.complete) == (3, 2, True)
        assert "has 5 bytes" in found.damaged[1]
        shown = run("status", out)
        assert shown.code == 0
        assert "verify" in shown.out
        assert tree(out) == before
        (out / "cache.json").write_bytes(b"{")
        assert run("status", out).code == 5
        assert run("status", tmp_path).code == 4
