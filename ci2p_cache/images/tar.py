"""Images in tar files: as WebDataset writes them, or in class folders; plain, gzip or zstandard.

::

    archives --headers, labels--> listing (once) --order--> ImageRef  b"train-000000.tar#1536+8712"
    read: plain tar by position | packed tar through a window that goes forward
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.archive_source import ArchiveSource
from ci2p_cache.images.archives import TAR_SUFFIXES, Archive, read_archive
from ci2p_cache.images.class_folders import ClassFolders, class_of, refuse_shards
from ci2p_cache.images.imagenet import read_titles
from ci2p_cache.images.kept import Kept
from ci2p_cache.images.labels import Classes, LabelTable, order_notices, ordered_classes
from ci2p_cache.images.names import as_key, for_display, hash64, join
from ci2p_cache.images.reading import MAX_FILE_BYTES
from ci2p_cache.images.source import ImageRef, SourceOptions
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tar_images import NO_LABEL_FILE, Listed
from ci2p_cache.images.tar_listing import TarLister, refusal
from ci2p_cache.images.tar_members import BLOCK_BYTES, require_header
from ci2p_cache.images.tar_streams import Window, is_packed, read_at

__all__ = ["TarSource"]

_MAX_WINDOWS = 4
"""Packed archives open for reading at a time; each keeps 32 MiB."""
_NO_LABEL = -1
_PACK = (
    "pack class folders, tar -cf CLASSES.tar -C FOLDER . with FOLDER/CLASS/image.jpg; or unpack "
    "the images and encode a list of them, a .csv with path and label"
)


class TarSource(ArchiveSource):
    """An `ImageSource` over tar files.

    The archives are gone through once, when `scan` or `classes` is first asked for: headers and
    labels of a plain tar, all of a packed one. Rows follow archive and position, so encoding reads
    each archive in sequence, once per split that is drawn from it. In random order a plain tar is
    as good as a folder; a packed one begins again for each image that is behind.

    A label is the text of `.cls`, or `label`, `cls` or `class_name` of `.json`; see `LabelTable`.
    Where no archive has any such file, the layout is found out as that of a folder is, over all
    archives; a tar of class tars, or a folder of them, is read in the same way (ImageNet comes so).

    Keys are the names of the image members, so that a folder and a tar of it have the same. Where
    an archive of a split has a name that another one has too, they are ARCHIVE/NAME.

    Args:
        location: A tar, a folder that holds only tars, a wildcard or a brace pattern; see
            `find_archives`, also for splits.
        options: The extension of the images, and where labels are.

    Raises:
        SourceError: nothing is there, a named archive is missing, or the splits are unclear.
        ResourceError: the file system failed again and again.
    """

    suffixes = TAR_SUFFIXES
    place = re.compile(rb"(.+)#(\d{1,18})\+(\d{1,18})", re.DOTALL)
    words = ("image of an archive", "tar", "archives")

    def __init__(
        self, location: str | os.PathLike[str], options: SourceOptions | None = None
    ) -> None:
        super().__init__(location)
        self._options = options or SourceOptions()
        self._listing: list[tuple[Archive, Listed]] | None = None
        self._labels: list[int] = []
        self._folders: ClassFolders | None = None
        self._names_recur = False
        self._windows: Kept[Window] = Kept(_MAX_WINDOWS)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: archives by split and name, images as they are in them.

        Raises:
            SourceError: an archive is damaged or hostile, a sample has no label or two images, or
                there is no image at all.
            ResourceError: reading failed again and again.
        """
        place = 0
        for archive, listed in self._list():
            for split, name, label, offset, size in self._placed(archive, listed):
                path = b"%b#%d+%d" % (archive.path, offset, size)
                key = as_key(join(archive.path, name) if self._names_recur else name)
                yield ImageRef(key, split, label, path, order=place)
                place += 1

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        told = "archives have images of the same name, so keys are ARCHIVE/NAME"
        return (*super().notices, *((told,) if self._names_recur else ()))

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image; any number of threads may call it.

        Raises:
            ImageDecodeError: it is larger than 512 MiB.
            SourceError: `path` is none below the source, or the archive is damaged or was changed.
            ResourceError: reading failed again and again, or the archive has gone.
        """
        full, (offset, size) = self._found(path)
        if size > MAX_FILE_BYTES:
            raise ImageDecodeError(f"the file has {size} bytes; at most {MAX_FILE_BYTES} are read")
        start, stop = offset - BLOCK_BYTES, offset + size
        if is_packed(full):
            window = self._windows.get(full, lambda: Window(full))
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

    def _list(self) -> list[tuple[Archive, Listed]]:
        """Goes through all archives; once."""
        if self._listing is None:
            table, listing = LabelTable(), []
            tally = self._tally = Tally()
            for archive in self._archives.files:
                full = join(self._archives.root, archive.path)
                listed = read_archive(TarLister(full, archive, table, self._options).list, full)
                tally.merge(listed.tally)
                listing.append((archive, listed))
            found = [listed for _, listed in listing]
            if self._options.labels == "none":
                self._settle_none(listing)
            elif any(each.has_labels for each in found) or not any(each.problem for each in found):
                self._settle_files(table, listing)
            else:
                self._settle_folders(listing)
            self._listing = listing
            self._names_recur = self._do_names_recur()
        return self._listing

    def _settle_none(self, listing: list[tuple[Archive, Listed]]) -> None:
        """Takes all images without labels; class folders count for their splits alone."""
        if not any(len(listed.images) for _, listed in listing):
            raise SourceError(f"{self.location()} has no image in it")
        self._folders = self._folders_of(listing, archives_are_classes=False)
        self._classes = Classes((), (), self._folders.notices)
        self._check_places(self._folders, listing)

    def _folders_of(
        self, listing: list[tuple[Archive, Listed]], *, archives_are_classes: bool
    ) -> ClassFolders:
        """Finds out how the images in the archives are laid out, as if in one folder."""
        return ClassFolders(
            self._archives.location,
            listing,
            labelled=self._options.labels == "auto",
            archives_are_classes=archives_are_classes,
        )

    def _settle_files(self, table: LabelTable, listing: list[tuple[Archive, Listed]]) -> None:
        """Settles labels that come from files, and what has none."""
        for archive, listed in listing:
            if listed.problem is not None and archive.split != "test":
                raise listed.problem
        count = sum(len(listed.images) - listed.images.labels.count(NO_LABEL_FILE)
                    for _, listed in listing)  # fmt: skip
        for archive, listed in listing:
            for name, _, _, label in listed.images:
                if label == NO_LABEL_FILE:
                    self._tally.add("unlabelled", join(archive.path, name))
        settled = self._settle(table, self._label_folders(), num_images=count, tally=self._tally)
        self._labels = settled.tolist()
        if _NO_LABEL not in self._labels:
            return
        for archive, listed in listing:
            for name, _, _, label in listed.images:
                if label != NO_LABEL_FILE and self._labels[label] == _NO_LABEL:
                    if archive.split != "test":
                        raise refusal(self._archives.root, archive, name, "has the label -1, none")
                    self._tally.add("unlabelled", join(archive.path, name))

    def _settle_folders(self, listing: list[tuple[Archive, Listed]]) -> None:
        """Settles labels that come from the folders in the archives."""
        inner = {n.rpartition(b"/")[0] for _, listed in listing for n, *_ in listed.images}
        classes = [class_of(archive) for archive, _ in listing]
        # A folder of class tars, the outer tar of ImageNet unpacked.
        archives_are_classes = inner == {b""} and len(classes) > 1
        if archives_are_classes:
            inner = set(classes)
        is_nested = any(listed.is_nested for _, listed in listing)
        try:
            if archives_are_classes or is_nested:
                refuse_shards(inner, alone=is_nested)
            folders = self._folders_of(listing, archives_are_classes=archives_are_classes)
        except SourceError as error:
            problem = next(listed.problem for _, listed in listing if listed.problem is not None)
            raise SourceError(
                f"{problem}. Nor does it hold class folders or class tars: {error}",
                hint=error.hint or _PACK,
            ) from error
        self._folders = folders
        self._check_places(folders, listing)
        ordered = ordered_classes(folders.names)
        titles, notices = read_titles(self._label_folders(), ordered)
        kind = "tars" if archives_are_classes or is_nested else "folders in the archive"
        told = f"classes are the {kind}, because no image has a label beside it"
        notices += (*folders.notices, *order_notices(ordered))
        self._classes = Classes(ordered, titles, (told, *notices))

    def _check_places(self, folders: ClassFolders, listing: list[tuple[Archive, Listed]]) -> None:
        """Refuses an archive whose folders do not go with its name; tallies what is in none."""
        for archive, listed in listing:
            outside, is_placed = b"", False
            for name, *_ in listed.images:
                found = folders.place(archive, name)
                if found is None:
                    self._tally.add("outside", join(archive.path, name))
                    outside = name
                    continue
                split, _, key = found
                is_placed, problem = True, None
                if archive.split not in (None, split):
                    problem = f"is of {split}, and the archive's name says {archive.split}"
                if listed.is_nested and key.count(b"/") > 1 and folders.names:
                    problem = "is in a folder of a tar in the tar; its class is not clear"
                if problem is not None:
                    raise refusal(self._archives.root, archive, name, problem)
            if outside and not is_placed and archive.split != "test":
                raise refusal(
                    self._archives.root,
                    archive,
                    outside,
                    "is in no class folder, and nor do the others of this archive",
                    hint="encode the other archives alone, or pack its images in class folders",
                )

    def _placed(
        self, archive: Archive, listed: Listed
    ) -> Iterator[tuple[str | None, bytes, int, int, int]]:
        """Yields split, name, label, offset and size of the images that have a label.

        Of all images, with the label -1, where labels do not count.
        """
        if self._folders is None:
            for name, offset, size, label in listed.images:
                if label != NO_LABEL_FILE and self._labels[label] != _NO_LABEL:
                    yield archive.split, name, self._labels[label], offset, size
            return
        label_of = {name: label for label, name in enumerate(self._classes.names)}
        for name, offset, size, _ in listed.images:
            found = self._folders.place(archive, name)
            if found is not None:
                yield found[0], found[2], label_of.get(found[1], _NO_LABEL), offset, size

    def _do_names_recur(self) -> bool:
        """Whether an image of one archive has the name of one in another, in the same split.

        64 bits of its hash stand for a name; two that are taken for one would only lengthen keys.
        """
        hashes: dict[str | None, list[npt.NDArray[np.uint64]]] = {}
        for archive, listed in self._listing or ():
            own: dict[str | None, array[int]] = {}
            for split, name, *_ in self._placed(archive, listed):
                own.setdefault(split, array("Q")).append(hash64(name))
            for split, found in own.items():
                hashes.setdefault(split, []).append(np.unique(np.array(found)))
        return any(
            len(np.unique(np.concatenate(found))) < sum(map(len, found))
            for found in hashes.values()
        )

    def _label_folders(self) -> tuple[bytes, ...]:
        """Returns the root, and the folders of archives below it."""
        root = self._archives.root
        folders = {archive.path.rpartition(b"/")[0] for archive in self._archives.files}
        return (root, *(join(root, folder) for folder in sorted(folders - {b""})))
