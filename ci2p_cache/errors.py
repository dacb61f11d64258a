"""Every error this package raises on purpose, with the exit code the command line gives it.

::

    CacheError                      1   a bug of ours when raised bare
    +-- UsageError                  2   (ValueError) a flag or argument cannot be used
    |   +-- UnknownModelError       2   no model of that name
    |   +-- UnknownSplitError       2   (KeyError) the cache has no split of that name
    |   +-- MissingDependencyError  2   (ImportError) an optional package is not installed
    +-- InputDataError              3   what was given as data cannot be used
    |   +-- SourceError             3   the image source is empty, unreadable or of no known layout
    |   +-- ImageDecodeError        3   (ValueError) one image; counted, ends no run
    |   +-- InvalidRowError         3   (LookupError) a row that holds no latent was asked for
    |   +-- TooManyBadImagesError   3   the error budget is used up
    |   +-- WeightsError            3   (ValueError) a weights file does not fit the architecture
    |   +-- TrainingDivergedError   3   the loss stayed non-finite
    +-- RefusedError                4   we could, but it would break a promise
    |   +-- FingerprintMismatchError 4  the folder was made with other settings
    |   +-- LockedError             4   another process writes there
    |   +-- NotACacheError          4   the folder is not one of our caches
    |   +-- IncompleteCacheError    4   encoding has not finished
    |   +-- SaturationError         4   the symbols do not fit the dtype
    |   +-- RunMismatchError        4   the run folder holds a run with other settings
    +-- IntegrityError              5   bytes on disk are not what was committed
    |   +-- ManifestError           5   cache.json or plan.parquet is damaged
    |   +-- ShardError              5   a shard is missing, damaged or not committed
    |   +-- DigestError             5   a downloaded or recorded file has another sha256
    |   +-- CheckpointError         5   a checkpoint is damaged
    +-- ResourceError               6   (OSError) machine or network do not give enough
    |   +-- DiskFullError           6   no space left
    |   +-- WeightsUnavailableError 6   official weights cannot be fetched
    +-- InterruptedRunError 129/130/143 stopped by SIGHUP, Ctrl-C or SIGTERM; resumable
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from functools import partial
from typing import Any

__all__ = [
    "CacheError",
    "CheckpointError",
    "DigestError",
    "DiskFullError",
    "FingerprintMismatchError",
    "ImageDecodeError",
    "IncompleteCacheError",
    "InputDataError",
    "IntegrityError",
    "InterruptedRunError",
    "InvalidRowError",
    "LockedError",
    "ManifestError",
    "MissingDependencyError",
    "NotACacheError",
    "RefusedError",
    "ResourceError",
    "RunMismatchError",
    "SaturationError",
    "ShardError",
    "SourceError",
    "TooManyBadImagesError",
    "TrainingDivergedError",
    "UnknownModelError",
    "UnknownSplitError",
    "UsageError",
    "WeightsError",
    "WeightsUnavailableError",
    "command",
    "size",
    "stop_signals",
    "without_overwrite",
]


class CacheError(Exception):
    """The base of every error of this package.

    Args:
        message: What is wrong, the value got and the value wanted, and where.
        hint: One command, or one sentence, that gets the user on; None where there is none.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CacheError, ValueError):
    """A flag or argument cannot be used."""

    exit_code = 2


class UnknownModelError(UsageError):
    """No model of that name is registered."""


class UnknownSplitError(UsageError, KeyError):
    """A cache has no split of that name."""

    # KeyError shows its argument in quotes.
    __str__ = Exception.__str__


class MissingDependencyError(UsageError, ImportError):
    """A package that this call needs is not installed."""


class InputDataError(CacheError):
    """What was given as data cannot be used."""

    exit_code = 3


class SourceError(InputDataError):
    """The image source is empty, unreadable or of no known layout."""


class ImageDecodeError(InputDataError, ValueError):
    """One image cannot be decoded; its row becomes invalid and the run continues."""


class InvalidRowError(InputDataError, LookupError):
    """A row of a split holds no latent: its image could not be decoded, or it is in no subset.

    No IndexError: that would end a loop over rows without a word.
    """


class TooManyBadImagesError(InputDataError):
    """More images failed than `max_errors` allows."""


class WeightsError(InputDataError, ValueError):
    """A weights file does not fit the architecture; the message says which keys or shapes."""


class TrainingDivergedError(InputDataError):
    """The loss stayed non-finite; the last good checkpoint remains."""


class RefusedError(CacheError):
    """Nothing was changed, because going on would break a promise."""

    exit_code = 4


class FingerprintMismatchError(RefusedError):
    """The folder was made with other values or another layout; the message lists the fields."""


class LockedError(RefusedError):
    """Another process writes to this folder."""


class NotACacheError(RefusedError):
    """The folder exists and is not one of our caches."""


class IncompleteCacheError(RefusedError):
    """Encoding has not finished."""


class SaturationError(RefusedError):
    """More symbols than allowed do not fit the dtype."""


class RunMismatchError(RefusedError):
    """The run folder holds a run with other settings."""


class IntegrityError(CacheError):
    """Bytes on disk are not what was committed."""

    exit_code = 5


class ManifestError(IntegrityError):
    """`cache.json`, `plan.parquet` or a commit record is damaged or of an unknown version."""


class ShardError(IntegrityError):
    """A shard is missing, damaged or not committed; the message names it and its rows."""


class DigestError(IntegrityError):
    """A file's sha256 is not the recorded one."""


class CheckpointError(IntegrityError):
    """A checkpoint is damaged or incomplete."""


class ResourceError(CacheError, OSError):
    """The machine or the network does not give what is needed; resumable."""

    exit_code = 6


class DiskFullError(ResourceError):
    """No space is left on the device."""


class WeightsUnavailableError(ResourceError):
    """Official weights cannot be fetched; the message names the three ways to get an encoder."""


class InterruptedRunError(CacheError):
    """A signal stopped the run; the same command continues where it stopped.

    Args:
        message: What was stopped and what is safe on disk.
        signal_number: The signal's number; the exit code is 128 plus it.
        hint: The command that continues.
    """

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled by default with the message alone.
        make = partial(type(self), signal_number=self.exit_code - 128, hint=self.hint)
        return make, self.args


def size(num_bytes: float) -> str:
    """Formats a number of bytes, 1000-based."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals after which a run can continue later: SIGINT, SIGTERM and SIGHUP.

    Signals that this process ignores are left out and stay ignored. `nohup` starts a command with
    SIGHUP ignored, and a shell script its background jobs with SIGINT ignored. So are signals whose
    handler is not Python's, because Python could not put it back.
    """
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return tuple(
        number for number in wanted if signal.getsignal(number) not in (signal.SIG_IGN, None)
    )


def without_overwrite(words: Sequence[str]) -> list[str]:
    """Returns a command line that continues another, which may have removed a folder first.

    Args:
        words: Those behind `ci2p-cache`.
    """
    left = iter(words)
    kept = []
    for word in left:
        if word == "--overwrite":
            next(left, None)
        elif not word.startswith("--overwrite="):
            kept.append(word)
    return kept


def command(*words: object, note: str = "") -> str:
    """Returns a `ci2p-cache` command for a hint, quoted so that a shell takes it as it stands.

    Args:
        words: Subcommand, options and paths, one word each.
        note: What to say behind it, for people.
    """
    line = shlex.join(["ci2p-cache", *map(str, words)])
    return f"{line}   ({note})" if note else line
