"""Holds what two trees gave against each other, and against the list of intended differences.

What a tree gives is a dict from item to value: the digest of a file, an exit code, a JSON document.
In a document every field is compared by itself, and named ITEM#/field/0/other.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

__all__ = ["Difference", "Intended", "compared", "read_intended", "sorted_out"]

_MISSING = "(missing)"
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that the two trees do not give alike."""

    group: str
    """The group of what was compared."""
    item: str
    """What it is."""
    base: Any
    """What the commit gave."""
    ours: Any
    """What this tree gave."""

    @property
    def unit(self) -> str:
        """The unit that it came up in."""
        return self.item.partition("/")[0]

    def __str__(self) -> str:
        base, ours = _shown(self.base), _shown(self.ours)
        return f"{self.group}: {self.item}\n    was {base}\n    now {ours}"


@dataclass(frozen=True, slots=True)
class Intended:
    """An entry of the list of intended differences."""

    group: str
    """Name of the group."""
    item: str
    """Glob of the items; `*` matches `/` too."""
    reason: str
    """Why it is meant to differ."""
    since: str
    """The commit or issue that made it differ."""

    def covers(self, difference: Difference) -> bool:
        """Whether this is the difference that is meant."""
        return self.group == difference.group and fnmatchcase(difference.item, self.item)


def compared(group: str, base: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Difference]:
    """Compares all items of a group, in the order of their names."""
    for item in sorted({*base, *ours}):
        yield from _differing(
            group, item, base.get(item, _MISSING), ours.get(item, _MISSING), separator="#/"
        )


def _differing(
    group: str, item: str, base: Any, ours: Any, separator: str = "/"
) -> Iterator[Difference]:
    if isinstance(base, Mapping) and isinstance(ours, Mapping):
        for name in sorted({*base, *ours}, key=str):
            pair = base.get(name, _MISSING), ours.get(name, _MISSING)
            yield from _differing(group, f"{item}{separator}{name}", *pair)
    elif isinstance(base, list) and isinstance(ours, list) and len(base) == len(ours):
        for number, pair in enumerate(zip(base, ours, strict=True)):
            yield from _differing(group, f"{item}{separator}{number}", *pair)
    elif isinstance(base, list) and isinstance(ours, list):
        # What is inserted moves the rest: only the parts that differ are told.
        aligned = SequenceMatcher(None, [*map(repr, base)], [*map(repr, ours)], autojunk=False)
        for tag, first, last, low, high in aligned.get_opcodes():
            if tag != "equal":
                name = f"{item}{separator}{first}"
                yield Difference(group, name, base[first:last], ours[low:high])
    # By their text: NaN equals itself then, and 1 is not 1.0.
    elif repr(base) != repr(ours):
        yield Difference(group, item, base, ours)


def read_intended(path: Path, groups: Iterable[str]) -> list[Intended]:
    """Reads the list of intended differences.

    Args:
        path: A TOML file with tables `[[difference]]` of `group`, `item`, `reason`, `since`.
        groups: The groups there are.

    Raises:
        ValueError: an entry lacks a field, has others, or names no group.
    """
    data = tomllib.loads(path.read_text("utf-8"))
    if unknown := data.keys() - {"difference"}:
        raise ValueError(f"{path} has {sorted(unknown)}; wanted [[difference]] only")
    names, entries = [field.name for field in fields(Intended)], []
    for number, entry in enumerate(data.get("difference", []), start=1):
        where = f"{path}, difference {number} ({entry.get('item', 'no item')})"
        for name in names:
            if not isinstance(entry.get(name), str) or not entry[name].strip():
                raise ValueError(f"{where} has no `{name}`")
        if unknown := entry.keys() - set(names):
            raise ValueError(f"{where} has {sorted(unknown)}; wanted {', '.join(names)}")
        if entry["group"] not in groups:
            raise ValueError(f"{where} names group {entry['group']!r}; there is no such group")
        entries.append(Intended(**entry))
    return entries


def sorted_out(
    differences: Iterable[Difference], intended: Sequence[Intended]
) -> tuple[list[Difference], list[int]]:
    """Parts the differences that are listed from those that are not.

    Returns:
        The differences that no entry covers, and for each entry how many it covers.
    """
    counts, others = [0] * len(intended), []
    for difference in differences:
        covering = [i for i, entry in enumerate(intended) if entry.covers(difference)]
        for i in covering:
            counts[i] += 1
        if not covering:
            others.append(difference)
    return others, counts


def _shown(value: Any) -> str:
    text = value if value == _MISSING else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"
