"""Images in tar files as WebDataset writes them: `train-000000.tar`, plain, gzip or zstandard.

A sample is a run of members whose paths are the same up to the first dot of the file name
(webdataset.github.io, "The WebDataset Format"): one image, and a `.cls` or `.json` with its label.

::

    archives --headers, labels--> listing (once) --order--> ImageRef  b"train-000000.tar#1536+8712"
    read: plain tar by position | packed tar through a window that goes forward
"""

from __future__ import annotations

import json
import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.archives import TAR_SUFFIXES, Archive, find_archives, read_archive
from ci2p_cache.images.labels import Classes, LabelTable
from ci2p_cache.images.listing import (
    IMAGE_SUFFIXES,
    MAX_FILE_BYTES,
    SNIFF_BYTES,
    Tally,
    as_key,
    for_display,
    is_image_content,
    join,
)
from ci2p_cache.images.source import ImageRef
from ci2p_cache.images.tar_members import BLOCK_BYTES, Member, members, require_header
from ci2p_cache.images.tar_streams import TarStream, Window, is_packed, open_stream, read_at

__all__ = ["TarSource"]

_MAX_LABEL_BYTES = {b"cls": 4096, b"json": 2**24}
_LABEL_FIELDS = ("label", "cls", "class_name")
_MAX_SAMPLE_MEMBERS = 1024
_MAX_WINDOWS = 4
"""Packed archives open for reading at a time; each keeps 32 MiB."""
_PATH = re.compile(rb"(.+)#(\d{1,18})\+(\d{1,18})", re.DOTALL)
_NO_LABEL = -1


@dataclass(slots=True)
class _Sample:
    """Members that belong together, while they are met."""

    base: bytes
    images: list[Member] = field(default_factory=list)
    labels: dict[bytes, bytes] = field(default_factory=dict)
    """Content of the label files, by extension."""
    count: int = 0


class _Listed:
    """The images of one archive, in some 20 bytes and their name each."""

    def __init__(self) -> None:
        self.names = bytearray()
        self.ends = array("q")
        self.offsets = array("q")
        self.sizes = array("q")
        self.labels = array("i")

    def add(self, image: Member, label: int) -> None:
        self.names += image.name
        self.ends.append(len(self.names))
        self.offsets.append(image.offset)
        self.sizes.append(image.size)
        self.labels.append(label)

    def __iter__(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields name, offset, size and label."""
        start = 0
        columns = zip(self.ends, self.offsets, self.sizes, self.labels, strict=True)
        for end, offset, size, label in columns:
            yield bytes(self.names[start:end]), offset, size, label
            start = end


class TarSource:
    """An `ImageSource` over tar files.

    The archives are gone through once, when `scan` or `classes` is first asked for: headers and
    labels of a plain tar, all of a packed one. Rows follow archive and position, so encoding reads
    each archive in sequence, once per split that is drawn from it. In random order a plain tar is
    as good as a folder; a packed one begins again for each image that lies behind.

    Keys are the names of the image members, so that a folder and a tar of it have the same. A label
    is the text of `.cls`, or `label`, `cls` or `class_name` of `.json`; see `LabelTable`.

    Args:
        location: A tar, a folder that holds only tars, a wildcard or a brace pattern; see
            `find_archives`, also for splits.

    Raises:
        SourceError: nothing is there, a named archive is missing, or the splits are unclear.
        ResourceError: the file system failed again and again.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self._archives = find_archives(os.fsencode(location), TAR_SUFFIXES)
        self._tally = Tally()
        self._listing: list[tuple[Archive, _Listed]] | None = None
        self._classes = Classes((), ())
        self._labels: list[int] = []
        self._windows: OrderedDict[bytes, Window] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names: sorted where labels are names, by number where they are numbers."""
        self._list()
        return self._classes.names

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people from `classes.json` or `classes.txt` beside the archives."""
        self._list()
        return self._classes.titles

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        return (*self._archives.notices, *self._classes.notices, *self._tally.notices())

    def location(self) -> str:
        """Returns the absolute path or pattern; bytes that are not UTF-8 are surrogates."""
        return os.fsdecode(self._archives.location)

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
                yield ImageRef(as_key(name), archive.split, self._labels[label], path, order=place)
                place += 1

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image; any number of threads may call it.

        Raises:
            ImageDecodeError: it is larger than 512 MiB.
            SourceError: `path` is none below the source, or the archive is damaged or was changed.
            ResourceError: reading failed again and again, or the archive has gone.
        """
        match = _PATH.fullmatch(path)
        shown = for_display(path)
        if match is None or path.startswith(b"/") or b".." in path.split(b"/") or b"\0" in path:
            raise SourceError(f"{shown} is no image of an archive below {self.location()}")
        archive, offset, size = match[1], int(match[2]), int(match[3])
        if not archive.lower().endswith(TAR_SUFFIXES):
            raise SourceError(f"{shown} names no tar below {self.location()}")
        if size > MAX_FILE_BYTES:
            raise ImageDecodeError(f"the file has {size} bytes; at most {MAX_FILE_BYTES} are read")
        full = join(self._archives.root, archive)
        start, stop = offset - BLOCK_BYTES, offset + size
        if is_packed(archive):
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

    def _window(self, full: bytes) -> Window:
        with self._lock:
            window = self._windows.pop(full, None) or Window(full)
            self._windows[full] = window
            if len(self._windows) > _MAX_WINDOWS:
                self._windows.popitem(last=False)
            return window

    def _list(self) -> list[tuple[Archive, _Listed]]:
        """Goes through all archives; once."""
        if self._listing is None:
            table, listing = LabelTable(), []
            tally = self._tally = Tally()
            for archive in self._archives.files:
                full = join(self._archives.root, archive.path)
                lister = _Lister(full, archive, table)
                listed, found = read_archive(lister.list, full)
                tally.merge(found)
                listing.append((archive, listed))
            shown = self.location()
            if not any(len(listed.sizes) for _, listed in listing):
                raise SourceError(
                    f"{shown} has {len(listing)} archives and no labelled image in them; "
                    f"{'; '.join(self._tally.notices()) or 'they are empty'}"
                )
            try:
                self._classes, labels = table.settle(self._label_folders())
            except SourceError as error:
                raise SourceError(f"{shown}: {error}", hint=error.hint) from error
            self._labels = labels.tolist()
            self._listing = self._with_labels(listing)
        return self._listing

    def _label_folders(self) -> tuple[bytes, ...]:
        """Returns the root, and the folders of archives below it."""
        root = self._archives.root
        folders = {archive.path.rpartition(b"/")[0] for archive in self._archives.files}
        return (root, *(join(root, folder) for folder in sorted(folders - {b""})))

    def _with_labels(self, listing: list[tuple[Archive, _Listed]]) -> list[tuple[Archive, _Listed]]:
        """Leaves out images of the test split whose label is -1; elsewhere they are refused."""
        if _NO_LABEL not in self._labels:
            return listing
        kept = []
        for archive, listed in listing:
            new = _Listed()
            for name, offset, size, label in listed:
                if self._labels[label] != _NO_LABEL:
                    new.add(Member(name, offset, size, is_file=True), label)
                elif archive.split == "test":
                    self._tally.add("unlabelled", join(archive.path, name))
                else:
                    raise _refusal(self._archives.root, archive, name, "has the label -1, none")
            kept.append((archive, new))
        return kept


class _Lister:
    """Goes through one archive.

    Args:
        full: Its absolute path.
        archive: It, for its split.
        labels: Takes each label that is met.
    """

    def __init__(self, full: bytes, archive: Archive, labels: LabelTable) -> None:
        self._full = full
        self._archive = archive
        self._labels = labels
        self._listed = _Listed()
        self._tally = Tally()

    def list(self) -> tuple[_Listed, Tally]:
        """Returns the images, and a tally of what is none.

        Raises:
            SourceError: it is damaged, or a sample is not as it should be.
            OSError: it cannot be read.
        """
        self._listed, self._tally = _Listed(), Tally()
        stream = open_stream(self._full)
        sample: _Sample | None = None
        for member in members(stream, self._full):
            if not member.is_file:
                self._tally.add("member", self._shown(member))
                continue
            if any(p.startswith(b".") or p == b"__MACOSX" for p in member.name.split(b"/")):
                self._tally.add("hidden", self._shown(member))
                continue
            folder, _, name = member.name.rpartition(b"/")
            stem, _, extension = name.partition(b".")
            base = join(folder, stem)
            if sample is None or base != sample.base:
                self._finish(sample)
                sample = _Sample(base)
            self._take(sample, member, extension.lower(), stream)
        self._finish(sample)
        return self._listed, self._tally

    def _take(self, sample: _Sample, member: Member, extension: bytes, stream: TarStream) -> None:
        sample.count += 1
        if sample.count > _MAX_SAMPLE_MEMBERS:
            raise self._error(member.name, f"has more than {_MAX_SAMPLE_MEMBERS} members")
        if extension in _MAX_LABEL_BYTES:
            if extension in sample.labels:
                raise self._error(member.name, f"has two .{extension.decode()}")
            if member.size > _MAX_LABEL_BYTES[extension]:
                raise self._error(member.name, f"has a label file of {member.size} bytes")
            sample.labels[extension] = stream.read(member.size)
        elif b"." + extension.rpartition(b".")[2] in IMAGE_SUFFIXES or is_image_content(
            self._shown(member), stream.read(min(member.size, SNIFF_BYTES)), self._tally
        ):
            sample.images.append(member)

    def _finish(self, sample: _Sample | None) -> None:
        """Lists the image of a sample that is complete."""
        if sample is None or not sample.images:
            return
        if len(sample.images) > 1:
            names = " and ".join(for_display(image.name) for image in sample.images[:2])
            raise self._error(sample.base, f"has several images, {names}; wanted one")
        image = sample.images[0]
        label = self._label(sample)
        if label is not None:
            try:
                self._listed.add(image, self._labels.add(label))
            except SourceError as error:
                raise self._error(image.name, f"has {error}") from error
        elif self._archive.split == "test":
            self._tally.add("unlabelled", self._shown(image))
        else:
            raise self._error(image.name, "has no label; wanted a .cls or a .json beside it")

    def _label(self, sample: _Sample) -> str | int | None:
        """Returns what the .cls says, or else the .json, which with a .cls can be anything."""
        if b"cls" in sample.labels:
            return as_key(sample.labels[b"cls"])
        if b"json" not in sample.labels:
            return None
        try:
            found = json.loads(sample.labels[b"json"])
        except (ValueError, RecursionError) as error:
            raise self._error(sample.base + b".json", f"is no JSON: {error}") from error
        for name in _LABEL_FIELDS:
            value = found.get(name) if isinstance(found, dict) else None
            if isinstance(value, str | int) and not isinstance(value, bool):
                return value
        return None

    def _shown(self, member: Member) -> bytes:
        return join(self._archive.path, member.name)

    def _error(self, name: bytes, what: str) -> SourceError:
        root = self._full[: -len(self._archive.path)]
        return _refusal(root, self._archive, name, what)


def _refusal(root: bytes, archive: Archive, name: bytes, what: str) -> SourceError:
    shown = for_display(join(root.rstrip(b"/"), archive.path))
    return SourceError(
        f"{shown}: {for_display(name)} {what}",
        hint="mend the archive, or leave it out of the source",
    )
