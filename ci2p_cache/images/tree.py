"""A tree of images: what the layout of a source is found from, on disk or in an archive."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH112, PTH113, PTH116, PTH122, PTH123, PTH202

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from ci2p_cache.errors import CacheError, ResourceError, SourceError
from ci2p_cache.images.headers import foreign_format, sniff_format
from ci2p_cache.images.names import Tally, as_key, for_display, is_hidden, join
from ci2p_cache.images.reading import opened, persistently

__all__ = ["IMAGE_SUFFIXES", "SNIFF_BYTES", "ArchiveTree", "DiskTree", "Tree", "has_image_suffix",
           "is_image_content"]  # fmt: skip

IMAGE_SUFFIXES = frozenset(
    {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff"}
)
"""What names of images end in, in lower case."""

_FOREIGN_SUFFIXES = frozenset(
    {b".avif", b".heic", b".heif", b".jxl", b".jp2", b".j2k", b".svg", b".psd", b".ico", b".tga"}
    | {b".ppm", b".pgm", b".pbm", b".pnm", b".exr", b".hdr", b".dng", b".cr2", b".nef", b".arw"}
)

SNIFF_BYTES = 16
"""How much of a file `is_image_content` wants to see."""


def has_image_suffix(name: bytes) -> bool:
    """Whether a file has the name of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_image_content(path: bytes, prefix: bytes, tally: Tally) -> bool:
    """Whether the first bytes are of an allowed format; if not, the file is tallied."""
    if sniff_format(prefix) is not None:
        return True
    suffix = os.path.splitext(path)[1].lower()
    foreign = suffix.decode() if suffix in _FOREIGN_SUFFIXES else foreign_format(prefix)
    if foreign is not None:
        tally.add_foreign(foreign, path)
    else:
        tally.add("ignored", path)
    return False


class Tree(ABC):
    """Folders and files below a root.

    Paths are bytes below the root with "/" between their parts, empty for the root itself.

    Args:
        root: Absolute path of the folder or archive; with "/" and a path in front of messages.
    """

    _rename_hint = "rename one of them"

    def __init__(self, root: bytes) -> None:
        self.root = root

    @abstractmethod
    def list_folder(self, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
        """Returns the names of the folders and of the regular files in a folder, each sorted.

        `tally` takes what is skipped: hidden entries, broken links, pipes and devices.

        Raises:
            SourceError: it cannot be listed, or two names look the same as text.
            ResourceError: listing failed again and again.
        """

    def walk(self, folder: bytes, tally: Tally) -> Iterator[bytes]:
        """Yields the path of every regular file in a folder, at any depth.

        Entries of a folder come in the order of their bytes, folders and files mixed. A link to a
        folder is followed unless it leads to one of the folders it is in. Errors as above.
        """
        # Not by recursion: a name may have any number of parts.
        parts = folder.split(b"/") if folder else []
        parents = [b"/".join(parts[:count]) for count in range(len(parts) + 1)]
        chain = [self._identity(parent) for parent in parents]
        stack = [self._entries(folder, tally)]
        while stack:
            path, is_folder = next(stack[-1], (b"", False))
            if not path:
                stack.pop()
                chain.pop()
            elif not is_folder:
                yield path
            elif (identity := self._identity(path)) in chain:
                tally.add("loop", path)
            else:
                chain.append(identity)
                stack.append(self._entries(path, tally))

    def images(self, folder: bytes, tally: Tally) -> Iterator[bytes]:
        """Yields those files of `walk` that are images; the others are tallied."""
        return (path for path in self.walk(folder, tally) if self.is_image(path, tally))

    def images_in(self, folder: bytes, files: Sequence[bytes], tally: Tally) -> list[bytes]:
        """Returns the names of those files of one folder that are images; tallies the others."""
        return [name for name in files if self.is_image(join(folder, name), tally)]

    def _with_distinct_names(
        self, folder: bytes, folders: list[bytes], files: list[bytes]
    ) -> tuple[list[bytes], list[bytes]]:
        """Refuses two names in one folder that would give the same key."""
        if len({as_key(name) for name in folders + files}) < len(folders) + len(files):
            raise SourceError(
                f"{for_display(join(self.root, folder))} has two names that are the same, or the "
                "same once bytes that are not UTF-8 are written as \\xNN; keys could not tell "
                "them apart",
                hint=self._rename_hint,
            )
        return folders, files

    def _entries(self, folder: bytes, tally: Tally) -> Iterator[tuple[bytes, bool]]:
        folders, files = self.list_folder(folder, tally)
        found = sorted([(name, True) for name in folders] + [(name, False) for name in files])
        return ((join(folder, name), is_folder) for name, is_folder in found)

    def _identity(self, folder: bytes) -> object:
        """Returns what distinguishes a folder from those it is in."""
        return folder

    @abstractmethod
    def is_image(self, path: bytes, tally: Tally) -> bool:
        """Whether a file counts as an image; one that does not is tallied.

        Known suffixes are believed (a wrong one shows when the content is decoded); other files
        count if their first bytes are of an allowed format.
        """

    @abstractmethod
    def has_image(self, folder: bytes) -> bool:
        """Whether a folder holds an image at any depth; one that cannot be listed may hold one."""

    @abstractmethod
    def is_folder(self, path: bytes) -> bool:
        """Whether a folder has that path."""

    @abstractmethod
    def is_file(self, path: bytes) -> bool:
        """Whether a regular file has that path; absolute paths are possible."""

    @abstractmethod
    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        """Returns a small file; None where it is larger; absolute paths are possible."""


class DiskTree(Tree):
    """A `Tree` over a folder on disk; links are followed."""

    def list_folder(self, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
        """See `Tree`."""
        path = join(self.root, folder)
        try:
            entries = persistently(lambda: _scandir(path), path)
        except ResourceError:
            raise
        except OSError as error:
            raise SourceError(
                f"folder {for_display(path)} cannot be listed: {error.strerror}",
                hint="make it readable, or move it out of the source",
            ) from error
        names: dict[str, list[bytes]] = {"folder": [], "file": []}
        for entry in sorted(entries, key=lambda entry: entry.name):
            kind = _kind(entry)
            if kind in names:
                names[kind].append(entry.name)
            else:
                tally.add(kind, join(folder, entry.name))
        folders, files = names.values()
        return self._with_distinct_names(folder, folders, files)

    def _identity(self, folder: bytes) -> object:
        path = join(self.root, folder)
        try:
            found = persistently(lambda: os.stat(path), path)
        except ResourceError:
            raise
        except OSError as error:
            raise SourceError(
                f"folder {for_display(path)} cannot be looked at: {error.strerror}"
            ) from error
        return found.st_dev, found.st_ino

    def is_image(self, path: bytes, tally: Tally) -> bool:
        """See `Tree`."""
        if has_image_suffix(path):
            return True
        try:
            with opened(self._full(path)) as descriptor:
                prefix = os.read(descriptor, SNIFF_BYTES)
        except OSError:
            tally.add("unreadable", path)
            return False
        return is_image_content(path, prefix, tally)

    def has_image(self, folder: bytes) -> bool:
        """See `Tree`."""
        try:
            with os.scandir(join(self.root, folder)) as entries:
                # Most often the first entry is one, and the others need not be listed.
                for entry in entries:
                    is_known = has_image_suffix(entry.name) and entry.name[:1] != b"."
                    if is_known and entry.is_file():
                        return True
            return next(self.images(folder, Tally()), None) is not None
        except (OSError, CacheError):
            return True

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


def _scandir(path: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(path) as entries:
        return list(entries)


def _kind(entry: os.DirEntry[bytes]) -> str:
    """Returns folder, file, or the kind under which an entry is tallied."""
    if is_hidden(entry.name):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:
        return "broken"
    return "special"


class ArchiveTree(Tree):
    """The half of a `Tree` over an archive that only needs the names in it.

    Args:
        root: Absolute path of the archive.
        names: Paths in it, sorted; those of folders end in "/".
    """

    _rename_hint = "unpack it, rename one of them, and name the folder"

    def __init__(self, root: bytes, names: Sequence[bytes]) -> None:
        super().__init__(root)
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
        return self._with_distinct_names(folder, folders, files)

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

    def _below(self, path: bytes) -> bytes:
        """Removes the archive from an absolute path; another path stays, and matches no member."""
        return path.removeprefix(self.root + b"/")
