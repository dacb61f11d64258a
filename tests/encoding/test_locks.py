"""Locks of another machine, on a file system that carries no flock from there: a name and an age.

What the other machine does is what it leaves in the folder; tests/long/shared_fs.py has two real
encoders behind two mounts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.cache.lock import LOCK, LockHolder
from tests.support.encode_bench import EncodeBench, tree
from tests.support.warm import Child, WarmParent


@pytest.fixture(scope="module")
def undisturbed(
    warm: WarmParent, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EncodeBench]:
    made = EncodeBench(tmp_path_factory.mktemp("locks"), images=12, shard_samples=2)
    made.undisturbed(warm)
    yield made
    made.fresh()


@pytest.fixture
def bench(undisturbed: EncodeBench) -> EncodeBench:
    undisturbed.fresh()
    return undisturbed


def put_lock(path: Path, *, seconds_ago: float, what: str = "encode") -> None:
    """Leaves the lock file of process 4711 on a machine whose flock does not get here."""
    path.parent.mkdir(exist_ok=True)
    holder = LockHolder(host="node7", pid=4711, what=what, scope="another kernel/7")
    path.write_text(json.dumps(holder.to_dict()))
    written = time.time() - seconds_ago
    os.utime(path, (written, written))


def test_a_lock_that_was_just_written_is_held_and_an_old_one_is_not(
    warm: WarmParent, bench: EncodeBench
) -> None:
    lock = bench.out / LOCK
    put_lock(lock, seconds_ago=20)
    before = tree(bench.out)
    refused = warm.run(*bench.arguments)
    assert refused.code == 4, refused.told
    assert "encode on host node7, process 4711" in refused.err
    assert "free after 60 seconds" in refused.err
    assert tree(bench.out) == before
    put_lock(lock, seconds_ago=90)
    assert warm.run(*bench.arguments).code == 0
    assert tree(bench.out) == bench.whole


def test_a_range_of_another_machine_is_refused_and_shown(
    warm: WarmParent, bench: EncodeBench
) -> None:
    assert warm.run(*bench.arguments, "--plan-only").code == 0
    put_lock(bench.out / f"{LOCK}.1-1-of-2", seconds_ago=0, what="range 1/2")
    for overlapping in (["--shard-range", "1/2"], ["--shard-range", "1-3/4"], []):
        refused = warm.run(*bench.arguments, *overlapping)
        assert refused.code == 4
        assert "range 1/2 on host node7, process 4711" in refused.err
    (working,) = cc.status(bench.out).working
    assert (working.shard_range, working.host, working.pid) == ("1/2", "node7", 4711)
    beside = warm.run(*bench.arguments, "--shard-range", "2/2")
    assert beside.code == 0
    assert "1 other ranges are at work" in beside.err
    put_lock(bench.out / f"{LOCK}.1-1-of-2", seconds_ago=90, what="range 1/2")
    assert cc.status(bench.out).working == ()
    assert warm.run(*bench.arguments, "--shard-range", "1/2").code == 0
    assert tree(bench.out) == bench.whole


def test_a_lock_that_names_nobody_yet_is_waited_for(warm: WarmParent, bench: EncodeBench) -> None:
    bench.out.mkdir()
    (bench.out / LOCK).touch()
    assert warm.run(*bench.arguments).code == 0
    assert tree(bench.out) == bench.whole


def test_an_encoder_that_wakes_after_its_lock_was_taken_over_writes_nothing(
    warm: WarmParent, bench: EncodeBench
) -> None:
    child = warm.start(*bench.arguments)
    wait_for_commit(bench, child)
    stop(child)
    # What the other machine does first.
    (bench.out / LOCK).unlink()
    shutil.rmtree(bench.out / ".staging")
    put_lock(bench.out / LOCK, seconds_ago=0)
    before = tree(bench.out)
    assert len(bench.commits()) < bench.num_shards
    child.send_signal(signal.SIGCONT)
    printed = child.wait()
    assert child.returncode == 4, printed
    assert "another process took over" in printed
    after = tree(bench.out)
    committed = {name for name in after if name.startswith("commits/")}
    assert committed == {name for name in before if name.startswith("commits/")}
    assert after[LOCK] == before[LOCK]
    put_lock(bench.out / LOCK, seconds_ago=90)
    assert warm.run(*bench.arguments).code == 0
    assert tree(bench.out) == bench.whole


def stop(child: Child) -> None:
    """Suspends a child; it has stopped when this returns."""
    child.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.002)


def wait_for_commit(bench: EncodeBench, child: Child) -> None:
    """Waits until a child has committed its first shard."""
    while not bench.commits():
        assert child.poll() is None, child.told()
        time.sleep(0.002)
