"""The images that were found in a tar, kept small: a million of them are listed at a time."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ci2p_cache.errors import SourceError
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tar_members import Member

__all__ = ["NO_LABEL_FILE", "Listed", "ListedImages"]

NO_LABEL_FILE = -1
"""Label of an image that has no file of labels beside it."""


class ListedImages:
    """The images of one archive, in some 20 bytes and their name each."""

    def __init__(self) -> None:
        self.names = bytearray()
        self.ends = array("q")
        self.offsets = array("q")
        self.sizes = array("q")
        self.labels = array("i")

    def add(self, image: Member, label: int) -> None:
        """Adds one image; `label` is what `LabelTable.add` returned, or NO_LABEL_FILE."""
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

    def by_offset(self) -> ListedImages:
        """Returns them in the order of their content, which is how an archive is best read."""
        ordered = ListedImages()
        for at in np.argsort(np.array(self.offsets), kind="stable").tolist():
            name = bytes(self.names[self.ends[at - 1] if at else 0 : self.ends[at]])
            image = Member(name, self.offsets[at], self.sizes[at], is_file=True)
            ordered.add(image, self.labels[at])
        return ordered


@dataclass(slots=True)
class Listed:
    """What was found in one archive."""

    images: ListedImages = field(default_factory=ListedImages)
    tally: Tally = field(default_factory=Tally)
    """What is no image."""
    is_nested: bool = False
    """Whether it holds tars, which were gone through."""
    texts: dict[bytes, bytes | None] = field(default_factory=dict)
    """Lists of a public data set, by name; None for one that was too large to be kept."""
    has_labels: bool = False
    """Whether there are files of labels."""
    problem: SourceError | None = None
    """Why the first image without a label has none; None where all have one."""
