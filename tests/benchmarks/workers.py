"""Contestants of the loader benchmark, each in a process of its own.

Threads that one library leaves running, or a heap that it filled, change what another is measured
at: in one process with all peers `LatentLoader` ran at 0.57 of its bound, without them at 1.08. The
processes are forked once the stores are built, so the latents are in memory only once.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Self

import numpy as np

from tests.benchmarks.contestants import Batch, Contestant
from tests.benchmarks.measure import pinned
from tests.benchmarks.stores import Data

__all__ = ["Worker"]

UNTIMED_BATCHES = 4
"""One more than `LatentLoader` reads ahead."""
VERIFIED_BATCHES = 3
WARM_UP_SECONDS = 10.0


class Worker:
    """A contestant that waits for its turns.

    It has been held against the data, and warmed up over `samples` or ten seconds, when this
    returns.

    Raises:
        SystemExit: it reads other values, or fails.
    """

    def __init__(self, contestant: Contestant, data: Data, samples: int) -> None:
        self._contestant = contestant
        # Objects that are never collected are never written to, so their pages stay shared.
        gc.freeze()
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, contestant, data, samples), daemon=True
        )
        with warnings.catch_warnings():
            # Python 3.12 warns where threads run; those of the writers have ended.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()
        self._hear()

    def timed(self, seconds: float) -> float:
        """Images per second over at least so many seconds."""
        self._pipe.send(seconds)
        return self._hear()

    def _hear(self) -> float:
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = "its process ended by itself"
        if isinstance(answer, str):
            raise SystemExit(f"{self._contestant.name} ({self._contestant.key}): {answer}")
        return float(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        # Libraries with threads of their own do not always come to an end.
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, contestant: Contestant, data: Data, samples: int) -> None:
    try:
        stream = contestant.stream()
        verify(stream, contestant, data)
        warm_up(stream, contestant, samples)
        pipe.send(0.0)
        while True:
            pipe.send(_timed(stream, contestant, pipe.recv()))
    except EOFError:
        return
    except BaseException:
        pipe.send(traceback.format_exc())


def verify(stream: Iterator[Batch], contestant: Contestant, data: Data) -> None:
    """Holds the first batches against the data."""
    for _ in range(VERIFIED_BATCHES):
        rows, batch = next(stream)
        wanted = data.latents[rows] if contestant.gives == "int8" else data.dequantised(rows)
        if batch.dtype != wanted.dtype or not np.array_equal(batch, wanted):
            raise ValueError("it reads other values")


def warm_up(stream: Iterator[Batch], contestant: Contestant, samples: int) -> None:
    with pinned(contestant.threads):
        seen, started = 0, time.perf_counter()
        while seen < samples and time.perf_counter() - started < WARM_UP_SECONDS:
            seen += len(next(stream)[0])


def _timed(stream: Iterator[Batch], contestant: Contestant, seconds: float) -> float:
    with pinned(contestant.threads):
        for _ in range(UNTIMED_BATCHES):
            next(stream)
        images, started = 0, time.perf_counter()
        while True:
            images += len(next(stream)[0])
            spent = time.perf_counter() - started
            if spent >= seconds:
                return images / spent
