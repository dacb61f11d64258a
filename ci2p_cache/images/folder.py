"""Images in folders on disk: `SRC/CLASS/...`, `SRC/{train,val,test}/CLASS/...`, and ImageNet."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH116

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import SPLIT_NAMES, SPLIT_ORDER
from ci2p_cache.images.imagenet import (
    DEVKIT,
    data_folder,
    flat_val_labels,
    label_folders,
    read_titles,
)
from ci2p_cache.images.kinds import has_image, is_image
from ci2p_cache.images.labels import order_notices, ordered_classes
from ci2p_cache.images.listing import list_folder, walk
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.reading import place_below, read_file
from ci2p_cache.images.source import ImageRef
from ci2p_cache.images.tally import Tally

__all__ = ["FolderSource"]

_WANTED = (
    "wanted SRC/CLASS/image.jpg, SRC/train/CLASS/image.jpg with val/ and test/ beside train/, or "
    "ImageNet's ILSVRC/Data/CLS-LOC"
)
_MAX_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Part:
    """One folder of images: a whole source without splits, or one of its splits."""

    split: str | None
    path: bytes
    """Below the source's root; empty for the root."""
    folders: tuple[bytes, ...]
    """The class folders; empty where `labels` says what each file shows."""
    labels: Mapping[bytes, str]
    """File name -> class of a flat folder; empty otherwise."""

    def class_names(self) -> set[str]:
        return {as_key(name) for name in self.folders} | set(self.labels.values())


class FolderSource:
    """An `ImageSource` over a folder of images; the layout is found out, never guessed silently.

    Split folders are taken as such only where `train` is there and every other folder beside it is
    called val, valid, validation or test (in any case); `train` and `val` beside folders of other
    names are refused, because labels would mean something else each way. Nested folders belong to
    their class. Links are followed; hidden entries are skipped. A flat `test` folder has no labels
    and is skipped; a flat `val` takes its labels from ImageNet's files.

    Args:
        location: The folder.

    Raises:
        SourceError: nothing is there, it cannot be read, or its layout is not understood.
        ResourceError: the file system failed again and again.
    """

    layout: str
    """What was recognised, in a few words: class folders, split folders, or ImageNet."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(os.fsencode(location))
        self._require_folder()
        self._found_at_start = Tally()
        self._scanned = Tally()
        self._notices: list[str] = []
        self._empty_classes: tuple[str, ...] = ()
        data = data_folder(self._root)
        self._label_folders = label_folders(self._root, data)
        self._parts = self._find_parts(data)
        self.layout = "ImageNet" if data else self._layout_words()
        self._empty_classes = self._without_images()
        found = {name for part in self._parts for name in part.class_names()}
        self._classes = ordered_classes(found - set(self._empty_classes))
        self._labels = {name: label for label, name in enumerate(self._classes)}
        self._titles, notices = read_titles(self._label_folders, self._classes)
        self._notices += [*notices, *order_notices(self._classes), *self._unknown_to_train()]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names: folders with images, over all splits, in the order of `ordered_classes`."""
        return self._classes

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people from `classes.json`, `classes.txt` or `LOC_synset_mapping.txt`."""
        return self._titles

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        found = [*self._notices, *self._found_at_start.notices(), *self._scanned.notices()]
        if self._empty_classes:
            found.append(f"{_listed(self._empty_classes)}: no image, so no class")
        return tuple(found)

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
        count = 0
        for part in self._parts:
            for name, path in self._files_of(part, tally):
                count += 1
                key = as_key(path[len(part.path) + 1 :] if part.path else path)
                if name not in self._labels:
                    raise SourceError(f"{for_display(path)} came while the source was listed")
                yield ImageRef(key, part.split, self._labels[name], path)
        if not count:
            raise SourceError(
                f"{for_display(self._root)} has {len(self._empty_classes)} class folders and no "
                f"image in them; {'; '.join(self.notices) or 'they are empty'}"
            )

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

    def _require_folder(self) -> None:
        shown = for_display(self._root)
        try:
            mode = os.stat(self._root).st_mode
        except FileNotFoundError as error:
            raise SourceError(f"{shown} does not exist; {_WANTED}") from error
        except OSError as error:
            raise SourceError(f"{shown} cannot be read: {error.strerror}") from error
        if not stat.S_ISDIR(mode):
            raise SourceError(f"{shown} is a file, not a folder; {_WANTED}")

    def _find_parts(self, data: bytes) -> list[_Part]:
        shown = for_display(join(self._root, data))
        folders, files = list_folder(self._root, data, self._found_at_start)
        folders = [name for name in folders if name != DEVKIT]
        splits = [name for name in folders if name.lower() in SPLIT_NAMES]
        others = [name for name in folders if name.lower() not in SPLIT_NAMES]
        has_train = any(name.lower() == b"train" for name in splits)
        if not folders:
            raise SourceError(
                f"{shown} has no folders in it, {self._summary(data, files)}; {_WANTED}",
                hint="name the folder above it, if this is the folder of a class"
                if files
                else None,
            )
        if not others and not has_train:
            raise SourceError(
                f"{shown} has {_listed_bytes(splits)} and no train folder; {_WANTED}",
                hint="add train/, or rename the folder if its name is a class",
            )
        if others and has_train and len(splits) > 1:
            raise SourceError(
                f"{shown} has split folders ({_listed_bytes(splits)}) beside other folders "
                f"({_listed_bytes(others)}); they cannot be both splits and classes",
                hint="move the other folders out of the source, or give SRC a folder without them",
            )
        self._count_strays(data, files)
        if others:
            if has_train and list_folder(self._root, join(data, splits[0]), Tally())[0]:
                self._notices.append(
                    f"{for_display(splits[0])} is taken as a class, because "
                    f"{for_display(others[0])} beside it is no split"
                )
            return [_Part(None, data, tuple(folders), {})]
        return self._split_parts(data, splits)

    def _split_parts(self, data: bytes, names: list[bytes]) -> list[_Part]:
        by_split: dict[str, bytes] = {}
        for name in names:
            split = SPLIT_NAMES[name.lower()]
            if split in by_split:
                raise SourceError(
                    f"{for_display(by_split[split])} and {for_display(name)} in "
                    f"{for_display(self._root)} are both the {split} split",
                    hint="keep one of them",
                )
            by_split[split] = name
        parts = []
        for split in SPLIT_ORDER:
            if split in by_split:
                part = self._split_part(split, join(data, by_split[split]))
                parts += [part] if part is not None else []
        return parts

    def _split_part(self, split: str, path: bytes) -> _Part | None:
        """Returns the split's part; None, with a notice, where it has nothing that can be used."""
        folders, files = list_folder(self._root, path, self._found_at_start)
        if folders:
            self._count_strays(path, files)
            return _Part(split, path, tuple(folders), {})
        shown = for_display(join(self._root, path))
        if split == "train":
            raise SourceError(
                f"{shown} has no class folders, {self._summary(path, files)}; {_WANTED}"
            )
        images = [n for n in files if is_image(self._root, join(path, n), self._found_at_start)]
        if not images:
            self._notices.append(f"{shown} holds no images; there is no {split} split")
            return None
        if split == "test":
            self._notices.append(f"{shown} holds {len(images)} images without labels; skipped")
            return None
        labels, where = flat_val_labels(self._label_folders, images, join(self._root, path))
        self._notices.append(f"the labels of {shown} come from {where}")
        return _Part(split, path, (), labels)

    def _without_images(self) -> tuple[str, ...]:
        """Returns the names of class folders that hold no image in any split."""
        names = {name for part in self._parts for name in part.class_names()}
        for part in self._parts:
            names -= set(part.labels.values())
            for folder in part.folders:
                if as_key(folder) in names and has_image(self._root, join(part.path, folder)):
                    names.remove(as_key(folder))
        return tuple(sorted(names))

    def _files_of(self, part: _Part, tally: Tally) -> Iterator[tuple[str, bytes]]:
        """Yields (class, path below the root) of every image of a part."""
        for folder in part.folders:
            for path in walk(self._root, join(part.path, folder), tally):
                if is_image(self._root, path, tally):
                    yield as_key(folder), path
        for name, label in part.labels.items():
            yield label, join(part.path, name)

    def _count_strays(self, folder: bytes, files: list[bytes]) -> None:
        for name in files:
            if is_image(self._root, join(folder, name), Tally()):
                self._found_at_start.add("stray", join(folder, name))

    def _summary(self, folder: bytes, files: list[bytes]) -> str:
        """Says what files were found where folders were wanted."""
        if not files:
            return "and no files"
        images = [n for n in files if is_image(self._root, join(folder, n), Tally())]
        if images:
            return f"but {len(images)} images, for example {for_display(images[0])}"
        return f"and {len(files)} files that are no images, for example {for_display(files[0])}"

    def _layout_words(self) -> str:
        if self._parts[0].split is None:
            return "class folders"
        return "split folders " + ", ".join(str(part.split) for part in self._parts)

    def _unknown_to_train(self) -> list[str]:
        known = self._parts[0].class_names()
        notices = []
        for part in self._parts[1:]:
            unknown = sorted(part.class_names() - known)
            if unknown:
                notices.append(f"{_listed(unknown)}: in {part.split}, but unknown to train")
        return notices


def _listed(names: tuple[str, ...] | list[str]) -> str:
    """Returns a count with the first few names."""
    shown = ", ".join(for_display(name.encode()) for name in names[:_MAX_NAMES_SHOWN])
    more = ", ..." if len(names) > _MAX_NAMES_SHOWN else ""
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown}{more})"


def _listed_bytes(names: list[bytes]) -> str:
    more = ", ..." if len(names) > _MAX_NAMES_SHOWN else ""
    return ", ".join(for_display(name) for name in names[:_MAX_NAMES_SHOWN]) + more
