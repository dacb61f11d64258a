"""The rows of a list of images: from text with a delimiter that is found out, or from parquet."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH122, PTH123

from __future__ import annotations

import codecs
import csv
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import read_archive
from ci2p_cache.images.columns import columns_hint, label_column, label_values, path_column, plain
from ci2p_cache.images.image_table import guarded, open_parquet
from ci2p_cache.images.kinds import IMAGE_SUFFIXES
from ci2p_cache.images.names import as_key, for_display
from ci2p_cache.images.source import SourceOptions

__all__ = ["CsvRows", "ListRows", "ParquetRows"]

_SPLIT = "split"
_DELIMITERS = ",;\t|"
_BATCH_ROWS = 2**14
_MAX_HEADER_CHARS = 2**16

_Row = tuple[bytes, str | int | None, str]
"""Path, label (None or empty for none) and split (empty for none), as they stand there."""


class ListRows(Protocol):
    """Gives the rows of a list, again from the start each time."""

    class_names: tuple[str, ...]
    """Names of numbered labels, where the list has them."""

    def rows(self) -> Iterator[_Row]:
        """Yields every row.

        Raises:
            SourceError: the list is damaged or has other columns.
            ResourceError: reading failed again and again.
        """


class CsvRows:
    """The rows of a text.

    Args:
        path: Its absolute path.
        options: The columns of paths and labels.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, path: bytes, options: SourceOptions) -> None:
        self._path = path
        self._shown = for_display(path)
        self._options = options
        self._wanted = [options.image_column or "path"]
        if options.labels == "auto":
            self._wanted.append(options.label_column or "label")

    def rows(self) -> Iterator[_Row]:
        """Yields every row; errors as `ListRows.rows` has them."""
        # Names that are not UTF-8 come through as they are.
        with read_archive(
            lambda: open(self._path, encoding="utf-8-sig", errors="surrogateescape", newline=""),
            self._path,
        ) as file:
            delimiter = self._delimiter(file.readline(_MAX_HEADER_CHARS))
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            try:
                self._require_columns(reader.fieldnames or ())
                for row in reader:
                    values = [row.get(name, "") for name in (*self._wanted, _SPLIT)]
                    if len(values) == 2:
                        values.insert(1, "")
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

    def _delimiter(self, line: str) -> str:
        """Returns the delimiter that gives the wanted columns, or else the most."""
        raw = line.encode("utf-8", "surrogateescape")
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            name = shlex.quote(self._shown)
            raise SourceError(
                f"{self._shown} is text in UTF-16, as Excel writes it; wanted UTF-8",
                hint=f"iconv -f UTF-16 -t UTF-8 {name} > utf8.csv, and encode utf8.csv",
            )
        found = {}
        for each in _DELIMITERS:
            try:
                names = next(csv.reader([line], delimiter=each), [])
            except csv.Error:
                continue
            found[each] = (len(set(self._wanted) & set(names)), len(names))
        return max(found, key=lambda each: found[each], default=",")

    def _require_columns(self, names: Sequence[str]) -> None:
        found = [str(name) for name in names]
        double = next((name for name in (*self._wanted, _SPLIT) if found.count(name) > 1), None)
        if double is not None:
            raise SourceError(
                f"{self._shown} has {found.count(double)} columns called `{double}`; wanted one",
                hint="rename one of them in the first line",
            )
        _refuse_other_split(self._shown, found)
        if not set(self._wanted) <= set(found):
            shown = for_display(", ".join(found).encode("utf-8", "replace")[:300])
            wanted = ", ".join(f"`{name}`" for name in self._wanted)
            hint = columns_hint(found, self._options.image_column, self._options.label_column)
            if any(os.path.splitext(n.encode("utf-8", "replace"))[1].lower() in IMAGE_SUFFIXES
                   for n in found):  # fmt: skip
                # The first line is a row.
                name = shlex.quote(self._shown)
                hint = f"give the list a first line of names: sed -i '1i path,label' {name}"
            raise SourceError(
                f"{self._shown} has the columns {shown or 'none'}; wanted {wanted} and, where it "
                f"has splits, `{_SPLIT}`",
                hint=hint,
            )


class ParquetRows:
    """The rows of a parquet file.

    Args:
        path: Its absolute path.
        options: The columns of paths and labels.
    """

    def __init__(self, path: bytes, options: SourceOptions) -> None:
        self._path = path
        self._shown = for_display(path)
        self._options = options
        self.class_names: tuple[str, ...] = ()

    def rows(self) -> Iterator[_Row]:
        """Yields every row; errors as `ListRows.rows` has them."""
        table = read_archive(lambda: guarded(self._path, self._load), self._path)
        values, labels = self._labels(table)
        for start in range(0, table.num_rows, _BATCH_ROWS):
            part = table.slice(start, _BATCH_ROWS)
            own = labels.slice(start, _BATCH_ROWS).to_pylist()
            splits = [""] * part.num_rows
            if _SPLIT in table.column_names:
                splits = part[_SPLIT].to_pylist()
            for path, label, split in zip(part["path"].to_pylist(), own, splits, strict=True):
                if path is None:
                    raise SourceError(f"{self._shown} has a row without a path")
                yield os.fsencode(path), None if label is None else values[label], split or ""

    def _load(self) -> pa.Table:
        """Reads path, label and, where it is there, split: plain columns of those names."""
        with open_parquet(self._path) as (file, _):
            return self._columns(file)

    def _columns(self, file: pq.ParquetFile) -> pa.Table:
        schema, options = file.schema_arrow, self._options
        path = path_column(schema, options.image_column)
        label_name = options.label_column or "label"
        if path is None:
            shown = for_display(", ".join(schema.names).encode("utf-8", "replace")[:300])
            raise SourceError(
                f"{self._shown} has the columns {shown or 'none'}; wanted "
                f"`{options.image_column or 'path'}`, `{label_name}` and, where it has splits, "
                f"`{_SPLIT}`",
                hint=columns_hint(schema.names, options.image_column, options.label_column),
            )
        is_struct = pa.types.is_struct(schema.field(path).type)
        wanted, label = [f"{path}.path" if is_struct else path], None
        if options.labels == "auto":
            try:
                label, self.class_names = label_column(schema, options.label_column)
            except SourceError as error:
                raise SourceError(f"{self._shown} {error}", hint=error.hint) from error
            wanted.append(label)
        _refuse_other_split(self._shown, schema.names)
        wanted += [_SPLIT] if _SPLIT in schema.names else []
        table = file.read(columns=wanted)
        columns = {
            "path": plain(pc.struct_field(table[path], "path") if is_struct else table[path]),
            "label": pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
            if label is None
            else table[label],
        }
        if _SPLIT in schema.names:
            splits = plain(table[_SPLIT])
            if not (pa.types.is_string(splits.type) or pa.types.is_large_string(splits.type)):
                raise SourceError(f"{self._shown} has a `split` of type {splits.type}")
            columns["split"] = splits
        return pa.table(columns)

    def _labels(self, table: pa.Table) -> tuple[list[str | int | None], pa.Array]:
        try:
            return label_values(table["label"])
        except SourceError as error:
            raise SourceError(
                f"{self._shown} {error}; wanted a text, and a text or whole number"
            ) from error


def _refuse_other_split(shown: str, names: Sequence[str]) -> None:
    """Refuses a column `Split`, which would be left aside."""
    other = next((name for name in names if name.strip().lower() == _SPLIT), _SPLIT)
    if _SPLIT not in names and other != _SPLIT:
        raise SourceError(
            f"{shown} has a column {other!r}; wanted `{_SPLIT}`",
            hint=f"rename it to {_SPLIT}, or to something else if it holds no splits",
        )
