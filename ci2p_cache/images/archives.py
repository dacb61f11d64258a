"""Which archives or tables a location names, and what the sources over them share.

::

    train-{000000..000012}.tar   data/*.parquet   FOLDER   FILE
        --braces, wildcards--> files below one root --names--> split of each
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH110, PTH112, PTH113, PTH120, PTH207

from __future__ import annotations

import glob
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import SourceError
from ci2p_cache.images.labels import Classes, ClassSource, LabelTable
from ci2p_cache.images.names import Tally, as_key, for_display, join
from ci2p_cache.images.reading import about
from ci2p_cache.images.splits import SPLIT_NAMES, SPLIT_ORDER
from ci2p_cache.images.tree import DiskTree

__all__ = ["PARQUET_SUFFIXES", "TAR_SUFFIXES", "Archive", "ArchiveSource", "Archives",
           "expand_braces", "find_archives", "kind_of_folder"]  # fmt: skip

TAR_SUFFIXES = (b".tar", b".tar.gz", b".tgz", b".tar.zst", b".tar.zstd", b".tzst")
PARQUET_SUFFIXES = (b".parquet",)

_MAX_FILES = 2**20
_BRACES = re.compile(rb"\{([^{}]*)\}")
_RANGE = re.compile(rb"(\d{1,12})\.\.(\d{1,12})")
_WILD = re.compile(rb"[*?\[]")
_HEAD = re.compile(rb"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Archive:
    """One file that holds images: where, and the split that its name announces, if any has one."""

    path: bytes
    """Below the root."""
    split: str | None


@dataclass(frozen=True, slots=True)
class Archives:
    """The files of a source."""

    root: bytes
    """The absolute folder that paths are below: the folder or file's folder that was named, or the
    part of a pattern before its first wildcard."""
    location: bytes
    """Absolute, with its wildcards and braces: names the same files again."""
    files: tuple[Archive, ...]
    """Sorted by split (train, val, test), then by the bytes of their paths."""
    notices: tuple[str, ...] = ()
    """The files that were left out."""


def find_archives(location: bytes, suffixes: Sequence[bytes]) -> Archives:
    """Finds the files that a location names, or says what is missing or unclear.

    A split is announced by the letters a file name begins with (`train-000.tar`,
    `validation-00000-of-00014.parquet`), or else by the folder the file is in, below the root.
    Either all files announce one, and train is among them, or none does.

    Args:
        location: A file, a folder whose files have one of `suffixes` (or with them in split
            folders, or in `data/`), a wildcard or a brace pattern (`{000..012}`, `{train,val}`).
            What exists under that very name is not read as a pattern.
        suffixes: How the names of files end, in lower case.
    """
    full = os.path.abspath(location)
    tally = Tally()
    if os.path.isdir(full):
        root, paths = full, _in_folder(full, suffixes, tally)
    elif os.path.exists(full):
        root, name = os.path.split(full)
        paths = [name]
    elif _WILD.search(location) or _BRACES.search(location):
        root = _fixed_part(full)
        paths = [path[len(root.rstrip(b"/")) + 1 :] for path in _matches(full)]
    else:
        raise SourceError(f"{for_display(full)} does not exist; wanted a file, folder or pattern")
    if not paths:
        wanted = ", ".join(suffix.decode() for suffix in suffixes)
        raise SourceError(f"{for_display(full)} names no file; wanted files ending in {wanted}")
    if len({as_key(path) for path in paths}) != len(paths):
        raise SourceError(
            f"{for_display(full)} names a file twice, or two files whose names look the same"
        )
    return Archives(root, full, _with_splits(full, paths), tally.notices())


def kind_of_folder(root: bytes) -> tuple[bytes, ...] | None:
    """Returns the suffixes of the files that a folder is a source of, or None for image folders.

    A folder is one of archives if it, its split folders or its `data/` hold some, and no other
    folder is in it. Tar and parquet files side by side are refused.
    """
    tree = DiskTree(root)
    folders, names = tree.list_folder(b"", Tally())
    if any(name.lower() not in SPLIT_NAMES and name != b"data" for name in folders):
        return None
    for folder in folders:
        inner, files = tree.list_folder(folder, Tally())
        if inner or not _chosen(files, TAR_SUFFIXES + PARQUET_SUFFIXES):
            return None
        names = names + files
    kinds = [kind for kind in (TAR_SUFFIXES, PARQUET_SUFFIXES) if _chosen(names, kind)]
    if len(kinds) > 1:
        raise SourceError(
            f"{for_display(root)} holds tar and parquet files; they may be the same images twice",
            hint="name the files: SRC/'*.tar' or SRC/'*.parquet'",
        )
    return kinds[0] if kinds else None


def _chosen(names: Sequence[bytes], suffixes: Sequence[bytes]) -> list[bytes]:
    return [name for name in names if name.lower().endswith(tuple(suffixes))]


def _in_folder(root: bytes, suffixes: Sequence[bytes], tally: Tally) -> list[bytes]:
    tree = DiskTree(root)
    folders, names = tree.list_folder(b"", tally)
    paths = _chosen(names, suffixes)
    inner = [name for name in folders if name.lower() in SPLIT_NAMES or name == b"data"]
    if paths and inner:
        raise SourceError(
            f"{for_display(root)} holds {for_display(paths[0])} beside the folder "
            f"{for_display(inner[0])}; the same images may be in both",
            hint="name the files by a pattern, or move one of them out of the source",
        )
    for folder in inner:
        found = _chosen(tree.list_folder(folder, tally)[1], suffixes)
        paths += [join(folder, name) for name in found]
    return paths


def _matches(pattern: bytes) -> Iterator[bytes]:
    """Yields the files of a pattern; each of its brace expansions must name at least one."""
    for expanded in expand_braces(pattern):
        if _WILD.search(expanded):
            found = sorted(path for path in glob.glob(expanded) if os.path.isfile(path))
        else:
            found = [expanded] if os.path.isfile(expanded) else []
        if not found:
            raise SourceError(
                f"{for_display(expanded)}, named by the pattern {for_display(pattern)}, is missing",
                hint="complete the files, or name only those that are there",
            )
        yield from found


def expand_braces(pattern: bytes) -> list[bytes]:
    """Expands {a,b} and {000..012} as bash does; the width of a number is that of its first."""
    done, waiting = [], [pattern]
    while waiting:
        current = waiting.pop()
        match = _BRACES.search(current)
        if match is None:
            done.append(current)
        else:
            head, tail = current[: match.start()], current[match.end() :]
            waiting += [head + word + tail for word in _expanded(match[1])]
        if len(done) + len(waiting) > _MAX_FILES:
            raise SourceError(f"{for_display(pattern)} names more than {_MAX_FILES} files")
    return sorted(done)


def _expanded(inner: bytes) -> list[bytes]:
    numbers = _RANGE.fullmatch(inner)
    if numbers is None:
        return inner.split(b",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MAX_FILES:
        raise SourceError(f"{{{as_key(inner)}}} is no range of 1 to {_MAX_FILES} numbers")
    return [b"%0*d" % (len(numbers[1]), number) for number in range(first, last + 1)]


def _fixed_part(pattern: bytes) -> bytes:
    """Returns the folder in which everything is that a pattern could name."""
    folder = pattern
    while _WILD.search(folder) or b"{" in folder:
        folder = os.path.dirname(folder)
    return folder


def _with_splits(location: bytes, paths: Sequence[bytes]) -> tuple[Archive, ...]:
    splits = {path: _split_of(path) for path in paths}
    named = sorted({split for split in splits.values() if split}, key=SPLIT_ORDER.index)
    if named and None in splits.values():
        plain = next(path for path in paths if splits[path] is None)
        split = next(path for path in paths if splits[path] is not None)
        raise SourceError(
            f"{for_display(location)}: the name {for_display(split)} announces a split and "
            f"{for_display(plain)} does not; they cannot be both",
            hint="rename one of them, or name only the files of one kind",
        )
    if named and "train" not in named:
        raise SourceError(
            f"{for_display(location)} has files of {' and '.join(named)} and none of train",
            hint="name the files of train too, or rename these if they are for training",
        )
    order = {split: number for number, split in enumerate((None, *SPLIT_ORDER))}
    files = [Archive(path, splits[path]) for path in paths]
    return tuple(sorted(files, key=lambda file: (order[file.split], file.path)))


def _split_of(path: bytes) -> str | None:
    folder, _, name = path.rpartition(b"/")
    for text in (name, folder.rpartition(b"/")[2]):
        match = _HEAD.match(text)
        if match is not None and match[0].lower() in SPLIT_NAMES:
            return SPLIT_NAMES[match[0].lower()]
    return None


class ArchiveSource(ClassSource):
    """The part of an `ImageSource` that is the same for all kinds of files.

    Args:
        location: A file, a folder that holds only such files, a wildcard or a brace pattern; see
            `find_archives`, also for splits.

    Raises:
        SourceError: nothing is there, a named file is missing, or the splits are unclear.
        ResourceError: the file system failed again and again.
    """

    suffixes: ClassVar[tuple[bytes, ...]]
    """How names of files end, in lower case."""
    form: ClassVar[re.Pattern[bytes]]
    """Of `ImageRef.path`: a file below the root, "#", and numbers."""
    words: ClassVar[tuple[str, str, str]]
    """Words of messages for an image, a file, and its files."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self._archives = find_archives(os.fsencode(location), self.suffixes)
        super().__init__(self._archives.location)
        self._tally = Tally()
        self._classes = Classes()

    @property
    def notices(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        return (*self._archives.notices, *self._classes.notices, *self._tally.notices())

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns the archive or table that holds an image among others."""
        return self._found(path)[0], False

    @abstractmethod
    def _list(self) -> Sequence[tuple[Archive, object]]:
        """Lists all files; once, which sets the classes and the tally."""

    def _settled(self) -> Classes:
        self._list()
        return self._classes

    def _settle(
        self,
        labels: LabelTable,
        folders: Sequence[bytes],
        names: Sequence[str] = (),
        *,
        num_images: int,
        tally: Tally,
    ) -> npt.NDArray[np.int32]:
        """Sets the classes; returns the label of each number of `labels`, int32.

        Args:
            labels: The labels of all files.
            folders: Where `classes.json` or `classes.txt` may be, absolute.
            names: The names of the classes, where the files have them.
            num_images: Labelled images in all files.
            tally: The files that were left out.
        """
        shown, (_, _, files) = self.location(), self.words
        if not num_images:
            raise SourceError(
                f"{shown} has {len(self._archives.files)} {files} and no labelled image in them; "
                f"{'; '.join(tally.notices()) or 'they are empty'}"
            )
        with about(f"{shown}: "):
            self._classes, settled = labels.settle(tuple(folders), names)
        return settled

    def _found(self, path: bytes) -> tuple[bytes, list[int]]:
        """Takes an `ImageRef.path` apart: the file's absolute path, and the numbers behind it."""
        match = self.form.fullmatch(path)
        shown, (image, file, _) = for_display(path), self.words
        if match is None or path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
            raise SourceError(f"{shown} is no {image} below {self.location()}")
        archive, *numbers = match.groups()
        if not archive.lower().endswith(self.suffixes):
            raise SourceError(f"{shown} names no {file} below {self.location()}")
        return join(self._archives.root, archive), [int(number) for number in numbers]
