"""What lies in one tar: its images with their labels; where tars come from is not known here.

A sample is a run of members whose paths are the same up to the first dot of the file name
(webdataset.github.io, "The WebDataset Format"): one image, and a `.cls` or `.json` with its label.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import Archive
from ci2p_cache.images.kinds import IMAGE_SUFFIXES, SNIFF_BYTES, is_image_content
from ci2p_cache.images.labels import LabelTable
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tar_members import Member, members
from ci2p_cache.images.tar_streams import TarStream, open_stream

__all__ = ["ListedImages", "TarLister", "names_recur", "refusal"]

_MAX_LABEL_BYTES = {b"cls": 4096, b"json": 2**24}

_LABEL_FIELDS = ("label", "cls", "class_name")

_MAX_SAMPLE_MEMBERS = 1024


@dataclass(slots=True)
class _Sample:
    """Members that belong together, while they are met."""

    base: bytes
    images: list[Member] = field(default_factory=list)
    labels: dict[bytes, bytes] = field(default_factory=dict)
    """Content of the label files, by extension."""
    count: int = 0


class ListedImages:
    """The images of one archive, in some 20 bytes and their name each."""

    def __init__(self) -> None:
        self.names = bytearray()
        self.ends = array("q")
        self.offsets = array("q")
        self.sizes = array("q")
        self.labels = array("i")

    def add(self, image: Member, label: int) -> None:
        """Adds one image; `label` is what `LabelTable.add` returned."""
        self.names += image.name
        self.ends.append(len(self.names))
        self.offsets.append(image.offset)
        self.sizes.append(image.size)
        self.labels.append(label)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields name, offset, size and label."""
        start = 0
        columns = zip(self.ends, self.offsets, self.sizes, self.labels, strict=True)
        for end, offset, size, label in columns:
            yield bytes(self.names[start:end]), offset, size, label
            start = end


def names_recur(archives: Iterable[ListedImages]) -> bool:
    """Whether an image of one archive has the name of an image in another.

    A name is told by 64 bits of its hash; two that are taken for one would only lengthen keys.
    """
    found = [
        np.unique(np.array([_hash64(name) for name, *_ in listed], np.uint64))
        for listed in archives
    ]
    return len(np.unique(np.concatenate(found))) < sum(map(len, found)) if found else False


def _hash64(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


class TarLister:
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
        self._listed = ListedImages()
        self._tally = Tally()

    def list(self) -> tuple[ListedImages, Tally]:
        """Returns the images, and a tally of what is none.

        Raises:
            SourceError: it is damaged, or a sample is not as it should be.
            OSError: it cannot be read.
        """
        self._listed, self._tally = ListedImages(), Tally()
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
        return refusal(root, self._archive, name, what)


def refusal(root: bytes, archive: Archive, name: bytes, what: str) -> SourceError:
    """Returns the error of a member that is not as it should be.

    Args:
        root: The source's root.
        archive: Where the member lies.
        name: Its name.
        what: What is wrong with it, as the rest of a sentence.
    """
    shown = for_display(join(root.rstrip(b"/"), archive.path))
    return SourceError(
        f"{shown}: {for_display(name)} {what}",
        hint="mend the archive, or leave it out of the source",
    )
