"""Changes to an experiment from the command line: `--set train.epochs=2`, typed by the field."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ci2p_cache.errors import UsageError
from ci2p_cache.experiment.spec import Experiment
from ci2p_cache.record import Record

__all__ = ["settable_fields", "with_changes"]

_SWITCH = {"true": True, "yes": True, "false": False, "no": False}


def settable_fields() -> tuple[str, ...]:
    """Returns the dotted names that `with_changes` takes, in the order of the records."""
    return tuple(_fields())


def with_changes(experiment: Experiment, changes: Sequence[str]) -> Experiment:
    """Returns an experiment with fields replaced.

    ::

        with_changes(experiment, ["train.epochs=2", "encode.size=64", "encode.limit=none"])

    Args:
        experiment: What is changed.
        changes: FIELD=VALUE each; the value is read as the field's type: a number, true or false,
            one of its choices, a text, numbers with commas between them, or none where the field
            may be None.

    Raises:
        UsageError: a field is unknown or given twice, a value is not of its type, or the experiment
            cannot be so.
    """
    fields = _fields()
    values: dict[str, dict[str, Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.strip()
        if not equals:
            raise UsageError(
                f"`--set` got {change!r}; wanted FIELD=VALUE, for example train.epochs=2"
            )
        if name not in fields:
            raise UsageError(f"no field is named {name!r}{_close(name, list(fields))}")
        group, _, field = name.rpartition(".")
        if field in values.setdefault(group, {}):
            raise UsageError(f"`--set` names {name} twice; which value is meant?")
        values[group][field] = _read(name, fields[name], text.strip())
    top = values.pop("", {})
    for group, changed in values.items():
        top[group] = dataclasses.replace(getattr(experiment, group), **changed)
    return dataclasses.replace(experiment, **top)


def _fields() -> dict[str, Any]:
    """Returns the type of every field that can be set, by its dotted name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Experiment).items():
        if isinstance(hint, type) and issubclass(hint, Record):
            inner = typing.get_type_hints(hint)
            found |= {f"{name}.{field}": kind for field, kind in inner.items()}
        else:
            found[name] = hint
    return {name: hint for name, hint in found.items() if name.rpartition(".")[2] != "version"}


def _read(name: str, wanted: Any, text: str) -> Any:
    """Reads a value of a field's type."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        if text.lower() == "none" and type(None) in args:
            return None
        return _read(name, next(arg for arg in args if arg is not type(None)), text)
    if origin is Literal:
        if text not in args:
            raise UsageError(f"`{name}` is {text!r}; wanted one of {', '.join(map(str, args))}")
        return text
    if origin is tuple:
        return tuple(_read(name, args[0], part.strip()) for part in text.split(","))
    if wanted is bool:
        if text.lower() not in _SWITCH:
            raise UsageError(f"`{name}` is {text!r}; wanted true or false")
        return _SWITCH[text.lower()]
    if wanted is Path:
        return Path(text)
    try:
        return wanted(text)
    except ValueError as error:
        kind = "a whole number" if wanted is int else "a number"
        raise UsageError(f"`{name}` is {text!r}; wanted {kind}") from error


def _close(name: str, known: list[str]) -> str:
    """Says which fields may be meant."""
    bare = name.rpartition(".")[2]
    close = [each for each in known if each.rpartition(".")[2] == bare]
    close += difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(dict.fromkeys(close))}?"
    return f"; the fields are {', '.join(known)}"
