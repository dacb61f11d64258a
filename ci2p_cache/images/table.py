"""Images named by a table: a CSV or parquet file with the path and the label of each."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH112, PTH113, PTH116, PTH120

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, SPLIT_NAMES, read_archive
from ci2p_cache.images.columns import holds_paths
from ci2p_cache.images.image_table import guarded, open_parquet
from ci2p_cache.images.labels import NO_LABEL, Classes, LabelTable
from ci2p_cache.images.list_paths import ListPaths
from ci2p_cache.images.list_rows import CsvRows, ListRows, ParquetRows
from ci2p_cache.images.names import as_key, for_display
from ci2p_cache.images.reading import place_below, read_file
from ci2p_cache.images.source import ImageRef, SourceOptions
from ci2p_cache.images.splits import split_folders
from ci2p_cache.images.tally import Tally

__all__ = ["TableSource", "is_table"]

_NO_LABEL = -1
_FIRST_ROWS = 1000
"""Of a list: they show which folder its paths start from."""

_Row = tuple[bytes, str | int, str]


class TableSource:
    """An `ImageSource` over the files that a table names.

    The table is a `.csv`, `.tsv` or `.parquet` file with columns `path`, `label` and, if it likes,
    `split` (train, val or test); options name others for the first two. The delimiter of a text is
    found out. Paths start from the table's folder or from a root that is named, which none may
    leave; absolute ones below it are taken too. A key is the path below the root, without the
    folder of its split in front. The files are not looked at before they are read, but the first
    few, and those whose paths have backslashes.

    Args:
        location: The table.
        options: The columns of paths and labels, and the folder that paths start from.

    Raises:
        SourceError: it is missing, is no file, or has not those columns.
        ResourceError: the file system failed again and again.
    """

    def __init__(
        self, location: str | os.PathLike[str], options: SourceOptions | None = None
    ) -> None:
        options = options or SourceOptions()
        self._labelled = options.labels == "auto"
        self._path = os.path.abspath(os.fsencode(location))
        folder = os.path.dirname(self._path)
        root = None if options.root is None else os.path.abspath(os.fsencode(options.root))
        self._root = root or folder
        is_parquet = self._path.lower().endswith(PARQUET_SUFFIXES)
        by_folder = root is not None or (is_parquet and options.image_column is not None)
        self._location = self._root if by_folder else self._path
        self._shown = for_display(self._path)
        self._tally = Tally()
        self._labels_of = LabelTable()
        self._classes: Classes | None = None
        self._labels: list[int] = []
        self._identity: tuple[int, int] | None = None
        if not os.path.isfile(self._path):
            kind = "is no file" if os.path.lexists(self._path) else "does not exist"
            raise SourceError(f"{self._shown} {kind}; wanted a table of paths and labels")
        if root is not None and not os.path.isdir(root):
            raise SourceError(f"--root {for_display(root)} is no folder; wanted one with images")
        self._table: ListRows = CsvRows(self._path, options)
        if is_parquet:
            self._table = ParquetRows(self._path, options)
        self._paths = ListPaths(self._root, folder)
        next(self._rows(), None)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of `ordered_classes`, or as they are declared."""
        return self._settled().names

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people from `classes.json` or `classes.txt` beside the table."""
        return self._settled().titles

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        notices = self._classes.notices if self._classes else ()
        return (*notices, *self._tally.notices(), *self._paths.notices())

    def location(self) -> str:
        """Returns the table's absolute path; the root's where options were needed to find that.

        Either is enough to read images again. Bytes that are not UTF-8 are surrogates.
        """
        return os.fsdecode(self._location)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image in the order of the table.

        Raises:
            SourceError: the table is damaged, a row cannot be used, or there is none.
            ResourceError: reading failed again and again.
        """
        self._settled()
        tally = self._tally = Tally()
        count = 0
        for path, label, split in self._rows():
            if not self._labelled:
                count += 1
                yield ImageRef(_key(path, split), split or None, _NO_LABEL, path)
                continue
            number = self._labels_of.add(label)
            if number >= len(self._labels):
                raise SourceError(f"{self._shown} was changed while it was read")
            if self._labels[number] == _NO_LABEL:
                if split != "test":
                    raise SourceError(f"{self._shown}: {for_display(path)} has the label -1, none")
                tally.add("unlabelled", path)
                continue
            count += 1
            yield ImageRef(_key(path, split), split or None, self._labels[number], path)
        if not count:
            raise SourceError(
                f"{self._shown} names no {'labelled ' if self._labelled else ''}image"
            )

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image; errors as `FolderSource.read` has them."""
        return read_file(self._root, path)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns the file of an image."""
        return place_below(self._root, path), True

    def _settled(self) -> Classes:
        """Reads all labels; once."""
        if self._classes is None:
            splits: set[str] = set()
            folders_in: set[bytes] = set()
            first: list[bytes] = []
            for path, label, split in self._rows():
                self._labels_of.add(label)
                splits.add(split)
                folders_in.add(os.path.dirname(path))
                if len(first) < ListPaths.num_looked_at:
                    first.append(path)
            self._paths.look_at(first)
            if "" in splits and len(splits) > 1:
                raise SourceError(f"{self._shown} has rows with a split and rows without")
            if "" in splits:
                self._refuse_split_folders(folders_in)
            if splits and not splits & {"", "train"}:
                raise SourceError(f"{self._shown} has no row of the split train")
            folders = tuple(dict.fromkeys([os.path.dirname(self._path), self._root]))
            try:
                self._paths.refuse_without_suffix(first)
                if not self._labelled:
                    self._classes = Classes((), ())
                    return self._classes
                classes, labels = self._labels_of.settle(folders, self._table.class_names)
            except SourceError as error:
                raise SourceError(f"{self._shown}: {error}", hint=error.hint) from error
            self._classes, self._labels = classes, labels.tolist()
        return self._classes

    def _refuse_split_folders(self, folders: set[bytes]) -> None:
        """Refuses a list without splits all of whose files are in folders of splits."""
        start = len(os.path.commonpath(folders))
        heads = sorted({path[start:].lstrip(b"/").partition(b"/")[0] for path in folders})
        if 1 < len(heads) == len(split_folders(heads)):
            raise SourceError(
                f"{self._shown} has paths in the folders {for_display(b', '.join(heads))} and no "
                "column `split`; they look like splits, and would be mixed",
                hint="add a column split with train, val or test in each row",
            )

    def _rows(self) -> Iterator[_Row]:
        """Yields path, label and split ("" for none) of every row, checked."""
        found = os.stat(self._path)
        identity = (found.st_size, found.st_mtime_ns)
        if self._identity not in (None, identity):
            raise SourceError(f"{self._shown} was changed while it was read")
        self._identity = identity
        for number, (path, label, split) in enumerate(self._table.rows(), 1):
            try:
                yield self._checked(path, label, split)
            except SourceError as error:
                raise SourceError(
                    f"{self._shown}, row {number}: {error}", hint=error.hint
                ) from error

    def _checked(self, path: bytes, label: str | int | None, split: str) -> _Row:
        known = SPLIT_NAMES.get(split.strip().lower().encode("utf-8", "replace"))
        if split and known is None:
            raise SourceError(f"`split` is {split[:40]!r}; wanted train, val or test")
        given = NO_LABEL if label is None or label == "" else label
        if self._labelled and given != label and known != "test":
            raise SourceError(
                f"{for_display(path[:200])} has no label",
                hint="leave rows without a label out, or give them the split test",
            )
        try:
            return self._paths.below(path), given, known or ""
        except SourceError as error:
            if path.startswith(b"/"):
                hint = f"repeat the command with --root {for_display(self._common_folder(path))}"
                raise SourceError(str(error), hint=hint) from error
            raise

    def _common_folder(self, path: bytes) -> bytes:
        """Returns the folder around those of an absolute path and of the first ones of the list."""
        first = [each for each, *_ in islice(self._table.rows(), _FIRST_ROWS)]
        folders = {os.path.dirname(each) for each in (path, *first) if each.startswith(b"/")}
        # One folder alone is that of a class.
        return os.path.commonpath(folders) if len(folders) > 1 else os.path.dirname(folders.pop())


def is_table(location: bytes, options: SourceOptions | None = None) -> bool:
    """Whether a parquet file names images, instead of holding them.

    Raises:
        SourceError: it is damaged.
        ResourceError: reading failed again and again.
    """
    full = os.path.abspath(location)
    if not os.path.isfile(full):
        return False

    def names_images() -> bool:
        with open_parquet(full) as (file, _):
            return holds_paths(file, options.image_column if options else None)

    return read_archive(lambda: guarded(full, names_images), full)


def _key(path: bytes, split: str) -> str:
    """Returns a path as a key, without the folder of its split in front."""
    first, _, rest = path.partition(b"/")
    if split and rest and SPLIT_NAMES.get(first.lower()) == split:
        return as_key(rest)
    return as_key(path)
