"""`Record`: a frozen dataclass with a strict dictionary form, for whatever is written to disk."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ci2p_cache.errors import ManifestError, UsageError

__all__ = ["Record", "read_json"]

MAX_JSON_BYTES = 64 * 2**20
"""No JSON file of ours comes near this; a larger one is refused before it is parsed."""


class Record:
    """Gives a frozen dataclass `to_dict` and a `from_dict` that refuses unknown or missing fields.

    Fields may be str, int, float, bool, None unions of these, Literals, other records,
    `tuple[X, ...]` and `dict[str, X]` of any of them.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, nested records as dictionaries."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]  # a mixin

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuilds a record written by `to_dict`.

        Raises:
            ManifestError: a field is unknown, missing, of another type or out of range.
        """
        if not isinstance(data, Mapping):
            raise ManifestError(f"{cls.__name__} wants an object, got {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown, missing = sorted(set(data) - set(names)), sorted(set(names) - set(data))
        if unknown or missing:
            raise ManifestError(
                f"{cls.__name__} has unknown fields {unknown} and lacks {missing}; "
                "it was written by another version of ci2p-cache or is damaged"
            )
        values = {
            name: _checked(f"{cls.__name__}.{name}", hints[name], data[name]) for name in names
        }
        try:
            return cls(**values)
        except UsageError as error:
            raise ManifestError(f"{cls.__name__} is not valid: {error}") from error


def _checked(place: str, wanted: Any, value: Any) -> Any:
    """Returns `value` if it has the annotated type, with records and tuples restored."""
    if isinstance(wanted, type) and issubclass(wanted, Record):
        return wanted.from_dict(value)
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(place, args[0], item) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _checked(place, args[1], item) for key, item in value.items()}
    if origin is types.UnionType:
        if type(value) in args:
            return value
        rest = [arg for arg in args if arg not in (type(None), str, int, bool)]
        if rest and value is not None:
            return _checked(place, rest[0], value)
        raise ManifestError(f"{place} wants {wanted}, got {value!r}")
    if origin is Literal:
        fits = value in args
    elif wanted is float and type(value) is int:
        value, fits = float(value), True
    else:
        fits = type(value) is wanted
    if not fits:
        raise ManifestError(f"{place} wants {wanted}, got {value!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of ours, capped in size.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is too large, no JSON, nested too deeply, or no object.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ManifestError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are plausible")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} is damaged: wanted an object, got {type(data).__name__}")
    return data
