"""Folders in tars that say what images show, by the rules of folders on disk (`layouts`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import Archive
from ci2p_cache.images.layouts import find_layout
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tar_images import Listed
from ci2p_cache.images.tar_nested import stem
from ci2p_cache.images.tree import ArchiveTree

__all__ = ["ClassFolders", "class_of", "refuse_shards"]

_MOST_NAMED = 5
_SHARD = re.compile(
    rb"(shards?|parts?|train|val|valid|validation|test|data|batch|chunk|images?|imgs?|files?|set)"
    rb"[-_.]?\d+",
    re.IGNORECASE,
)
_WNID = re.compile(rb"n\d{8}")


class _TarTree(ArchiveTree):
    """A `Tree` over what was listed in tars.

    Args:
        root: Absolute path of the tar; of several, what names them.
        images: The paths of the images.
        texts: Lists of labels and splits, by path; None for one that was not kept.
    """

    def __init__(
        self, root: bytes, images: Iterable[bytes], texts: Mapping[bytes, bytes | None]
    ) -> None:
        super().__init__(root, sorted({*images, *texts}))
        self._texts = texts

    def is_image(self, path: bytes, tally: Tally) -> bool:
        """See `Tree`."""
        return path not in self._texts

    def is_file(self, path: bytes) -> bool:
        """See `Tree`."""
        return self._below(path) in self._texts

    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        """See `Tree`."""
        return self._texts[self._below(path)]

    def _below(self, path: bytes) -> bytes:
        return path.removeprefix(self.root + b"/")


class ClassFolders:
    """What the folders in archives say of each image: as those on disk would, over all archives.

    Args:
        location: What names the archives, absolute.
        listing: The archives, and what is in them.
        labelled: Whether folders are to say what the images show.
        archives_are_classes: Whether each archive stands for a folder, as ImageNet's class tars do.

    Raises:
        SourceError: the layout is not understood, or there is one class; only a part of the
            messages says where.
    """

    def __init__(
        self,
        location: bytes,
        listing: Sequence[tuple[Archive, Listed]],
        *,
        labelled: bool,
        archives_are_classes: bool,
    ) -> None:
        self._archives_are_classes = archives_are_classes
        images = (self._path(a, name) for a, listed in listing for name, *_ in listed.images)
        texts = {name: text for _, listed in listing for name, text in listed.texts.items()}
        layout = find_layout(_TarTree(location, images, texts), labelled=labelled)
        self.notices = layout.notices
        """What the user should know, one sentence each."""
        self.names = {name for part in layout.parts for name in part.class_names()} - {""}
        """The classes; none where folders are not to say them."""
        if labelled and len(self.names) < 2:
            raise SourceError(f"it has one class folder, {min(self.names)}")
        self._of_files = {
            join(part.path, name): (part, label)
            for part in layout.parts
            for name, label in part.files.items()
        }
        self._of_folders = {
            join(part.path, folder): (part, as_key(folder))
            for part in layout.parts
            for folder in part.folders
        }

    def place(self, archive: Archive, name: bytes) -> tuple[str | None, str, bytes] | None:
        """Returns split, class and key of an image; None where it is in no class folder."""
        path = self._path(archive, name)
        found, end = self._of_files.get(path), len(path)
        while found is None and end > 0:
            end = max(0, path.rfind(b"/", 0, end))
            found = self._of_folders.get(path[:end])
        if found is None:
            return None
        part, label = found
        key = path[len(part.path) + 1 :] if part.path else path
        return part.split or archive.split, label, key

    def _path(self, archive: Archive, name: bytes) -> bytes:
        return join(class_of(archive), name) if self._archives_are_classes else name


def class_of(archive: Archive) -> bytes:
    """Returns the class that an archive stands for, if it is one."""
    return stem(archive.path).rpartition(b"/")[2]


def refuse_shards(folders: Iterable[bytes], *, alone: bool) -> None:
    """Refuses tars that are called like the parts of one data set, and not like classes.

    Args:
        folders: What the tars stand for.
        alone: Whether they are in one tar, where only class tars are known to.

    Raises:
        SourceError: they are; the message does not say where.
    """
    names = sorted({folder.rpartition(b"/")[2] for folder in folders})
    numbered = len(names) > 1 and len({re.sub(rb"\d+", b"0", name) for name in names}) == 1
    synsets = all(_WNID.fullmatch(name) for name in names)
    if all(map(_SHARD.fullmatch, names)) or (numbered and not alone and not synsets):
        raise SourceError(f"its tars ({_listed(names)}) are called like parts, not like classes")


def _listed(names: Iterable[bytes]) -> str:
    found = sorted(names)
    more = ", ..." if len(found) > _MOST_NAMED else ""
    return ", ".join(for_display(name) for name in found[:_MOST_NAMED]) + more
