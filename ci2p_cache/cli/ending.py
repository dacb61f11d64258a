"""How a command ends: the error, the command that helps, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ci2p_cache.cli import render
from ci2p_cache.errors import (
    CacheError,
    IntegrityError,
    InterruptedRunError,
    ResourceError,
    SourceError,
    WeightsError,
    command,
)

__all__ = ["advice", "out_of_memory", "reported_errors"]


def advice(error: CacheError, words: Sequence[str], commands: Iterable[str]) -> str:
    """Returns a command to paste.

    Args:
        error: An error without a hint.
        words: The command line behind `ci2p-cache`.
        commands: The names of all commands; those of a group as "bench encode".
    """
    if type(error) is CacheError:
        return command("doctor", "--json", note="please report this, with what that prints")
    if isinstance(error, SourceError):
        return command("encode", "--help", note="it lists the layouts of images")
    if isinstance(error, WeightsError):
        return command("encode", "--help", note="--weights, --arch and --quality belong together")
    if isinstance(error, IntegrityError):
        # Here, because `--help` needs no yaml, which the cache's names would bring.
        from ci2p_cache.cache.paths import MANIFEST

        caches = (word for word in words if Path(word, MANIFEST).is_file())
        cache = next(caches, None)
        if cache is not None:
            return command("verify", cache)
    if isinstance(error, (IntegrityError, ResourceError)):
        return command("doctor", note="looks at disk, memory and packages")
    return command(*_command_of(words, commands), "--help")


def out_of_memory(error: Exception) -> ResourceError | None:
    """Returns what the command line says of an error with which torch or Python ran out of memory.

    Args:
        error: Any error; where it is another one, None is returned.
    """
    # Named, not imported: torch need not be there when a command ends.
    is_cuda = type(error).__name__ == "OutOfMemoryError"
    is_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    if not (is_cuda or is_cpu or isinstance(error, MemoryError)):
        return None
    text = (str(error).splitlines() or ["no more of it is given"])[0]
    return ResourceError(
        f"memory is used up: {text}",
        hint="the same command with a smaller --batch-size"
        " (train: --accumulate 2 keeps the batch and takes it in two parts)",
    )


def _command_of(words: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Returns the words that name the command, none where no command is named."""
    known = set(commands)
    for number, word in enumerate(words):
        for name in (" ".join(words[number : number + 2]), word):
            if name in known:
                return name.split()
    return []


@contextmanager
def reported_errors(
    *, go_on: str, advise: Callable[[CacheError], str] | None = None
) -> Iterator[None]:
    """Reports the error that ends the block, and exits with its code.

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
