"""What sources over a tree of class folders share: layout, classes, and listing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

from ci2p_cache.errors import SourceError
from ci2p_cache.images.imagenet import read_titles
from ci2p_cache.images.labels import order_notices, ordered_classes
from ci2p_cache.images.layouts import Layout, Part, find_layout
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.source import ImageRef
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tree import Tree

__all__ = ["TreeSource"]

_MAX_NAMES_SHOWN = 5


class TreeSource(ABC):
    """The half of an `ImageSource` that a folder and an archive of folders have in common.

    The layout is found out when classes or images are first asked for; reading needs none.

    Args:
        root: Absolute path of the folder or archive.
        labelled: Whether folders say what the images show; if not, labels are -1 and there are no
            classes.
    """

    def __init__(self, root: bytes, *, labelled: bool) -> None:
        self._root = root
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
        """Returns the whole content of one image; errors as `ImageSource.read` has them."""

    @abstractmethod
    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns where an image is; as `ImageSource.file_of` has it."""

    @property
    def layout(self) -> str:
        """What was recognised, in a few words: class folders, split folders, ImageNet, ..."""
        return self._found.words

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names: folders with images, over all splits, in the order of `ordered_classes`."""
        return self._named[0]

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people from `classes.json`, `classes.txt` or `LOC_synset_mapping.txt`."""
        return self._named[1]

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        found, (classes, _, of_classes) = self._found, self._named
        unknown = _unknown_to_train(found.parts) if classes else []
        return (
            *found.notices, *of_classes, *unknown,
            *found.tally.notices(), *self._scanned.notices(),
        )  # fmt: skip

    def location(self) -> str:
        """Returns the absolute path; bytes that are not UTF-8 are surrogates, as `os` has them."""
        return os.fsdecode(self._root)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: splits train, val, test, then folders and files by their bytes.

        Raises:
            SourceError: a folder cannot be listed, or there is no image at all.
            ResourceError: listing failed again and again.
        """
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
                f"{for_display(self._root)} has no image in it; "
                f"{'; '.join(self.notices) or 'its folders are empty'}"
            )

    @cached_property
    def _found(self) -> Layout:
        return find_layout(self._tree, labelled=self._labelled)

    @cached_property
    def _named(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Returns classes, their titles, and notices about both."""
        if not self._labelled:
            return (), (), ()
        names = {name for part in self._found.parts for name in part.class_names()}
        classes = ordered_classes(names)
        titles, notices = read_titles(self._found.label_folders, classes, self._tree)
        return classes, titles, notices + order_notices(classes)

    def _files_of(self, part: Part, tally: Tally) -> Iterator[tuple[str, bytes]]:
        """Yields (class, path below the root) of every image of a part."""
        for folder in part.folders:
            for path in self._tree.walk(join(part.path, folder), tally):
                if self._tree.is_image(path, tally):
                    yield as_key(folder), path
        for name, label in part.files.items():
            yield label, join(part.path, name)


def _unknown_to_train(parts: Sequence[Part]) -> list[str]:
    known = parts[0].class_names()
    notices = []
    for part in parts[1:]:
        unknown = sorted(part.class_names() - known)
        if unknown:
            notices.append(f"{_listed(unknown)}: in {part.split}, but unknown to train")
    return notices


def _listed(names: Sequence[str]) -> str:
    """Returns a count with the first few names."""
    shown = ", ".join(for_display(name.encode()) for name in names[:_MAX_NAMES_SHOWN])
    more = ", ..." if len(names) > _MAX_NAMES_SHOWN else ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown}{more})"
