"""How a command ends: with its error told, and with the exit code that the error has."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ci2p_cache.cli import render
from ci2p_cache.cli.advice import out_of_memory
from ci2p_cache.errors import CacheError, InterruptedRunError

__all__ = ["told_errors"]


@contextmanager
def told_errors(*, go_on: str, advise: Callable[[CacheError], str] | None = None) -> Iterator[None]:
    """Tells of the error that ends the block, and exits with its code.

    Args:
        go_on: What to run or do after an interruption.
        advise: What to run or do after any other error that does not; None says nothing then.
    """
    try:
        yield
    except KeyboardInterrupt:
        # Where work is guarded it ends as an InterruptedRunError; so nothing is half done.
        _end(
            InterruptedRunError("interrupted; what was saved is safe", signal_number=signal.SIGINT),
            go_on,
        )
    except InterruptedRunError as stopped:
        # Here the command itself is known; several ranks continue with torchrun's.
        if os.environ.get("WORLD_SIZE", "1") == "1":
            stopped.hint = go_on
        _end(stopped, go_on)
    except Exception as caught:
        error = caught if isinstance(caught, CacheError) else out_of_memory(caught)
        if error is None:
            traceback.print_exc()
            error = CacheError(f"this is a bug of ci2p-cache: {caught!r}")
        _end(error, advise(error) if advise is not None and error.hint is None else None)


def _end(error: CacheError, hint: str | None) -> NoReturn:
    error.hint = error.hint or hint
    render.fail(error)
    sys.exit(error.exit_code)
