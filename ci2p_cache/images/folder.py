"""Images in folders on disk: `SRC/CLASS/...`, `SRC/{train,val,test}/CLASS/...`, and ImageNet."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH116

from __future__ import annotations

import os
import stat

from ci2p_cache.errors import SourceError
from ci2p_cache.images.layout_refusals import WANTED
from ci2p_cache.images.names import for_display
from ci2p_cache.images.reading import place_below, read_file
from ci2p_cache.images.tree import DiskTree
from ci2p_cache.images.tree_source import TreeSource

__all__ = ["FolderSource"]


class FolderSource(TreeSource):
    """An `ImageSource` over a folder of images; the layout is found out or refused.

    Folders without an image count for nothing. A single folder around everything is looked into.
    Folders are splits only where all of them have
    names for splits (train, val, test and other words for them, in any case, with a prefix or
    suffix that all share) and train is among them; splits beside other folders are refused. A
    folder `test` or `train` beside other classes is a class. Names or contents that look like
    splits in another way are refused. Nested folders belong to their class. Links are followed;
    hidden entries are skipped. A flat `test` folder has no labels and is skipped; a flat `val`
    takes its labels from ImageNet's or Tiny ImageNet's files. CUB-200-2011, Food-101 and the
    Oxford-IIIT pets are read by their own lists.

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
        shown = for_display(self._root)
        try:
            mode = os.stat(self._root).st_mode
        except FileNotFoundError as error:
            raise SourceError(f"{shown} does not exist; {WANTED}") from error
        except OSError as error:
            raise SourceError(f"{shown} cannot be read: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise SourceError(f"{shown} is a file, not a folder; {WANTED}")
        self._disk = DiskTree(self._root)

    @property
    def _tree(self) -> DiskTree:
        return self._disk

    def _path_in_plan(self, path: bytes) -> bytes:
        return path

    def read(self, path: bytes) -> bytes:
        """Returns the whole content of one image; any number of threads may call it.

        What may pass (EIO, a stale handle, a network that is away) is tried three times.

        Raises:
            ImageDecodeError: this one file is the trouble: it has vanished since it was listed, may
                not be read, is larger than 512 MiB or is no regular file any more.
            SourceError: `path` is none below the source.
            ResourceError: reading failed three times, or the whole source has gone.
        """
        return read_file(self._root, path)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns the file of an image."""
        return place_below(self._root, path), True
