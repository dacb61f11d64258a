"""Labels as archives and tables write them: names or numbers -> classes and indices into them."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH113

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import SourceError
from ci2p_cache.images.imagenet import read_titles, text_lines
from ci2p_cache.images.names import for_display, join

__all__ = ["Classes", "LabelTable"]

_MAX_CLASSES = 2**18
"""Of numbered labels: a data set of a million classes of a picture each is taken for a mistake."""
_MAX_LABEL_BYTES = 4096
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_WNID = re.compile(r"(n[0-9]{8})\s+(.*\S)\s*")


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a source."""

    names: tuple[str, ...]
    """A label is an index into them."""
    titles: tuple[str, ...]
    """Names for people, in the same order."""
    notices: tuple[str, ...] = ()
    """Where the names come from, where that is not plain."""


class LabelTable:
    """Collects the labels of a source, each as it was written, and settles what they mean.

    Labels are numbers if all of them are whole numbers, otherwise names. Names are sorted, as
    folders are. Numbers are indices into the names that the source itself carries, or that
    `classes.json` or `classes.txt` beside it give, or else into "0", "1", ... -1 means that there
    is no label.
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
        if text.isascii() and _NUMBER.fullmatch(text):
            text = str(int(text))
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
        known = list(self._ids)
        if not all(_NUMBER.fullmatch(text) for text in known):
            names = tuple(sorted(known))
            place = {name: label for label, name in enumerate(names)}
            titles, notices = read_titles(folders, names)
            labels = np.array([place[text] for text in known], np.int32)
            return Classes(names, titles, notices), labels
        numbers = [int(text) for text in known]
        classes = _numbered(folders, tuple(own), max(numbers, default=-1) + 1)
        wrong = next((n for n in numbers if not -1 <= n < len(classes.names)), None)
        if wrong is not None:
            raise SourceError(
                f"there is a label {wrong}, but {len(classes.names)} classes; wanted 0 to "
                f"{len(classes.names) - 1}, or -1 for none",
                hint="name the classes in classes.txt beside the images, one a line, 0 first",
            )
        return classes, np.array(numbers, np.int32)


def _numbered(folders: Sequence[bytes], own: tuple[str, ...], count: int) -> Classes:
    """Finds the names of numbered classes."""
    if own:
        return _distinct(folders, own)
    for folder in folders:
        for name in (b"classes.json", b"classes.txt"):
            path = join(folder, name)
            if not os.path.isfile(path):
                continue
            pairs = _json_names(path) if name.endswith(b".json") else _line_names(path)
            if len({name for name, _ in pairs}) != len(pairs):
                raise SourceError(f"{for_display(path)} names a class twice")
            names, titles = tuple(n for n, _ in pairs), tuple(t for _, t in pairs)
            notice = f"labels are numbers; their names come from {for_display(path)}"
            return Classes(names, titles, (notice,))
    if count > _MAX_CLASSES:
        raise SourceError(
            f"there is a label {count - 1} and no names of classes; numbers up to "
            f"{_MAX_CLASSES - 1} are taken without",
            hint="name the classes in classes.txt beside the images, one a line, 0 first",
        )
    names = tuple(str(number) for number in range(count))
    notice = (
        f"labels are numbers, 0 to {count - 1}, without names; classes.txt beside the images, one "
        "name a line, would give them"
    )
    return Classes(names, names, (notice,) if count else ())


def _distinct(folders: Sequence[bytes], own: tuple[str, ...]) -> Classes:
    """Returns names that a source carries; ImageNet has two cranes, which get their number."""
    counts = Counter(own)
    names = tuple(n if counts[n] == 1 else f"{n} ({label})" for label, n in enumerate(own))
    titles, notices = read_titles(folders, names)
    if len(counts) < len(own):
        double = next(name for name in own if counts[name] > 1)
        notices = (*notices, f"several classes are called {double}; their numbers were added")
    return Classes(names, titles, notices)


def _json_names(path: bytes) -> list[tuple[str, str]]:
    """Reads a list of names, or an object {"0": name, "1": name, ...}."""
    try:
        found = json.loads("\n".join(text_lines(path)))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{for_display(path)} is no JSON: {error}") from error
    if isinstance(found, dict) and found.keys() == {str(n) for n in range(len(found))}:
        found = [found[str(number)] for number in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(n, str) and n for n in found):
        raise SourceError(
            f"{for_display(path)} gives no names for labels that are numbers; wanted a list of "
            'names, or an object {"0": name, "1": name, ...}'
        )
    return [(name, name) for name in found]


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
