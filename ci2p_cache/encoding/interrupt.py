"""A stop signal as an error that unwinds cleanly, so that nothing half-done is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ci2p_cache.errors import InterruptedRunError, stop_signals

__all__ = ["interruptible"]


class _Signalled(KeyboardInterrupt):
    """Passes through code that catches `Exception`, as modules do while they are imported."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Raises `InterruptedRunError` in the block at the first of `stop_signals()`.

    A second signal meets the handlers that were there before, so it ends the process at once. Only
    SIGHUP is ignored then: a terminal that closes sends it two or three times. Outside the main
    thread, where Python delivers no signals, the block runs as it is.

    Args:
        message: What was interrupted and what is safe.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in stop_signals()}

    def stop(number: int, _: FrameType | None) -> None:
        for each, handler in earlier.items():
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else handler)
        raise _Signalled(number)

    for number in earlier:
        signal.signal(number, stop)
    try:
        yield
    except _Signalled as signalled:
        raise InterruptedRunError(message, signal_number=signalled.number) from None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
