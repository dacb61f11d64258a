"""Where images come from: the contract of a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ImageRef", "ImageSource"]


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
    archive or table, its path, "#" and a place in it. It is all that `read` needs, in any process.
    """
    order: int | None = None
    """Where it comes when the source is read in sequence, ascending; None where images may as well
    be read in any order. The plan keeps this order."""


class ImageSource(Protocol):
    """Lists images and gives their bytes.

    `scan` belongs to one thread at a time; `read` may be called from any number of threads.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted as torchvision sorts them; one list over all splits.

        Where labels are numbers, in their order. Archives and tables are listed for it.
        """

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

        Streams: memory grows with the largest folder, not with the source. Archives and tables keep
        their list, some 20 bytes and the name per image, and list anew only when opened anew.

        Raises:
            SourceError: a folder cannot be listed, or there is no image at all.
            ResourceError: listing failed again and again; the same call may succeed later.
        """

    def file_of(self, path: bytes) -> tuple[bytes, bool] | None:
        """Returns the local file that holds an image, absolute, and whether it holds nothing else.

        None where the images are fetched from a server. Neither is looked at.

        Raises:
            SourceError: `path` is none below the source.
        """

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image, by `ImageRef.path`.

        Raises:
            ImageDecodeError: the file has vanished, may not be read, is too large or is no regular
                file any more. The message is one line without the path.
            SourceError: `path` is none below the source, or an archive or table is damaged or not
                what was listed.
            ResourceError: reading failed again and again, or the source as a whole has gone.
        """
