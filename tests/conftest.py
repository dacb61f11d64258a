"""Fixtures shared by all tests: generated pictures, real photographs, ways to run commands."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# One OpenMP thread, here and in every process that a test starts: it is the reference setting, and
# two threads that wait for each other lose tenfold as soon as another process takes a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support.commands import REPO, Ran
from tests.support.pictures import write_image_folder
from tests.support.warm import WarmParent

# A stall of the machine is no failure; hypothesis fails an example that takes 0.2 s.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_MEMORY_BYTES = 12 * 2**30
"""The default tier leaves less than two gigabytes of caches until it ends."""

SHARED_DATA = Path(os.environ.get("CI2P_CACHE_TEST_DATA", REPO.parent / "shared" / "data"))


def pytest_configure() -> None:
    """Has tests write to memory where there is plenty of it: every shard is synced."""
    room = Path("/dev/shm")
    if not {"TMPDIR", "PYTEST_DEBUG_TEMPROOT"} & os.environ.keys() and room.is_dir():
        # Free pages would not do: what the page cache holds can be had too.
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        free = min(shutil.disk_usage(room).free, int(found[1]) * 1024 if found else 0)
        if free > _MEMORY_BYTES and os.access(room, os.W_OK):
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(room)


def pytest_collection_finish() -> None:
    """Takes what was imported out of garbage collection: looking through it takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs; tests that need it skip where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real photographs at {SHARED_DATA}; set CI2P_CACHE_TEST_DATA")
    return SHARED_DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Computes on one thread while a module runs: bits depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nano() -> Iterator[None]:
    """Has the nano models known while a module runs."""
    from tests.support.nano import nano_models

    with nano_models():
        yield


@pytest.fixture
def takes_ctrl_c() -> Iterator[None]:
    """Lets a test send itself SIGINT also where pytest was started with that signal ignored."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 9, 7 and 5 small JPEGs; read only."""
    root = tmp_path_factory.mktemp("images")
    return write_image_folder(root, {"ant": 9, "bee": 7, "cat": 5})


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    """Starts commands as processes of their own, without the seconds that importing torch takes."""
    with WarmParent(tmp_path_factory.mktemp("warm")) as made:
        yield made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command as its script does, in this process."""
    from ci2p_cache.cli.app import run_command

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ci2p-cache", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command()
            sys.exit(0)
        captured = capfd.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run
