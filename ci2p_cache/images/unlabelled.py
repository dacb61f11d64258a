"""A source whose labels do not count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ci2p_cache.images.source import ImageRef, ImageSource

__all__ = ["UnlabelledSource"]


class UnlabelledSource:
    """An `ImageSource` that gives the images of another without their labels.

    Args:
        source: The other; it still wants its labels to be in order.
    """

    classes: tuple[str, ...] = ()
    class_titles: tuple[str, ...] = ()

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, as the other has it."""
        return self._source.notices

    def location(self) -> str:
        """Returns where the other is."""
        return self._source.location()

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image of the other with the label -1; errors as the other has them."""
        for ref in self._source.scan():
            yield replace(ref, label=-1)

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image; errors as the other has them."""
        return self._source.read(path)

    def file_of(self, path: bytes) -> tuple[bytes, bool] | None:
        """Returns the file of an image; errors as the other has them."""
        return self._source.file_of(path)
