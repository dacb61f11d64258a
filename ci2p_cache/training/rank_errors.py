"""How an error on one rank becomes the error of all of them.

A rank that ends early closes its connections, which ends the collective that the others are in;
they then read from torchrun's store what it died of. So an error on any rank is raised on all of
them, and rank 0 prints it. No timeout is involved, so rank 0 may take its time to save.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from ci2p_cache import errors
from ci2p_cache.errors import CacheError, InterruptedRunError, ResourceError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["collective", "first_error", "wait_until_told"]

_TOLD_TIMEOUT = timedelta(seconds=20)
"""Longest that a failed rank waits for rank 0 to take up its error; torchrun needs 30 s more."""
_ERROR, _TOLD = "error", "told"
"""Keys of the store: the first error, and that rank 0 has taken it up."""

_log = logging.getLogger(__name__)


class _LostRankError(Exception):
    """A collective ended without a result, because a process that takes part in it has ended."""


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Tells a broken connection from errors of ours, around one collective."""
    try:
        yield
    except RuntimeError as error:
        raise _LostRankError(str(error)) from error


def first_error(store: Store, error: Exception, *, rank: int) -> Exception:
    """Returns what all ranks raise, given what this one met: the first error of any of them.

    Args:
        store: The group's part of torchrun's store, which outlives every rank.
        error: What this rank has met.
        rank: This rank; 0 also notes that it knows.

    Returns:
        `error` itself where it came first, where it is a CacheError, or where the store is gone; a
        CacheError that names the other rank otherwise.
    """
    own = error
    if isinstance(error, _LostRankError):
        own = ResourceError(
            "another rank of this run was killed or cannot be reached (out of memory?); what "
            "was trained since the last checkpoint is lost, nothing else",
            hint="run the same command again to continue",
        )
    try:
        record = _pack(own, rank)
        first = store.compare_set(_ERROR, "", record).decode()
        if rank == 0:
            store.set(_TOLD, "")
    except RuntimeError as unreachable:
        _log.debug("torchrun's store is gone: %s", unreachable)
        return own
    return own if isinstance(error, CacheError) or first == record else _unpack(first)


def wait_until_told(store: Store, error: Exception, *, rank: int) -> None:
    """Gives rank 0 the time to take up an error: torchrun ends all once one rank has left.

    Args:
        store: As for `first_error`.
        error: What this rank has met.
        rank: This rank; 0 does not wait.
    """
    if rank == 0 or isinstance(error, _LostRankError):
        return
    try:
        store.wait([_TOLD], _TOLD_TIMEOUT)
    except RuntimeError as unreachable:
        _log.debug("rank 0 or torchrun's store is gone: %s", unreachable)


def _pack(error: Exception, rank: int) -> str:
    """Returns an error as one line of JSON for the store."""
    is_ours = isinstance(error, CacheError)
    return json.dumps(
        {
            "rank": rank,
            "type": type(error).__name__,
            "message": str(error) if is_ours else f"{type(error).__name__}: {error}",
            "hint": error.hint if isinstance(error, CacheError) else None,
            "exit_code": error.exit_code if isinstance(error, CacheError) else 1,
        }
    )


def _unpack(record: str) -> CacheError:
    """Returns the error that `_pack` was given on another rank; CacheError for a bug."""
    told = json.loads(record)
    message = f"on rank {told['rank']}: {told['message']}"
    if told["type"] == InterruptedRunError.__name__:
        return InterruptedRunError(
            message, signal_number=told["exit_code"] - 128, hint=told["hint"]
        )
    kind: type[CacheError] = getattr(errors, told["type"], CacheError)
    return kind(message, hint=told["hint"])
