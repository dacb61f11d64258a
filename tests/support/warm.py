"""A warm parent that forks one child per command: importing torch takes seconds, a fork none.

The parent is started with the shim preloaded, imports everything, computes nothing and starts no
thread; each child then runs the real command line (`ci2p_cache.cli.start.main`), with a fault armed
or with a SIGKILL to come, and is a process like any other: own descriptors, own locks, own death.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Child", "Ended", "WarmParent", "build_shim"]

_REPO = Path(__file__).resolve().parents[2]


def build_shim(folder: Path, name: str = "faults") -> Path | None:
    """Compiles a shim of this folder into `folder`; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    shim = folder / f"{name}.so"
    source = Path(__file__).with_name(f"{name}.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", shim, source, "-ldl"], check=True
    )
    return shim


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended."""

    code: int
    """Exit code; the negative number of the signal that ended it."""
    calls: int
    """Calls that changed something below the root; -1 where it was killed."""
    seconds: float
    """How long it lived."""
    told: str
    """What it wrote, both streams."""


class Child:
    """A command that was started and goes on beside the test; its process id takes signals."""

    def __init__(self, warm: WarmParent, pid: int, log: Path) -> None:
        self._nursery = warm
        self.pid = pid
        self.log = log
        """What it writes, both streams."""
        self.returncode: int | None = None
        """As of `subprocess.Popen`; None while it runs."""

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.asked({"poll": self.pid})["code"]
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, limit: float = 60.0) -> str:
        """Waits for its end and returns what it wrote; after `limit` seconds it is killed."""
        end = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(signal.SIGKILL)
                raise AssertionError(f"it ran on for {limit:g} s: {self.log.read_text()}")
            time.sleep(0.01)
        return self.log.read_text("utf-8", "replace")


class WarmParent:
    """Starts the warm parent and asks it for children; a context manager.

    Args:
        folder: Where the shim is built and children write what they say.
        shim: What is preloaded into the parent and whatever it starts: faults or crash.
    """

    def __init__(self, folder: Path, *, shim: str = "faults") -> None:
        self._folder = folder
        self._started = 0
        library = build_shim(folder, shim)
        self.has_shim = library is not None
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.warm"],
            cwd=_REPO, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()

    def run(
        self,
        arguments: Sequence[str],
        *,
        root: Path | None = None,
        at: int = 0,
        kind: str = "",
        kill_after: float | None = None,
        limit: float = 120.0,
    ) -> Ended:
        """Runs one command in a new child and waits for its end.

        Args:
            arguments: Those of `ci2p-cache`.
            root: The folder whose changes are counted; None where nothing is counted or hit.
            at: Number of the call that is hit, from 1; 0 for none.
            kind: What happens there: EIO, ENOSPC, before, after; trace tells every call.
            kill_after: Seconds after which it gets SIGKILL; None for never.
            limit: Seconds after which it is killed as hung, which is an error.
        """
        log = self._folder / "child.log"
        asked = {
            "arguments": list(arguments), "at": at, "kind": kind, "kill_after": kill_after,
            "limit": limit, "root": str(root or self._folder / "nowhere"), "log": str(log),
        }  # fmt: skip
        return Ended(**self.asked(asked), told=log.read_text("utf-8", "replace"))

    def start(
        self,
        *arguments: object,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """Starts a command in a new child that is not waited for.

        Args:
            arguments: Those of `ci2p-cache`.
            folder: Where it runs; None for here.
            environment: What is added to the environment.
        """
        self._started += 1
        log = self._folder / f"child-{self._started}.log"
        started = {
            "start": [str(each) for each in arguments],
            "log": str(log),
            "folder": str(folder or Path.cwd()),
            "environment": dict(environment or {}),
        }
        return Child(self, self.asked(started)["pid"], log)

    def asked(self, what: dict[str, Any]) -> dict[str, Any]:
        """Sends one request to the warm parent and returns its answer."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(what) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, "the warm parent died"
        return dict(json.loads(answer))


def _command(arguments: list[str], log: str) -> int:
    """Runs the command line in this process; returns its exit code."""
    from ci2p_cache.cli import start

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["ci2p-cache", *arguments]
    code = 0
    try:
        start.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _child(asked: dict[str, Any], channel: int) -> int:
    """Runs a command with the shim armed; returns its exit code."""
    shim = ctypes.CDLL(None)
    counts = hasattr(shim, "ci2p_fault_arm")
    if counts:
        shim.ci2p_fault_arm(
            os.fsencode(asked["root"]), ctypes.c_long(asked["at"]), asked["kind"].encode()
        )
    code = _command(asked["arguments"], asked["log"])
    calls = shim.ci2p_fault_count() if counts else -1
    os.write(channel, str(calls).encode())
    return code


def _run(asked: dict[str, Any]) -> dict[str, Any]:
    """Runs a command in a child and waits for its end."""
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_child(asked, writing))
    os.close(writing)
    code = _watch(child, started, asked)
    seconds = time.monotonic() - started
    calls = int(os.read(reading, 32) or b"-1")
    os.close(reading)
    return {"code": code, "calls": calls, "seconds": seconds}


def _start(asked: dict[str, Any]) -> dict[str, int]:
    """Runs a command in a child of its own."""
    # What is there to read before it has begun.
    Path(asked["log"]).touch()
    child = os.fork()
    if child == 0:
        os.chdir(asked["folder"])
        os.environ.update(asked["environment"])
        os._exit(_command(asked["start"], asked["log"]))
    return {"pid": child}


def _poll(child: int) -> dict[str, int | None]:
    """Looks whether a started child has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return {"code": os.waitstatus_to_exitcode(status) if done else None}


def _watch(child: int, started: float, asked: dict[str, Any]) -> int:
    """Waits for a child, killing it where that was asked for or where it hangs."""
    kill_after = asked["kill_after"]
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        lived = time.monotonic() - started
        if lived > asked["limit"] or (kill_after is not None and lived >= kill_after):
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            return 124 if lived > asked["limit"] else code
        left = 0.02 if kill_after is None else kill_after - lived
        time.sleep(min(0.02, max(left, 0.0005)))


def _threads() -> set[str]:
    """Names of the threads beside the main one; jemalloc's minds forks by itself."""
    tasks = Path("/proc/self/task")
    own = str(os.getpid())
    return {(task / "comm").read_text().strip() for task in tasks.iterdir() if task.name != own}


def _main() -> None:
    """Serves requests, one line of JSON each, until the input ends."""
    # What the commands import late; nothing here computes or starts a thread.

    import ci2p_cache.cli.watch
    import ci2p_cache.encoding.whole
    import ci2p_cache.report.plots
    import ci2p_cache.training.run  # noqa: F401
    from ci2p_cache.images.decoder_server import start_decoder_server

    start_decoder_server()
    for line in sys.stdin:
        asked = json.loads(line)
        others = _threads() - {"jemalloc_bg_thd"}
        assert not others, f"a fork would lose the threads {others}"
        if "poll" in asked:
            answer: dict[str, Any] = _poll(asked["poll"])
        elif "start" in asked:
            answer = _start(asked)
        else:
            answer = _run(asked)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
