"""Which columns of a table hold images, paths and labels, and the labels as they stand there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ci2p_cache.errors import SourceError
from ci2p_cache.images.labels import written
from ci2p_cache.images.names import for_display

__all__ = [
    "columns_hint",
    "features_of",
    "holds_paths",
    "image_column",
    "label_column",
    "label_values",
    "path_column",
    "plain",
]

_LABEL = "ClassLabel"
_MOST_SHOWN = 600

_PATH_NAMES = ("path", "image_path", "img_path", "filepath", "file_path", "filename", "file_name",
               "file", "image", "images", "img", "image_id", "id", "name")  # fmt: skip
_LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "y", "species",
                "breed", "label_name", "class_id", "category_id")  # fmt: skip
"""What such columns are often called: for hints alone, never taken without being named."""


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Returns what the metadata says of each column, as `datasets` writes it; empty for nothing."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def holds_paths(file: pq.ParquetFile, wanted: str | None) -> bool:
    """Whether a file lists paths of images, instead of holding them.

    Args:
        file: A parquet file.
        wanted: The column of images or paths, where one is named.
    """
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

    Raises:
        SourceError: there is none, or more than one and none is named; without the file's name.
    """
    structs = [field.name for field in schema if _is_image_struct(field.type)]
    binaries = [field.name for field in schema if _is_binary(field.type)]
    found = _named(schema, wanted, structs + binaries, structs or binaries)
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
    found = _named(schema, wanted, texts + structs, usual or structs)
    return found[0] if len(found) == 1 else None


def label_column(schema: pa.Schema, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """Returns the column that holds labels, and the names of its classes, where it has them.

    Raises:
        SourceError: there is none, or more than one and none is named; without the file's name.
    """
    features = features_of(schema)
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == _LABEL]
    usual = ["label"] if "label" in schema.names else declared
    found = _named(schema, wanted, schema.names, usual)
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
    is_list = isinstance(names, list) and all(isinstance(n, str) and n for n in names)
    return found[0], tuple(names) if isinstance(names, list) and is_list else ()


def label_values(column: pa.ChunkedArray) -> tuple[list[str | int | None], pa.Array]:
    """Returns the different labels of a column, None for none, and which each row has.

    Raises:
        SourceError: a label is neither a text nor a whole number; without the file's name.
    """
    given = pc.dictionary_encode(plain(column))
    try:
        values = [written(value) for value in given.dictionary.to_pylist()]
    except SourceError as error:
        raise SourceError(f"has a column of type {str(column.type)[:80]} with {error}") from error
    return values, given.indices


def plain(column: pa.ChunkedArray) -> pa.Array:
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
    for group in range(metadata.num_row_groups):
        part = metadata.row_group(group)
        for number in range(part.num_columns):
            column = part.column(number)
            if column.path_in_schema not in (image, f"{image}.bytes"):
                continue
            found = column.statistics
            if found is None or not found.has_null_count or found.null_count < part.num_rows:
                return True
    return not metadata.num_rows


def columns_hint(names: Iterable[str], image: str | None, label: str | None) -> str:
    """Returns which options would name the columns of a list; the likely ones, where some are.

    Args:
        names: The columns.
        image: The column of paths, where one is named.
        label: The column of labels, where one is named.
    """
    found = list(names)
    words = []
    for option, wanted, usual in (
        ("--image-column", image or "path", _PATH_NAMES),
        ("--label-column", label or "label", _LABEL_NAMES),
    ):
        if wanted not in found:
            words.append(f"{option} {_guess(found, usual)}")
    return f"repeat the command with {' '.join(words)}"


def _named(
    schema: pa.Schema, wanted: str | None, possible: Sequence[str], usual: Sequence[str]
) -> list[str]:
    """Returns the columns that may be meant: the one that is named, or else the usual ones."""
    if wanted is None:
        return [name for name in schema.names if name in usual]
    return [name for name in schema.names if name == wanted and name in possible]


def _guess(names: Iterable[str], usual: Sequence[str]) -> str:
    lowered = {name.lower(): name for name in names}
    return next((lowered[name] for name in usual if name in lowered), "NAME")


def _shown(schema: pa.Schema) -> str:
    shown = ", ".join(f"{field.name}: {field.type}"[:80] for field in schema)[:_MOST_SHOWN]
    return for_display(shown.encode())


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    found = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(found)


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    found = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return bool(found)


def _is_image_struct(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
    data, path = fields.get("bytes"), fields.get("path")
    return (
        data is not None
        and path is not None
        and (_is_binary(data) or pa.types.is_null(data))
        and (_is_text(path) or pa.types.is_null(path))
    )
