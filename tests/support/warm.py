"""A warm parent that forks one child per command: importing torch takes seconds, a fork none.

The parent has imported everything, has computed nothing and has no thread of its own; each child
then runs the real command line (`ci2p_cache.cli.start.main`) and is a process like any other: own
descriptors, own locks, own signals, own death. Two libraries are preloaded: faults.c makes a chosen
call on the disk fail, crash.c lets a marked picture kill its decoder.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import pty
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.commands import REPO

__all__ = ["LOST_READER", "Child", "Ended", "WarmParent", "build_shim"]

LOST_READER = "|"
"""A pipe whose reader has left, as after `| head -1`."""

_PR_SET_PDEATHSIG = 1
_SPARE_ADDRESSES = 6 * 2**30
"""Address space that a command may add where its memory is limited."""
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def build_shim(folder: Path, name: str = "faults") -> Path | None:
    """Compiles a library of this folder into `folder`; None where there is no compiler."""
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
    out: str
    """What it wrote on stdout; everything where it ran on a terminal."""
    err: str
    """What it wrote on stderr."""
    seconds: float
    """How long it lived."""
    calls: int
    """Calls that changed something below the root; -1 where it was killed."""
    grown_bytes: int
    """Peak memory above that of the warm parent; very large where it was killed."""

    @property
    def told(self) -> str:
        """Both streams, one after the other."""
        return self.out + self.err


class Child:
    """A process that was started and runs beside the test; its process id takes signals."""

    def __init__(self, parent: WarmParent, pid: int, files: Path, terminal: int | None) -> None:
        self._parent = parent
        self._files = files
        self._started = time.monotonic()
        self._shown = b""
        self._reader: threading.Thread | None = None
        self._hangs_up = threading.Event()
        self.pid = pid
        self.returncode: int | None = None
        """As of `subprocess.Popen`; None while it runs."""
        if terminal is not None:
            self._reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
            self._reader.start()

    def _read(self, terminal: int) -> None:
        try:
            while not self._hangs_up.is_set():
                if not select.select([terminal], [], [], 0.02)[0]:
                    continue
                part = os.read(terminal, 65536)
                if not part:
                    break
                self._shown += part
        except OSError:
            # Reading a terminal whose last writer has gone ends in EIO.
            pass
        finally:
            os.close(terminal)

    def hang_up(self) -> None:
        """Takes its terminal away, as closing the window does: it gets SIGHUP, and writes fail."""
        assert self._reader is not None
        self._hangs_up.set()
        self._reader.join()

    def told(self) -> str:
        """Returns what it has written so far, both streams."""
        return self._stream("out") + self._stream("err")

    def _stream(self, name: str) -> str:
        if self._reader is not None:
            return self._shown.decode("utf-8", "replace") if name == "out" else ""
        path = self._files.with_suffix(f".{name}")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._parent.asked({"poll": self.pid})["code"]
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
                raise AssertionError(f"it ran on for {limit:g} s: {self.told()}")
            time.sleep(0.005)
        if self._reader is not None:
            self._reader.join(10)
        return self.told()

    def ended(self, *, kill_after: float | None = None, limit: float = 120.0) -> Ended:
        """Waits for its end; kills it after `kill_after` seconds of its life, if they are given."""
        if kill_after is not None:
            end = self._started + kill_after
            while self.poll() is None and (left := end - time.monotonic()) > 0:
                time.sleep(min(0.01, left))
            self.send_signal(signal.SIGKILL)
        self.wait(limit)
        seconds = time.monotonic() - self._started
        report = self._files.with_suffix(".json")
        found = json.loads(report.read_text()) if report.exists() else {}
        return Ended(
            code=self.returncode if self.returncode is not None else -1,
            out=self._stream("out"),
            err=self._stream("err"),
            seconds=seconds,
            calls=found.get("calls", -1),
            grown_bytes=found.get("grown_bytes", 2**62),
        )


class WarmParent:
    """Starts the warm parent and asks it for children; a context manager.

    Args:
        folder: Where the libraries are built and children write what they say.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        self.has_encoded = False
        """Whether a child has encoded: the first one waits for the decoders' server."""
        shims = [build_shim(folder, name) for name in ("faults", "crash")]
        self.has_shim = all(shims)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if self.has_shim:
            environment["LD_PRELOAD"] = ":".join(map(str, shims))
        self._parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.warm"],
            cwd=REPO, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
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
        *arguments: object,
        root: Path | None = None,
        at: int = 0,
        kind: str = "",
        kill_after: float | None = None,
        limit: float = 120.0,
        **options: Any,
    ) -> Ended:
        """Runs one command in a new child and waits for its end.

        Args:
            arguments: Those of `ci2p-cache`.
            root: The folder whose changes are counted; None where nothing is counted or hit.
            at: Number of the call that is hit, from 1; 0 for none.
            kind: What happens there: EIO, ENOSPC, before, after; trace tells every call.
            kill_after: Seconds after which it gets SIGKILL; None for never.
            limit: Seconds after which it is killed as hung, which is an error.
            options: As for `start`.
        """
        fault = {"root": str(root or self._folder / "nowhere"), "at": at, "kind": kind}
        child = self.start(*arguments, fault=fault, **options)
        return child.ended(kill_after=kill_after, limit=limit)

    def start(
        self,
        *arguments: object,
        module: str = "ci2p_cache.cli.start",
        folder: Path | None = None,
        environment: Mapping[str, str | None] | None = None,
        columns: int | None = None,
        ignoring: Sequence[int] = (),
        limited: bool = False,
        unprivileged: bool = False,
        streams: Mapping[int, str | None] | None = None,
        fault: Mapping[str, object] | None = None,
    ) -> Child:
        """Starts a command in a new child that is not waited for.

        Args:
            arguments: Those of `ci2p-cache`, or of another module.
            module: The module whose `main` runs.
            folder: Where it runs; None for here.
            environment: What is added to the environment; None takes a variable out.
            columns: Runs on a terminal of that width, and not into files.
            ignoring: Signals that it ignores from the start, as under nohup.
            limited: Limits its memory, so that a growth of gigabytes is an error.
            unprivileged: Gives up what lets root read and write everything.
            streams: Number of a standard stream -> the file that it writes to, LOST_READER, or
                None for closed.
            fault: What `run` makes of `root`, `at` and `kind`.
        """
        self._started += 1
        files = self._folder / f"child-{self._started}"
        terminal, name = None, None
        if columns is not None:
            terminal, other = pty.openpty()
            fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            name = os.ttyname(other)
        started = {
            "start": [str(each) for each in arguments],
            "module": module,
            "files": str(files),
            "folder": str(folder or Path.cwd()),
            "environment": dict(environment or {}),
            "terminal": name,
            "ignoring": [int(number) for number in ignoring],
            "limited": limited,
            "unprivileged": unprivileged,
            "streams": list((streams or {}).items()),
            "fault": dict(fault or {}),
        }
        child = Child(self, self.asked(started)["pid"], files, terminal)
        if terminal is not None:
            # Open until the child has opened its own end: a terminal without one is at its end.
            while not files.with_suffix(".on").exists() and child.poll() is None:
                time.sleep(0.001)
            os.close(other)
        return child

    def ranks(self, world_size: int, *arguments: object, **options: Any) -> list[Child]:
        """Starts as many children as torchrun would, with the variables that it sets.

        Args:
            world_size: Number of ranks.
            arguments: As for `start`, the same for all.
            options: As for `start`.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

        # torchrun keeps the store itself: it outlives every rank.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return [
            self.start(
                *arguments,
                environment={
                    "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                },
                **options,
            )
            for rank in range(world_size)
        ]  # fmt: skip

    def decoders(self) -> list[int]:
        """Returns the process ids of the decoders that the children's images are decoded in."""
        servers = [pid for pid in _children(self._parent.pid) if _name(pid) == "ci2p-decoder"]
        return [worker for server in servers for worker in _children(server)]

    def asked(self, what: dict[str, Any]) -> dict[str, Any]:
        """Sends one request to the warm parent and returns its answer."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(what) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        assert answer, "the warm parent died"
        return dict(json.loads(answer))


def _children(parent: int) -> list[int]:
    """Returns the process ids of a process's children."""
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for path in tasks for pid in path.read_text().split()]


def _name(pid: int) -> str:
    """Returns the name that a process has given itself; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _memory(name: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123  # a fork's start
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024


def _settle(asked: dict[str, Any]) -> None:
    """Makes a fork a process of its own: signals, streams, folder, environment, limits."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for ignored in asked["ignoring"]:
        signal.signal(ignored, signal.SIG_IGN)
    files = Path(asked["files"])
    if asked["terminal"] is not None:
        os.setsid()
        descriptor = os.open(asked["terminal"], os.O_RDWR)
        fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
        streams = (descriptor, descriptor, descriptor)
        files.with_suffix(".on").touch()
    else:
        wanted = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        paths = (files.with_suffix(f".{name}") for name in ("out", "err"))
        out, err = (os.open(path, wanted, 0o644) for path in paths)
        streams = (os.open(os.devnull, os.O_RDONLY), out, err)
    for stream, descriptor in enumerate(streams):
        os.dup2(descriptor, stream)
    buffering = -1 if asked["terminal"] is None else 1
    given: dict[int, str | None] = dict(asked["streams"])
    for stream, path in given.items():
        if path is None:
            os.close(stream)
        elif path == LOST_READER:
            reader, writer = os.pipe()
            os.dup2(writer, stream)
            os.close(reader)
        else:
            os.dup2(os.open(path, os.O_WRONLY), stream)
    # Python starts with None where a stream is closed.
    if given.get(0, "") is None:
        sys.stdin = None
    for stream, name, size in ((1, "stdout", buffering), (2, "stderr", 1)):
        is_open = given.get(stream, "") is not None
        file = open(stream, "w", size, encoding="utf-8", closefd=False) if is_open else None  # noqa: SIM115
        setattr(sys, name, file)
    os.chdir(asked["folder"])
    for name, value in asked["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if asked["unprivileged"]:
        # capset(2), version 3: none effective, permitted or inheritable.
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    if asked["limited"]:
        limit = _memory("VmSize") + _SPARE_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _child(asked: dict[str, Any]) -> int:
    """Runs a command in this fork; returns its exit code."""
    _settle(asked)
    shim, fault = ctypes.CDLL(None), asked["fault"]
    counts = bool(fault) and hasattr(shim, "ci2p_fault_arm")
    before = _memory("VmHWM")
    module = importlib.import_module(asked["module"])
    sys.argv = ["ci2p-cache", *asked["start"]]
    # click would name the command after the module that was started with -m.
    sys.modules["__main__"].__spec__ = None
    if counts:
        shim.ci2p_fault_arm(
            os.fsencode(fault["root"]), ctypes.c_long(fault["at"]), fault["kind"].encode()
        )
    code = 0
    try:
        module.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    calls = shim.ci2p_fault_count() if counts else -1
    for written in filter(None, (sys.stdout, sys.stderr)):
        written.flush()
    found = {"calls": calls, "grown_bytes": _memory("VmHWM") - before}
    Path(asked["files"]).with_suffix(".json").write_text(json.dumps(found))
    return code


def _start(asked: dict[str, Any]) -> dict[str, int]:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _child(asked)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return {"pid": child}


def _poll(child: int) -> dict[str, int | None]:
    """Looks whether a started child has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return {"code": os.waitstatus_to_exitcode(status) if done else None}


def _threads() -> set[str]:
    """Names of the threads beside the main one; jemalloc's minds forks by itself."""
    tasks = Path("/proc/self/task")
    own = str(os.getpid())
    return {(task / "comm").read_text().strip() for task in tasks.iterdir() if task.name != own}


def _main() -> None:
    """Serves requests, one line of JSON each, until the input ends."""
    # Ctrl-C on a terminal is pytest's to act on; children have handlers of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ci2p_cache.images.decoders import start_decoder_server

    # First of all: it is a fork, where nothing else is imported yet.
    start_decoder_server()
    # What the commands import late; nothing here computes or starts a thread.
    for name in ("torch.utils.tensorboard", "rich.table", "timm.models"):
        importlib.import_module(name)
    for module in (
        "cli.app", "cli.watch", "encoding.resume", "pictures.previews", "report.charts",
        "training.run", "cache.summary", "cache.verify", "inference.classifier",
        "experiment.run",
    ):  # fmt: skip
        importlib.import_module(f"ci2p_cache.{module}")
    from tests.support.nano import add_nano_models

    add_nano_models()
    # What typer makes of the options at their first use, pydantic's import among it.
    for command in importlib.import_module("ci2p_cache.cli.app").command_tree().commands.values():
        for option in command.params:
            option.get_runtime_param()
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        others = _threads() - {"jemalloc_bg_thd"}
        assert not others, f"a fork would lose the threads {others}"
        print(json.dumps(_poll(asked["poll"]) if "poll" in asked else _start(asked)), flush=True)
    # Taking Python and torch down would take seconds.
    os._exit(0)


if __name__ == "__main__":
    _main()
