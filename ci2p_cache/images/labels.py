"""Labels as sources write them -> classes in one order, and indices into them.

Also the small files beside images that name classes.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.tree import DiskTree, Tree

__all__ = ["DEVKIT", "DISK", "NO_LABEL", "ClassSource", "Classes", "LabelTable", "find_file",
           "folder_classes", "small_file", "text_lines", "written"]  # fmt: skip

NO_LABEL = "-1"
"""Means that an image has no label, as `datasets` writes it."""
DEVKIT = b"ILSVRC2012_devkit_t12"
"""Folder of ImageNet's development kit; it may be beside train and val and is no class."""

_MAX_LABEL_BYTES = 4096
_MAX_TEXT_BYTES = 64 * 2**20
_SYNSETS = b"LOC_synset_mapping.txt"
_NUMBER = re.compile(r"-?[0-9]{1,18}")
_POINT_ZERO = re.compile(r"-?[0-9]{1,18}\.0")
_WNID = re.compile(r"(n[0-9]{8})\s+(.*\S)\s*")
_HINT = "name the classes in classes.txt beside the images, one a line, 0 first"
DISK = DiskTree(b"/")
"""Gives files by their absolute paths."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a source."""

    names: tuple[str, ...] = ()
    """A label is an index into them."""
    titles: tuple[str, ...] = ()
    """Names for people, in the same order."""
    notices: tuple[str, ...] = ()
    """Where the names or their order come from, where that is not plain."""


class ClassSource(ABC):
    """The part of an `ImageSource` that our own sources share: its place and its classes.

    Args:
        location: Absolute path or pattern, as bytes.
    """

    def __init__(self, location: bytes) -> None:
        self._location = location

    @abstractmethod
    def _settled(self) -> Classes:
        """Returns the classes; they are found out once."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label, over all splits."""
        return self._settled().names

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people, from `classes.json` or `classes.txt` and the like."""
        return self._settled().titles

    def location(self) -> str:
        """Returns the absolute path or pattern; bytes that are not UTF-8 are surrogates."""
        return os.fsdecode(self._location)


def folder_classes(names: Iterable[str], folders: Sequence[bytes], tree: Tree) -> Classes:
    """Returns the classes of folders with these names; titles are looked for in `folders`."""
    found = _titled(folders, _ordered(names), tree)
    return Classes(found.names, found.titles, found.notices + _order_notices(found.names))


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct class names in the order that every source gives them.

    Whole numbers are ordered by value, so that labels 0 to K-1 keep their numbers; two spellings of
    one number ("1", "01") are two classes. If any name is no whole number, all are sorted as text,
    as torchvision's ImageFolder sorts them.
    """
    distinct = set(names)
    if all(_NUMBER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def _order_notices(names: Sequence[str]) -> tuple[str, ...]:
    """Returns a sentence where the order is not that of torchvision's ImageFolder."""
    notices = []
    as_text = sorted(names)
    if list(names) != as_text:
        kind = "by their numbers" if tuple(names) == _ordered(names) else "as declared"
        at = next(n for n, name in enumerate(names) if name != as_text[n])
        notices.append(
            f"classes are ordered {kind}: label {at} is {names[at]}; torchvision's ImageFolder "
            f"sorts them as text, there label {at} is {as_text[at]}"
        )
    if names and all(_NUMBER.fullmatch(name) for name in names):
        double = [number for number, count in Counter(map(int, names)).items() if count > 1]
        if double:
            same = " and ".join(name for name in names if int(name) == double[0])
            notices.append(f"{same} are one number in different spellings; they are two classes")
    return tuple(notices)


def written(label: object) -> str | int | None:
    """Returns a label as a table or JSON holds it: text or a whole number; None where it is none.

    Floats that are whole become numbers (pandas turns a column into floats where a value is
    missing); None, NaN, -1 and "-1" are missing labels. Anything else is a `SourceError`, which
    does not say where.
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
    in the order of `_ordered`. The label -1 means that there is none.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def add(self, label: str | int) -> int:
        """Returns the number of a label among those met so far; errors do not say where it is."""
        text = str(label).strip()
        if not text or len(text.encode("utf-8", "surrogatepass")) > _MAX_LABEL_BYTES:
            raise SourceError(f"a label of {len(text)} characters; wanted 1 to {_MAX_LABEL_BYTES}")
        return self._ids.setdefault(text, len(self._ids))

    def settle(
        self, folders: Sequence[bytes], own: Sequence[str] = ()
    ) -> tuple[Classes, npt.NDArray[np.int32]]:
        """Returns the classes, and the label of each number that `add` returned.

        Args:
            folders: Where files of class names are looked for, best first.
            own: Names that the source carries for numbered labels.

        Returns:
            The classes, and int32 (number of different labels,): indices into them, -1 for none.
        """
        known, notices = self._spellings()
        wanted = [text for text in known if text != NO_LABEL]
        classes = None
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
            if classes is None and wanted:
                notices.append(
                    f"labels are {len(wanted)} numbers without names, {lowest} to {highest}; "
                    "classes.txt beside the images, one name a line, would give them"
                )
        if classes is not None:
            labels = [int(text) for text in known]
        else:
            classes = _titled(folders, _ordered(wanted))
            label_of = {name: label for label, name in enumerate(classes.names)} | {NO_LABEL: -1}
            labels = [label_of[text] for text in known]
        notices += [*classes.notices, *_order_notices(classes.names)]
        return Classes(classes.names, classes.titles, tuple(notices)), np.array(labels, np.int32)

    def _spellings(self) -> tuple[list[str], list[str]]:
        """Returns the labels in the order of their numbers, and notices."""
        known = list(self._ids)
        floats = [text for text in known if text != NO_LABEL]
        if floats and all(_POINT_ZERO.fullmatch(text) for text in floats):
            notice = f"labels are written as {floats[0]}; the .0 was taken off"
            return [text.removesuffix(".0") for text in known], [notice]
        return known, []


def _named(folders: Sequence[bytes], labels: Sequence[str]) -> Classes | None:
    """Finds names of numbered classes; None where no file gives any."""
    paths = [join(f, name) for f in folders for name in (b"classes.json", b"classes.txt")]
    path = next(filter(DISK.is_file, paths), None)
    if path is None:
        return None
    pairs = _json_names(path, labels) if path.endswith(b".json") else _line_names(path)
    if pairs is None:
        return None
    if len({name for name, _ in pairs}) != len(pairs):
        raise SourceError(f"{for_display(path)} names a class twice")
    names, titles = tuple(n for n, _ in pairs), tuple(t for _, t in pairs)
    notice = f"labels are numbers; their names come from {for_display(path)}"
    return Classes(names, titles, (notice,))


def _distinct(folders: Sequence[bytes], own: tuple[str, ...]) -> Classes:
    """Returns names that a source carries; ImageNet has two cranes, which get their number."""
    counts = Counter(own)
    names = tuple(n if counts[n] == 1 else f"{n} ({label})" for label, n in enumerate(own))
    found = _titled(folders, names)
    if len(counts) == len(own):
        return found
    double = next(name for name in own if counts[name] > 1)
    notice = f"several classes are called {double}; their numbers were added"
    return Classes(names, found.titles, (*found.notices, notice))


def _titled(folders: Sequence[bytes], names: tuple[str, ...], tree: Tree | None = None) -> Classes:
    return Classes(names, *_read_titles(folders, names, tree or DISK))


def _json_names(path: bytes, labels: Sequence[str]) -> list[tuple[str, str]] | None:
    """Reads a list of names, or an object {"0": name, "1": name, ...}.

    None where it is an object that gives each label a title, whatever number it is.
    """
    found = _json(path, text_lines(path))
    if isinstance(found, dict) and found.keys() == {str(n) for n in range(len(found))}:
        found = [found[str(number)] for number in range(len(found))]
    elif isinstance(found, dict) and labels and found.keys() >= set(labels):
        return None
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


def find_file(tree: Tree, folders: Sequence[bytes], name: bytes) -> bytes | None:
    """Returns the path of a small file in one of some folders, or where ImageNet has it there."""
    for folder in folders:
        for below in (b"", b"data", DEVKIT, join(DEVKIT, b"data")):
            path = join(folder, join(below, name))
            if tree.is_file(path):
                return path
    return None


def text_lines(path: bytes, tree: Tree = DISK) -> list[str]:
    """Returns the lines of a small UTF-8 file of a tree, by its absolute path."""
    try:
        return small_file(path, tree).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{for_display(path)} cannot be read: {error}") from error


def small_file(path: bytes, tree: Tree) -> bytes:
    """Returns the content of a small file; errors as `text_lines` has them."""
    try:
        content = tree.content(path, _MAX_TEXT_BYTES)
    except ResourceError:
        raise
    except (OSError, ImageDecodeError) as error:
        raise SourceError(f"{for_display(path)} cannot be read: {error}") from error
    if content is None:
        raise SourceError(
            f"{for_display(path)} is larger than {_MAX_TEXT_BYTES} bytes; is it that file?"
        )
    return content


def _read_titles(
    folders: Sequence[bytes], classes: Sequence[str], tree: Tree
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds names for people, one for each class, and notices.

    Looks for `classes.json` ({folder: title}), `classes.txt` (lines "folder title words") and
    ImageNet's `LOC_synset_mapping.txt` (the same lines), and takes the first that exists; also
    Tiny ImageNet's `words.txt`, where `wnids.txt` is beside it. A class without a title has its
    name.
    """
    tiny = (b"words.txt",) if find_file(tree, folders, b"wnids.txt") else ()
    names = (b"classes.json", b"classes.txt", _SYNSETS, *tiny)
    path = next(filter(None, (find_file(tree, folders, name) for name in names)), None)
    if path is None:
        return tuple(classes), ()
    try:
        lines = text_lines(path, tree)
        is_json = path.endswith(b".json")
        titles = _json_titles(path, lines) if is_json else _line_titles(lines, classes)
    except SourceError as error:
        return tuple(classes), (f"no names for people were read: {error}",)
    missing = [name for name in classes if name not in titles]
    notices = (
        f"{for_display(path)} names {len(classes) - len(missing)} of {len(classes)} classes; "
        f"not, for example, {name}"
        for name in missing[:1]
    )
    return tuple(titles.get(name, name) for name in classes), tuple(notices)


def _json(path: bytes, lines: list[str]) -> Any:
    try:
        return json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{for_display(path)} is no JSON: {error}") from error


def _json_titles(path: bytes, lines: list[str]) -> Mapping[str, str]:
    found = _json(path, lines)
    if not isinstance(found, dict) or not all(isinstance(title, str) for title in found.values()):
        raise SourceError(f"{for_display(path)} wants an object of folder names and titles")
    return found


def _line_titles(lines: list[str], classes: Sequence[str]) -> Mapping[str, str]:
    """Reads lines of a class and its title; a class may have spaces, so the longest one counts."""
    known = set(classes)
    titles: dict[str, str] = {}
    for line in lines:
        found = next((each for each in _divisions(line.strip()) if each[0] in known), None)
        if found is not None:
            titles[found[0]] = found[1] or found[0]
    return titles


def _divisions(line: str) -> Iterator[tuple[str, str]]:
    """Yields (head, rest) of a line cut at each of its white space, longest head first."""
    yield line, ""
    for position in range(len(line) - 1, 0, -1):
        if line[position].isspace():
            yield line[:position].rstrip(), line[position:].strip()
