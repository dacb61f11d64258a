"""The checks that the records of all models share; each names the field and what it wants."""

from __future__ import annotations

from typing import Any

from ci2p_cache.errors import UsageError

__all__ = ["require_bool", "require_integer", "require_name", "require_rate", "require_version"]


def require_version(value: object, readable: int) -> None:
    """Refuses a record of another version than this one's.

    Raises:
        UsageError: `value` is not `readable`.
    """
    if value != readable:
        raise UsageError(
            f"model record `version` is {value!r}; this ci2p-cache reads {readable}, so use the "
            "version that wrote it"
        )


def require_name(value: object) -> None:
    """Refuses a model `name` that is no string.

    Raises:
        UsageError: it is something else.
    """
    if type(value) is not str:
        raise UsageError(f"model `name` is {value!r}; it must be a string")


def require_integer(record: Any, field: str, lowest: int, *, multiple_of: int = 1) -> None:
    """Refuses a field that is no integer, below `lowest`, or no multiple of `multiple_of`.

    Raises:
        UsageError: it is one of these.
    """
    value = getattr(record, field)
    if type(value) is not int or value < lowest:
        raise UsageError(f"`{field}` is {value!r}; it must be an integer >= {lowest}")
    if value % multiple_of:
        raise UsageError(f"`{field}` is {value}; it must be a multiple of {multiple_of}")


def require_bool(record: Any, field: str) -> None:
    """Refuses a field that is neither True nor False.

    Raises:
        UsageError: it is something else.
    """
    value = getattr(record, field)
    if type(value) is not bool:
        raise UsageError(f"`{field}` is {value!r}; it must be True or False")


def require_rate(record: Any, field: str) -> None:
    """Refuses a field that is no number in [0, 1).

    Raises:
        UsageError: it is something else, nan included.
    """
    value = getattr(record, field)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise UsageError(f"`{field}` is {value!r}; wanted 0 <= rate < 1")
