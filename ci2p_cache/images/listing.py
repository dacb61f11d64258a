"""What is in a folder: listing and walking that survive whatever they meet.

Whether a file is an image is not known here.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH116

from __future__ import annotations

import os
from collections.abc import Iterator

from ci2p_cache.errors import ResourceError, SourceError
from ci2p_cache.images.names import as_key, for_display, is_hidden, join
from ci2p_cache.images.reading import persistently
from ci2p_cache.images.tally import Tally

__all__ = ["list_folder", "walk"]


def list_folder(root: bytes, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
    """Lists one folder, links followed.

    Args:
        root: Absolute path of the source.
        folder: Path below it, empty for the root itself.
        tally: Takes what is skipped: hidden entries, broken links, pipes and devices.

    Returns:
        Names of the folders and of the regular files in it, each sorted by their bytes.

    Raises:
        SourceError: it cannot be listed, or two names look the same as text.
        ResourceError: listing failed again and again.
    """
    path = join(root, folder)
    try:
        entries = persistently(lambda: _scandir(path), path)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise SourceError(
            f"folder {for_display(path)} cannot be listed: {error.strerror}",
            hint="make it readable, or move it out of the source",
        ) from error
    folders: list[bytes] = []
    files: list[bytes] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        kind = _kind(entry)
        if kind == "folder":
            folders.append(entry.name)
        elif kind == "file":
            files.append(entry.name)
        else:
            tally.add(kind, join(folder, entry.name))
    names = folders + files
    if len({as_key(name) for name in names}) != len(names):
        raise SourceError(
            f"folder {for_display(path)} has two names that are the same once bytes that are not "
            "UTF-8 are written as \\xNN; keys could not tell them apart",
            hint="rename one of them",
        )
    return folders, files


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


def walk(root: bytes, folder: bytes, tally: Tally) -> Iterator[bytes]:
    """Yields the path below `root` of every regular file in `folder`, at any depth.

    Entries of a folder come in the order of their bytes, folders and files mixed. A link to a
    folder is followed unless it leads to one of the folders it is in.

    Raises:
        SourceError: a folder cannot be listed.
        ResourceError: listing failed again and again.
    """
    chain = [_identity(root, parent) for parent in _parents(folder)]
    stack = [(folder, _entries(root, folder, tally))]
    while stack:
        current, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            chain.pop()
            continue
        name, is_folder = entry
        path = join(current, name)
        if not is_folder:
            yield path
            continue
        identity = _identity(root, path)
        if identity in chain:
            tally.add("loop", path)
            continue
        chain.append(identity)
        stack.append((path, _entries(root, path, tally)))


def _entries(root: bytes, folder: bytes, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    folders, files = list_folder(root, folder, tally)
    return iter(sorted([(name, True) for name in folders] + [(name, False) for name in files]))


def _parents(folder: bytes) -> list[bytes]:
    """Returns the root (empty), every folder on the way, and the folder itself."""
    parts = folder.split(b"/") if folder else []
    return [b"/".join(parts[:count]) for count in range(len(parts) + 1)]


def _identity(root: bytes, folder: bytes) -> tuple[int, int]:
    path = join(root, folder)
    try:
        found = persistently(lambda: os.stat(path), path)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise SourceError(
            f"folder {for_display(path)} cannot be looked at: {error.strerror}"
        ) from error
    return found.st_dev, found.st_ino
