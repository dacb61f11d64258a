"""Images named by a table: a CSV or parquet file with a `path` and a `label` for each."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH113, PTH116, PTH120, PTH123

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

import pyarrow as pa

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, SPLIT_NAMES, read_archive
from ci2p_cache.images.image_table import guarded, open_parquet
from ci2p_cache.images.labels import Classes, LabelTable
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.reading import read_file
from ci2p_cache.images.source import ImageRef
from ci2p_cache.images.tally import Tally

__all__ = ["TableSource", "is_table"]

_COLUMNS = ("path", "label", "split")
_BATCH_ROWS = 2**14
_NO_LABEL = -1

_Row = tuple[bytes, str | int, str]


class TableSource:
    """An `ImageSource` over the files that a table names.

    The table is a `.csv` (comma), `.tsv` (tab) or `.parquet` file with columns `path`, `label` and,
    if it likes, `split` (train, val or test); others are ignored. Paths are relative to the table's
    folder, which none may leave. A key is the path, without the folder of its split in front. The
    files are not looked at before they are read.

    Args:
        location: The table.

    Raises:
        SourceError: it is missing, is no file, or has not those columns.
        ResourceError: the file system failed again and again.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(os.fsencode(location))
        self._root = os.path.dirname(self._path)
        self._shown = for_display(self._path)
        self._tally = Tally()
        self._table = LabelTable()
        self._classes: Classes | None = None
        self._labels: list[int] = []
        self._identity: tuple[int, int] | None = None
        if not os.path.isfile(self._path):
            kind = "is no file" if os.path.lexists(self._path) else "does not exist"
            raise SourceError(f"{self._shown} {kind}; wanted a table of paths and labels")
        next(self._rows(), None)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names: sorted where labels are names, by number where they are numbers."""
        return self._settled().names

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people from `classes.json` or `classes.txt` beside the table."""
        return self._settled().titles

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        notices = self._classes.notices if self._classes else ()
        return (*notices, *self._tally.notices())

    def location(self) -> str:
        """Returns the table's absolute path; bytes that are not UTF-8 are surrogates."""
        return os.fsdecode(self._path)

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
            number = self._table.add(label)
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
            raise SourceError(f"{self._shown} names no labelled image")

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image; errors as `FolderSource.read` has them."""
        self._require_below(path)
        return read_file(self._root, path)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns the file of an image."""
        self._require_below(path)
        return join(self._root, path), True

    def _require_below(self, path: bytes) -> None:
        if path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
            raise SourceError(f"{for_display(path)} is no path below {for_display(self._root)}")

    def _settled(self) -> Classes:
        """Reads all labels; once."""
        if self._classes is None:
            splits = set()
            for _, label, split in self._rows():
                self._table.add(label)
                splits.add(split)
            if "" in splits and len(splits) > 1:
                raise SourceError(f"{self._shown} has rows with a split and rows without")
            if splits and not splits & {"", "train"}:
                raise SourceError(f"{self._shown} has no row of the split train")
            try:
                classes, labels = self._table.settle((self._root,))
            except SourceError as error:
                raise SourceError(f"{self._shown}: {error}", hint=error.hint) from error
            self._classes, self._labels = classes, labels.tolist()
        return self._classes

    def _rows(self) -> Iterator[_Row]:
        """Yields path, label and split ("" for none) of every row, checked."""
        is_parquet = self._path.lower().endswith(PARQUET_SUFFIXES)
        found = os.stat(self._path)
        identity = (found.st_size, found.st_mtime_ns)
        if self._identity not in (None, identity):
            raise SourceError(f"{self._shown} was changed while it was read")
        self._identity = identity
        rows = self._parquet_rows() if is_parquet else self._csv_rows()
        for number, (path, label, split) in enumerate(rows, 1):
            try:
                yield self._checked(path, label, split)
            except SourceError as error:
                raise SourceError(f"{self._shown}, row {number}: {error}") from error

    def _checked(self, path: bytes, label: str | int, split: str) -> _Row:
        if b"://" in path:
            raise SourceError(f"{for_display(path[:200])} is a URL; wanted a file below the table")
        if path.startswith(self._root.rstrip(b"/") + b"/"):
            path = path[len(self._root.rstrip(b"/")) + 1 :]
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        if not parts or path.startswith(b"/") or b".." in parts or b"\0" in path:
            raise SourceError(
                f"`path` is {for_display(path[:200])!r}; wanted one below {for_display(self._root)}"
            )
        if label == "":
            raise SourceError(f"{for_display(path[:200])} has no label")
        known = SPLIT_NAMES.get(split.strip().lower().encode("utf-8", "replace"))
        if split and known is None:
            raise SourceError(f"`split` is {split[:40]!r}; wanted train, val or test")
        return b"/".join(parts), label, known or ""

    def _csv_rows(self) -> Iterator[tuple[bytes, str, str]]:
        tabs = self._path.lower().endswith(b".tsv")
        # Names that are not UTF-8 come through as they are.
        with read_archive(
            lambda: open(self._path, encoding="utf-8-sig", errors="surrogateescape", newline=""),
            self._path,
        ) as file:
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",", strict=True)
            try:
                self._require_columns(reader.fieldnames or ())
                for row in reader:
                    values = [row.get(name, "") for name in _COLUMNS]
                    if None in values or None in row:
                        raise SourceError(
                            f"{self._shown}, line {reader.line_num}, has another number of values "
                            "than the first line has names"
                        )
                    path, label, split = values
                    # Labels as tars have them: bytes that are not UTF-8 are shown as \xNN.
                    yield os.fsencode(path), as_key(os.fsencode(label.strip())), split
            except csv.Error as error:
                raise SourceError(
                    f"{self._shown}, line {reader.line_num}, is no CSV: {error}"
                ) from error

    def _parquet_rows(self) -> Iterator[tuple[bytes, str | int, str]]:
        def load() -> pa.Table:
            with open_parquet(self._path) as (file, _):
                names = file.schema_arrow.names
                self._require_columns(names)
                return file.read(columns=[name for name in _COLUMNS if name in names])

        table = read_archive(lambda: guarded(self._path, load), self._path)
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            columns = batch.to_pydict()
            splits = columns.get("split") or [""] * batch.num_rows
            for path, label, split in zip(columns["path"], columns["label"], splits, strict=True):
                if not isinstance(path, str | bytes) or not isinstance(label, str | int):
                    raise SourceError(
                        f"{self._shown} has a path {path!r:.80} with the label {label!r:.80}; "
                        "wanted a text, and a text or whole number"
                    )
                if not isinstance(split, str | None):
                    raise SourceError(f"{self._shown} has a split {split!r:.80}; wanted a text")
                yield os.fsencode(path), label, split or ""

    def _require_columns(self, names: object) -> None:
        found = list(names) if isinstance(names, list | tuple) else []
        if any(name not in found for name in ("path", "label")):
            shown = for_display(", ".join(map(str, found)).encode("utf-8", "replace")[:300])
            raise SourceError(
                f"{self._shown} has the columns {shown or 'none'}; wanted `path`, `label` and, "
                "where it has splits, `split`"
            )


def is_table(location: bytes) -> bool:
    """Whether a parquet file names images, instead of holding them.

    Raises:
        SourceError: it is damaged.
        ResourceError: reading failed again and again.
    """
    full = os.path.abspath(location)
    if not os.path.isfile(full):
        return False

    def names() -> list[str]:
        with open_parquet(full) as (file, _):
            return list(file.schema_arrow.names)

    found = read_archive(lambda: guarded(full, names), full)
    return "path" in found and "label" in found


def _key(path: bytes, split: str) -> str:
    """Returns a path as a key, without the folder of its split in front."""
    first, _, rest = path.partition(b"/")
    if split and rest and SPLIT_NAMES.get(first.lower()) == split:
        return as_key(rest)
    return as_key(path)
