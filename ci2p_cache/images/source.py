"""Where images come from: the contract of a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["ImageReader", "ImageRef", "ImageSource", "Labels", "SourceOptions"]

Labels = Literal["auto", "none"]
"""Where labels come from: from the source, or from nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """What the user says of a source whose own names do not say it."""

    root: str | None = None
    """Folder that the paths of a list start from; None: the list's own."""
    image_column: str | None = None
    """Column of the images or of their paths; in tars the extension of the images. None: `path` in
    a list, the only image column of a parquet file, every image of a tar."""
    label_column: str | None = None
    """Column of the labels; in tars an extension, or a field of the .json. None: `label`, the only
    ClassLabel column of a parquet file, `.cls` or the usual fields of `.json`."""
    labels: Labels = "auto"
    """none: images without labels, or without regard to those that they have."""


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
    """Where the bytes are, below the source's root: the file system's own bytes. Of an image in an
    archive or table, its path, "#" and where it is in there. It is all that `read` needs, in any
    process. Neither it nor the key is empty, starts with "/" or has ".." between two "/".
    """
    order: int | None = None
    """Where it comes when the source is read in sequence, ascending; None where images may as well
    be read in any order. The plan keeps this order."""


class ImageReader(Protocol):
    """Gives the bytes of images that were listed before; any number of threads may call it."""

    def location(self) -> str:
        """Returns the absolute path or URL, for display and for opening a reader again."""

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image, by `ImageRef.path`.

        Raises:
            ImageDecodeError: the file has vanished, may not be read, is too large or is no regular
                file any more. The message is one line without the path.
            SourceError: `path` is none below the source, or an archive or table is damaged or not
                what was listed.
            ResourceError: reading failed again and again, or the source as a whole has gone.
        """


class ImageSource(ImageReader, Protocol):
    """Lists images and gives their bytes; `scan` belongs to one thread at a time.

    `encode` takes any object with these members. What it must keep: `scan` yields the same images
    under the same keys each time, while nothing is added; each label is an index into `classes`, or
    -1 where there are no classes; `read` gives the same bytes for the same path, to any number of
    threads, also without a `scan` before it: a run that continues reads by its plan alone. The
    bytes may be anything: they are decoded in a process of its own. `location` names the source,
    each time alike.
    """

    def file_of(self, path: bytes) -> tuple[bytes, bool] | None:
        """Returns the absolute path of an image's file, and whether the file holds only that image.

        None where the images are fetched from a server. Neither is looked at.

        Raises:
            SourceError: `path` is none below the source.
        """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, whole numbers by value and others as text; one list over all splits.

        Classes that the source declares (a ClassLabel, `classes.txt`) keep the order they have
        there. Archives and tables are listed for it.
        """

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people, in the order of `classes`; the class name where there is no other."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image once, in an order that depends on names alone.

        Streams: memory grows with the largest folder, not with the source. Archives and tables hold
        their list, some 30 bytes and the name per image, and list anew only when opened anew.

        Raises:
            SourceError: a folder cannot be listed, or there is no image at all.
            ResourceError: listing failed again and again; the same call may succeed later.
        """
