"""One parquet file with images: its columns, its paths and labels, and its row groups."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH116, PTH119, PTH123

from __future__ import annotations

import os
import stat
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.archives import SPLIT_NAMES, read_archive
from ci2p_cache.images.columns import (
    holds_paths,
    image_column,
    label_column,
    label_values,
    plain,
)
from ci2p_cache.images.labels import LabelTable
from ci2p_cache.images.names import for_display
from ci2p_cache.images.reading import MAX_FILE_BYTES
from ci2p_cache.images.source import SourceOptions
from ci2p_cache.images.tally import Tally
from ci2p_cache.parquet import RowGroup, require_small_pages

__all__ = ["ImageTable", "guarded", "open_parquet"]

_T = TypeVar("_T")

_MAX_GROUP_BYTES = 2**30
"""Of one row group, unpacked: it is read as a whole. `datasets` writes 100 images in each."""
_KEPT_GROUPS = 2
_MAX_FOOTER_BYTES = 2**22
"""The names of 21,841 classes are in it twice, as `datasets` writes it: some 1.5 MB."""


class ImageTable:
    """One parquet file with images; any number of threads may read it.

    Args:
        full: Its absolute path.
        options: Its columns, where they are named; the one of labels matters for `listing` alone.

    Raises:
        SourceError: it is damaged, hostile, or has other columns.
        OSError: it cannot be read.
    """

    def __init__(self, full: bytes, options: SourceOptions | None = None) -> None:
        self._full = full
        self._options = options or SourceOptions()
        self._identity = _identity(full)
        self._groups: OrderedDict[int, pa.Array] = OrderedDict()
        self._lock = threading.Lock()
        groups, self._schema, self._holds_paths = guarded(full, self._open)
        self._first_rows = [0, *accumulate(group.rows for group in groups)]
        largest = max((group.unpacked_bytes for group in groups), default=0)
        if largest > _MAX_GROUP_BYTES:
            raise SourceError(
                f"{for_display(full)} has a row group of {largest} bytes; it is read as a whole, "
                f"and at most {_MAX_GROUP_BYTES} bytes are",
                hint="write the file again with row groups of about 100 images",
            )
        with self._named():
            self._image = image_column(self._schema, self._options.image_column)
        self._is_struct = pa.types.is_struct(self._schema.field(self._image).type)
        self.class_names: tuple[str, ...] = ()

    def listing(self, labels: LabelTable, split: str | None, tally: Tally) -> pa.Table:
        """Returns row (int64), path (string, may be null) and label (int32, a place in `labels`).

        Rows of the test split that have no label (-1, null) are tallied and left out. Where labels
        do not count, all rows are there, with the label -1.

        Raises:
            SourceError: the file is damaged, has no column of labels or only paths of images, a
                row of another split has no label, or a column `split` does not fit its name.
            ResourceError: reading failed again and again.
        """
        wanted = [f"{self._image}.path"] if self._is_struct else []
        label = None
        if self._options.labels == "auto":
            with self._named():
                label, self.class_names = label_column(self._schema, self._options.label_column)
            wanted.append(label)
        table = self._read(lambda file: file.read(columns=wanted))
        self._refuse_splits(split)
        num_rows = self._first_rows[-1]
        paths = pa.nulls(num_rows, pa.string())
        if self._is_struct:
            paths = plain(pc.struct_field(table[self._image], "path")).cast(pa.string())
        self._refuse_paths(paths)
        rows = pa.array(np.arange(num_rows))
        if label is None:
            columns = [rows, paths, np.full(num_rows, -1, np.int32)]
            return pa.table(columns, names=["row", "path", "label"])
        try:
            values, indices = label_values(table[label])
        except SourceError as error:
            raise SourceError(
                f"{for_display(self._full)} {error}; wanted whole numbers or names"
            ) from error
        known = {place: value for place, value in enumerate(values) if value is not None}
        has_label = pc.is_in(indices, pa.array(list(known), indices.type))
        missing = rows.filter(pc.invert(has_label))
        if len(missing):
            first = missing[0].as_py()
            if split != "test":
                raise SourceError(f"{for_display(self._full)}: row {first} has no label")
            for _ in range(len(missing)):
                tally.add("unlabelled", b"%b, row %d" % (os.path.basename(self._full), first))
        place = np.zeros(len(values) + 1, np.int32)
        for number, value in known.items():
            try:
                place[number] = labels.add(value)
            except SourceError as error:
                raise SourceError(f"{for_display(self._full)} has {error}") from error
        numbers = indices.filter(has_label).to_numpy(zero_copy_only=False)
        columns = [rows.filter(has_label), paths.filter(has_label), place[numbers]]
        return pa.table(columns, names=["row", "path", "label"])

    def image(self, row: int) -> bytes:
        """Returns the content of one image; errors as `ParquetSource.read` has them."""
        if not 0 <= row < self._first_rows[-1]:
            raise SourceError(
                f"{for_display(self._full)} has {self._first_rows[-1]} rows; row {row} was wanted"
            )
        group = bisect_right(self._first_rows, row) - 1
        with self._lock:
            if group in self._groups:
                self._groups.move_to_end(group)
            else:
                name = self._image
                columns = [f"{name}.bytes" if self._is_struct else name]
                table = self._read(lambda file: file.read_row_group(group, columns=columns))
                found = pc.struct_field(table[name], "bytes") if self._is_struct else table[name]
                self._groups[group] = plain(found)
                if len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            value = self._groups[group][row - self._first_rows[group]]
        data = value.as_buffer() if value.is_valid else None
        if data is None:
            raise ImageDecodeError("the row holds no bytes")
        if data.size > MAX_FILE_BYTES:
            raise ImageDecodeError(
                f"the file has {data.size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        return bytes(data)

    def _open(self) -> tuple[list[RowGroup], pa.Schema, bool]:
        with open_parquet(self._full) as (file, groups):
            return groups, file.schema_arrow, holds_paths(file, self._options.image_column)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Adds the file's name to errors that do without."""
        try:
            yield
        except SourceError as error:
            raise SourceError(f"{for_display(self._full)} {error}", hint=error.hint) from error

    def _refuse_splits(self, split: str | None) -> None:
        """Refuses a column `split` that says another thing than the name of the file."""
        if "split" not in self._schema.names:
            return
        table = self._read(lambda file: file.read(columns=["split"]))
        named = {str(name).strip().lower() for name in pc.unique(plain(table["split"])).to_pylist()}
        if {SPLIT_NAMES.get(name.encode()) for name in named} != {split}:
            shown = for_display(", ".join(sorted(named)).encode()[:200])
            raise SourceError(
                f"{for_display(self._full)} has a column `split` with {shown}, and its name says "
                f"{split or 'no split'}; images in parquet have the split of their file",
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

    def _read(self, action: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
        def attempt() -> pa.Table:
            if _identity(self._full) != self._identity:
                raise SourceError(
                    f"{for_display(self._full)} was changed while it was read",
                    hint="run the same command when nothing writes to the images any more",
                )

            def inner() -> pa.Table:
                with open_parquet(self._full, checked=True) as (file, _):
                    return action(file)

            return guarded(self._full, inner)

        return read_archive(attempt, self._full)


@contextmanager
def open_parquet(
    full: bytes, *, checked: bool = False
) -> Iterator[tuple[pq.ParquetFile, list[RowGroup]]]:
    """Opens a parquet file with every page's checksum verified, where it has them.

    Args:
        full: Its absolute path.
        checked: It was found to unpack to little before; the list of row groups is empty then.

    Raises:
        ValueError, OSError, ArrowException: as `guarded` tells them apart.
    """
    groups = []
    if not checked:
        groups = require_small_pages(os.fsdecode(full), max_footer_bytes=_MAX_FOOTER_BYTES)
    # Not by name: pyarrow cannot open one that is not UTF-8.
    with (
        open(full, "rb") as handle,
        pq.ParquetFile(
            handle,
            page_checksum_verification=True,
            thrift_string_size_limit=2**24,
            thrift_container_size_limit=2**16,
        ) as file,
    ):
        yield file, groups


def guarded(full: bytes, action: Callable[[], _T]) -> _T:
    """Calls `action`, which reads a parquet file, and tells damage from a disk that is not well.

    Raises:
        SourceError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        return action()
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SourceError(
            f"{for_display(full)} is damaged: {for_display(str(error).encode())[:500]}",
            hint="get the file again, or leave it out",
        ) from error


def _identity(full: bytes) -> tuple[int, ...]:
    found = os.stat(full)
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{for_display(full)} is no regular file")
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
