"""How the images of a tree are laid out: found out from names and folders, or refused.

::

    wrapper folders --> ImageNet | a data set with lists | split folders | class folders | refused

Nothing is guessed: what could mean two things is refused, with what was found and what would help.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, TAR_SUFFIXES
from ci2p_cache.images.labels import DEVKIT
from ci2p_cache.images.listed_layouts import (
    data_folder,
    flat_val_labels,
    label_folders,
    listed_layout,
)
from ci2p_cache.images.names import Tally, as_key, for_display, join, listed
from ci2p_cache.images.splits import (
    SPLIT_NAMES,
    SPLIT_ORDER,
    UNLABELLED,
    look_like_parts,
    look_like_splits,
    split_folders,
)
from ci2p_cache.images.tree import DiskTree, Tree

__all__ = ["NONE_HINT", "WANTED", "Layout", "Part", "find_layout"]

WANTED = (
    "wanted SRC/CLASS/image.jpg, SRC/{train,val,test}/CLASS/image.jpg or ImageNet's Data/CLS-LOC"
)
NONE_HINT = "--labels none encodes images without labels"
_LIST_HINT = "or write a list: a .csv with the columns path, label and split, and name it as SRC"

_MAX_WRAPPERS = 8
_MOST_LOOKED_INTO = 256
"""With more folders, only those named like a split are searched."""
_MOST_LOOKED_AT = 1000
"""Files below a folder that has no class folders."""
_OTHER_SOURCES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES, b".zip", b".csv", b".tsv")
_NUMBERED = re.compile(r"(.*[^\d._-])([._-])\d+\.\w+")
"""Names as `Abyssinian_12.jpg` and `cat.12.jpg`: class, sign, number."""


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
    """Grouped by split, train first."""
    label_folders: tuple[bytes, ...]
    """Absolute; names of classes for people may be there."""
    notices: tuple[str, ...]
    """What the user should know, one sentence each."""
    tally: Tally
    """The files that were left out."""


def find_layout(tree: Tree, *, labelled: bool) -> Layout:
    """Finds out how the images of a tree are laid out, or refuses what could mean two things.

    Args:
        tree: Where they are.
        labelled: Whether folders are to say what the images show; if not, only splits are looked
            for, and every image below them counts.
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
        root = self._tree.root
        top = b""
        for _ in range(_MAX_WRAPPERS):
            imagenet = data_folder(self._tree, top)
            if imagenet:
                folders = label_folders(join(root, top), imagenet[len(top) :].lstrip(b"/"))
                return self._layout("ImageNet", self._parts(imagenet, folders), folders)
            listing = listed_layout(self._tree, top, self._tally)
            if listing is not None:
                self._notices += listing.notices
                parts = [Part(s, listing.path, files=of) for s, of in listing.splits.items()]
                return self._layout(listing.name, parts, ())
            inner = self._only_folder(top)
            if inner is None:
                break
            self._list(top, self._tally)
            top = inner
        folders = label_folders(root, b"")
        if top:
            self._notices.append(f"{self._shown(top)} is the only folder with images, so taken")
            folders = (join(root, top), *folders)
        parts = self._parts(top, folders)
        words = "class folders" if self._labelled else "images without labels"
        if parts[0].split is not None:
            words = "split folders " + ", ".join(dict.fromkeys(str(each.split) for each in parts))
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
                for _ in self._tree.images(path, tally):
                    pass
        return [name for name, path in paths.items() if self._with_images[path]], files

    def _only_folder(self, path: bytes, *, of_any_kind: bool = False) -> bytes | None:
        """Returns the folder that everything is in; None where `path` has others or images.

        It has no name of a split and holds no image itself, but where it may be `of_any_kind`.
        """
        folders, files = self._list(path)
        if len(folders) != 1 or self._tree.images_in(path, files, Tally()):
            return None
        inner = join(path, folders[0])
        if of_any_kind:
            return inner
        if folders[0].lower() in SPLIT_NAMES:
            return None
        below, files = self._list(inner)
        return inner if below and not self._tree.images_in(inner, files, Tally()) else None

    def _parts(self, top: bytes, label_files: tuple[bytes, ...]) -> list[Part]:
        """Returns the parts of the folder that holds all images, found behind any wrapper."""
        # Without labels, scanning lists this folder again.
        folders, files = self._list(top, self._tally if self._labelled else None)
        splits = split_folders(folders)
        others = [name for name in folders if name not in splits]
        named = [name for name in folders if name.lower() in SPLIT_NAMES]
        if not folders and self._labelled:
            raise _no_class_folders(self._tree, top, files, self._tally)
        if splits and not others:
            self._count_strays(top, files)
            return self._split_parts(top, splits, label_files)
        if len(set(splits.values())) > 1:
            raise SourceError(
                f"{self._shown(top)} has split folders ({listed(list(splits))}) beside other "
                f"folders ({listed(others)}); they cannot be both splits and classes",
                hint="move the other folders out of the source, or give SRC a folder without them",
            )
        if named and len(named) == len(folders):
            raise SourceError(
                f"{self._shown(top)} has {listed(named)} and no train folder; {WANTED}",
                hint="add train/, rename the folder if its name is a class, or name the folder "
                "itself, if its images are for training",
            )
        self._refuse_doubtful(top, folders)
        if not self._labelled:
            return [Part(None, top, (b"",))]
        self._count_strays(top, files)
        other = next(name for name in folders if name not in named)
        self._notices += [
            f"{for_display(name)} is taken as a class, because {for_display(other)} beside it is "
            "no split"
            for name in named
            if self._list(join(top, name))[0]
        ]
        return [Part(None, top, tuple(folders))]

    def _refuse_doubtful(self, path: bytes, folders: list[bytes]) -> None:
        found = _doubt(self._tree, path, folders)
        if found is not None:
            what, hint, about_splits = found
            if self._labelled or about_splits:
                raise SourceError(
                    f"{self._shown(path)} has the folders {listed(folders)}: {what}", hint=hint
                )

    def _split_parts(
        self, top: bytes, splits: dict[bytes, str], label_files: tuple[bytes, ...]
    ) -> list[Part]:
        by_split: dict[str, bytes] = {}
        for name, split in splits.items():
            if split in by_split and split != UNLABELLED:
                raise SourceError(
                    f"{for_display(by_split[split])} and {for_display(name)} in "
                    f"{self._shown(top)} are both the {split} split",
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
        train: set[str] | None = None
        for split in SPLIT_ORDER:
            if split not in by_split:
                continue
            folder = join(top, by_split[split])
            part: Part | None = Part(split, folder, (b"",))
            if self._labelled:
                part = self._split_part(split, folder, train, label_files)
            if part is not None:
                parts.append(part)
            if split == "train" and self._labelled and part is not None:
                # Also the classes of train that have no image.
                names, _ = self._tree.list_folder(part.path, Tally())
                train = part.class_names() | set(map(as_key, names))
        for name in (name for name, split in splits.items() if split == UNLABELLED):
            if self._labelled:
                count = sum(1 for _ in self._tree.images(join(top, name), Tally()))
                self._skip(join(top, name), count)
            else:
                parts.insert(1, Part("train", top, (name,)))
        return parts

    def _split_part(
        self,
        split: str,
        path: bytes,
        train: set[str] | None,
        label_files: tuple[bytes, ...],
    ) -> Part | None:
        """Returns the split's part; None, with a notice, where it has nothing that can be used.

        `train` are the classes of train, also those without an image; None for train itself.
        """
        path = self._unwrapped(path, train)
        folders, files = self._list(path, self._tally)
        if folders:
            self._refuse_doubtful(path, folders)
            self._count_strays(path, files)
            return Part(split, path, tuple(folders))
        shown = self._shown(path)
        if split == "train":
            raise _no_class_folders(self._tree, path, files, self._tally)
        images = self._tree.images_in(path, files, self._tally)
        if not images:
            self._notices.append(f"{shown} holds no images; there is no {split} split")
            return None
        if split == "test":
            self._skip(path, len(images))
            return None
        labels, where = flat_val_labels(
            self._tree, label_files, images, join(self._tree.root, path)
        )
        self._notices.append(f"the labels of {shown} come from {where}")
        return Part(split, path, files=labels)

    def _unwrapped(self, path: bytes, train: set[str] | None) -> bytes:
        """Looks into a single folder within a split that is no class of train."""
        for _ in range(_MAX_WRAPPERS):
            inner = self._only_folder(path, of_any_kind=train is not None)
            if inner is None or as_key(inner.rpartition(b"/")[2]) in (train or ()):
                return path
            path = inner
        return path

    def _skip(self, path: bytes, count: int) -> None:
        self._notices.append(f"{self._shown(path)} holds {count} images without labels; skipped")

    def _count_strays(self, folder: bytes, files: list[bytes]) -> None:
        for name in self._tree.images_in(folder, files, Tally()):
            self._tally.add("stray", join(folder, name))

    def _shown(self, path: bytes) -> str:
        return for_display(join(self._tree.root, path))


_Doubt = tuple[str, str, bool]
"""Why folders are most likely no classes, as half a sentence behind their names; what helps; and
whether it concerns a source without labels too."""


def _doubt(tree: Tree, path: bytes, folders: Sequence[bytes]) -> _Doubt | None:
    """Says why the folders in `path` are most likely no classes; None where they may be."""
    names = [as_key(name) for name in folders]
    if look_like_splits(names):
        return (
            "these names look like splits, not classes",
            "call the folders train, val and test; a folder that is none of these has to go",
            True,
        )
    if look_like_parts(names):
        return (
            "these names look like parts of one set, not classes",
            f"sort the images into class folders, {_LIST_HINT}; or --labels none",
            False,
        )
    few = len(folders) <= _MOST_LOOKED_INTO
    inner = {
        name: _folders_only(tree, join(path, name))
        for name in folders
        if few or name.lower() in SPLIT_NAMES
    }
    return _doubt_inside(folders, inner) if len(folders) > 1 else None


def _folders_only(tree: Tree, folder: bytes) -> list[bytes]:
    """Returns the folders in a folder; none where it holds images too."""
    folders, files = tree.list_folder(folder, Tally())
    return folders if folders and not tree.images_in(folder, files, Tally()) else []


def _doubt_inside(folders: Sequence[bytes], inner: dict[bytes, list[bytes]]) -> _Doubt | None:
    """Compares what is in folders that hold nothing but folders."""
    for name, below in inner.items():
        shown, some = for_display(name), listed(below, 3)
        if below and set(below) <= set(folders):
            return (
                f"{shown} holds {some}, as if it were the source again",
                f"move {shown} out of the source; if it is a split, move the others into train/",
                False,
            )
        if len(set(split_folders(below).values())) > 1:
            return (
                f"{shown} holds {some}, which look like splits within a class; they would be mixed",
                f"put the split above the class, as in train/{shown}/; {_LIST_HINT}",
                True,
            )
        if name.lower() in SPLIT_NAMES and len(below) > 1 and not all(inner.values()):
            return (
                f"{shown} has the name of a split and holds folders ({some}), others hold images; "
                "it may be a split or a class",
                f"name {shown} itself as SRC if its folders are the classes, or move it away",
                False,
            )
    sets = list(inner.values())
    if len(sets) == len(folders) and len(sets[0]) > 1 and all(own == sets[0] for own in sets):
        return (
            f"each holds the same folders ({listed(sets[0], 3)}), so these look like splits or "
            "versions of one set, not classes",
            f"name one of them as SRC, call them train, val and test, {_LIST_HINT}",
            False,
        )
    return None


def _no_class_folders(tree: Tree, path: bytes, files: list[bytes], tally: Tally) -> SourceError:
    """Returns the error of a folder that has these files, and no class folders."""
    images = tree.images_in(path, files, Tally())
    left_out = "; ".join(tally.notices())
    shown, hint = for_display(join(tree.root, path)), _hint(tree, path, images)
    if left_out and not images:
        return SourceError(f"{shown} has no image in it; {left_out}", hint=hint)
    found = "and no files"
    if images:
        found = f"but {len(images)} images, for example {for_display(images[0])}"
    elif files:
        found = f"and {len(files)} files that are no images, for example {for_display(files[0])}"
    return SourceError(f"{shown} has no class folders, {found}; {WANTED}", hint=hint)


def _hint(tree: Tree, path: bytes, images: list[bytes]) -> str | None:
    on_disk = isinstance(tree, DiskTree)
    below = () if images else tree.walk(path, Tally())
    around = list(itertools.islice(below, _MOST_LOOKED_AT))
    for folder in dict.fromkeys((path, path.rpartition(b"/")[0])):
        around += [join(folder, name) for name in tree.list_folder(folder, Tally())[1]]
    other = next((name for name in around if name.lower().endswith(_OTHER_SOURCES)), None)
    if other is not None:
        file = for_display(join(tree.root, other) if on_disk else other)
        first = "" if on_disk else "unpack the archive, and "
        return f"{first}name {file} as SRC if it holds the images or their labels; or {NONE_HINT}"
    if not images:
        return None
    sign = _sign_behind_class(images)
    if sign and on_disk:
        shown = shlex.quote(for_display(join(tree.root, path)))
        cut = "%%." if sign == "." else f"%{sign}"
        return (
            f"if the names of files begin with the class: (cd {shown} && echo path,label && for f "
            f'in *{sign}*; do echo "$f,${{f{cut}*}}"; done) > labels.csv; mv labels.csv {shown}; '
            f"then name {shown}/labels.csv as SRC; or {NONE_HINT}"
        )
    return f"name the folder above it, if this is the folder of a class; or {NONE_HINT}"


def _sign_behind_class(images: list[bytes]) -> str | None:
    """Returns what stands between class and number, where all names have both."""
    found = [_NUMBERED.fullmatch(as_key(name)) for name in images]
    matches = [match for match in found if match is not None]
    names = Counter(match[1] for match in matches)
    signs = {match[2] for match in matches}
    if len(matches) < len(images) or len(signs) != 1 or len(names) < 2:
        return None
    return signs.pop() if max(names.values()) > 1 else None
