"""A tree of images: what the layout of a source is found from, on disk or in an archive."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH112, PTH113, PTH123, PTH202

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Protocol

from ci2p_cache.errors import SourceError
from ci2p_cache.images.kinds import has_image, is_image
from ci2p_cache.images.listing import list_folder, walk
from ci2p_cache.images.names import as_key, for_display, is_hidden, join
from ci2p_cache.images.tally import Tally

__all__ = ["ArchiveTree", "DiskTree", "Tree"]


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


class ArchiveTree(ABC):
    """The half of a `Tree` over an archive that only needs the names in it.

    Args:
        root: Absolute path of the archive.
        names: Paths in it, sorted; those of folders end in "/".
    """

    def __init__(self, root: bytes, names: Sequence[bytes]) -> None:
        self.root = root
        self._names = names

    def list_folder(self, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
        """See `Tree`."""
        names, prefix = self._names, folder + b"/" if folder else b""
        folders: list[bytes] = []
        files: list[bytes] = []
        at = bisect_left(names, prefix)
        while at < len(names) and names[at].startswith(prefix):
            name, slash, _ = names[at][len(prefix) :].partition(b"/")
            if is_hidden(name):
                tally.add("hidden", join(folder, name))
            elif name:
                (folders if slash else files).append(name)
            # All that is in a folder has its name and "/" in front; "0" is the sign behind "/".
            at = bisect_left(names, prefix + name + b"0", at) if slash else at + 1
        if len({as_key(name) for name in folders + files}) < len(folders) + len(files):
            raise SourceError(
                f"{for_display(join(self.root, folder))} has two names that are the same, or the "
                "same once bytes that are not UTF-8 are written as \\xNN",
                hint="unpack it, rename one of them, and name the folder",
            )
        return folders, files

    def walk(self, folder: bytes, tally: Tally) -> Iterator[bytes]:
        """See `Tree`."""
        # Not by recursion: a name may have any number of parts.
        stack = [self._entries(folder, tally)]
        while stack:
            path, is_folder = next(stack[-1], (b"", False))
            if is_folder:
                stack.append(self._entries(path, tally))
            elif path:
                yield path
            else:
                stack.pop()

    def _entries(self, folder: bytes, tally: Tally) -> Iterator[tuple[bytes, bool]]:
        folders, files = self.list_folder(folder, tally)
        found = [(name, True) for name in folders] + [(name, False) for name in files]
        return iter([(join(folder, name), is_folder) for name, is_folder in sorted(found)])

    def has_image(self, folder: bytes) -> bool:
        """See `Tree`."""
        prefix = folder + b"/" if folder else b""
        for at in range(bisect_left(self._names, prefix), len(self._names)):
            name = self._names[at]
            if not name.startswith(prefix):
                break
            is_file = not (name.endswith(b"/") or is_hidden(name[len(prefix) :]))
            if is_file and self.is_image(name, Tally()):
                return True
        return False

    def is_folder(self, path: bytes) -> bool:
        """See `Tree`."""
        at = bisect_left(self._names, path + b"/")
        return at < len(self._names) and self._names[at].startswith(path + b"/")

    @abstractmethod
    def is_image(self, path: bytes, tally: Tally) -> bool:
        """See `Tree`."""
