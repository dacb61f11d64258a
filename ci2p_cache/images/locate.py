"""The door to the sources: a location as the user gives it -> the source that reads it."""

from __future__ import annotations

import os
from functools import partial
from typing import Literal

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, TAR_SUFFIXES, kind_of_folder
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.images.source import ImageSource
from ci2p_cache.images.tree_source import TreeSource
from ci2p_cache.images.unlabelled import UnlabelledSource
from ci2p_cache.images.zip import ZIP_SUFFIXES, ZipSource
from ci2p_cache.remote import url_of

__all__ = ["Labels", "open_source"]

Labels = Literal["auto", "none"]
"""Where labels come from: from the source, or from nowhere."""

_LIST_SUFFIXES = (b".csv", b".tsv")


def open_source(
    location: str | os.PathLike[str], *, labels: Labels = "auto", to_read: bool = False
) -> ImageSource:
    """Opens the images at a path.

    Args:
        location: One of

            - a folder of images: `SRC/CLASS/...`, `SRC/{train,val,test}/CLASS/...`, or ImageNet as
              it comes (see `folder.FolderSource`), or a zip of such a folder (`zip.ZipSource`);
            - tar files as WebDataset has them: a file, a folder that holds only tars, or a pattern
              (`train-{000000..000012}.tar`, `'*.tar.gz'`; see `tar.TarSource`);
            - parquet files with the images in them: a file, a folder, a pattern (see
              `parquet.ParquetSource`);
            - any of these behind `s3://`, `gs://` or `http(s)://` (see `fetched.FetchedSource`);
            - a list of paths and labels: a CSV or parquet file (see `table.TableSource`).
        labels: none for images without labels, or without regard to those that they have.
        to_read: Whether only `read` will be called; the layout of a folder is not looked at then.

    Returns:
        The source; its images are not listed yet.

    Raises:
        SourceError: nothing is there, it is of no known kind, or its layout is not understood.
        UsageError: it is a URL of a kind that is not read.
        MissingDependencyError: the library for this kind of URL is not installed.
        ResourceError: the file system failed again and again.
    """
    name = os.fsencode(location)
    if not name:
        raise SourceError("the location of the images is empty; wanted a folder or file")
    if name.startswith(b"pipe:"):
        raise SourceError(
            f"{location} is a command; wanted images on this machine or a URL",
            hint="give the files themselves",
        )
    labelled = labels != "none"
    url = url_of(os.fsdecode(name))
    if url is not None:
        from ci2p_cache.images.fetched import FetchedSource

        return FetchedSource(url, partial(open_source, labels=labels, to_read=to_read))
    lowered = name.lower()
    is_folder = os.path.isdir(name)  # noqa: PTH112
    if is_folder:
        kind = kind_of_folder(os.path.abspath(name))  # noqa: PTH100
        lowered = kind[0] if kind else b""
    # Only now: pyarrow takes a while to be imported.
    source: ImageSource
    if lowered.endswith(TAR_SUFFIXES):
        from ci2p_cache.images.tar import TarSource

        source = TarSource(location)
    elif lowered.endswith(PARQUET_SUFFIXES):
        from ci2p_cache.images.table import TableSource, is_table

        if is_table(name):
            source = TableSource(location)
        else:
            from ci2p_cache.images.parquet import ParquetSource

            source = ParquetSource(location)
    elif lowered.endswith(_LIST_SUFFIXES):
        from ci2p_cache.images.table import TableSource

        source = TableSource(location)
    else:
        of_folders: TreeSource
        if lowered.endswith(ZIP_SUFFIXES):
            of_folders = ZipSource(location, labelled=labelled)
        else:
            of_folders = FolderSource(location, labelled=labelled)
        if not to_read:
            # A layout that is not understood is refused before anything else takes its time.
            _ = of_folders.layout
        return of_folders
    return source if labelled else UnlabelledSource(source)
