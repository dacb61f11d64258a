"""Parquet files: opened with care, and which columns of a table hold images, paths and labels."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH123

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ci2p_cache.errors import SourceError
from ci2p_cache.images.labels import written
from ci2p_cache.images.names import for_display
from ci2p_cache.parquet import RowGroup, require_small_pages

__all__ = [
    "columns_hint",
    "holds_paths",
    "image_column",
    "label_column",
    "label_values",
    "one_array",
    "open_parquet",
    "path_column",
    "shown_names",
]  # fmt: skip

_MAX_FOOTER_BYTES = 2**22
"""The names of 21,841 classes are in it twice, as `datasets` writes it: some 1.5 MB."""

_PATH_NAMES = ("path", "image_path", "img_path", "filepath", "file_path", "filename", "file_name",
               "file", "image", "images", "img", "image_id", "id", "name")  # fmt: skip
_LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "y", "species",
                "breed", "label_name", "class_id", "category_id")  # fmt: skip
"""What such columns are often called: for hints alone, never taken without being named."""


@contextmanager
def open_parquet(
    full: bytes, *, checked: bool = False
) -> Iterator[tuple[pq.ParquetFile, list[RowGroup]]]:
    """Opens a parquet file with every page's checksum verified, where it has them.

    With `checked`, it was found to unpack to little before, and its row groups are not listed.

    Raises:
        SourceError: the file is damaged, now or where its rows are read.
        OSError: it cannot be read.
    """
    try:
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
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SourceError(
            f"{for_display(full)} is damaged: {for_display(str(error).encode())[:500]}",
            hint="get the file again, or leave it out",
        ) from error


def holds_paths(file: pq.ParquetFile, wanted: str | None) -> bool:
    """Whether a file lists paths of images; `wanted` is the column, where one is named."""
    schema = file.schema_arrow
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    if wanted is not None and wanted in schema.names:
        kind = schema.field(wanted).type
        return _is_text(kind) or (wanted in structs and not _has_bytes(file, wanted))
    if structs:
        return not any(_has_bytes(file, name) for name in structs)
    holds_bytes = any(_is_binary(field.type) for field in schema if field.name != "path")
    return "path" in schema.names or (not holds_bytes and path_column(schema, None) is not None)


def image_column(schema: pa.Schema, wanted: str | None) -> str:
    """Returns the column that holds images: a struct of `bytes` and `path`, or bytes alone.

    Errors of this and the next functions are half sentences, behind the file's name.
    """
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    binaries = [field.name for field in schema if _is_binary(field.type)]
    found = _meant(schema, wanted, structs + binaries, structs or binaries)
    if len(found) != 1:
        raise SourceError(
            f"has no single image column; wanted `{wanted or 'image'}`, a struct of `bytes` and "
            f"`path` or bytes alone; it has {_shown(schema)}",
            hint=f"repeat the command with --image-column {found[0]}"
            if found
            else f"if it lists paths: {columns_hint(schema.names, None, None)}",
        )
    return found[0]


def path_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """Returns the column of a list that holds paths: text, or a struct of `bytes` and `path`."""
    texts = [field.name for field in schema if _is_text(field.type) or _is_binary(field.type)]
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    usual = [name for name in ("path", "image") if name in texts][:1]
    found = _meant(schema, wanted, texts + structs, usual or structs)
    return found[0] if len(found) == 1 else None


def label_column(schema: pa.Schema, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """Returns the column that holds labels, and the names of its classes, where it has them."""
    features = _features_of(schema)
    declared = [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    usual = ["label"] if "label" in schema.names else declared
    found = _meant(schema, wanted, schema.names, usual)
    if len(found) != 1:
        several = f"{len(found)} of them, {', '.join(found)}" if found else "none"
        best = found[0] if found else _guess(schema.names, _LABEL_NAMES)
        raise SourceError(
            f"has no single label column but {for_display(several.encode()[:300])}; wanted "
            f"`{wanted or 'label'}`; it has {_shown(schema)}",
            hint=f"repeat the command with --label-column {best}",
        )
    kind = schema.field(found[0]).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(inner) or pa.types.is_floating(inner) or _is_text(inner)):
        raise SourceError(
            f"has a column `{for_display(found[0].encode())}` of type {str(kind)[:80]}; wanted "
            "whole numbers or names"
        )
    names = features.get(found[0], {}).get("names")
    if isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        return found[0], tuple(names)
    return found[0], ()


def _features_of(schema: pa.Schema) -> dict[str, Any]:
    """Returns what the metadata says of each column, as `datasets` writes it; empty for nothing."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def label_values(column: pa.ChunkedArray) -> tuple[list[str | int | None], pa.Array]:
    """Returns the different labels of a column, None for none, and which each row has."""
    given = pc.dictionary_encode(one_array(column))
    try:
        values = [written(value) for value in given.dictionary.to_pylist()]
    except SourceError as error:
        raise SourceError(f"has a column of type {str(column.type)[:80]} with {error}") from error
    return values, given.indices


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array, without dictionaries (pandas' categories) and views."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    if pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    return column.combine_chunks()


def _has_bytes(file: pq.ParquetFile, image: str) -> bool:
    """Whether any row holds an image; False only where every group says that none does."""
    metadata = file.metadata
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema not in (image, f"{image}.bytes"):
                continue
            found = column.statistics
            if found is None or not found.has_null_count or found.null_count < group.num_rows:
                return True
    return not metadata.num_rows


def columns_hint(names: Iterable[str], image: str | None, label: str | None) -> str:
    """Returns which options would name the columns of a list; the likely ones, where some are.

    `image` and `label` are the columns of paths and labels, where they are named.
    """
    found = list(names)
    words = [
        f"{option} {_guess(found, usual)}"
        for option, wanted, usual in (
            ("--image-column", image or "path", _PATH_NAMES),
            ("--label-column", label or "label", _LABEL_NAMES),
        )
        if wanted not in found
    ]
    return f"repeat the command with {' '.join(words)}"


def _meant(
    schema: pa.Schema, wanted: str | None, possible: Sequence[str], usual: Sequence[str]
) -> list[str]:
    """Returns the columns that may be meant: the one that is named, or else the usual ones."""
    if wanted is None:
        return [name for name in schema.names if name in usual]
    return [name for name in schema.names if name == wanted and name in possible]


def _guess(names: Iterable[str], usual: Sequence[str]) -> str:
    lowered = {name.lower(): name for name in names}
    return next((lowered[name] for name in usual if name in lowered), "NAME")


def shown_names(names: Iterable[str], most: int = 300) -> str:
    """Returns the names of columns for messages."""
    return for_display(", ".join(names).encode("utf-8", "replace")[:most])


def _shown(schema: pa.Schema) -> str:
    return shown_names((f"{field.name}: {field.type}"[:80] for field in schema), 600)


def _is_text(kind: pa.DataType) -> bool:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(inner) in ("string", "large_string", "string_view")


def _is_binary(kind: pa.DataType) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_image_struct(kind: pa.DataType) -> bool:
    """Whether a column's type is that of `datasets`' images: a struct of `bytes` and `path`."""
    if not pa.types.is_struct(kind):
        return False
    fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    data, path = fields.get("bytes"), fields.get("path")
    if data is None or path is None:
        return False
    return (_is_binary(data) or pa.types.is_null(data)) and (
        _is_text(path) or pa.types.is_null(path)
    )
