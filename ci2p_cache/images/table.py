"""Images named by a table: a CSV or parquet file with the path and the label of each."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH110, PTH112, PTH113, PTH118, PTH120, PTH123

from __future__ import annotations

import codecs
import csv
import functools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.errors import SourceError
from ci2p_cache.images import columns
from ci2p_cache.images.archives import PARQUET_SUFFIXES
from ci2p_cache.images.columns import open_parquet
from ci2p_cache.images.labels import NO_LABEL, Classes, ClassSource, LabelTable
from ci2p_cache.images.names import Tally, as_key, for_display, join
from ci2p_cache.images.reading import about, path_below, read_archive, read_file
from ci2p_cache.images.source import ImageRef, SourceOptions
from ci2p_cache.images.splits import SPLIT_NAMES, split_folders
from ci2p_cache.images.tree import IMAGE_SUFFIXES, has_image_suffix

__all__ = ["TableSource", "is_table"]

_NO_LABEL = -1
_FIRST_ROWS = 1000
"""The first rows of a list; they show which folder its paths start from."""
_NUM_LOOKED_AT = 64
"""Paths whose files are looked at, to find a fault that all have."""
_DRIVE = re.compile(rb"[A-Za-z]:[/\\]")

_SPLIT = "split"
_DELIMITERS = ",;\t|"
_BATCH_ROWS = 2**14
_MAX_HEADER_CHARS = 2**16

_ListRow = tuple[bytes, str | int | None, str]
"""Path, label (None or empty for none) and split (empty for none), as the list has them."""
_Row = tuple[bytes, str | int, str]


class TableSource(ClassSource):
    """An `ImageSource` over the files that a table names.

    The table is a `.csv`, `.tsv` or `.parquet` file with columns `path`, `label` and, if it likes,
    `split` (train, val or test); options name others for the first two. The delimiter of a text is
    found out. Paths start from the table's folder or from a root that is named, which none may
    leave; absolute ones below it are taken too. A key is the path below the root, without the
    folder of its split in front. The files are not looked at before they are read, but the first
    few, and those whose paths have backslashes.

    Its `location` is the table, or the root where options were needed to find that: either is
    enough to read images again.

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
        super().__init__(self._root if by_folder else self._path)
        self._shown = for_display(self._path)
        self._tally = Tally()
        self._labels_of = LabelTable()
        self._classes: Classes | None = None
        self._labels: list[int] = []
        self._own_names: tuple[str, ...] = ()
        self._identity: tuple[int, int] | None = None
        if not os.path.isfile(self._path):
            kind = "is no file" if os.path.lexists(self._path) else "does not exist"
            raise SourceError(f"{self._shown} {kind}; wanted a table of paths and labels")
        if root is not None and not os.path.isdir(root):
            raise SourceError(f"--root {for_display(root)} is no folder; wanted one with images")
        self._open = partial(_parquet_rows if is_parquet else _csv_rows, self._path, options)
        self._paths = _Paths(self._root, folder)
        next(self._rows(), None)

    @property
    def notices(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        notices = self._classes.notices if self._classes else ()
        return (*notices, *self._tally.notices(), *self._paths.notices())

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image in the order of the table."""
        self._settled()
        tally = self._tally = Tally()
        count = 0
        for path, text, split in self._rows():
            label = _NO_LABEL
            if self._labelled:
                number = self._labels_of.add(text)
                if number >= len(self._labels):
                    raise SourceError(f"{self._shown} was changed while it was read")
                label = self._labels[number]
                if label == _NO_LABEL:
                    if split != "test":
                        shown = for_display(path)
                        raise SourceError(f"{self._shown}: {shown} has the label -1, none")
                    tally.add("unlabelled", path)
                    continue
            count += 1
            yield ImageRef(_key(path, split), split or None, label, path)
        if not count:
            raise SourceError(
                f"{self._shown} names no {'labelled ' if self._labelled else ''}image"
            )

    def read(self, path: bytes) -> bytes:
        """See `ImageReader`."""
        return read_file(self._root, path)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """See `ImageSource`."""
        return path_below(self._root, path), True

    def _settled(self) -> Classes:
        """Reads all labels; once."""
        if self._classes is not None:
            return self._classes
        splits: set[str] = set()
        folders_in: set[bytes] = set()
        first: list[bytes] = []
        for path, label, split in self._rows():
            self._labels_of.add(label)
            splits.add(split)
            folders_in.add(os.path.dirname(path))
            if len(first) < _NUM_LOOKED_AT:
                first.append(path)
        self._paths.look_at(first)
        if "" in splits and len(splits) > 1:
            raise SourceError(f"{self._shown} has rows with a split and rows without")
        if "" in splits:
            self._refuse_split_folders(folders_in)
        if splits and not splits & {"", "train"}:
            raise SourceError(f"{self._shown} has no row of the split train")
        with about(f"{self._shown}: "):
            self._paths.refuse_without_suffix(first)
            classes = Classes()
            if self._labelled:
                folders = tuple(dict.fromkeys([os.path.dirname(self._path), self._root]))
                classes, labels = self._labels_of.settle(folders, self._own_names)
                self._labels = labels.tolist()
        self._classes = classes
        return classes

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
        found = os.stat(self._path)  # noqa: PTH116
        identity = (found.st_size, found.st_mtime_ns)
        if self._identity not in (None, identity):
            raise SourceError(f"{self._shown} was changed while it was read")
        self._identity = identity
        self._own_names, rows = self._open()
        for number, (path, label, split) in enumerate(rows, 1):
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
        first = [each for each, *_ in islice(self._open()[1], _FIRST_ROWS)]
        folders = {os.path.dirname(each) for each in (path, *first) if each.startswith(b"/")}
        # One folder alone is that of a class.
        return os.path.commonpath(folders) if len(folders) > 1 else os.path.dirname(folders.pop())


def is_table(location: bytes, options: SourceOptions | None = None) -> bool:
    """Whether a parquet file names images, instead of holding them."""
    full = os.path.abspath(location)
    if not os.path.isfile(full):
        return False

    def names_images() -> bool:
        with open_parquet(full) as (file, _):
            return columns.holds_paths(file, options.image_column if options else None)

    return read_archive(names_images, full)


def _key(path: bytes, split: str) -> str:
    """Returns a path as a key, without the folder of its split in front."""
    first, _, rest = path.partition(b"/")
    if split and rest and SPLIT_NAMES.get(first.lower()) == split:
        return as_key(rest)
    return as_key(path)


class _Paths:
    """Brings the paths of a list, as people and other systems write them, below one root.

    Args:
        root: The absolute folder that paths start from, which none may leave.
        folder: The folder of the list, from which a path with ".." may start too.
    """

    def __init__(self, root: bytes, folder: bytes) -> None:
        self._root = root
        self._folder = folder
        self._has_backslashes = False
        self._found_none: bytes | None = None
        # Most paths of a list are in few folders.
        self._real = functools.lru_cache(2**12)(os.path.realpath)

    def below(self, path: bytes) -> bytes:
        """Returns a path of the list as one below the root; links are followed."""
        if b"://" in path:
            raise SourceError(f"{for_display(path[:200])} is a URL; wanted a file below the table")
        has_zero = b"\0" in path
        if b"\\" in path and not has_zero and not os.path.lexists(os.path.join(self._root, path)):
            path = path.replace(b"\\", b"/")
            self._has_backslashes = True
        found = None
        if path and not has_zero and not _DRIVE.match(path):
            if path.startswith(b"/"):
                found = self._under_root(path)
            else:
                for start in (self._root, self._folder):
                    found = found or self._under_root(join(start, path))
        if not found:
            hint = "repeat the command with --root FOLDER, the folder that the paths start from"
            if _DRIVE.match(path):
                hint = "write the paths of another system as they are here, below the list"
            shown, root = for_display(path[:200]), for_display(self._root)
            raise SourceError(f"`path` is {shown!r}; wanted one below {root}", hint=hint)
        return found

    def notices(self) -> tuple[str, ...]:
        """Returns what the user should know of the paths."""
        notices = []
        if self._has_backslashes:
            notices.append("paths of the list have backslashes; they were read as slashes")
        if self._found_none is not None:
            notices.append(
                f"none of the first files of the list is there, for example "
                f"{for_display(join(self._root, self._found_none))}; --root names the folder that "
                "the paths start from"
            )
        return tuple(notices)

    def look_at(self, paths: Sequence[bytes]) -> None:
        """Looks whether the first files of a list are there, for `notices`."""
        self._found_none = None
        if paths and not any(os.path.exists(join(self._root, path)) for path in paths):
            self._found_none = paths[0]

    def refuse_without_suffix(self, paths: Sequence[bytes]) -> None:
        """Refuses a list that leaves out the suffixes of its files; `paths` are its first."""
        if self._found_none is None:
            return
        for path in paths:
            suffix = None if has_image_suffix(path) else self._suffix_of(path)
            if suffix is not None:
                shown = for_display(path)
                raise SourceError(
                    f"there is no file {shown}, but {shown}{suffix}; a list names files with their "
                    "suffix",
                    hint=f"add the suffix to the paths, for example with pandas: t[COLUMN] += "
                    f"'{suffix}'",
                )

    def _suffix_of(self, path: bytes) -> str | None:
        """Returns the suffix under which a file is there."""
        folder, name = os.path.split(join(self._root, path))
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.name.startswith(name + b".")]
        except OSError:
            return None
        suffixes = sorted({each[len(name) :] for each in names})
        return next((s.decode() for s in suffixes if s.lower() in IMAGE_SUFFIXES), None)

    def _under_root(self, path: bytes) -> bytes | None:
        """Returns an absolute path as one below the root; None where it is not below it."""
        path = os.path.normpath(path)
        roots = [each.rstrip(b"/") + b"/" for each in (self._root, self._real(self._root))]
        for start in roots:
            if path.startswith(start):
                return path[len(start) :]
        folder, name = os.path.split(path)
        real = join(self._real(folder), name)
        return real[len(roots[1]) :] if real.startswith(roots[1]) else None


def _csv_rows(path: bytes, options: SourceOptions) -> tuple[tuple[str, ...], Iterator[_ListRow]]:
    """Reads a text.

    Returns:
        Names of numbered labels, where the list has them, and an iterator over its rows. A list
        that is damaged or has other columns is refused, also while iterating.
    """
    return (), _rows_of_text(path, options)


def _rows_of_text(path: bytes, options: SourceOptions) -> Iterator[_ListRow]:
    shown = for_display(path)
    wanted = [options.image_column or "path"]
    if options.labels == "auto":
        wanted.append(options.label_column or "label")
    # Names that are not UTF-8 come through as they are.
    with read_archive(
        lambda: open(path, encoding="utf-8-sig", errors="surrogateescape", newline=""), path
    ) as file:
        delimiter = _delimiter(shown, file.readline(_MAX_HEADER_CHARS), wanted)
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _require_columns(
                shown, [str(name) for name in reader.fieldnames or ()], options, wanted
            )
            for row in reader:
                name, *label, split = (row.get(column, "") for column in (*wanted, _SPLIT))
                if None in (name, *label, split) or None in row:
                    raise SourceError(
                        f"{shown}, line {reader.line_num}, has another number of values than the "
                        "first line has names"
                    )
                # Labels as tars have them: bytes that are not UTF-8 are shown as \xNN.
                text = as_key(os.fsencode(label[0].strip())) if label else ""
                yield os.fsencode(name), text, split
        except csv.Error as error:
            raise SourceError(f"{shown}, line {reader.line_num}, is no CSV: {error}") from error


def _delimiter(shown: str, line: str, wanted: Sequence[str]) -> str:
    """Returns the delimiter that gives the wanted columns, or else the most."""
    raw = line.encode("utf-8", "surrogateescape")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(
            f"{shown} is text in UTF-16, as Excel writes it; wanted UTF-8",
            hint=f"iconv -f UTF-16 -t UTF-8 {shlex.quote(shown)} > utf8.csv, and encode utf8.csv",
        )
    found = {}
    for each in _DELIMITERS:
        try:
            names = next(csv.reader([line], delimiter=each), [])
        except csv.Error:
            continue
        found[each] = (len(set(wanted) & set(names)), len(names))
    return max(found, key=lambda each: found[each], default=",")


def _require_columns(
    shown: str, found: list[str], options: SourceOptions, wanted: Sequence[str]
) -> None:
    double = next((name for name in (*wanted, _SPLIT) if found.count(name) > 1), None)
    if double is not None:
        raise SourceError(
            f"{shown} has {found.count(double)} columns called `{double}`; wanted one",
            hint="rename one of them in the first line",
        )
    _refuse_other_split(shown, found)
    if not set(wanted) <= set(found):
        hint = None
        if any(has_image_suffix(name.encode("utf-8", "replace")) for name in found):
            # The first line is a row.
            hint = "give the list a first line of names: sed -i '1i path,label' "
            hint += shlex.quote(shown)
        raise _other_columns(shown, found, wanted, options, hint)


def _other_columns(
    shown: str,
    found: Sequence[str],
    wanted: Sequence[str],
    options: SourceOptions,
    hint: str | None = None,
) -> SourceError:
    has, names = columns.shown_names(found) or "none", ", ".join(f"`{name}`" for name in wanted)
    return SourceError(
        f"{shown} has the columns {has}; wanted {names} and, where it has splits, `{_SPLIT}`",
        hint=hint or columns.columns_hint(found, options.image_column, options.label_column),
    )


def _parquet_rows(
    path: bytes, options: SourceOptions
) -> tuple[tuple[str, ...], Iterator[_ListRow]]:
    """Reads a parquet file; arguments, results and errors as `_csv_rows` has them."""
    shown = for_display(path)
    names, table = read_archive(lambda: _load(path, options), path)
    try:
        values, labels = columns.label_values(table["label"])
    except SourceError as error:
        raise SourceError(f"{shown} {error}; wanted a text, and a text or whole number") from error
    return names, _rows_of_table(shown, table, values, labels)


def _rows_of_table(
    shown: str, table: pa.Table, values: Sequence[str | int | None], labels: pa.Array
) -> Iterator[_ListRow]:
    for start in range(0, table.num_rows, _BATCH_ROWS):
        part = table.slice(start, _BATCH_ROWS)
        own = labels.slice(start, _BATCH_ROWS).to_pylist()
        paths, splits = part["path"].to_pylist(), part[_SPLIT].to_pylist()
        for path, label, split in zip(paths, own, splits, strict=True):
            if path is None:
                raise SourceError(f"{shown} has a row without a path")
            yield os.fsencode(path), None if label is None else values[label], split or ""


def _load(path: bytes, options: SourceOptions) -> tuple[tuple[str, ...], pa.Table]:
    """Returns the names of the classes, and path, label and split as plain columns."""
    shown = for_display(path)
    with open_parquet(path) as (file, _):
        schema = file.schema_arrow
        names: tuple[str, ...] = ()
        column = columns.path_column(schema, options.image_column)
        if column is None:
            usual = (options.image_column or "path", options.label_column or "label")
            raise _other_columns(shown, schema.names, usual, options)
        is_struct = pa.types.is_struct(schema.field(column).type)
        wanted, label = [f"{column}.path" if is_struct else column], None
        if options.labels == "auto":
            with about(f"{shown} "):
                label, names = columns.label_column(schema, options.label_column)
            wanted.append(label)
        _refuse_other_split(shown, schema.names)
        table = file.read(columns=[*wanted, *([_SPLIT] if _SPLIT in schema.names else [])])
    none = pa.nulls(table.num_rows, pa.string())
    splits = columns.one_array(table[_SPLIT]) if _SPLIT in schema.names else none
    if not (pa.types.is_string(splits.type) or pa.types.is_large_string(splits.type)):
        raise SourceError(f"{shown} has a `split` of type {splits.type}")
    found = {
        "path": columns.one_array(
            pc.struct_field(table[column], "path") if is_struct else table[column]
        ),
        "label": pa.chunked_array([none]) if label is None else table[label],
        _SPLIT: splits,
    }
    return names, pa.table(found)


def _refuse_other_split(shown: str, names: Sequence[str]) -> None:
    """Refuses a column `Split`, which would be left aside."""
    other = next((name for name in names if name.strip().lower() == _SPLIT), _SPLIT)
    if _SPLIT not in names and other != _SPLIT:
        raise SourceError(
            f"{shown} has a column {other!r}; wanted `{_SPLIT}`",
            hint=f"rename it to {_SPLIT}, or to something else if it holds no splits",
        )
