"""Who encodes: one process, one process per device, actors of a Ray cluster: the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.encoding.ray_actors import Actors
from ci2p_cache.encoding.worker import Event, Job, ShardId, serve
from tests.support.encode_bench import tree
from tests.support.pictures import write_image_folder
from tests.support.warm import WarmParent

SMALL = cc.EncodeOptions(
    encoder="bundled", size=32, shard_samples=8, devices="cpu:1", workers=1, val_fraction=0.0
)
WORKER = "ci2p_cache.encoding.worker"


def with_options(**changes: object) -> cc.EncodeOptions:
    return dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]  # any field


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "src"
    return write_image_folder(root, {"ant": 60, "bee": 52, "cat": 48})


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cc.encode(pictures, out, SMALL).shards == 20
    return out


class Notices(cc.EncodeObserver):
    """Keeps what a run has to say."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


class Meanwhile(Notices):
    """Acts once, when the first images are encoded; meanwhile the driver hands out no shard."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act: Callable[[], None] | None = act

    def progress(self, progress: cc.EncodeProgress) -> None:
        if progress.done and self.act:
            act, self.act = self.act, None
            act()


def workers_of(pid: int) -> list[int]:
    """Process ids of the encode workers that a process has started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if WORKER in words and int(parent) == pid:
                found.append(int(folder.name))
    return sorted(found)


def until(is_true: Callable[[], bool]) -> None:
    """Waits for something."""
    for _ in range(60_000):
        if is_true():
            return
        time.sleep(0.005)
    raise AssertionError("it did not get so far")


@pytest.mark.slow
def test_a_killed_process_has_its_shards_taken_over(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out", []

    def kill_one() -> None:
        seen.extend(workers_of(os.getpid()))
        os.kill(seen[0], signal.SIGKILL)

    observer = Meanwhile(kill_one)
    summary = cc.encode(
        pictures, out, with_options(executor="processes", devices="cpu:2"), observer=observer
    )
    assert len(seen) == 2
    assert summary.complete
    assert summary.encoded_now == summary.images == 160
    assert any("SIGKILL" in text for text in observer.texts)
    assert tree(out) == tree(whole)
    assert workers_of(os.getpid()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_when_the_driver_ends_all_processes_end(
    warm: WarmParent, pictures: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    driver = warm.start(
        *("encode", pictures, "--out", out, "--encoder", "bundled", "--size", "32"),
        *("--shard-samples", "8", "--workers", "1", "--val-fraction", "0"),
        *("--executor", "processes", "--device", "cpu:2"),
    )
    until(lambda: len(workers_of(driver.pid)) == 2 and len(list(out.glob("commits/*"))) >= 2)
    alive = workers_of(driver.pid)
    driver.send_signal(number)
    text = driver.wait()
    assert driver.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), text
    for _ in range(2000):
        left = [pid for pid in alive if Path(f"/proc/{pid}/cmdline").exists()]
        if not any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left):
            break
        time.sleep(0.005)
    else:
        raise AssertionError(f"{left} still run")
    if number == signal.SIGINT:
        assert "ci2p-cache encode" in text
        assert not (out / ".staging").exists()
    # The same command with another executor continues, to the same bytes.
    summary = cc.encode(pictures, out, SMALL)
    assert 0 < summary.encoded_now < 160
    assert tree(out) == tree(whole)


def test_a_process_encodes_and_counts_what_it_cannot(pictures: Path, tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 11, "bee": 1})
    for number in range(3):
        (source / "ant" / f"{number:03d}.jpg").write_bytes(b"\xff\xd8 nothing")
    options = with_options(executor="processes", devices="cpu:1", max_errors="3")
    summary = cc.encode(source, tmp_path / "out", options)
    assert (summary.images, summary.bad) == (9, 3)
    cc.encode(source, tmp_path / "here", with_options(max_errors="3"))
    assert tree(tmp_path / "out") == tree(tmp_path / "here")
    with pytest.raises(errors.UsageError, match="device"):
        cc.encode(pictures, tmp_path / "b", with_options(executor="processes", devices="tpu"))


@pytest.mark.slow
def test_what_a_process_cannot_do_is_the_runs_error(tmp_path: Path) -> None:
    source, out = write_image_folder(tmp_path / "src", {"ant": 11, "bee": 1}), tmp_path / "out"
    for number in range(3):
        (source / "ant" / f"{number:03d}.jpg").write_bytes(b"\xff\xd8 nothing")
    options = with_options(executor="processes", devices="cpu:1")
    with pytest.raises(errors.TooManyBadImagesError, match="1 are allowed") as refused:
        cc.encode(source, out, options)
    assert refused.value.hint is not None
    assert not (out / ".staging").exists()
    summary = cc.encode(source, out, dataclasses.replace(options, max_errors="3"))
    assert (summary.images, summary.bad) == (9, 3)


class Threads:
    """A crew of threads, whose first `num_lost` workers are lost when they have committed a shard.

    They commit that shard and report neither it nor its images.
    """

    most_losses = 4
    num_lost = 0

    def __init__(self, options: cc.EncodeOptions, num_shards: int) -> None:
        self.devices = ["cpu:1"]
        self.threads = 1
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()
        self.answers: list[queue.Queue[ShardId | None]] = []

    def start(self, number: int, job: Job) -> None:
        self.answers.append(queue.Queue())
        threading.Thread(target=self.work, args=(number, job), daemon=True).start()

    def work(self, number: int, job: Job) -> None:
        def say(text: str) -> None:
            event = json.loads(text)
            if number >= self.num_lost or "wants" in event:
                self.events.put((number, event))
            elif "commit" in event:
                raise InterruptedError

        try:
            serve(job, say, self.answers[number].get)
        except InterruptedError:
            self.events.put((number, {"lost": "a thread fell asleep"}))

    def poll(self) -> tuple[int, Event]:
        return self.events.get()

    def give(self, number: int, shard: ShardId | None) -> None:
        self.answers[number].put(shard)

    def close(self) -> None:
        pass


def test_what_a_lost_worker_had_committed_counts(
    pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ci2p_cache.encoding.processes.Processes", Threads)
    monkeypatch.setattr(Threads, "num_lost", 3)
    observer, options = Notices(), with_options(executor="processes")
    summary = cc.encode(pictures, tmp_path / "out", options, observer=observer)
    assert sum("a thread fell asleep" in text for text in observer.texts) == 3
    assert summary.encoded_now == summary.images == 160
    assert tree(tmp_path / "out") == tree(whole)


def test_workers_that_are_lost_again_and_again_end_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unable(Threads):
        most_losses = 2
        asks = True

        def work(self, number: int, job: Job) -> None:
            if self.asks:
                self.events.put((number, {"wants": "shard"}))
            self.events.put((number, {"lost": "a thread fell asleep"}))

    monkeypatch.setattr("ci2p_cache.encoding.processes.Processes", Unable)
    options = with_options(executor="processes")
    with pytest.raises(errors.ResourceError, match=r"2 workers .* held train shard 0"):
        cc.encode(pictures, tmp_path / "out", options)
    monkeypatch.setattr(Unable, "asks", False)
    with pytest.raises(errors.ResourceError, match=r"2 workers .* held no shard yet"):
        cc.encode(pictures, tmp_path / "out", options)
    assert not (tmp_path / "out" / ".staging").exists()
    assert cc.encode(pictures, tmp_path / "out", SMALL).complete


class TestRay:
    @pytest.fixture
    def cluster(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
        pytest.importorskip("ray", reason="ray is not installed: pip install 'ci2p-cache[ray]'")
        # At 15, Ray's own, the tests beside it would leave its actors next to nothing.
        monkeypatch.setenv("RAY_worker_niceness", "0")
        from ray.cluster_utils import Cluster

        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20},
        )
        yield made
        import ray

        ray.shutdown()
        made.shutdown()

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    # Ray's own sockets and files are closed by its exit handlers.
    @pytest.mark.filterwarnings("ignore")
    def test_a_killed_node_costs_no_shard(
        self,
        cluster: object,
        pictures: Path,
        whole: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import ray

        size = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
        nodes = [cluster.add_node(**size) for _ in range(2)]  # type: ignore[attr-defined]
        ray.init(address=cluster.address, log_to_driver=False)  # type: ignore[attr-defined]
        asked: list[tuple[int, ShardId | None]] = []

        class Held(Actors):
            """Hands out nothing until all three have asked; then a node is gone."""

            def give(self, number: int, shard: ShardId | None) -> None:
                asked.append((number, shard))
                workers = {number for number, _ in asked}
                if len(workers) == 3 and nodes:
                    cluster.remove_node(nodes.pop(), allow_graceful=False)  # type: ignore[attr-defined]
                    nodes.clear()
                    for answer in asked:
                        super().give(*answer)
                elif not nodes:
                    super().give(number, shard)

        monkeypatch.setattr("ci2p_cache.encoding.ray_actors.Actors", Held)
        observer, out = Notices(), tmp_path / "out"
        summary = cc.encode(
            pictures, out, with_options(executor="ray", devices="auto"), observer=observer
        )
        assert any("actor was lost" in text for text in observer.texts)
        assert summary.complete
        assert summary.encoded_now == 160
        assert tree(out) == tree(whole)

    def test_without_ray_the_error_names_the_extra(
        self, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(errors.MissingDependencyError, match="ray") as refused:
            cc.encode(pictures, tmp_path / "out", with_options(executor="ray", devices="auto"))
        assert "ci2p-cache[ray]" in (refused.value.hint or "")

    def test_devices_are_the_clusters_to_count(self, pictures: Path, tmp_path: Path) -> None:
        with pytest.raises(errors.UsageError, match="the cluster says how many"):
            cc.encode(pictures, tmp_path / "out", with_options(executor="ray"))
