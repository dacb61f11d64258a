"""How the images of a tree are laid out: found out from names and folders, or refused.

::

    wrapper folders --> ImageNet | a data set with lists | split folders | class folders | refused

Nothing is guessed: what could mean two things is refused, with what was found and what would help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import SPLIT_NAMES, SPLIT_ORDER
from ci2p_cache.images.imagenet import DEVKIT, data_folder, flat_val_labels, label_folders
from ci2p_cache.images.layout_doubts import doubt
from ci2p_cache.images.layout_refusals import WANTED, no_class_folders
from ci2p_cache.images.listed_layouts import listed_layout
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.splits import UNLABELLED, split_folders
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tree import Tree

__all__ = ["Layout", "Part", "find_layout"]

_MAX_WRAPPERS = 8
_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Some folders of images: a whole source without splits, or one of its splits."""

    split: str | None
    path: bytes
    """Below the source's root; keys are paths below it."""
    folders: tuple[bytes, ...] = ()
    """The class folders in it."""
    files: Mapping[bytes, str] = field(default_factory=dict)
    """Path below `path` -> class, of images whose class is in a list."""

    def class_names(self) -> set[str]:
        """Returns the classes that the part has, by its folders and lists."""
        return {as_key(name) for name in self.folders} | set(self.files.values())


@dataclass(frozen=True, slots=True)
class Layout:
    """How a source is laid out."""

    words: str
    """In a few words, for people: class folders, split folders, ImageNet, ..."""
    parts: tuple[Part, ...]
    """By split, train first."""
    label_folders: tuple[bytes, ...]
    """Absolute; names of classes for people may be there."""
    notices: tuple[str, ...]
    """What the user should know, one sentence each."""
    tally: Tally
    """What was left out."""


def find_layout(tree: Tree, *, labelled: bool) -> Layout:
    """Finds out how the images of a tree are laid out.

    Args:
        tree: Where they are.
        labelled: Whether folders are to say what the images show; if not, only splits are looked
            for, and every image below them counts.

    Raises:
        SourceError: a folder cannot be listed, or the layout is not understood or could mean two
            things.
        ResourceError: listing failed again and again.
    """
    return _Finder(tree, labelled=labelled).find()


class _Finder:
    def __init__(self, tree: Tree, *, labelled: bool) -> None:
        self._tree = tree
        self._labelled = labelled
        self._tally = Tally()
        self._notices: list[str] = []
        self._with_images: dict[bytes, bool] = {}

    def find(self) -> Layout:
        place = b""
        for _ in range(_MAX_WRAPPERS):
            imagenet = data_folder(self._tree, place)
            if imagenet:
                below = imagenet[len(place) :].lstrip(b"/")
                folders = label_folders(join(self._tree.root, place), below)
                return self._layout("ImageNet", self._parts(imagenet, folders), folders)
            listing = listed_layout(self._tree, place, self._tally)
            if listing is not None:
                self._notices += listing.notices
                parts = [Part(s, listing.path, files=of) for s, of in listing.splits.items()]
                return self._layout(listing.name, parts, ())
            inner = self._only_folder(place)
            if inner is None:
                break
            self._list(place, self._tally)
            place = inner
        if place:
            self._notices.append(f"{self._shown(place)} is the only folder with images, so taken")
        folders = label_folders(self._tree.root, b"")
        if place:
            folders = (join(self._tree.root, place), *folders)
        parts = self._parts(place, folders)
        words = "class folders" if self._labelled else "images without labels"
        if parts[0].split is not None:
            splits = dict.fromkeys(str(part.split) for part in parts)
            words = "split folders " + ", ".join(splits)
        return self._layout(words, parts, folders)

    def _layout(self, words: str, parts: list[Part], folders: tuple[bytes, ...]) -> Layout:
        return Layout(words, tuple(parts), folders, tuple(self._notices), self._tally)

    def _list(self, folder: bytes, tally: Tally | None = None) -> tuple[list[bytes], list[bytes]]:
        """Returns the folders that hold an image, and the files; `tally` takes the others."""
        folders, files = self._tree.list_folder(folder, Tally() if tally is None else tally)
        paths = {name: join(folder, name) for name in folders if name != DEVKIT}
        for path in paths.values():
            if path not in self._with_images:
                self._with_images[path] = self._tree.has_image(path)
            if not self._with_images[path] and tally is not None:
                tally.add("empty", path)
                for inner in self._tree.walk(path, tally):
                    self._tree.is_image(inner, tally)
        return [name for name, path in paths.items() if self._with_images[path]], files

    def _only_folder(self, path: bytes) -> bytes | None:
        """Returns the folder that everything is in; None where `path` has others or images."""
        folders, files = self._list(path)
        if len(folders) != 1 or folders[0].lower() in SPLIT_NAMES or self._has_image(path, files):
            return None
        inner = join(path, folders[0])
        below, inner_files = self._list(inner)
        return inner if below and not self._has_image(inner, inner_files) else None

    def _has_image(self, folder: bytes, files: Sequence[bytes]) -> bool:
        return any(self._tree.is_image(join(folder, name), Tally()) for name in files)

    def _parts(self, place: bytes, label_files: tuple[bytes, ...]) -> list[Part]:
        """Returns the parts of the folder that holds all images, found behind any wrapper."""
        # Without labels, scanning lists this folder again.
        folders, files = self._list(place, self._tally if self._labelled else None)
        splits = split_folders(folders)
        others = [name for name in folders if name not in splits]
        named = [name for name in folders if name.lower() in SPLIT_NAMES]
        if not folders and self._labelled:
            raise no_class_folders(self._tree, place, files, self._tally)
        if splits and len(splits) == len(folders):
            self._count_strays(place, files)
            return self._split_parts(place, splits, label_files)
        if len(set(splits.values())) > 1:
            raise SourceError(
                f"{self._shown(place)} has split folders ({_listed(list(splits))}) beside other "
                f"folders ({_listed(others)}); they cannot be both splits and classes",
                hint="move the other folders out of the source, or give SRC a folder without them",
            )
        if named and len(named) == len(folders):
            raise SourceError(
                f"{self._shown(place)} has {_listed(named)} and no train folder; {WANTED}",
                hint="add train/, rename the folder if its name is a class, or name the folder "
                "itself, if its images are for training",
            )
        self._refuse_doubtful(place, folders)
        if not self._labelled:
            return [Part(None, place, (b"",))]
        self._count_strays(place, files)
        other = next(name for name in folders if name not in named)
        self._notices += [
            f"{for_display(name)} is taken as a class, because {for_display(other)} beside it is "
            "no split"
            for name in named
            if self._list(join(place, name))[0]
        ]
        return [Part(None, place, tuple(folders))]

    def _refuse_doubtful(self, place: bytes, folders: list[bytes]) -> None:
        found = doubt(self._tree, place, folders)
        if found is not None and (self._labelled or found.about_splits):
            raise SourceError(
                f"{self._shown(place)} has the folders {_listed(folders)}: {found.what}",
                hint=found.hint,
            )

    def _split_parts(
        self, place: bytes, splits: dict[bytes, str], label_files: tuple[bytes, ...]
    ) -> list[Part]:
        by_split: dict[str, bytes] = {}
        for name, split in splits.items():
            if split in by_split and split != UNLABELLED:
                raise SourceError(
                    f"{for_display(by_split[split])} and {for_display(name)} in "
                    f"{self._shown(place)} are both the {split} split",
                    hint="keep one of them",
                )
            by_split[split] = name
        unusual = [
            f"{for_display(name)} as {split}"
            for name, split in splits.items()
            if split not in (UNLABELLED, as_key(name).lower())
        ]
        if unusual:
            self._notices.append(f"taken as splits: {', '.join(unusual)}")
        parts: list[Part] = []
        for split in SPLIT_ORDER:
            if split in by_split:
                train = self._named_in(parts[0]) if parts else None
                folder = join(place, by_split[split])
                if self._labelled:
                    part = self._split_part(split, folder, train, label_files)
                else:
                    part = Part(split, folder, (b"",))
                parts += [part] if part is not None else []
        for name in (name for name, split in splits.items() if split == UNLABELLED):
            if self._labelled:
                self._skip_unlabelled(join(place, name))
            else:
                parts.insert(1, Part("train", place, (name,)))
        return parts

    def _named_in(self, train: Part) -> set[str]:
        """Returns the classes of train, also those without an image."""
        folders, _ = self._tree.list_folder(train.path, Tally())
        return train.class_names() | set(map(as_key, folders))

    def _split_part(
        self,
        split: str,
        path: bytes,
        train: set[str] | None,
        label_files: tuple[bytes, ...],
    ) -> Part | None:
        """Returns the split's part; None, with a notice, where it has nothing that can be used.

        Args:
            split: Its name.
            path: Its folder.
            train: The classes of train, also those without an image; None for train itself.
            label_files: Where labels of a flat folder may be.
        """
        path = self._unwrapped(path, train)
        folders, files = self._list(path, self._tally)
        if folders:
            self._refuse_doubtful(path, folders)
            self._count_strays(path, files)
            return Part(split, path, tuple(folders))
        shown = self._shown(path)
        if split == "train":
            raise no_class_folders(self._tree, path, files, self._tally)
        images = [n for n in files if self._tree.is_image(join(path, n), self._tally)]
        if not images:
            self._notices.append(f"{shown} holds no images; there is no {split} split")
            return None
        if split == "test":
            self._notices.append(f"{shown} holds {len(images)} images without labels; skipped")
            return None
        labels, where = flat_val_labels(
            self._tree, label_files, images, join(self._tree.root, path)
        )
        self._notices.append(f"the labels of {shown} come from {where}")
        return Part(split, path, files=labels)

    def _unwrapped(self, path: bytes, train: set[str] | None) -> bytes:
        """Looks into a single folder within a split that is no class of train."""
        for _ in range(_MAX_WRAPPERS):
            inner = self._only_folder(path)
            if inner is None and train is not None:
                folders, files = self._list(path)
                if len(folders) == 1 and not self._has_image(path, files):
                    inner = join(path, folders[0])
            if inner is None or as_key(inner.rpartition(b"/")[2]) in (train or ()):
                return path
            path = inner
        return path

    def _skip_unlabelled(self, path: bytes) -> None:
        tally = Tally()
        count = sum(self._tree.is_image(p, tally) for p in self._tree.walk(path, tally))
        self._notices.append(f"{self._shown(path)} holds {count} images without labels; skipped")

    def _count_strays(self, folder: bytes, files: list[bytes]) -> None:
        for name in files:
            if self._tree.is_image(join(folder, name), Tally()):
                self._tally.add("stray", join(folder, name))

    def _shown(self, path: bytes) -> str:
        return for_display(join(self._tree.root, path))


def _listed(names: list[bytes]) -> str:
    more = ", ..." if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(for_display(name) for name in names[:_MAX_NAMES_SHOWN]) + more
