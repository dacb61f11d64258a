"""Images in tar files: as WebDataset writes them, or in class folders; plain, gzip or zstandard.

::

    archives --headers, labels--> listing (once) --order--> ImageRef  b"train-000000.tar#1536+8712"
    read: plain tar by position | packed tar through a window that moves forward
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import TAR_SUFFIXES, Archive, ArchiveSource
from ci2p_cache.images.labels import DISK, Classes, LabelTable, folder_classes
from ci2p_cache.images.layouts import find_layout
from ci2p_cache.images.names import Tally, as_key, for_display, join, listed
from ci2p_cache.images.reading import MAX_FILE_BYTES, read_archive, too_large
from ci2p_cache.images.source import ImageRef, SourceOptions
from ci2p_cache.images.tar_bytes import BLOCK_BYTES, Window, is_packed, read_at, require_header
from ci2p_cache.images.tar_listing import NO_LABEL_FILE, Listed, TarLister, refusal, stem
from ci2p_cache.images.tree import ArchiveTree

__all__ = ["TarSource"]

_Listing = list[tuple[Archive, Listed]]

_MAX_WINDOWS = 4
"""Packed archives open for reading at a time; each takes 32 MiB."""
_NO_LABEL = -1
_PACK = (
    "pack class folders, tar -cf CLASSES.tar -C FOLDER . with FOLDER/CLASS/image.jpg; or unpack "
    "the images and encode a list of them, a .csv with path and label"
)
_SHARD = re.compile(
    rb"(shards?|parts?|train|val|valid|validation|test|data|batch|chunk|images?|imgs?|files?|set)"
    rb"[-_.]?\d+",
    re.IGNORECASE,
)
_WNID = re.compile(rb"n\d{8}")


class TarSource(ArchiveSource):
    """An `ImageSource` over tar files.

    The archives are listed once, when `scan` or `classes` is first asked for: headers and labels of
    a plain tar are read, all of a packed one. Rows follow archive and position, so encoding reads
    each archive in sequence, once per split that is drawn from it. In random order a plain tar is
    as good as a folder; a packed one begins again for each image that is behind.

    A label is the text of `.cls`, or `label`, `cls` or `class_name` of `.json`; see `LabelTable`.
    Where no archive has any such file, the layout is found out as that of a folder is, over all
    archives; a tar of class tars, or a folder of them, is read in the same way (ImageNet comes so).

    Keys are the names of the image members, so that a folder and a tar of it have the same. Where
    an archive of a split has a name that another one has too, they are ARCHIVE/NAME.

    Args:
        location: As `ArchiveSource` has it.
        options: The extension of the images, and where labels are.
    """

    suffixes = TAR_SUFFIXES
    form = re.compile(rb"(.+)#(\d{1,18})\+(\d{1,18})", re.DOTALL)
    words = ("image of an archive", "tar", "archives")

    def __init__(
        self, location: str | os.PathLike[str], options: SourceOptions | None = None
    ) -> None:
        super().__init__(location)
        self._options = options or SourceOptions()
        self._listing: _Listing | None = None
        self._labels: list[int] = []
        self._folders: _ClassFolders | None = None
        self._names_recur = False
        self._window = lru_cache(_MAX_WINDOWS)(Window)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: archives by split and name, images as they are in them."""
        order = 0
        for archive, found in self._list():
            for split, name, label, offset, size in self._placed(archive, found):
                path = b"%b#%d+%d" % (archive.path, offset, size)
                key = as_key(join(archive.path, name) if self._names_recur else name)
                yield ImageRef(key, split, label, path, order=order)
                order += 1

    @property
    def notices(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        recur = ("archives have images of the same name, so keys are ARCHIVE/NAME",)
        return (*super().notices, *(recur if self._names_recur else ()))

    def read(self, path: bytes) -> bytes:
        """See `ImageReader`."""
        full, (offset, size) = self._found(path)
        if size > MAX_FILE_BYTES:
            raise too_large(size)
        start, stop = offset - BLOCK_BYTES, offset + size
        if is_packed(full):
            window = self._window(full)
            data = read_archive(lambda: window.read(start, stop), full)
        else:
            data = read_archive(lambda: read_at(full, start, stop), full)
        if len(data) != stop - start or not require_header(data[:BLOCK_BYTES], size):
            raise SourceError(
                f"{for_display(full)} has no file of {size} bytes at byte {offset} any more; it "
                "was changed since the plan was made",
                hint="put the archive back, or encode into a new folder",
            )
        return data[BLOCK_BYTES:]

    def _list(self) -> _Listing:
        if self._listing is None:
            table, listing = LabelTable(), []
            tally = self._tally = Tally()
            for archive in self._archives.files:
                full = join(self._archives.root, archive.path)
                found = read_archive(TarLister(full, archive, table, self._options).list, full)
                tally.merge(found.tally)
                listing.append((archive, found))
            if self._options.labels == "none":
                self._settle_none(listing)
            elif any(found.has_labels for _, found in listing) or not any(
                found.problem for _, found in listing
            ):
                self._settle_files(table, listing)
            else:
                self._settle_folders(listing)
            self._listing = listing
            self._names_recur = self._do_names_recur()
        return self._listing

    def _settle_none(self, listing: _Listing) -> None:
        """Takes all images without labels; class folders count for their splits alone."""
        if not any(len(found.images) for _, found in listing):
            raise SourceError(f"{self.location()} has no image in it")
        self._folders = _ClassFolders(self._location, listing, labelled=False)
        self._classes = Classes((), (), self._folders.notices)
        self._check_folders(self._folders, listing)

    def _settle_files(self, table: LabelTable, listing: _Listing) -> None:
        """Settles labels that come from files, and what has none."""
        count = 0
        for archive, found in listing:
            if found.problem is not None and archive.split != "test":
                raise found.problem
            for name, _, _, label in found.images:
                count += label != NO_LABEL_FILE
                if label == NO_LABEL_FILE:
                    self._tally.add("unlabelled", join(archive.path, name))
        settled = self._settle(table, self._label_folders(), num_images=count, tally=self._tally)
        self._labels = settled.tolist()
        if _NO_LABEL not in self._labels:
            return
        for archive, found in listing:
            for name, _, _, label in found.images:
                if label != NO_LABEL_FILE and self._labels[label] == _NO_LABEL:
                    if archive.split != "test":
                        raise refusal(self._archives.root, archive, name, "has the label -1, none")
                    self._tally.add("unlabelled", join(archive.path, name))

    def _settle_folders(self, listing: _Listing) -> None:
        """Settles labels that come from the folders in the archives."""
        inner = {n.rpartition(b"/")[0] for _, found in listing for n, *_ in found.images}
        # A folder of class tars, the outer tar of ImageNet unpacked.
        archives_are_classes = inner == {b""} and len(listing) > 1
        if archives_are_classes:
            inner = {_class_of(archive) for archive, _ in listing}
        is_nested = any(found.is_nested for _, found in listing)
        try:
            if archives_are_classes or is_nested:
                _refuse_shards(inner, alone=is_nested)
            folders = _ClassFolders(
                self._location, listing, labelled=True, archives_are_classes=archives_are_classes
            )
        except SourceError as error:
            problem = next(found.problem for _, found in listing if found.problem is not None)
            raise SourceError(
                f"{problem}. Nor does it hold class folders or class tars: {error}",
                hint=error.hint or _PACK,
            ) from error
        self._folders = folders
        self._check_folders(folders, listing)
        found = folder_classes(folders.names, self._label_folders(), DISK)
        kind = "tars" if archives_are_classes or is_nested else "folders in the archive"
        first = f"classes are the {kind}, because no image has a label beside it"
        notices = (first, *folders.notices, *found.notices)
        self._classes = Classes(found.names, found.titles, notices)

    def _check_folders(self, folders: _ClassFolders, listing: _Listing) -> None:
        """Refuses an archive whose folders do not go with its name; tallies what is in none."""
        for archive, found in listing:
            outside, has_some = b"", False
            for name, *_ in found.images:
                split_class_key = folders.find(archive, name)
                if split_class_key is None:
                    self._tally.add("outside", join(archive.path, name))
                    outside = name
                    continue
                split, _, key = split_class_key
                has_some, problem = True, None
                if archive.split not in (None, split):
                    problem = f"is of {split}, and the archive's name says {archive.split}"
                if found.is_nested and key.count(b"/") > 1 and folders.names:
                    problem = "is in a folder of a tar in the tar; its class is not clear"
                if problem is not None:
                    raise refusal(self._archives.root, archive, name, problem)
            if outside and not has_some and archive.split != "test":
                raise refusal(
                    self._archives.root,
                    archive,
                    outside,
                    "is in no class folder, and nor do the others of this archive",
                    hint="encode the other archives alone, or pack its images in class folders",
                )

    def _placed(
        self, archive: Archive, found: Listed
    ) -> Iterator[tuple[str | None, bytes, int, int, int]]:
        """Yields split, name, label, offset and size of the images that have a label.

        Of all images, with the label -1, where labels do not count.
        """
        label_of = {name: label for label, name in enumerate(self._classes.names)}
        for name, offset, size, label in found.images:
            if self._folders is not None:
                in_folder = self._folders.find(archive, name)
                if in_folder is not None:
                    split, class_name, key = in_folder
                    yield split, key, label_of.get(class_name, _NO_LABEL), offset, size
            elif label != NO_LABEL_FILE and self._labels[label] != _NO_LABEL:
                yield archive.split, name, self._labels[label], offset, size

    def _do_names_recur(self) -> bool:
        """Whether an image of one archive has the name of one in another, in the same split.

        64 bits of its hash stand for a name; two that are taken for one would only lengthen keys.
        """
        hashes: dict[str | None, list[npt.NDArray[np.uint64]]] = {}
        for archive, found in self._listing or ():
            own: dict[str | None, array[int]] = {}
            for split, name, *_ in self._placed(archive, found):
                digest = hashlib.blake2b(name, digest_size=8).digest()
                own.setdefault(split, array("Q")).frombytes(digest)
            for split, numbers in own.items():
                hashes.setdefault(split, []).append(np.unique(np.array(numbers)))
        return any(
            len(np.unique(np.concatenate(each))) < sum(map(len, each)) for each in hashes.values()
        )

    def _label_folders(self) -> tuple[bytes, ...]:
        """Returns the root, and the folders of archives below it."""
        root = self._archives.root
        folders = {archive.path.rpartition(b"/")[0] for archive in self._archives.files}
        return (root, *(join(root, folder) for folder in sorted(folders - {b""})))


class _TarTree(ArchiveTree):
    """A `Tree` over what was listed in tars.

    Args:
        root: Absolute path of the tar; of several, what names them.
        images: The paths of the images.
        texts: Lists of labels and splits, by path; None for one that was too large.
    """

    def __init__(
        self, root: bytes, images: Iterable[bytes], texts: Mapping[bytes, bytes | None]
    ) -> None:
        super().__init__(root, sorted({*images, *texts}))
        self._texts = texts

    def is_image(self, path: bytes, tally: Tally) -> bool:
        return path not in self._texts

    def is_file(self, path: bytes) -> bool:
        return self._below(path) in self._texts

    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        return self._texts[self._below(path)]


class _ClassFolders:
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
        listing: _Listing,
        *,
        labelled: bool,
        archives_are_classes: bool = False,
    ) -> None:
        self._archives_are_classes = archives_are_classes
        images = (self._path(a, name) for a, found in listing for name, *_ in found.images)
        texts = {name: text for _, found in listing for name, text in found.texts.items()}
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

    def find(self, archive: Archive, name: bytes) -> tuple[str | None, str, bytes] | None:
        """Returns split, class and key of an image; None where it is in no class folder."""
        path = self._path(archive, name)
        found, end = self._of_files.get(path), len(path)
        while found is None and end > 0:
            end = max(0, path.rfind(b"/", 0, end))
            found = self._of_folders.get(path[:end])
        if found is None:
            return None
        part, label = found
        return part.split or archive.split, label, path[len(part.path) :].lstrip(b"/")

    def _path(self, archive: Archive, name: bytes) -> bytes:
        return join(_class_of(archive), name) if self._archives_are_classes else name


def _class_of(archive: Archive) -> bytes:
    """Returns the class that an archive stands for, if it is one."""
    return stem(archive.path).rpartition(b"/")[2]


def _refuse_shards(folders: Iterable[bytes], *, alone: bool) -> None:
    """Refuses tars that are called like the parts of one data set, and not like classes.

    `folders` is what the tars stand for. Those that are `alone` in one tar are known to be classes.
    """
    names: Sequence[bytes] = sorted({folder.rpartition(b"/")[2] for folder in folders})
    numbered = len(names) > 1 and len({re.sub(rb"\d+", b"0", name) for name in names}) == 1
    synsets = all(_WNID.fullmatch(name) for name in names)
    if all(map(_SHARD.fullmatch, names)) or (numbered and not alone and not synsets):
        raise SourceError(f"its tars ({listed(names)}) are called like parts, not like classes")
