"""A tree of images: what the layout of a source is found from, on disk or in an archive."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH112, PTH113, PTH123, PTH202

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Protocol

from ci2p_cache.images.kinds import has_image, is_image
from ci2p_cache.images.listing import list_folder, walk
from ci2p_cache.images.names import join
from ci2p_cache.images.tally import Tally

__all__ = ["DiskTree", "Tree"]


class Tree(Protocol):
    """Folders and files below a root.

    Paths are bytes below the root with "/" between their parts, empty for the root itself.
    """

    root: bytes
    """Absolute path of the folder or archive; with "/" and a path in front of messages."""

    def list_folder(self, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
        """Returns the names of the folders and of the regular files in a folder, each sorted.

        Raises:
            SourceError: it cannot be listed, or two names look the same as text.
            ResourceError: listing failed again and again.
        """

    def walk(self, folder: bytes, tally: Tally) -> Iterator[bytes]:
        """Yields the path of every regular file in a folder, at any depth; errors as above."""

    def is_image(self, path: bytes, tally: Tally) -> bool:
        """Whether a file counts as an image; one that does not is tallied."""

    def has_image(self, folder: bytes) -> bool:
        """Whether a folder holds an image at any depth; one that cannot be listed may hold one."""

    def is_folder(self, path: bytes) -> bool:
        """Whether a folder has that path."""

    def is_file(self, path: bytes) -> bool:
        """Whether a regular file has that path; absolute paths are possible."""

    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        """Returns a small file; None where it is larger; absolute paths are possible.

        Raises:
            OSError: it cannot be read.
            ImageDecodeError: its content is damaged.
            SourceError: the archive was changed.
        """


class DiskTree:
    """A `Tree` over a folder on disk; links are followed.

    Args:
        root: Its absolute path.
    """

    def __init__(self, root: bytes) -> None:
        self.root = root

    def list_folder(self, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
        """See `Tree`."""
        return list_folder(self.root, folder, tally)

    def walk(self, folder: bytes, tally: Tally) -> Iterator[bytes]:
        """See `Tree`."""
        return walk(self.root, folder, tally)

    def is_image(self, path: bytes, tally: Tally) -> bool:
        """See `Tree`."""
        return is_image(self.root, path, tally)

    def has_image(self, folder: bytes) -> bool:
        """See `Tree`."""
        return has_image(self.root, folder)

    def is_folder(self, path: bytes) -> bool:
        """See `Tree`."""
        return os.path.isdir(self._full(path))

    def is_file(self, path: bytes) -> bool:
        """See `Tree`."""
        return os.path.isfile(self._full(path))

    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        """See `Tree`."""
        full = self._full(path)
        if os.path.getsize(full) > most_bytes:
            return None
        with open(full, "rb") as file:
            return file.read()

    def _full(self, path: bytes) -> bytes:
        return path if path.startswith(b"/") else join(self.root, path)
