"""What sources over archives and over tables share: their files, listed once, and their classes.

How images are in a file is not known here.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import Archive, find_archives
from ci2p_cache.images.labels import Classes, LabelTable
from ci2p_cache.images.names import for_display, join
from ci2p_cache.images.tally import Tally

__all__ = ["ArchiveSource"]


class ArchiveSource(ABC):
    """The half of an `ImageSource` that does not depend on what its files are.

    Args:
        location: A file, a folder that holds only such files, a wildcard or a brace pattern; see
            `find_archives`, also for splits.

    Raises:
        SourceError: nothing is there, a named file is missing, or the splits are unclear.
        ResourceError: the file system failed again and again.
    """

    suffixes: ClassVar[tuple[bytes, ...]]
    """How names of files end, in lower case."""
    place: ClassVar[re.Pattern[bytes]]
    """Form of `ImageRef.path`: a file below the root, "#", and a place in it."""
    words: ClassVar[tuple[str, str, str]]
    """What messages call an image of it, a file of it, and its files."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self._archives = find_archives(os.fsencode(location), self.suffixes)
        self._tally = Tally()
        self._classes = Classes((), ())

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label, as `LabelTable` has them."""
        self._list()
        return self._classes.names

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people from `classes.json` or `classes.txt` beside the files."""
        self._list()
        return self._classes.titles

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        return (*self._archives.notices, *self._classes.notices, *self._tally.notices())

    def location(self) -> str:
        """Returns the absolute path or pattern; bytes that are not UTF-8 are surrogates."""
        return os.fsdecode(self._archives.location)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns the archive or table that holds an image among others."""
        return self._found(path)[0], False

    @abstractmethod
    def _list(self) -> Sequence[tuple[Archive, object]]:
        """Lists all files; once, which sets the classes and the tally."""

    def _settle(
        self,
        labels: LabelTable,
        folders: Sequence[bytes],
        names: Sequence[str] = (),
        *,
        num_images: int,
        tally: Tally,
    ) -> npt.NDArray[np.int32]:
        """Sets the classes; returns the label of each that `labels` was told of, int32.

        Args:
            labels: The labels of all files.
            folders: Where `classes.json` or `classes.txt` may be, absolute.
            names: The names of the classes, where the files have them.
            num_images: Labelled images in all files.
            tally: What was left out.

        Raises:
            SourceError: there is no image, or the labels do not go together.
        """
        shown, (_, _, files) = self.location(), self.words
        if not num_images:
            raise SourceError(
                f"{shown} has {len(self._archives.files)} {files} and no labelled image in them; "
                f"{'; '.join(tally.notices()) or 'they are empty'}"
            )
        try:
            self._classes, settled = labels.settle(tuple(folders), names)
        except SourceError as error:
            raise SourceError(f"{shown}: {error}", hint=error.hint) from error
        return settled

    def _found(self, path: bytes) -> tuple[bytes, list[int]]:
        """Takes an `ImageRef.path` apart.

        Returns:
            The file's absolute path, and the numbers of the place in it.

        Raises:
            SourceError: it is none below the source.
        """
        match = self.place.fullmatch(path)
        shown, (image, file, _) = for_display(path), self.words
        if match is None or path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
            raise SourceError(f"{shown} is no {image} below {self.location()}")
        archive, *numbers = match.groups()
        if not archive.lower().endswith(self.suffixes):
            raise SourceError(f"{shown} names no {file} below {self.location()}")
        return join(self._archives.root, archive), [int(number) for number in numbers]
