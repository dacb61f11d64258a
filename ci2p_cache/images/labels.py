"""Labels as sources write them -> classes, one order for all sources, and indices into them."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH113

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import SourceError
from ci2p_cache.images.imagenet import read_titles, text_lines
from ci2p_cache.images.names import as_key, for_display, join

__all__ = ["NO_LABEL", "Classes", "LabelTable", "order_notices", "ordered_classes", "written"]

NO_LABEL = "-1"
"""Means that an image has no label, as `datasets` writes it."""

_MAX_LABEL_BYTES = 4096
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_POINT_ZERO = re.compile(r"-?[0-9]{1,18}\.0")
_WNID = re.compile(r"(n[0-9]{8})\s+(.*\S)\s*")
_HINT = "name the classes in classes.txt beside the images, one a line, 0 first"


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a source."""

    names: tuple[str, ...]
    """A label is an index into them."""
    titles: tuple[str, ...]
    """Names for people, in the same order."""
    notices: tuple[str, ...] = ()
    """Where the names or their order come from, where that is not plain."""


def ordered_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct class names in the order that every source gives them.

    Whole numbers are ordered by value, so that labels 0 to K-1 keep their numbers; two spellings of
    one number ("1", "01") are two classes. If any name is no whole number, all are sorted as text,
    as torchvision's ImageFolder sorts them.
    """
    distinct = set(names)
    if all(_NUMBER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def order_notices(names: Sequence[str]) -> tuple[str, ...]:
    """Returns a sentence where the order is not that of torchvision's ImageFolder."""
    notices = []
    as_text = sorted(names)
    if list(names) != as_text:
        kind = "by their numbers" if list(names) == list(ordered_classes(names)) else "as declared"
        at = next(n for n, (one, other) in enumerate(zip(names, as_text, strict=True))
                  if one != other)  # fmt: skip
        notices.append(
            f"classes are ordered {kind}: label {at} is {names[at]}; torchvision's ImageFolder "
            f"sorts them as text, there label {at} is {as_text[at]}"
        )
    if names and all(_NUMBER.fullmatch(name) for name in names):
        spellings = Counter(int(name) for name in names)
        if len(spellings) < len(names):
            number = next(n for n, count in spellings.items() if count > 1)
            same = " and ".join(name for name in names if int(name) == number)
            notices.append(f"{same} are one number in different spellings; they are two classes")
    return tuple(notices)


def written(label: object) -> str | int | None:
    """Returns a label as a table or JSON holds it: text or a whole number; None where it is none.

    Floats that are whole become numbers (pandas turns a column into floats where a value is
    missing); None, NaN, -1 and "-1" are missing labels.

    Raises:
        SourceError: it is anything else; the message does not say where.
    """
    if isinstance(label, bytes):
        label = as_key(label)
    if isinstance(label, float) and (math.isnan(label) or label.is_integer()):
        label = None if math.isnan(label) else int(label)
    if label is None or str(label).strip() in (NO_LABEL, f"{NO_LABEL}.0"):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise SourceError(f"a label {label!r:.80}")
    return label


class LabelTable:
    """Collects the labels of a source, each as it was written, and settles what they mean.

    Labels are numbers if all of them are whole numbers, otherwise names. Numbers are indices into
    the names that the source itself carries, or that `classes.json` or `classes.txt` beside it
    give. Without these, and for names, the classes are the labels that occur, as they are spelled,
    in the order of `ordered_classes`. The label -1 means that there is none.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def add(self, label: str | int) -> int:
        """Returns the place of a label among those met so far; the same label has the same.

        Raises:
            SourceError: it is empty, or longer than 4,096 bytes; the message does not say where.
        """
        text = str(label).strip()
        if not text or len(text.encode("utf-8", "surrogatepass")) > _MAX_LABEL_BYTES:
            raise SourceError(f"a label of {len(text)} characters; wanted 1 to {_MAX_LABEL_BYTES}")
        return self._ids.setdefault(text, len(self._ids))

    def settle(
        self, folders: Sequence[bytes], own: Sequence[str] = ()
    ) -> tuple[Classes, npt.NDArray[np.int32]]:
        """Returns the classes, and the label of each place that `add` returned.

        Args:
            folders: Where files of class names are looked for, best first.
            own: Names that the source carries for numbered labels.

        Returns:
            The classes, and int32 (number of different labels,): indices into them, -1 for none.

        Raises:
            SourceError: a number has no name, or the file of names cannot be used.
        """
        known, notices = self._spellings()
        wanted = [text for text in known if text != NO_LABEL]
        if all(_NUMBER.fullmatch(text) for text in wanted):
            numbers = [int(text) for text in wanted]
            lowest, highest = min(numbers, default=0), max(numbers, default=0)
            classes = _distinct(folders, tuple(own)) if own else _named(folders, wanted)
            size = None if classes is None else len(classes.names)
            if lowest < 0 or (size is not None and highest >= size):
                wrong = lowest if lowest < 0 else highest
                among = "" if size is None else f", but {size} classes"
                upto = "or more" if size is None else f"to {size - 1}"
                raise SourceError(
                    f"there is a label {wrong}{among}; wanted 0 {upto}, or -1 for none",
                    hint=_HINT if lowest >= 0 else "write such labels as names, not as numbers",
                )
            if classes is not None:
                labels = [-1 if text == NO_LABEL else int(text) for text in known]
                told = (*notices, *classes.notices, *order_notices(classes.names))
                return Classes(classes.names, classes.titles, told), np.array(labels, np.int32)
            if wanted:
                notices.append(
                    f"labels are {len(wanted)} numbers without names, {lowest} to {highest}; "
                    "classes.txt beside the images, one name a line, would give them"
                )
        names = ordered_classes(wanted)
        titles, told = read_titles(folders, names)
        place = {name: label for label, name in enumerate(names)} | {NO_LABEL: -1}
        labels = [place[text] for text in known]
        told = (*notices, *told, *order_notices(names))
        return Classes(names, titles, told), np.array(labels, np.int32)

    def _spellings(self) -> tuple[list[str], list[str]]:
        """Returns the labels in the order of their places, and notices."""
        known = list(self._ids)
        floats = [text for text in known if text != NO_LABEL]
        if floats and all(_POINT_ZERO.fullmatch(text) for text in floats):
            notice = f"labels are written as {floats[0]}; the .0 was taken off"
            return [text.removesuffix(".0") for text in known], [notice]
        return known, []


def _named(folders: Sequence[bytes], labels: Sequence[str]) -> Classes | None:
    """Finds names of numbered classes; None where no file gives any."""
    for folder in folders:
        for name in (b"classes.json", b"classes.txt"):
            path = join(folder, name)
            if not os.path.isfile(path):
                continue
            if name.endswith(b".json"):
                found = _json_names(path, labels)
                if found is None:
                    return None
                pairs = [(each, each) for each in found]
            else:
                pairs = _line_names(path)
            if len({name for name, _ in pairs}) != len(pairs):
                raise SourceError(f"{for_display(path)} names a class twice")
            names, titles = tuple(n for n, _ in pairs), tuple(t for _, t in pairs)
            notice = f"labels are numbers; their names come from {for_display(path)}"
            return Classes(names, titles, (notice,))
    return None


def _distinct(folders: Sequence[bytes], own: tuple[str, ...]) -> Classes:
    """Returns names that a source carries; ImageNet has two cranes, which get their number."""
    counts = Counter(own)
    names = tuple(n if counts[n] == 1 else f"{n} ({label})" for label, n in enumerate(own))
    titles, notices = read_titles(folders, names)
    if len(counts) < len(own):
        double = next(name for name in own if counts[name] > 1)
        notices = (*notices, f"several classes are called {double}; their numbers were added")
    return Classes(names, titles, notices)


def _json_names(path: bytes, labels: Sequence[str]) -> list[str] | None:
    """Reads a list of names, or an object {"0": name, "1": name, ...}.

    None where it is an object that gives each label a title, whatever number it is.
    """
    try:
        found = json.loads("\n".join(text_lines(path)))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{for_display(path)} is no JSON: {error}") from error
    if isinstance(found, dict) and found.keys() == {str(n) for n in range(len(found))}:
        found = [found[str(number)] for number in range(len(found))]
    elif isinstance(found, dict) and labels and found.keys() >= set(labels):
        return None
    if not isinstance(found, list) or not all(isinstance(n, str) and n for n in found):
        raise SourceError(
            f"{for_display(path)} gives no names for labels that are numbers; wanted a list of "
            'names, or an object {"0": name, "1": name, ...}'
        )
    return found


def _line_names(path: bytes) -> list[tuple[str, str]]:
    """Reads a name a line; "n01440764 tench" and "name TAB title" have a title for people too."""
    pairs = []
    lines = [line.strip() for line in text_lines(path)]
    synsets = [_WNID.fullmatch(line) for line in lines]
    for number, (line, synset) in enumerate(zip(lines, synsets, strict=True), 1):
        name, _, title = line.partition("\t")
        if synset is not None and all(synsets):
            name, title = synset[1], synset[2]
        if not name:
            raise SourceError(f"{for_display(path)} has an empty line, number {number}")
        pairs.append((name, title.strip() or name))
    return pairs
