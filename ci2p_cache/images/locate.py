"""The door to the sources: a location as the user gives it -> the source that reads it."""

from __future__ import annotations

import os
from pathlib import Path

from ci2p_cache.errors import SourceError
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.images.source import ImageSource

__all__ = ["open_source"]

_LATER_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".parquet", ".zip")


def open_source(location: str | os.PathLike[str]) -> ImageSource:
    """Opens the images at a path.

    Args:
        location: A folder: `SRC/CLASS/...`, `SRC/{train,val,test}/CLASS/...`, or ImageNet as it
            comes (see `folder.FolderSource`).

    Returns:
        The source; its classes are known, its images are not listed yet.

    Raises:
        SourceError: nothing is there, it is of no known kind, or its layout is not understood.
        ResourceError: the file system failed again and again.
    """
    name = os.fsdecode(location)
    if not name:
        raise SourceError("the location of the images is empty; wanted a folder")
    if "://" in name:
        raise SourceError(
            f"{name} is a URL; wanted a folder of images on this machine",
            hint="download the images first, one folder per class",
        )
    if name.lower().endswith(_LATER_SUFFIXES) and not Path(location).is_dir():
        raise SourceError(
            f"{name} is an archive or table; wanted a folder of images, the only source there is",
            hint="unpack it into one folder per class",
        )
    return FolderSource(location)
