"""A stop signal as a flag that the loop looks at, so that a step and a save end whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from ci2p_cache.errors import stop_signals

__all__ = ["StopSignal"]


class StopSignal:
    """Notes the first of `stop_signals()` that comes while its block runs.

    A second one meets the handlers that were there before, so it ends the process at once. Only
    SIGHUP is ignored then: a terminal that closes sends it two or three times, through the kernel
    and through its shell. Outside the main thread, where Python delivers no signals, it notes
    nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def is_set(self) -> bool:
        """Returns whether a signal has come."""
        return self.number is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._put_back()
        if signal.SIGHUP in self._earlier:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _put_back(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
