"""Images in parquet files as Hugging Face `datasets` writes them: one row, one image.

Columns: `image`, a struct of `bytes` and `path`, and `label`, a number; the names of the classes
are in the schema's metadata under `huggingface`. Hub layout of imagenet-1k:
`data/train-00000-of-00294.parquet`, `data/validation-...`, `data/test-...` (labels -1).

::

    files --paths, labels--> listing (once) --order--> ImageRef  b"data/train-00000.parquet#817"
    read: the row group that holds the row, held while its other rows are asked for
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH119

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, Archive, ArchiveSource
from ci2p_cache.images.columns import (
    holds_paths,
    image_column,
    label_column,
    label_values,
    one_array,
    open_parquet,
    shown_names,
)
from ci2p_cache.images.labels import LabelTable
from ci2p_cache.images.names import Tally, for_display, join
from ci2p_cache.images.reading import (
    MAX_FILE_BYTES,
    about,
    changed,
    identity,
    read_archive,
    too_large,
)
from ci2p_cache.images.source import ImageRef, SourceOptions
from ci2p_cache.images.splits import SPLIT_NAMES

__all__ = ["ParquetSource"]

_OPEN_FILES, _HELD_GROUPS = 4, 2
_MAX_GROUP_BYTES = 2**30
"""Largest row group, unpacked: it is read as a whole. `datasets` writes 100 images in each."""
_NAME_BYTES = 4096
_LEADS_OUT = r"^$|^/|\\|\x00|(^|/)\.{1,2}(/|$)|//|^[A-Za-z][A-Za-z0-9+.-]*:"
"""Paths that cannot be keys: absolute ones and URLs, "." and ".." among their parts."""


class ParquetSource(ArchiveSource):
    """An `ImageSource` over parquet files with the images in them.

    The image column is the only struct of `bytes` and `path`, or else the only one of bytes; the
    label column is `label`, or else the only one that the schema's metadata calls a ClassLabel.
    Options name others.

    Paths and labels are read once, when `scan` or `classes` is first asked for. Rows follow file
    and row, so encoding reads each row group once per split that is drawn from it; in random order
    each image costs a whole group.

    A key is the row's `path` where all rows of all files have one, relative and unlike the others
    of its split; otherwise it is file and row ("data/train-00000-of-00294.parquet/817").

    Args:
        location: As `ArchiveSource` has it.
        options: Which columns hold the images and the labels.
    """

    suffixes = PARQUET_SUFFIXES
    form = re.compile(rb"(.+)#(\d{1,18})", re.DOTALL)
    words = ("row of a file", "parquet file", "files")

    def __init__(
        self, location: str | os.PathLike[str], options: SourceOptions | None = None
    ) -> None:
        super().__init__(location)
        self._options = options or SourceOptions()
        self._column = os.fsencode(self._options.image_column or "")
        if set(self._column) & set(b"#/"):
            raise SourceError(
                f"the column {for_display(self._column)} cannot be read: its name has # or / in it",
                hint="write the file again with another name for it",
            )
        self._listing: list[tuple[Archive, pa.Table]] | None = None
        self._has_paths = False
        self._labels: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._lock = threading.Lock()
        self._file = lru_cache(_OPEN_FILES)(_opened)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: files by split and name, rows as they are in them."""
        order = 0
        # `read` knows nothing of the options.
        column = b"=" + self._column if self._column else b""
        for archive, table in self._list():
            shown = os.fsdecode(archive.path).encode("utf-8", "backslashreplace").decode()
            for batch in table.to_batches():
                columns = (batch.column(name).to_pylist() for name in ("row", "path", "label"))
                for row, name, label_id in zip(*columns, strict=True):
                    path = b"%b#%d%b" % (archive.path, row, column)
                    key = name if self._has_paths else f"{shown}/{row}"
                    label = int(self._labels[label_id]) if label_id >= 0 else -1
                    yield ImageRef(key, archive.split, label, path, order=order)
                    order += 1

    def read(self, path: bytes) -> bytes:
        """See `ImageReader`."""
        file, _, rest = path.rpartition(b"#")
        number, _, column = rest.partition(b"=")
        full, (row,) = self._found(b"%b#%b" % (file, number))
        # No two threads may open one file, each with row groups of its own.
        with self._lock:
            table = self._file(full, SourceOptions(image_column=os.fsdecode(column) or None))
        return table.image(row)

    def _list(self) -> list[tuple[Archive, pa.Table]]:
        if self._listing is not None:
            return self._listing
        labels, listing = LabelTable(), []
        tally, names = Tally(), None
        for archive in self._archives.files:
            full = join(self._archives.root, archive.path)
            file = _opened(full, self._options)
            listing.append((archive, file.listing(labels, archive.split, tally)))
            if names is not None and names != file.class_names:
                raise SourceError(
                    f"{for_display(full)} has other class names in its metadata than the first "
                    "file; a label would not mean the same in both"
                )
            names = file.class_names
        folder = self._archives.files[0].path.rpartition(b"/")[0]
        folders = dict.fromkeys([self._archives.root, join(self._archives.root, folder)])
        num_images = sum(table.num_rows for _, table in listing)
        if self._options.labels == "auto" or not num_images:
            self._labels = self._settle(
                labels, tuple(folders), names or (), num_images=num_images, tally=tally
            )
        self._has_paths = _paths_are_keys(listing)
        self._tally = tally
        self._listing = listing
        return listing


def _paths_are_keys(listing: list[tuple[Archive, pa.Table]]) -> bool:
    """Whether every row has a path that can be its key."""
    for split in {archive.split for archive, _ in listing}:
        paths = pa.concat_tables(t for archive, t in listing if archive.split == split)["path"]
        if (
            paths.null_count
            or pc.any(pc.match_substring_regex(paths, _LEADS_OUT)).as_py()
            or (pc.max(pc.binary_length(paths)).as_py() or 0) > _NAME_BYTES
            or len(pc.unique(paths)) != len(paths)
        ):
            return False
    return True


class _ImageTable:
    """One parquet file with images; any number of threads may read it."""

    def __init__(self, full: bytes, options: SourceOptions) -> None:
        self._full = full
        self._options = options
        self._identity = identity(full)
        self._lock = threading.Lock()
        self._group = lru_cache(_HELD_GROUPS)(self._read_group)
        with open_parquet(full) as (file, groups):
            self._schema = file.schema_arrow
            self._holds_paths = holds_paths(file, options.image_column)
        self._first_rows = [0, *accumulate(group.rows for group in groups)]
        largest = max((group.unpacked_bytes for group in groups), default=0)
        if largest > _MAX_GROUP_BYTES:
            raise SourceError(
                f"{for_display(full)} has a row group of {largest} bytes; it is read as a whole, "
                f"and at most {_MAX_GROUP_BYTES} bytes are",
                hint="write the file again with row groups of about 100 images",
            )
        with about(f"{for_display(full)} "):
            self._image = image_column(self._schema, options.image_column)
        self._is_struct = pa.types.is_struct(self._schema.field(self._image).type)
        self.class_names: tuple[str, ...] = ()

    def listing(self, labels: LabelTable, split: str | None, tally: Tally) -> pa.Table:
        """Returns row (int64), path (string, may be null) and label (int32, as `labels` numbers).

        Rows of the test split that have no label (-1, null) are tallied and left out. Where labels
        do not count, all rows are there, with the label -1.
        """
        wanted = [f"{self._image}.path"] if self._is_struct else []
        label = None
        if self._options.labels == "auto":
            with about(f"{for_display(self._full)} "):
                label, self.class_names = label_column(self._schema, self._options.label_column)
            wanted.append(label)
        table = self._read(columns=wanted)
        self._refuse_splits(split)
        num_rows = self._first_rows[-1]
        paths = pa.nulls(num_rows, pa.string())
        if self._is_struct:
            paths = one_array(pc.struct_field(table[self._image], "path")).cast(pa.string())
        self._refuse_paths(paths)
        rows = np.arange(num_rows)
        if label is None:
            columns = [rows, paths, np.full(num_rows, -1, np.int32)]
            return pa.table(columns, names=["row", "path", "label"])
        try:
            values, indices = label_values(table[label])
        except SourceError as error:
            raise SourceError(
                f"{for_display(self._full)} {error}; wanted whole numbers or names"
            ) from error
        # A row without a value is that of a missing one behind all others.
        value_of = pc.fill_null(indices, len(values)).to_numpy(zero_copy_only=False)
        has_label = np.array([value is not None for value in (*values, None)])[value_of]
        missing = np.flatnonzero(~has_label)
        if len(missing):
            if split != "test":
                raise SourceError(f"{for_display(self._full)}: row {missing[0]} has no label")
            shown = b"%b, row %d" % (os.path.basename(self._full), missing[0])
            tally.add("unlabelled", shown, len(missing))
        with about(f"{for_display(self._full)} has "):
            numbers = [-1 if value is None else labels.add(value) for value in (*values, None)]
        label_of = np.array(numbers, np.int32)[value_of]
        columns = [rows[has_label], paths.filter(pa.array(has_label)), label_of[has_label]]
        return pa.table(columns, names=["row", "path", "label"])

    def image(self, row: int) -> bytes:
        """Returns the content of one image."""
        if not 0 <= row < self._first_rows[-1]:
            raise SourceError(
                f"{for_display(self._full)} has {self._first_rows[-1]} rows; row {row} was wanted"
            )
        group = bisect_right(self._first_rows, row) - 1
        with self._lock:
            value = self._group(group)[row - self._first_rows[group]]
        data = value.as_buffer() if value.is_valid else None
        if data is None:
            raise ImageDecodeError("the row holds no bytes")
        if data.size > MAX_FILE_BYTES:
            raise too_large(data.size)
        return bytes(data)

    def _read_group(self, group: int) -> pa.Array:
        name = self._image
        table = self._read(group, columns=[f"{name}.bytes" if self._is_struct else name])
        return one_array(pc.struct_field(table[name], "bytes") if self._is_struct else table[name])

    def _refuse_splits(self, split: str | None) -> None:
        """Refuses a column `split` that says another thing than the name of the file."""
        if "split" not in self._schema.names:
            return
        column = self._read(columns=["split"])["split"]
        named = {str(name).strip().lower() for name in pc.unique(one_array(column)).to_pylist()}
        if {SPLIT_NAMES.get(name.encode()) for name in named} != {split}:
            raise SourceError(
                f"{for_display(self._full)} has a column `split` with "
                f"{shown_names(sorted(named), 200)}, and its name says {split or 'no split'}; "
                "images in parquet have the split of their file",
                hint="write a file for each split, train.parquet and test.parquet; or rename the "
                "column, if it holds no splits",
            )

    def _refuse_paths(self, paths: pa.Array) -> None:
        """Refuses a file whose images are elsewhere."""
        if self._holds_paths:
            first = next((path.as_py() for path in paths[:1]), None)
            raise SourceError(
                f"{for_display(self._full)} has paths of images in `{self._image}`, for example "
                f"{for_display(str(first).encode()[:200])}, and no bytes; wanted the images",
                hint="encode this file alone, which reads it as a list: --root names the folder "
                "that its paths start from",
            )

    def _read(self, group: int | None = None, *, columns: list[str]) -> pa.Table:
        """Reads columns of one row group, or of all."""

        def attempt() -> pa.Table:
            if identity(self._full) != self._identity:
                raise changed(self._full)
            with open_parquet(self._full, checked=True) as (file, _):
                if group is None:
                    return file.read(columns=columns)
                return file.read_row_group(group, columns=columns)

        return read_archive(attempt, self._full)


def _opened(full: bytes, options: SourceOptions) -> _ImageTable:
    return read_archive(partial(_ImageTable, full, options), full)
