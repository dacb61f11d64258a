"""The door to the sources: a location as the user gives it -> the source that reads it."""

from __future__ import annotations

import os

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, TAR_SUFFIXES, kind_of_folder
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.images.source import ImageSource
from ci2p_cache.remote import url_of

__all__ = ["open_source"]

_LIST_SUFFIXES = (b".csv", b".tsv")


def open_source(location: str | os.PathLike[str]) -> ImageSource:
    """Opens the images at a path.

    Args:
        location: One of

            - a folder of images: `SRC/CLASS/...`, `SRC/{train,val,test}/CLASS/...`, or ImageNet as
              it comes (see `folder.FolderSource`);
            - tar files as WebDataset has them: a file, a folder that holds only tars, or a pattern
              (`train-{000000..000012}.tar`, `'*.tar.gz'`; see `tar.TarSource`);
            - parquet files with the images in them: a file, a folder, a pattern (see
              `parquet.ParquetSource`);
            - any of these behind `s3://`, `gs://` or `http(s)://` (see `fetched.FetchedSource`);
            - a list of paths and labels: a CSV or parquet file (see `table.TableSource`).

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
    url = url_of(os.fsdecode(name))
    if url is not None:
        from ci2p_cache.images.fetched import FetchedSource

        return FetchedSource(url, open_source)
    lowered = name.lower()
    if os.path.isdir(name):  # noqa: PTH112
        kind = kind_of_folder(os.path.abspath(name))  # noqa: PTH100
        if kind is None:
            return FolderSource(location)
        lowered = kind[0]
    # Only now: pyarrow takes a while to be imported.
    if lowered.endswith(TAR_SUFFIXES):
        from ci2p_cache.images.tar import TarSource

        return TarSource(location)
    if lowered.endswith(PARQUET_SUFFIXES):
        from ci2p_cache.images.table import TableSource, is_table

        if is_table(name):
            return TableSource(location)
        from ci2p_cache.images.parquet import ParquetSource

        return ParquetSource(location)
    if lowered.endswith(_LIST_SUFFIXES):
        from ci2p_cache.images.table import TableSource

        return TableSource(location)
    if lowered.endswith(b".zip"):
        raise SourceError(
            f"{os.fsdecode(location)} is a zip archive, which is not read",
            hint="unpack it into one folder per class",
        )
    return FolderSource(location)
