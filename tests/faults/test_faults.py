"""Real faults: calls that fail, processes that are killed, disks that are full. Samples only.

The same trials over every point, and hundreds of kills, are in tests/long/.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.long.train_kills import run_kills
from tests.support.encode_bench import KINDS, EncodeBench, GrowthBench, MoreViewsBench, spread, tree
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

Bench = tuple[EncodeBench, WarmParent]


@pytest.fixture(scope="module")
def bench(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two shards of three images at 32 px, encoded once undisturbed."""
    made = EncodeBench(tmp_path_factory.mktemp("faults"))
    if not warm.has_shim:
        pytest.skip("the shim needs Linux and a C compiler called cc")
    made.undisturbed(warm)
    return made, warm


def calls_of(bench: Bench) -> list[tuple[str, str]]:
    """(call, path relative to the cache) of everything that an undisturbed encode changes."""
    encode, _ = bench
    found = re.findall(r"^ci2p-fault \d+ (\w+) (.*)$", encode.told, re.MULTILINE)
    paths = (re.sub(r"(?<=/\.staging/all)-\w{8}", "", path) for _, path in found)
    return [
        (call, Path(path).relative_to(encode.out).as_posix())
        for (call, _), path in zip(found, paths, strict=True)
    ]


def test_every_file_is_synced_renamed_and_its_folder_synced_the_manifest_last(
    bench: Bench,
) -> None:
    # Also shows that the shim sees every commit: no file of the cache got there another way.
    encode, _ = bench
    calls = calls_of(bench)
    renamed = [path for call, path in calls if call == "rename" and ".staging" not in path]
    files = {name for name, digest in encode.whole.items() if digest != "folder"}
    assert set(renamed) == files
    assert renamed[-1] == "cache.json"
    for at, (call, path) in enumerate(calls):
        if call == "rename" and ".staging" not in path:
            staged = f".staging/all/{path.replace('/', '__')}"
            before = [seen for seen, where in calls[:at] if where == staged]
            assert before[-1] == "fsync", path
            assert calls[at + 1] == ("fsync", Path(path).parent.as_posix())
    for shard in range(encode.num_shards):
        record = renamed.index(f"commits/train-{shard:06d}.json")
        for path in (f"latents.zarr/train/latents/c.{shard}.0.0.0.0",
                     f"index/train-{shard:06d}.parquet"):  # fmt: skip
            assert renamed.index(path) < record


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", thinned(KINDS))
def test_a_fault_anywhere_is_survived_and_the_same_command_gives_the_same_bytes(
    bench: Bench, kind: str, count: int
) -> None:
    encode, warm = bench
    points = spread(encode.calls, count)[1:]
    problems = [(at, text) for at in points for text in encode.fault(warm, at, kind)]
    assert not problems


@pytest.mark.parametrize("kind", thinned(["ENOSPC", "EIO"]))
@pytest.mark.parametrize(
    ("call", "path"),
    [("mkdir", "."), ("open", ".lock"), ("mkdir", ".staging/all"), ("encoder", "")],
    ids=["folder", "lock", "staging", "encoder"],
)
def test_a_start_that_fails_ends_with_exit_6_and_leaves_nothing(
    bench: Bench, call: str, path: str, kind: str
) -> None:
    encode, warm = bench
    calls = calls_of(bench)
    if call == "encoder":
        at = next(i for i, (_, where) in enumerate(calls) if where.endswith("encoder.safetensors"))
    else:
        # The last of several: pathlib makes a folder again once its parent is there.
        head = calls[: 1 + next(i for i, (seen, _) in enumerate(calls) if seen == "rename")]
        at = max(i for i, each in enumerate(head) if each == (call, path) and i < 15)
    assert not list(encode.fault(warm, at + 1, kind))


def test_killed_at_any_time_no_committed_shard_is_lost(warm: WarmParent, tmp_path: Path) -> None:
    made = EncodeBench(tmp_path, images=8, shard_samples=2)
    made.undisturbed(warm)
    for share in (0.4, 0.7):
        shutil.rmtree(made.out)
        warm.run(*made.arguments, kill_after=share * made.seconds)
        committed = made.commits()
        assert not list(made.repeated(warm))
        assert committed <= made.commits()


@pytest.fixture(scope="module", params=[GrowthBench, MoreViewsBench], ids=["images", "views"])
def growth(
    warm: WarmParent, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> GrowthBench:
    """Of images the originals that are committed are gone: nothing could be made again."""
    made: GrowthBench = request.param(tmp_path_factory.mktemp("growth"), warm)
    made.undisturbed(warm)
    return made


@pytest.mark.parametrize("kind", thinned(KINDS, step=len(KINDS)))
def test_a_fault_while_a_cache_grows_leaves_it_whole(
    warm: WarmParent, growth: GrowthBench, kind: str
) -> None:
    made = growth
    points = spread(made.calls, 5)[1:]
    assert not [(at, text) for at in points for text in made.fault(warm, at, kind)]


def test_of_two_encoders_started_at_once_one_is_refused_and_no_row_is_lost(
    warm: WarmParent, tmp_path: Path
) -> None:
    made = EncodeBench(tmp_path, images=12, shard_samples=2)
    made.undisturbed(warm)
    shutil.rmtree(made.out)
    pair = [warm.start(*made.arguments) for _ in range(2)]
    told = [each.wait() for each in pair]
    # Where the second came only after the first had ended, it finds everything done.
    assert sorted(each.returncode or 0 for each in pair) in ([0, 4], [0, 0]), told
    assert tree(made.out) == made.whole


def test_ctrl_c_prints_a_command_that_pasted_goes_on_to_the_same_bytes(
    warm: WarmParent, tmp_path: Path
) -> None:
    made = EncodeBench(tmp_path, images=20, shard_samples=2)
    made.undisturbed(warm)
    shutil.rmtree(made.out)
    process = warm.start(*made.arguments)
    while process.poll() is None and not made.commits():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    told = process.wait()
    assert process.returncode == 130, told
    assert not {".staging", ".lock"} & tree(made.out).keys()
    printed = next(line for line in told.splitlines() if "ci2p-cache encode " in line)
    pasted = shlex.split(printed[printed.index("ci2p-cache encode ") :])
    assert warm.run(*pasted[1:]).code == 0
    assert tree(made.out) == made.whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory, of 64 kB; `resize` makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or sys.platform != "linux":
        pytest.skip("no mount here, so no small disk")
    command = [mount, "-t", "tmpfs", "-o", "size=64k", "ci2p-faults", str(disk)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def resize(disk: Path, num_bytes: int) -> None:
    option = f"remount,size={num_bytes}"
    subprocess.run(["mount", "-o", option, str(disk)], check=True)


def test_a_disk_that_is_really_full_ends_with_exit_6_and_goes_on_after_space_is_made(
    warm: WarmParent, small_disk: Path, tmp_path: Path
) -> None:
    made = EncodeBench(tmp_path, images=24, shard_samples=2, size=32)
    made.undisturbed(warm)
    encoder = (made.out / "encoder.safetensors").stat().st_size
    made.out = small_disk / "out"
    commits: list[int] = []
    # The encoder does not fit; some shards do; more shards do.
    for size in (64_000, encoder + 250_000, encoder + 450_000):
        resize(small_disk, size)
        ended = warm.run(*made.arguments)
        assert ended.code == 6, ended.told
        assert "space" in ended.told
        assert not {".staging", ".lock"} & tree(made.out).keys()
        commits.append(len(made.commits()))
    assert commits[0] == 0
    assert commits == sorted(commits)
    resize(small_disk, 4 * encoder)
    assert not list(made.repeated(warm))


@pytest.mark.slow
def test_training_killed_inside_a_save_goes_on_to_the_same_bits(
    warm: WarmParent, tmp_path: Path
) -> None:
    # Saving takes most of the time: six saves a run, fifteen in the long version.
    counts = run_kills(warm, tmp_path, count=2, seed=7, epochs=2, batch_size=8, model="vitds_nano")
    assert not counts.problems
    assert counts.good == 2
