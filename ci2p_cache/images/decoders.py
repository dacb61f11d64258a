"""Decoding in separate processes: a decoder that crashes costs one image, not the run.

Image decoders are C code that reads what strangers wrote. One that dies, loops or allocates without
end takes a worker process with it; the file it held is known, is tried once more in a fresh worker,
and is then a bad image like any other.

The first process of its kind is forked from this one, so torch is imported and held in memory once
for both. Where that is not safe, a fresh interpreter is started.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ci2p_cache.errors import (
    CacheError,
    ImageDecodeError,
    MissingDependencyError,
    ResourceError,
    UsageError,
)
from ci2p_cache.specs import ImageSpec, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_MESSAGE_BYTES", "MOST_AT_ONCE", "RAISED", "Decoders", "ViewedImage",
           "start_decoder_server"]  # fmt: skip

MAX_MESSAGE_BYTES = 2**17
"""A key of 4,096 bytes, all of them escaped, and the boxes of some hundred crops fit."""

MOST_AT_ONCE = 4
"""Images whose keys fit into one message."""

RAISED: dict[str, type[CacheError]] = {
    error.__name__: error for error in (ImageDecodeError, MissingDependencyError, UsageError)
}
"""Our own errors that an answer may name; any other is a bug and comes as its traceback."""

_SERVER_WORDS = [sys.executable, "-P", "-W", "ignore", "-m", "ci2p_cache.images.decoder_process"]
"""What starts the server."""

_HELD_BACK = (signal.SIGINT, signal.SIGHUP)
"""Ctrl-C and the terminal's end go to all its processes; the server ends with its owner."""

_ATTEMPTS = 2
"""A second death on the same file, in a worker that decoded nothing before it, is the file's."""

_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that no decoder raises itself: the machine or a person did."""

_MEMORY_BYTES = 2**23
"""Shared memory that a worker holds between images; more is given back after a large one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedImage:
    """One decoded image, cut into views."""

    views: Tensor
    """uint8 (V, 3, size, size), 0-255, contiguous, owning its memory."""
    boxes: list[dict[str, Any]]
    """Where each view was cut: the fields of a `views.CropBox`."""
    width: int
    """Pixels per row in the file."""
    height: int
    """Rows in the file."""
    mode: str
    """Pillow's name of the file's pixel kind."""
    format: str
    """Format by content."""
    orientation: int
    """EXIF orientation, 1-8."""


class Decoders:
    """Turns the bytes of image files into views, in worker processes.

    `decode` may be called from any number of threads; each call uses a separate worker, started
    when none is idle.

    Args:
        image_spec: How images are decoded and resized.
        view_spec: Which views are cut; None: one, the centre square.

    Raises:
        ResourceError: the process that starts workers cannot be started.
    """

    def __init__(self, image_spec: ImageSpec, view_spec: ViewSpec | None = None) -> None:
        self._image_spec = image_spec
        self._view_spec = view_spec or ViewSpec(kind="none")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        start_decoder_server()

    def end_with(self, owner: object) -> Self:
        """Ends the workers when `owner` is no longer used, if nothing closed them before."""
        weakref.finalize(owner, self.close)
        return self

    def close(self) -> None:
        """Ends all workers; a `decode` that waits for one raises."""
        with self._lock:
            self._closed = True
            for worker in self._idle:
                self._all.discard(worker)
                worker.close()
            self._idle.clear()
            for worker in self._all:
                worker.hang_up()

    def decode(
        self, data: bytes, *, split: str, key: str, numbers: Sequence[int] | None = None
    ) -> ViewedImage:
        """Decodes one image and cuts its views.

        Args:
            data: The whole file.
            split: The sample's split; `train` has more views.
            key: The sample's key; random crops are drawn from it.
            numbers: Of the views to cut; None: all that are stored. A crop may have any number.

        Raises:
            ImageDecodeError: the content cannot be decoded, or the decoder died of it, twice.
            MissingDependencyError: there is no JPEG decoder.
            ResourceError: a worker was killed from outside (SIGKILL: the kernel does so when memory
                runs out), or none can be started.
        """
        if numbers is None:
            numbers = range(self._view_spec.num_views(split))
        answer = self._answer(data, {"split": split, "key": key, "numbers": [*numbers]})
        return ViewedImage(**answer)

    def views(
        self, images: Sequence[tuple[bytes, str]], *, split: str, numbers: Sequence[int]
    ) -> Tensor:
        """Cuts one view of each of a few images at once: less time than one by one.

        Args:
            images: The whole file and the key of each, `MOST_AT_ONCE` at most.
            split: Their split.
            numbers: Of the view of each image; as `decode` takes them.

        Returns:
            uint8 (N, 3, size, size), 0-255, contiguous. Errors are those of `decode`, of any of
            the images.
        """
        assert len(images) <= MOST_AT_ONCE, "their keys fit into a message"
        keys, sizes = [key for _, key in images], [len(data) for data, _ in images]
        data = b"".join(data for data, _ in images)
        asked = {"split": split, "keys": keys, "sizes": sizes, "numbers": [*numbers]}
        views: Tensor = self._answer(data, asked)["views"]
        return views

    def pixels(self, data: bytes) -> Tensor:
        """Decodes one image whole; errors as `decode` has them.

        Returns:
            uint8 (3, H, W), 0-255, contiguous; turned where EXIF is applied.
        """
        pixels: Tensor = self._answer(data, {})["views"]
        return pixels

    def _answer(self, data: bytes, wanted: dict[str, Any]) -> dict[str, Any]:
        deaths = losses = 0
        while True:
            worker = self._take(fresh=deaths > 0)
            answer = worker.ask(data, wanted)
            if "retires" in answer:
                self._give_back(worker, retires=answer.pop("retires"))
                if "bug" in answer:
                    raise CacheError(f"decoding failed by a mistake of ours: {answer['bug']}")
                if "raised" in answer:
                    raise RAISED[answer["raised"]](answer["message"], hint=answer["hint"])
                return answer
            self._forget(worker)
            if "refused" in answer:
                raise _no_process(answer["refused"])
            if "died" in answer:
                deaths += 1
                if deaths == _ATTEMPTS:
                    raise _cause_of_death(answer["died"])
            else:
                losses += 1
                if losses == _ATTEMPTS:
                    raise _server_gone()

    def _take(self, *, fresh: bool) -> _Worker:
        with self._lock:
            self._require_open()
            if self._idle and not fresh:
                return self._idle.pop()
        worker = _Worker(self._image_spec, self._view_spec)
        with self._lock:
            if not self._closed:
                self._all.add(worker)
                return worker
        worker.close()
        raise _stopped()

    def _give_back(self, worker: _Worker, *, retires: bool) -> None:
        with self._lock:
            if not self._closed and not retires:
                self._idle.append(worker)
                return
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.close()
        self._require_open()

    def _require_open(self) -> None:
        if self._closed:
            raise _stopped()


def _stopped() -> ResourceError:
    return ResourceError("decoding was stopped")


class _Worker:
    """A worker process as its owner sees it: a channel, and memory that both can reach."""

    def __init__(self, image_spec: ImageSpec, view_spec: ViewSpec) -> None:
        self._image_spec = image_spec
        self._view_spec = view_spec
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._memory = os.memfd_create("ci2p-cache decoder")
        with theirs:
            _SERVER.fork(theirs.fileno(), self._memory)
        self._send({"image": image_spec.to_dict(), "views": view_spec.to_dict()})

    def ask(self, data: bytes, wanted: dict[str, Any]) -> dict[str, Any]:
        """Lets the worker decode: views of a `key`, one each of several `keys`, or all pixels.

        Returns:
            `retires`, and `views` and what else is known of the image, or `raised` or `bug`; or
            `died` or `refused` alone; nothing where server and worker have both gone.
        """
        import torch

        written = 0
        while written < len(data):
            written += os.pwrite(self._memory, memoryview(data)[written:], written)
        self._send({"bytes": len(data)} | wanted)
        answer = self._receive()
        if "retires" in answer and not {"raised", "bug"} & answer.keys():
            if "split" in wanted:
                size = self._image_spec.size
                shape = [len(wanted["numbers"]), 3, size, size]
            else:
                shape = answer.pop("shape")
                assert math.prod(shape) <= 3 * self._image_spec.max_pixels, "a worker refuses more"
            answer["views"] = views = torch.empty(shape, dtype=torch.uint8)
            got = os.preadv(self._memory, [views.numpy().data.cast("B")], 0)
            assert got == views.numel(), "a worker writes views before it answers"
        if len(data) > _MEMORY_BYTES or not wanted:
            os.ftruncate(self._memory, 0)
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        # When the worker has stopped listening, its last words can still be received.
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode())

    def _receive(self) -> dict[str, Any]:
        for _ in range(2):
            # Comes first where the worker died before it read the request.
            with contextlib.suppress(ConnectionResetError):
                message = self._channel.recv(MAX_MESSAGE_BYTES)
                answer: dict[str, Any] = json.loads(message) if message else {}
                return answer
        return {}

    def hang_up(self) -> None:
        """Wakes the thread that waits for an answer; the worker ends when it next looks."""
        self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the worker and gives back what it shared."""
        self._channel.close()
        os.close(self._memory)


def _cause_of_death(code: int) -> CacheError:
    """Returns what became of a decoder, as an error of its image or of the machine."""
    if -code in _FROM_OUTSIDE:
        return ResourceError(
            f"the process that decodes was killed by {signal.Signals(-code).name}, twice on one "
            "image; the kernel does so when memory runs out",
            hint="free memory or use fewer --workers, then run the same command",
        )
    if -code == signal.SIGXCPU:
        return ImageDecodeError("the decoder computed for minutes without coming to an end")
    if code < 0:
        return ImageDecodeError(f"the decoder crashed on it ({signal.Signals(-code).name})")
    return ImageDecodeError(f"the decoder ended its process (exit code {code})")


class _Server:
    """The process that forks workers: one for this process and whatever is forked from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Starts it unless it runs; it imports torchvision meanwhile and ends with this process."""
        with self._lock:
            self._started()

    def fork(self, channel: int, memory: int) -> None:
        """Starts a worker, which has descriptors of a socket to answer on and of shared memory."""
        with self._lock:
            for _ in range(2):
                control = self._started()
                try:
                    socket.send_fds(control, [b"fork"], [channel, memory])
                except (BrokenPipeError, ConnectionResetError):
                    control.close()
                    self._control = None
                else:
                    return
        raise _server_gone()

    def _started(self) -> socket.socket:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                if _forks_well():
                    _fork(theirs.fileno())
                else:
                    _spawn(theirs.fileno())
            self._control = ours
            atexit.register(ours.close)
        return self._control


_SERVER = _Server()


def start_decoder_server() -> None:
    """Starts the process that decoder workers are forked from, if it does not run yet."""
    _SERVER.start()


def _server_gone() -> ResourceError:
    return ResourceError(
        "the process that starts decoders has ended, twice",
        hint=f"{shlex.join(_SERVER_WORDS)} < /dev/null   (says why)",
    )


def _forks_well() -> bool:
    """Says whether a fork of this process is as good as a fresh interpreter.

    It has one thread, and nothing yet that decodes, so no setting of anybody's is inherited.
    """
    threads = list(Path("/proc/self/task").iterdir())
    return len(threads) == 1 and not {"PIL", "torch"} & sys.modules.keys()


def _fork(control: int) -> None:
    """Makes the server of a copy of this process, of which it keeps the imports alone.

    Raises:
        ResourceError: there is no room for another process.
    """
    import torch  # noqa: F401

    # Handlers of this process must not run in the server, not even for a moment.
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        if os.fork() == 0:
            _become_server(control)
    except OSError as error:
        raise _no_process(error) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _become_server(control: int) -> NoReturn:
    # What no collection touches stays shared. Nor may one close the files of the process before:
    # their descriptors will be other files'.
    gc.freeze()
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor, place in ((control, 0), (null, 1), (null, 2)):
            os.dup2(descriptor, place)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.update(_environment())
        warnings.simplefilter("ignore")
        signal.pthread_sigmask(signal.SIG_SETMASK, _HELD_BACK)
        from ci2p_cache.images.decoder_process import serve_decoders

        serve_decoders()
    finally:
        os._exit(1)


def _environment() -> dict[str, str]:
    """Returns what the server's environment has beside this process's own."""
    return {
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        # More threads would be lost in its forks, and none of them is wanted.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }


def _spawn(control: int) -> None:
    """Starts a fresh interpreter, because a fork of one with threads is not safe."""
    try:
        os.posix_spawn(
            sys.executable,
            _SERVER_WORDS,
            os.environ | _environment(),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, control, 0),
                # Who reads our output waits for all that hold it, and this one may still be
                # importing when we have gone. libjpeg's and libtiff's complaints go there too;
                # what counts of them comes as an error.
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsigmask=_HELD_BACK,
        )
    except OSError as error:
        raise _no_process(error) from error


def _no_process(error: object) -> ResourceError:
    return ResourceError(
        f"no process for decoding can be started: {error}",
        hint="fewer --workers, or a higher limit of processes (ulimit -u)",
    )
