"""The paths of a list, as people and other systems write them -> paths below one root."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH110, PTH118, PTH122

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import ClassVar

from ci2p_cache.errors import SourceError
from ci2p_cache.images.kinds import IMAGE_SUFFIXES
from ci2p_cache.images.names import for_display, join

__all__ = ["ListPaths"]

_DRIVE = re.compile(rb"[A-Za-z]:[/\\]")


class ListPaths:
    """Brings paths below the root, which none may leave.

    Args:
        root: The absolute folder that paths start from.
        folder: The folder of the list, from which a path with ".." may start too.
    """

    num_looked_at: ClassVar[int] = 64
    """Paths whose files are looked at, to find a fault that all have."""

    def __init__(self, root: bytes, folder: bytes) -> None:
        self._root = root
        self._folder = folder
        self._num_turned = 0
        self._found_none: bytes | None = None
        # Most paths of a list are in few folders.
        self._real = functools.lru_cache(2**12)(os.path.realpath)

    def below(self, path: bytes) -> bytes:
        """Returns a path of the list as one below the root; links are followed.

        Raises:
            SourceError: it is a URL, leads out of the root, or is none.
        """
        if b"://" in path:
            raise SourceError(f"{for_display(path[:200])} is a URL; wanted a file below the table")
        if (
            b"\\" in path
            and b"\0" not in path
            and not os.path.lexists(os.path.join(self._root, path))
        ):
            path = path.replace(b"\\", b"/")
            self._num_turned += 1
        found = None
        if path and b"\0" not in path and not _DRIVE.match(path):
            if path.startswith(b"/"):
                found = self._under_root(path)
            else:
                for start in (self._root, self._folder):
                    found = found or self._under_root(join(start, path))
        if not found:
            raise SourceError(
                f"`path` is {for_display(path[:200])!r}; wanted one below "
                f"{for_display(self._root)}",
                hint=self._hint(path),
            )
        return found

    def notices(self) -> tuple[str, ...]:
        """Returns what the user should know of the paths."""
        notices = []
        if self._num_turned:
            notices.append("paths of the list have backslashes; they were read as slashes")
        if self._found_none is not None:
            notices.append(
                f"none of the first files of the list is there, for example "
                f"{for_display(join(self._root, self._found_none))}; --root names the folder that "
                "the paths start from"
            )
        return tuple(notices)

    def look_at(self, paths: Sequence[bytes]) -> None:
        """Looks whether the first files of a list are there, for `notices`."""
        self._found_none = None
        if paths and not any(os.path.exists(join(self._root, path)) for path in paths):
            self._found_none = paths[0]

    def refuse_without_suffix(self, paths: Sequence[bytes]) -> None:
        """Refuses a list that leaves out the suffixes of its files; `paths` are its first.

        Raises:
            SourceError: no path names a file, and with a suffix one does.
        """
        if self._found_none is None:
            return
        for path in paths:
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
                continue
            suffix = self._suffix_of(path)
            if suffix is not None:
                shown = for_display(path)
                raise SourceError(
                    f"there is no file {shown}, but {shown}{suffix}; a list names files with their "
                    "suffix",
                    hint=f"add the suffix to the paths, for example with pandas: t[COLUMN] += "
                    f"'{suffix}'",
                )

    def _suffix_of(self, path: bytes) -> str | None:
        """Returns the suffix under which a file is there."""
        folder, name = os.path.split(join(self._root, path))
        try:
            with os.scandir(folder) as entries:
                found = [entry.name for entry in entries if entry.name.startswith(name + b".")]
        except OSError:
            return None
        suffixes = sorted({each[len(name) :] for each in found})
        return next((s.decode() for s in suffixes if s.lower() in IMAGE_SUFFIXES), None)

    def _under_root(self, path: bytes) -> bytes | None:
        """Returns an absolute path as one below the root; None where it is not below it."""
        path = os.path.normpath(path)
        for root in (self._root, self._real(self._root)):
            start = root.rstrip(b"/") + b"/"
            if path.startswith(start):
                return path[len(start) :]
        folder, name = os.path.split(path)
        start = self._real(self._root).rstrip(b"/") + b"/"
        real = join(self._real(folder), name)
        return real[len(start) :] if real.startswith(start) else None

    def _hint(self, path: bytes) -> str:
        if _DRIVE.match(path):
            return "write the paths of another system as they are here, below the list"
        return "repeat the command with --root FOLDER, the folder that the paths start from"
