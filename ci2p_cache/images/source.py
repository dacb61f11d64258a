"""Where images come from: the contract of a source, and the door that picks one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ci2p_cache.errors import SourceError

__all__ = ["ImageRef", "ImageSource", "open_source"]

_LATER_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".parquet", ".zip")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image of a source: what it is called, what it shows, and where its bytes are."""

    key: str
    """Unique within a split: path below the split's root with "/" between its parts, extension
    included ("daisy/1.jpg"); bytes that are not UTF-8 are shown as \\xNN."""
    split: str | None
    """train, val or test; None where the source has no splits and the plan draws them."""
    label: int
    """Index into the source's `classes`."""
    path: bytes
    """Where the bytes are, below the source's root: the file system's own bytes."""


class ImageSource(Protocol):
    """Lists images and gives their bytes.

    `scan` belongs to one thread at a time; `read` may be called from any number of threads.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted as torchvision sorts them; one list over all splits."""

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people, in the order of `classes`; the class name where there is no other."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""

    def location(self) -> str:
        """Returns the absolute path or URL, for display and for opening the source again."""

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image once, in an order that depends on names alone.

        Streams: memory grows with the largest folder, not with the source.

        Raises:
            SourceError: a folder cannot be listed, or there is no image at all.
            ResourceError: listing failed again and again; the same call may succeed later.
        """

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image, by `ImageRef.path`.

        Raises:
            ImageDecodeError: the file has vanished, may not be read, is too large or is no regular
                file any more. The message is one line without the path.
            SourceError: `path` is none below the source.
            ResourceError: reading failed again and again, or the source as a whole has gone.
        """


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
    # Here and not above: the sources import ImageRef from this file.
    from ci2p_cache.images.folder import FolderSource

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
