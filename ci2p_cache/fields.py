"""Fields of a settings record: default, meaning and range, declared once.

::

    quality: int = option(5, "CompressAI quality, 1 to 8; the paper's is 5.", low=1, high=8)

The command line, `--set` and the check on construction all read this declaration.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from ci2p_cache.errors import UsageError

__all__ = ["Option", "check_options", "declared_options", "option"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """What a field says beside its type and default."""

    help: str
    """What it means, with its unit and where the default comes from."""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    above: float | None = None
    """Exclusive lower bound."""
    below: float | None = None
    """Exclusive upper bound."""
    panel: str | None = None
    """Heading in the help of a command; None: among the everyday options, which come first."""
    flag: str | None = None
    """Its name on the command line; None: the field's."""
    metavar: str | None = None
    """What the help shows in place of the type."""
    is_flag: bool = True
    """Whether the command line has it."""
    pattern: str | None = None
    """Regular expression that a text matches as a whole; `help` then lists what does."""

    def refusal(self, kind: Any, value: Any) -> str | None:
        """Says what is wanted instead of a value; None where it fits.

        Args:
            kind: The field's type: int, float, str, bool, Path, a Literal, or one of them or None.
            value: To be checked.
        """
        if typing.get_origin(kind) is types.UnionType:
            if value is None:
                return None
            kind = next(each for each in typing.get_args(kind) if each is not types.NoneType)
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            return None if value in choices else f"one of {', '.join(map(str, choices))}"
        if self.pattern is not None and not re.fullmatch(self.pattern, str(value)):
            return self.help.rstrip(".")
        if kind not in (int, float):
            return None
        # A float must be finite, and a whole number must fit into a float.
        fits = type(value) in (int, kind) and (kind is int or abs(value) <= sys.float_info.max)
        if fits and self._holds(value):
            return None
        return f"{'a whole' if kind is int else 'a'} number{self._range()}"

    def _holds(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        bounds = (
            (("{} <= ", self.low), ("{} < ", self.above)),
            ((" <= {}", self.high), (" < {}", self.below)),
        )
        lower, upper = (
            "".join(text.format(b) for text, b in side if b is not None) for side in bounds
        )
        return f", {lower}value{upper}" if lower or upper else ""


def option(default: Any, help: str, **more: Any) -> Any:
    """Declares a field of a dataclass.

    Args:
        default: Of the field.
        help: See `Option`, as all others.
        **more: The other fields of `Option`.
    """
    return dataclasses.field(default=default, metadata={"option": Option(help=help, **more)})


@functools.cache
def declared_options(record: type) -> dict[str, tuple[Any, Any, Option]]:
    """Returns type, default and declaration of each field that `option` made, by name."""
    kinds = typing.get_type_hints(record)
    return {
        field.name: (kinds[field.name], field.default, field.metadata["option"])
        for field in dataclasses.fields(record)
        if "option" in field.metadata
    }


def check_options(record: Any) -> None:
    """Checks the types and ranges of a record; whole numbers in float fields become floats.

    So equal records have equal dictionaries.

    Raises:
        UsageError: a value is not what its field declares.
    """
    for name, (kind, _, declared) in declared_options(type(record)).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(record, name)
        wanted = declared.refusal(kind, value)
        if wanted is not None:
            raise UsageError(f"`{declared.flag or name}` is {value!r}; wanted {wanted}")
        if type(value) is int and (kind is float or float in typing.get_args(kind)):
            object.__setattr__(record, name, float(value))
