"""Decoding in processes of its own: a decoder that crashes costs one image, not the run.

Image decoders are C code that reads what strangers wrote. One that dies, loops or allocates without
end takes a worker process with it; the file it held is known, is tried once more in a fresh worker,
and is then a bad image like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ci2p_cache.errors import CacheError, ImageDecodeError, ResourceError
from ci2p_cache.images.decoder_process import MAX_MESSAGE_BYTES, RAISED
from ci2p_cache.images.decoder_server import fork_decoder, server_gone, start_decoder_server
from ci2p_cache.images.views import CropBox
from ci2p_cache.specs import ImageSpec, ViewSpec

__all__ = ["Decoders", "ViewedImage"]

_ATTEMPTS = 2
"""A second death on the same file, in a worker that decoded nothing before it, is the file's."""

_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that no decoder raises itself: the machine or a person did."""


_KEPT_BYTES = 2**23
"""Shared memory that a worker keeps between images; more is given back after a large one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedImage:
    """One decoded image, cut into views."""

    views: torch.Tensor
    """uint8 (V, 3, size, size), 0-255, contiguous, owning its memory."""
    boxes: tuple[CropBox, ...]
    """Where each view was cut."""
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

    `decode` may be called from any number of threads; each call uses a worker of its own, started
    when none is idle.

    Args:
        image_spec: How images are decoded and resized.
        view_spec: Which views are cut.

    Raises:
        ResourceError: the process that starts workers cannot be started.
    """

    def __init__(self, image_spec: ImageSpec, view_spec: ViewSpec) -> None:
        self._image_spec = image_spec
        self._view_spec = view_spec
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        start_decoder_server()

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

    def decode(self, data: bytes, *, split: str, key: str) -> ViewedImage:
        """Decodes one image and cuts its views.

        Args:
            data: The whole file.
            split: The sample's split; `train` has more views.
            key: The sample's key; random crops are drawn from it.

        Raises:
            ImageDecodeError: the content cannot be decoded, or the decoder died of it, twice.
            MissingDependencyError: there is no JPEG decoder.
            ResourceError: a worker was killed from outside (SIGKILL: the kernel does so when memory
                runs out), or none can be started.
        """
        deaths = losses = 0
        while True:
            worker = self._take(fresh=deaths > 0)
            answer = worker.ask(data, split=split, key=key)
            if "views" in answer or "raised" in answer or "bug" in answer:
                self._give_back(worker, retires=answer.pop("retires"))
                return self._image(answer)
            self._forget(worker)
            if "refused" in answer:
                raise ResourceError(
                    f"no process for decoding can be started: {answer['refused']}",
                    hint="fewer --workers, or a higher limit of processes (ulimit -u)",
                )
            if "died" in answer:
                deaths += 1
                if deaths == _ATTEMPTS:
                    raise _cause_of_death(answer["died"])
            else:
                losses += 1
                if losses == _ATTEMPTS:
                    raise server_gone()

    def _take(self, *, fresh: bool) -> _Worker:
        with self._lock:
            if self._idle and not fresh and not self._closed:
                return self._idle.pop()
        worker = _Worker(self._image_spec, self._view_spec)
        with self._lock:
            if not self._closed:
                self._all.add(worker)
                return worker
        worker.close()
        raise ResourceError("decoding was stopped")

    def _give_back(self, worker: _Worker, *, retires: bool) -> None:
        with self._lock:
            if not self._closed and not retires:
                self._idle.append(worker)
                return
        self._forget(worker)

    def _forget(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
            closed = self._closed
        worker.close()
        if closed:
            raise ResourceError("decoding was stopped")

    @staticmethod
    def _image(answer: dict[str, Any]) -> ViewedImage:
        if "bug" in answer:
            raise CacheError(f"decoding failed by a mistake of ours: {answer['bug']}")
        if "raised" in answer:
            raise RAISED[answer["raised"]](answer["message"], hint=answer["hint"])
        boxes = tuple(CropBox(**box) for box in answer.pop("boxes"))
        return ViewedImage(boxes=boxes, **answer)


class _Worker:
    """A worker process as its owner sees it: a channel, and memory that both can reach."""

    def __init__(self, image_spec: ImageSpec, view_spec: ViewSpec) -> None:
        self._view_spec = view_spec
        self._size = image_spec.size
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._memory = os.memfd_create("ci2p-cache decoder")
        with theirs:
            fork_decoder(theirs.fileno(), self._memory)
        self._tell({"image": image_spec.to_dict(), "views": view_spec.to_dict()})

    def ask(self, data: bytes, *, split: str, key: str) -> dict[str, Any]:
        """Lets the worker decode.

        Returns:
            `views` and what else is known of the image, or `raised`, `bug`, `died`, `refused`;
            nothing where server and worker have both gone.
        """
        _write(self._memory, data)
        self._tell({"bytes": len(data), "split": split, "key": key})
        answer = self._hear()
        if "boxes" in answer:
            shape = (self._view_spec.num_views(split), 3, self._size, self._size)
            answer["views"] = views = torch.empty(shape, dtype=torch.uint8)
            got = os.preadv(self._memory, [views.numpy().data.cast("B")], 0)
            assert got == views.numel(), "a worker writes views before it answers"
        if len(data) > _KEPT_BYTES:
            os.ftruncate(self._memory, 0)
        return answer

    def _tell(self, message: dict[str, Any]) -> None:
        # Where no one listens any more, the last words are still to be heard.
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(message).encode())

    def _hear(self) -> dict[str, Any]:
        for _ in range(2):
            try:
                message = self._channel.recv(MAX_MESSAGE_BYTES)
            except ConnectionResetError:
                # Comes first where the worker died before it read the request.
                continue
            answer: dict[str, Any] = json.loads(message) if message else {}
            return answer
        return {}

    def hang_up(self) -> None:
        """Wakes whoever waits for an answer; the worker ends when it next looks."""
        self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the worker and gives back what it shared."""
        self._channel.close()
        os.close(self._memory)


def _write(memory: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(memory, memoryview(data)[written:], written)


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
