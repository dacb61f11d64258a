"""What to do about an error that does not say it itself: one command that gets the user on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ci2p_cache.errors import (
    CacheError,
    IntegrityError,
    ResourceError,
    SourceError,
    WeightsError,
    command,
)

__all__ = ["advice", "out_of_memory"]


def advice(error: CacheError, words: Sequence[str], commands: Iterable[str]) -> str:
    """Returns a command to paste.

    Args:
        error: An error without a hint of its own.
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
    told = (str(error).splitlines() or ["no more of it is given"])[0]
    return ResourceError(
        f"memory is used up: {told}",
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
