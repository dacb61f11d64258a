"""The door to the sources: a location as the user gives it -> the source that reads it."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH112, PTH113, PTH120, PTH208

from __future__ import annotations

import os

from ci2p_cache.errors import SourceError, UsageError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, TAR_SUFFIXES, kind_of_folder
from ci2p_cache.images.folder import FolderSource, TreeSource
from ci2p_cache.images.source import ImageReader, ImageSource, SourceOptions
from ci2p_cache.images.zip import ZIP_SUFFIXES, ZipSource
from ci2p_cache.remote import url_of

__all__ = ["open_reader", "open_source"]

_LIST_SUFFIXES = (b".csv", b".tsv")


def open_source(
    location: str | os.PathLike[str] | ImageSource,
    options: SourceOptions | None = None,
    *,
    is_listed: bool = False,
) -> ImageSource:
    """Opens the images at a path.

    Args:
        location: One of

            - a folder of images: `SRC/CLASS/...`, `SRC/{train,val,test}/CLASS/...`, or ImageNet as
              it comes (see `folder.FolderSource`), or a zip of such a folder (`zip.ZipSource`);
            - tar files as WebDataset has them, or with class folders or class tars in them: a file,
              a folder that holds only tars, or a pattern (`train-{000000..000012}.tar`,
              `'*.tar.gz'`; see `tar.TarSource`);
            - parquet files with the images in them: a file, a folder, a pattern (see
              `parquet.ParquetSource`);
            - any of these behind `s3://`, `gs://` or `http(s)://` (see `fetched.FetchedSource`);
            - a list of paths and labels: a CSV or parquet file (see `table.TableSource`);
            - any other `ImageSource`, which is returned as it is.
        options: What the names of columns and the folder of a list are, where they are not the
            usual ones, and whether labels count.
        is_listed: Whether the images were listed before; the layout of a folder is then found out
            only where they are listed again.

    Returns:
        The source; its images are not listed yet.

    Raises:
        SourceError: nothing is there, it is of no known kind, or its layout is not understood.
        UsageError: it is a URL of a kind that is not read, or an option does not fit this kind.
        MissingDependencyError: the library for this kind of URL is not installed.
        ResourceError: the file system failed again and again.
    """
    options = options or SourceOptions()
    if not isinstance(location, str | os.PathLike):
        _refuse(options, "root image_column label_column", "a source of your own")
        if options.labels == "none" and not is_listed and location.classes:
            raise UsageError("`labels` is none, and the source has classes; wanted auto")
        return location
    source = _opened(location, options)
    if isinstance(source, TreeSource) and not is_listed:
        # A layout that is not understood is refused before anything else takes its time.
        _ = source.layout
    return source


def _opened(location: str | os.PathLike[str], options: SourceOptions) -> ImageSource:
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

        _refuse(options, "root", "images behind a URL")
        return FetchedSource(url, open_source, open_reader, options)
    lowered = name.lower()
    if os.path.isdir(name):
        kind = kind_of_folder(os.path.abspath(name))
        lowered = kind[0] if kind else b""
    # Only now: pyarrow takes a while to be imported.
    if lowered.endswith(TAR_SUFFIXES):
        from ci2p_cache.images.tar import TarSource

        _refuse(options, "root", "tar files")
        return TarSource(location, options)
    if lowered.endswith(PARQUET_SUFFIXES):
        from ci2p_cache.images.table import TableSource, is_table

        if is_table(name, options):
            return TableSource(location, options)
        from ci2p_cache.images.parquet import ParquetSource

        _refuse(options, "root", "parquet files with images in them")
        return ParquetSource(location, options)
    if lowered.endswith(_LIST_SUFFIXES):
        from ci2p_cache.images.table import TableSource

        return TableSource(location, options)
    _refuse(options, "root image_column label_column", "folders of images")
    of_folders = ZipSource if lowered.endswith(ZIP_SUFFIXES) else FolderSource
    return of_folders(location, labelled=options.labels == "auto")


def open_reader(location: str | os.PathLike[str] | ImageReader) -> ImageReader:
    """Opens images that were listed before, for reading alone.

    Nothing is listed and no layout found out: it is enough that the files are there.

    Args:
        location: As `ImageSource.location` gave it, where the same files are now, or any reader,
            which is returned as it is.

    Raises:
        SourceError, UsageError, MissingDependencyError, ResourceError: as `open_source` has them.
    """
    if not isinstance(location, str | os.PathLike):
        return location
    name = os.fsencode(location)
    url = url_of(os.fsdecode(name))
    if url is not None:
        from ci2p_cache.images.fetched import FetchedSource

        return FetchedSource(url, open_source, open_reader, SourceOptions())
    full = os.path.abspath(name)
    if os.path.isdir(full) and os.listdir(full) and kind_of_folder(full) is None:
        return FolderSource(os.fsdecode(full))
    if os.path.isfile(name) and name.lower().endswith((*_LIST_SUFFIXES, *PARQUET_SUFFIXES)):
        from ci2p_cache.images.table import is_table

        if name.lower().endswith(_LIST_SUFFIXES) or is_table(name):
            return FolderSource(os.fsdecode(os.path.dirname(full)))
    return open_source(location)


def _refuse(options: SourceOptions, names: str, kind: str) -> None:
    """Refuses options that would be ignored."""
    for name in names.split():
        if getattr(options, name) is not None:
            raise UsageError(
                f"`{name}` is {getattr(options, name)!r}, and the images are {kind}, where it has "
                "no meaning",
                hint=f"leave --{name.replace('_', '-')} out",
            )
