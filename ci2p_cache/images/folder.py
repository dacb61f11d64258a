"""Images in folders: on disk, or as an archive holds them; classes and splits by their names."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH116

from __future__ import annotations

import os
import stat
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property

from ci2p_cache.errors import SourceError
from ci2p_cache.images.labels import Classes, ClassSource, folder_classes
from ci2p_cache.images.layouts import WANTED, Layout, Part, find_layout
from ci2p_cache.images.names import Tally, as_key, for_display, join, listed
from ci2p_cache.images.reading import path_below, read_file
from ci2p_cache.images.source import ImageRef
from ci2p_cache.images.tree import DiskTree, Tree

__all__ = ["FolderSource", "TreeSource"]


class TreeSource(ClassSource):
    """The half of an `ImageSource` that a folder and an archive of folders have in common.

    The layout is found out when classes or images are first asked for; reading needs none.

    Args:
        root: Absolute path of the folder or archive.
        labelled: Whether folders say what the images show; if not, labels are -1 and there are no
            classes.
    """

    def __init__(self, root: bytes, *, labelled: bool) -> None:
        super().__init__(root)
        self._labelled = labelled
        self._scanned = Tally()

    @property
    @abstractmethod
    def _tree(self) -> Tree:
        """What is listed."""

    @abstractmethod
    def _path_in_plan(self, path: bytes) -> bytes:
        """Returns what `read` takes for the image at a path in the tree."""

    @abstractmethod
    def read(self, path: bytes) -> bytes:
        """See `ImageReader`."""

    @abstractmethod
    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """See `ImageSource`."""

    @property
    def layout(self) -> str:
        """What was recognised, in a few words: class folders, split folders, ImageNet, ..."""
        return self._found.words

    @property
    def notices(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        found, notices = self._found, [*self._found.notices, *self._settled().notices]
        if self._labelled:
            known = found.parts[0].class_names()
            for part in found.parts[1:]:
                unknown = sorted(name.encode() for name in part.class_names() - known)
                if unknown:
                    kind = "class" if len(unknown) == 1 else "classes"
                    notices.append(
                        f"{len(unknown)} {kind} ({listed(unknown)}): in {part.split}, but unknown "
                        "to train"
                    )
        return (*notices, *found.tally.notices(), *self._scanned.notices())

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: splits train, val, test, then folders and files by their bytes."""
        tally = self._scanned = Tally()
        labels = {name: label for label, name in enumerate(self.classes)}
        count = 0
        for part in self._found.parts:
            for name, path in self._files_of(part, tally):
                count += 1
                if self._labelled and name not in labels:
                    raise SourceError(f"{for_display(path)} came while the source was listed")
                key = as_key(path[len(part.path) + 1 :] if part.path else path)
                yield ImageRef(key, part.split, labels.get(name, -1), self._path_in_plan(path))
        if not count:
            raise SourceError(
                f"{for_display(self._location)} has no image in it; "
                f"{'; '.join(self.notices) or 'its folders are empty'}"
            )

    @cached_property
    def _found(self) -> Layout:
        return find_layout(self._tree, labelled=self._labelled)

    @cached_property
    def _classes(self) -> Classes:
        if not self._labelled:
            return Classes()
        names = {name for part in self._found.parts for name in part.class_names()}
        return folder_classes(names, self._found.label_folders, self._tree)

    def _settled(self) -> Classes:
        return self._classes

    def _files_of(self, part: Part, tally: Tally) -> Iterator[tuple[str, bytes]]:
        """Yields (class, path below the root) of every image of a part."""
        for folder in part.folders:
            for path in self._tree.images(join(part.path, folder), tally):
                yield as_key(folder), path
        for name, label in part.files.items():
            yield label, join(part.path, name)


class FolderSource(TreeSource):
    """An `ImageSource` over a folder of images; the layout is found out or refused.

    Folders without an image count for nothing. A single folder around everything is looked into.
    Folders are splits only where all of them have names for splits (train, val, test and other
    words for them, in any case, with a prefix or suffix that all share) and train is among them;
    splits beside other folders are refused. A folder `test` or `train` beside other classes is a
    class. Names or contents that look like splits in another way are refused. Nested folders belong
    to their class. Links are followed; hidden entries are skipped. A flat `test` folder has no
    labels and is skipped; a flat `val` takes its labels from ImageNet's or Tiny ImageNet's files.
    CUB-200-2011, Food-101 and the Oxford-IIIT pets are read by their own lists.

    Args:
        location: The folder.
        labelled: Whether folders say what the images show. If not, all images below the folder or
            its splits count; labels are -1 and there are no classes.

    Raises:
        SourceError: nothing is there, or it is no folder or cannot be read. A layout that is not
            understood is refused when classes or images are first asked for.
    """

    def __init__(self, location: str | os.PathLike[str], *, labelled: bool = True) -> None:
        super().__init__(os.path.abspath(os.fsencode(location)), labelled=labelled)
        shown = for_display(self._location)
        try:
            mode = os.stat(self._location).st_mode
        except FileNotFoundError as error:
            raise SourceError(f"{shown} does not exist; {WANTED}") from error
        except OSError as error:
            raise SourceError(f"{shown} cannot be read: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise SourceError(f"{shown} is a file, not a folder; {WANTED}")

    @cached_property
    def _tree(self) -> DiskTree:
        return DiskTree(self._location)

    def _path_in_plan(self, path: bytes) -> bytes:
        return path

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image; see `ImageReader`.

        What may pass (EIO, a stale handle, a network that is away) is tried three times.
        """
        return read_file(self._location, path)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """See `ImageSource`."""
        return path_below(self._location, path), True
