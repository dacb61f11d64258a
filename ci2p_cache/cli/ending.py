"""How a command ends: with its error told, and with the exit code that the error has."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ci2p_cache.cli import render
from ci2p_cache.errors import CacheError, InterruptedRunError

__all__ = ["told_errors"]


@contextmanager
def told_errors(*, go_on: str) -> Iterator[None]:
    """Tells of the error that ends the block, and exits with its code.

    Args:
        go_on: What to run or do after an interruption that does not say so itself.
    """
    try:
        try:
            yield
        except KeyboardInterrupt:
            # Where work is guarded it ends as an InterruptedRunError; so nothing is half done.
            raise InterruptedRunError(
                "interrupted; what was saved is safe", signal_number=signal.SIGINT
            ) from None
    except CacheError as error:
        if isinstance(error, InterruptedRunError):
            error.hint = error.hint or go_on
        render.fail(error)
        sys.exit(error.exit_code)
