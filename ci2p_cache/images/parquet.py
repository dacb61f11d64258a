"""Images in parquet files as Hugging Face `datasets` writes them: one row, one image.

Columns: `image`, a struct of `bytes` and `path`, and `label`, a number; the names of the classes
are in the schema's metadata under `huggingface`. Hub layout of imagenet-1k:
`data/train-00000-of-00294.parquet`, `data/validation-...`, `data/test-...` (labels -1).

::

    files --paths, labels--> listing (once) --order--> ImageRef  b"data/train-00000.parquet#817"
    read: the row group that holds the row, kept while its other rows are asked for
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archive_source import ArchiveSource
from ci2p_cache.images.archives import PARQUET_SUFFIXES, Archive, read_archive
from ci2p_cache.images.image_table import ImageTable
from ci2p_cache.images.kept import Kept
from ci2p_cache.images.labels import LabelTable
from ci2p_cache.images.names import for_display, join
from ci2p_cache.images.source import ImageRef, SourceOptions
from ci2p_cache.images.tally import Tally

__all__ = ["ParquetSource"]

_KEPT_FILES = 4
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
        location: A parquet file, a folder that holds only such files, perhaps below `data/`, a
            wildcard or a brace pattern; see `find_archives`, also for splits.
        options: Which columns hold the images and the labels.

    Raises:
        SourceError: nothing is there, a named file is missing, or the splits are unclear.
        ResourceError: the file system failed again and again.
    """

    suffixes = PARQUET_SUFFIXES
    place = re.compile(rb"(.+)#(\d{1,18})", re.DOTALL)
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
        self._files: Kept[ImageTable] = Kept(_KEPT_FILES)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: files by split and name, rows as they are in them.

        Raises:
            SourceError: a file is damaged or has other columns, a row has no label, or there is no
                image at all.
            ResourceError: reading failed again and again.
        """
        place = 0
        for archive, table in self._list():
            for batch in table.to_batches():
                columns = (batch.column(name).to_pylist() for name in ("row", "path", "label"))
                for row, name, label_id in zip(*columns, strict=True):
                    path = b"%b#%d" % (archive.path, row)
                    if self._column:
                        # `read` knows nothing of the options.
                        path += b"=" + self._column
                    shown = os.fsdecode(archive.path).encode("utf-8", "backslashreplace").decode()
                    key = name if self._has_paths else f"{shown}/{row}"
                    label = int(self._labels[label_id]) if label_id >= 0 else -1
                    yield ImageRef(key, archive.split, label, path, order=place)
                    place += 1

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image; any number of threads may call it.

        Raises:
            ImageDecodeError: the row holds no bytes, or more than 512 MiB.
            SourceError: `path` is none below the source, or the file is damaged or was changed.
            ResourceError: reading failed again and again, or the file has gone.
        """
        file, _, place = path.rpartition(b"#")
        number, _, column = place.partition(b"=")
        full, (row,) = self._found(b"%b#%b" % (file, number))
        options = SourceOptions(image_column=os.fsdecode(column) or None)
        table = self._files.get(
            full + b"#" + column,
            lambda: read_archive(lambda: ImageTable(full, options), full),
        )
        return table.image(row)

    def _list(self) -> list[tuple[Archive, pa.Table]]:
        """Reads paths and labels of all files; once."""
        if self._listing is not None:
            return self._listing
        labels, listing = LabelTable(), []
        tally, names = Tally(), None
        for archive in self._archives.files:
            full = join(self._archives.root, archive.path)
            file = read_archive(partial(ImageTable, full, self._options), full)
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
