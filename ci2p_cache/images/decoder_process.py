"""The process in which images are decoded: a server that forks a worker for each channel it gets.

::

    Decoders (decoders.py) --channel, memory--> server --fork--> worker: bytes -> views
              ^                                   |                        |
              +---- "died: SIGSEGV" --------------+                        |
              +---- answer, views in the shared memory <-------------------+

A fork of its owner, or run as `python -m ci2p_cache.images.decoder_process`, with the control
socket as standard input. The server has one thread and computes nothing, so a fork of it is whole
and costs milliseconds. Messages are JSON, one per packet; nothing is pickled. Ctrl-C reaches the
whole process group and is blocked here: workers and server end when the other end of their socket
does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import time
import traceback
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch

from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.decoders import MAX_MESSAGE_BYTES, RAISED
from ci2p_cache.images.views import image_views
from ci2p_cache.process import give_back_large_blocks, put_off_compiler
from ci2p_cache.specs import ImageSpec, ViewSpec

__all__ = ["serve_decoders"]

_PR_SET_PDEATHSIG = 1

_CPU_SECONDS = 120
"""Processor time for one image. A PNG of 89 million pixels with alpha took 6 s (measured)."""

_BYTES_PER_PIXEL = 24
_SPARE_BYTES = 2**29
"""What decoding may allocate: `max_pixels` times the first, plus the second. A PNG with alpha takes
14 bytes per pixel at its peak in Pillow, a JPEG 7 (measured at 89 million pixels)."""


class _Server:
    """Forks a worker per request, ends those whose owner has hung up, says how they ended.

    Args:
        control: Where requests come from; each carries a channel and a piece of memory.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._channels: dict[int, socket.socket] = {}
        self._alarm, writing = os.pipe()
        for descriptor in (self._alarm, writing):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writing)

    def serve(self) -> None:
        """Serves until the other end of `control` is closed."""
        while True:
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            poll.register(self._alarm, select.POLLIN)
            for channel in self._channels.values():
                poll.register(channel, 0)
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._alarm in ready:
                os.read(self._alarm, 4096)
                self._reap()
            for worker, channel in self._channels.items():
                if channel.fileno() in ready:
                    os.kill(worker, signal.SIGKILL)
            if self._control.fileno() in ready:
                message, descriptors, _, _ = socket.recv_fds(self._control, 16, 2)
                if not message:
                    return
                self._fork(socket.socket(fileno=descriptors[0]), descriptors[1])

    def _fork(self, channel: socket.socket, memory: int) -> None:
        try:
            worker = os.fork()
        except OSError as error:
            _send(channel, {"refused": str(error)})
            channel.close()
        else:
            if worker == 0:
                for other in (self._control, *self._channels.values()):
                    other.close()
                _live(channel, memory)
            self._channels[worker] = channel
        os.close(memory)

    def _reap(self) -> None:
        while self._channels:
            worker, status = os.waitpid(-1, os.WNOHANG)
            if worker == 0:
                return
            with self._channels.pop(worker) as channel:
                _send(channel, {"died": os.waitstatus_to_exitcode(status)})


def _send(channel: socket.socket, answer: dict[str, Any]) -> bool:
    """Sends an answer; returns whether anyone is there to take it."""
    try:
        channel.send(json.dumps(answer).encode())
    except OSError:
        return False
    return True


def _live(channel: socket.socket, memory: int) -> None:
    """A worker's whole life; never returns."""
    code = 1
    try:
        server = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if os.getppid() == server:
            _work(channel, memory)
        code = 0
    finally:
        os._exit(code)


def _work(channel: socket.socket, memory: int) -> None:
    """Decodes the images of one request after another until the channel is closed."""
    specs = json.loads(channel.recv(MAX_MESSAGE_BYTES))
    image_spec = ImageSpec.from_dict(specs["image"])
    view_spec = ViewSpec.from_dict(specs["views"])
    limit = _bound_memory(image_spec)
    names = ("width", "height", "mode", "format", "orientation")

    def views_of(data: bytes, key: str, numbers: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        _bound_time()
        image = decode_image(data, image_spec, planar=False)
        views, boxes = image_views(
            image, image_spec, view_spec, split=asked["split"], key=key, numbers=numbers
        )
        facts = {name: getattr(image, name) for name in names}
        return views, facts | {"boxes": [asdict(box) for box in boxes]}

    while message := channel.recv(MAX_MESSAGE_BYTES):
        asked = json.loads(message)
        answer: dict[str, Any] = {}
        data = os.pread(memory, asked["bytes"], 0)
        try:
            if "key" in asked:
                views, answer = views_of(data, asked["key"], asked["numbers"])
            elif "keys" in asked:
                ends = [0, *accumulate(asked["sizes"])]
                parts = [data[start:end] for start, end in pairwise(ends)]
                found = zip(parts, asked["keys"], asked["numbers"], strict=True)
                views = torch.cat([views_of(part, key, [one])[0] for part, key, one in found])
            else:
                _bound_time()
                views = decode_image(data, image_spec).pixels
                answer["shape"] = list(views.shape)
        except tuple(RAISED.values()) as error:
            answer = {"raised": type(error).__name__, "message": str(error), "hint": error.hint}
        except MemoryError:
            answer = {"raised": "ImageDecodeError", "message": "it takes too much memory to decode"}
        except Exception:
            answer = {"bug": traceback.format_exc()}
        else:
            os.pwrite(memory, views.numpy().data.cast("B"), 0)
        # What an image left behind must not make the next one fail.
        if not _send(channel, answer | {"retires": _data_bytes() > limit}):
            return


def _data_bytes() -> int:
    """Returns the private memory that this process has mapped, as RLIMIT_DATA counts it."""
    return int(Path("/proc/self/statm").read_bytes().split()[5]) * resource.getpagesize()


def _bound_memory(spec: ImageSpec) -> int:
    """Makes allocations fail where no image inside `max_pixels` needs them; no core is dumped.

    Returns the bytes of private memory up to which a worker takes another image.
    """
    retires = _data_bytes() + _SPARE_BYTES // 2
    limit = retires + _SPARE_BYTES // 2 + _BYTES_PER_PIXEL * spec.max_pixels
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    return retires


def _bound_time() -> None:
    """Lets the kernel end a decoder that computes for ever; only processor time counts."""
    limit = int(time.process_time()) + 1 + _CPU_SECONDS
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def serve_decoders() -> NoReturn:
    """Imports what decodes and resizes, and serves the socket on standard input; never returns."""
    # A fork has its owner's command line; `ps -o comm` and `top` show this.
    Path("/proc/self/comm").write_text("ci2p-decoder")
    # A fork has read the variables that say so before they were set.
    torch.set_num_threads(1)
    give_back_large_blocks()
    put_off_compiler()
    for name in ("torchvision.io", "torchvision.transforms.v2.functional"):
        # Before any fork, for all workers.
        importlib.import_module(name)
    _Server(socket.socket(fileno=0)).serve()
    os._exit(0)


if __name__ == "__main__":
    serve_decoders()
