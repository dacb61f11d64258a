"""`Record`: a frozen dataclass with a strict dictionary form, for whatever is written to disk.

Beside it: how a single file is read or written whole, and JSON that holds its own sha256.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import reprlib
import stat
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from ci2p_cache.errors import ManifestError, UsageError

__all__ = [
    "MAX_JSON_BYTES",
    "Record",
    "differing_fields",
    "json_bytes",
    "read_json",
    "read_regular",
    "read_sealed",
    "read_yaml",
    "regular_file",
    "sealed_bytes",
    "unsealed",
    "write_synced",
]

MAX_JSON_BYTES = 8 * 2**20
"""Room for 50,000 classes with titles. Parsed, hostile JSON takes about 25 times its size."""

_SEAL, _BLANK = "sha256", "0" * 64


class Record:
    """Gives a frozen dataclass `to_dict` and a `from_dict` that refuses unknown or missing fields.

    Fields may be str, int, float, bool, None unions of these, Literals, other records,
    `tuple[X, ...]` and `dict[str, X]` of any of them, and Path where the record's own `to_dict`
    makes it a str. `repr` is short: it leaves out fields that have their default, and cuts values.
    A field with the metadata `absent_where_none` is not in the dictionary where it is None, so that
    records that know nothing of it, and their digests, stay as they were.
    """

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # Set before `dataclass` looks, which else writes one that shows everything.
        if "__repr__" not in vars(cls):
            cls.__repr__ = _short_repr  # type: ignore[method-assign]  # see above

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, nested records as dictionaries."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]  # a mixin
        return _without_absent(self, values)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuilds a record written by `to_dict`; messages show no more than the start of a value.

        Raises:
            ManifestError: a field is unknown, missing, of another type or out of range.
        """
        if not isinstance(data, Mapping):
            raise ManifestError(f"{cls.__name__} wants an object, got {type(data).__name__}")
        hints = _hints(cls)  # type: ignore[arg-type]  # mypy takes a class for not hashable
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        missing = sorted(set(names) - set(data) - _absent_where_none(cls))
        unknown = sorted(set(map(str, data)) - set(names))
        if unknown or missing:
            raise ManifestError(
                f"{cls.__name__} has unknown fields {_shown(unknown)} and lacks {missing}; "
                "it was written by another version of ci2p-cache or is damaged"
            )
        values = {
            name: _checked(f"{cls.__name__}.{name}", hints[name], data[name])
            for name in names
            if name in data
        }
        try:
            return cls(**values)
        except UsageError as error:
            raise ManifestError(f"{cls.__name__} is not valid: {error}") from error


_R = TypeVar("_R", bound=Record)


def _absent_where_none(cls: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(cls) if "absent_where_none" in f.metadata}


def _without_absent(record: Record, values: dict[str, Any]) -> dict[str, Any]:
    """Takes the absent fields out of a record's dictionary, and of the records right below it."""
    for name in tuple(values):
        value = getattr(record, name)
        if value is None and name in _absent_where_none(type(record)):
            del values[name]
        elif isinstance(value, Record):
            _without_absent(value, values[name])
    return values


def differing_fields(ours: Record, theirs: Record) -> list[tuple[str, Any, Any]]:
    """Returns (dotted field name, our value, their value) for each field that differs, in order."""
    found: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(ours):  # type: ignore[arg-type]  # records are dataclasses
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, Record) and isinstance(other, Record):
            found += [
                (f"{field.name}.{name}", a, b) for name, a, b in differing_fields(mine, other)
            ]
        elif mine != other:
            found.append((field.name, mine, other))
    return found


_hints = cache(typing.get_type_hints)
"""Field name -> type; resolving the annotations takes longer than checking the values."""


def _checked(where: str, wanted: Any, value: Any) -> Any:
    """Returns `value` if it has the annotated type, with records and tuples restored."""
    if isinstance(wanted, type) and issubclass(wanted, Record):
        return wanted.from_dict(value)
    if wanted is Path and type(value) is str:
        return Path(value)
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_checked(where, args[0], item) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _checked(where, args[1], item) for key, item in value.items()}
    if origin is types.UnionType:
        if type(value) in args:
            return value
        rest = [arg for arg in args if arg not in (type(None), str, int, bool)]
        if rest and value is not None:
            return _checked(where, rest[0], value)
        raise ManifestError(f"{where} wants {wanted}, got {_shown(value)}")
    if origin is Literal:
        fits = any(type(value) is type(arg) and value == arg for arg in args)
    elif wanted is float and type(value) is int:
        value, fits = float(value), True
    else:
        fits = type(value) is wanted
    if not fits:
        raise ManifestError(f"{where} wants {wanted}, got {_shown(value)}")
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxtuple = 3


def _short_repr(record: Any) -> str:
    """Returns a record as the call that makes it, without defaults and with long values cut."""
    shown = []
    for field in dataclasses.fields(record):
        value, default = getattr(record, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            shown.append(f"{field.name}={_SHORT.repr(value)}")
    return f"{type(record).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    """Returns the start of a value's repr: whole, that of shared lists may not fit any memory."""
    return reprlib.repr(value)


def regular_file(path: Path) -> io.BufferedReader:
    """Opens one of our files for reading; it may come from a stranger.

    Links are not followed, because they may lead out of the folder; a pipe is not waited for, a
    device not read.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is a link or no regular file.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ManifestError(f"{path} is a link, which may lead anywhere") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ManifestError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Reads one of our files, which may come from a stranger, as `regular_file` opens it.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is a link, no regular file, or larger than `max_bytes`.
        OSError: it cannot be read.
    """
    with regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ManifestError(f"{path} has {size} bytes; at most {max_bytes} are plausible")
        return file.read(size)


def read_json(path: Path) -> dict[str, Any]:
    """Reads one of our JSON objects, capped in size.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is a link, too large, no JSON, nested too deeply, or no object.
    """
    return _parsed(read_regular(path, max_bytes=MAX_JSON_BYTES), path, json.loads, "JSON")


def _parsed(content: bytes, path: Path, parse: Callable[[bytes], Any], kind: str) -> dict[str, Any]:
    try:
        data = parse(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: not {kind} ({error})") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} is damaged: wanted an object, got {type(data).__name__}")
    return data


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Serialises to UTF-8 JSON, the same bytes for the same data."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def sealed_bytes(data: Mapping[str, Any]) -> bytes:
    """Serialises to JSON whose last field is the sha256 of the whole file.

    The digest is taken with the field's own 64 digits as zeros, so that a reader in any language
    can hold the file's bytes against it, and every flipped bit is noticed.
    """
    fields = {name: value for name, value in data.items() if name != _SEAL}
    head, blank, tail = json_bytes(fields | {_SEAL: _BLANK}).rpartition(_BLANK.encode())
    return head + hashlib.sha256(head + blank + tail).hexdigest().encode() + tail


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """Reads what `sealed_bytes` made.

    Returns:
        Its fields without the digest, and whether the digest fits. The caller looks at the format
        version first: another version may be sealed in another way.

    Raises:
        OSError, ManifestError: as for `read_json`.
    """
    raw = read_regular(path, max_bytes=MAX_JSON_BYTES)
    data = _parsed(raw, path, json.loads, "JSON")
    seal = data.pop(_SEAL, None)
    if not isinstance(seal, str) or not seal.isascii() or len(seal) != len(_BLANK):
        return data, False
    blank = _BLANK.encode().join(raw.rsplit(seal.encode(), 1))
    return data, hashlib.sha256(blank).hexdigest() == seal


def unsealed(kind: type[_R], data: Mapping[str, Any], path: Path, *, intact: bool) -> _R:
    """Rebuilds a record from what `read_sealed` gave for `path`; ManifestError if it is damaged."""
    if not intact:
        raise ManifestError(f"{path} is damaged: its own sha256 does not fit it")
    try:
        return kind.from_dict(data)
    except ManifestError as error:
        raise ManifestError(f"{path} is damaged: {error}") from error


def read_yaml(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Reads one of our YAML mappings: plain values only, capped in size.

    Args:
        path: The file.
        max_bytes: The most that is plausible; parsed, hostile YAML takes a thousand times its size.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: it is a link, too large, no YAML, nested too deeply, holds aliases, through
            which a few lines can stand for gigabytes, or is no mapping.
        OSError: it cannot be read.
    """
    # Only run folders hold any, and few commands read one.
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it holds aliases, which ci2p-cache never writes")
            return super().compose_node(parent, index)

    def parse(content: bytes) -> Any:
        try:
            return yaml.load(content, PlainLoader)  # a SafeLoader
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error

    return _parsed(read_regular(path, max_bytes=max_bytes), path, parse, "YAML")


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file through to the disk; the caller renames it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
