"""Images in tar files as WebDataset writes them: `train-000000.tar`, plain, gzip or zstandard.

::

    archives --headers, labels--> listing (once) --order--> ImageRef  b"train-000000.tar#1536+8712"
    read: plain tar by position | packed tar through a window that goes forward
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.archive_source import ArchiveSource
from ci2p_cache.images.archives import TAR_SUFFIXES, Archive, read_archive
from ci2p_cache.images.kept import Kept
from ci2p_cache.images.labels import LabelTable
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.reading import MAX_FILE_BYTES
from ci2p_cache.images.source import ImageRef
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tar_listing import ListedImages, TarLister, names_recur, refusal
from ci2p_cache.images.tar_members import BLOCK_BYTES, Member, require_header
from ci2p_cache.images.tar_streams import Window, is_packed, read_at

__all__ = ["TarSource"]

_MAX_WINDOWS = 4
"""Packed archives open for reading at a time; each keeps 32 MiB."""
_NO_LABEL = -1


class TarSource(ArchiveSource):
    """An `ImageSource` over tar files.

    The archives are gone through once, when `scan` or `classes` is first asked for: headers and
    labels of a plain tar, all of a packed one. Rows follow archive and position, so encoding reads
    each archive in sequence, once per split that is drawn from it. In random order a plain tar is
    as good as a folder; a packed one begins again for each image that lies behind.

    Keys are the names of the image members, so that a folder and a tar of it have the same. Where
    an archive of a split has a name that another one has too, they are ARCHIVE/NAME. A label is the
    text of `.cls`, or `label`, `cls` or `class_name` of `.json`; see `LabelTable`.

    Args:
        location: A tar, a folder that holds only tars, a wildcard or a brace pattern; see
            `find_archives`, also for splits.

    Raises:
        SourceError: nothing is there, a named archive is missing, or the splits are unclear.
        ResourceError: the file system failed again and again.
    """

    suffixes = TAR_SUFFIXES
    place = re.compile(rb"(.+)#(\d{1,18})\+(\d{1,18})", re.DOTALL)
    words = ("image of an archive", "tar", "archives")

    def __init__(self, location: str | os.PathLike[str]) -> None:
        super().__init__(location)
        self._listing: list[tuple[Archive, ListedImages]] | None = None
        self._labels: list[int] = []
        self._names_recur = False
        self._windows: Kept[Window] = Kept(_MAX_WINDOWS)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image: archives by split and name, images as they lie in them.

        Raises:
            SourceError: an archive is damaged or hostile, a sample has no label or two images, or
                there is no image at all.
            ResourceError: reading failed again and again.
        """
        place = 0
        for archive, listed in self._list():
            for name, offset, size, label in listed:
                path = b"%b#%d+%d" % (archive.path, offset, size)
                key = as_key(join(archive.path, name) if self._names_recur else name)
                yield ImageRef(key, archive.split, self._labels[label], path, order=place)
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

    def _list(self) -> list[tuple[Archive, ListedImages]]:
        """Goes through all archives; once."""
        if self._listing is None:
            table, listing = LabelTable(), []
            tally = self._tally = Tally()
            for archive in self._archives.files:
                full = join(self._archives.root, archive.path)
                lister = TarLister(full, archive, table)
                listed, found = read_archive(lister.list, full)
                tally.merge(found)
                listing.append((archive, listed))
            labels = self._settle(
                table,
                self._label_folders(),
                num_images=sum(len(listed) for _, listed in listing),
                tally=tally,
            )
            self._labels = labels.tolist()
            self._listing = self._with_labels(listing)
            splits = {archive.split for archive, _ in listing}
            self._names_recur = any(
                names_recur(listed for archive, listed in self._listing if archive.split == split)
                for split in splits
            )
        return self._listing

    def _label_folders(self) -> tuple[bytes, ...]:
        """Returns the root, and the folders of archives below it."""
        root = self._archives.root
        folders = {archive.path.rpartition(b"/")[0] for archive in self._archives.files}
        return (root, *(join(root, folder) for folder in sorted(folders - {b""})))

    def _with_labels(
        self, listing: list[tuple[Archive, ListedImages]]
    ) -> list[tuple[Archive, ListedImages]]:
        """Leaves out images of the test split whose label is -1; elsewhere they are refused."""
        if _NO_LABEL not in self._labels:
            return listing
        kept = []
        for archive, listed in listing:
            new = ListedImages()
            for name, offset, size, label in listed:
                if self._labels[label] != _NO_LABEL:
                    new.add(Member(name, offset, size, is_file=True), label)
                elif archive.split == "test":
                    self._tally.add("unlabelled", join(archive.path, name))
                else:
                    raise refusal(self._archives.root, archive, name, "has the label -1, none")
            kept.append((archive, new))
        return kept
