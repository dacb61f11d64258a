"""Images in a zip file, as Kaggle gives them: read in place, never unpacked onto the disk.

::

    zip --list of members--> tree --layout, as of a folder--> ImageRef
        b"cats/1.jpg#4096+8712+9001+305419896": member, offset, packed and unpacked bytes, CRC-32
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH113, PTH122

from __future__ import annotations

import os
import re
from functools import cached_property

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.archives import read_archive
from ci2p_cache.images.kinds import IMAGE_SUFFIXES, SNIFF_BYTES, is_image_content
from ci2p_cache.images.names import for_display
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tree import ArchiveTree
from ci2p_cache.images.tree_source import TreeSource
from ci2p_cache.images.zip_members import ZipMembers, list_members, read_member

__all__ = ["ZIP_SUFFIXES", "ZipSource"]

ZIP_SUFFIXES = (b".zip",)

_PLACE = re.compile(rb"(.+)#(\d{1,18})\+(\d{1,18})\+(\d{1,18})\+(\d{1,10})", re.DOTALL)


class _ZipTree(ArchiveTree):
    """A `Tree` over the members of a zip."""

    def __init__(self, root: bytes, members: ZipMembers) -> None:
        super().__init__(root, members.names)
        self.members = members

    def is_image(self, path: bytes, tally: Tally) -> bool:
        """See `Tree`."""
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            return True
        try:
            return is_image_content(path, self._read(path, head=SNIFF_BYTES), tally)
        except ImageDecodeError:
            tally.add("unreadable", path)
            return False

    def is_file(self, path: bytes) -> bool:
        """See `Tree`."""
        return self.members.place(self._below(path)) is not None

    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        """See `Tree`."""
        path = self._below(path)
        at = self.members.place(path)
        if at is not None and self.members.sizes[at] > most_bytes:
            return None
        return self._read(path)

    def _below(self, path: bytes) -> bytes:
        """Takes the archive off an absolute path; one outside of it names nothing here."""
        return path.removeprefix(self.root + b"/")

    def _read(self, path: bytes, *, head: int = 0) -> bytes:
        at, of = self.members.place(path), self.members
        if at is None:
            raise FileNotFoundError(f"{for_display(self.root)} has no {for_display(path)}")
        place = (of.offsets[at], of.packed[at], of.sizes[at], of.crcs[at])
        return read_archive(lambda: read_member(self.root, path, *place, head=head), self.root)


class ZipSource(TreeSource):
    """An `ImageSource` over a zip of class folders, split folders or another layout of a folder.

    The layout is found out as that of a folder is, and keys, labels and rows are those that the
    unpacked folder would give. Only the list of members is read to list it; images are read where
    they are in the archive, in any order, by any number of processes. Links in it are skipped.

    Args:
        location: The zip.
        labelled: As for `FolderSource`.

    Raises:
        SourceError: it does not exist. An archive that is damaged, encrypted or hostile, or has a
            name twice, is refused when classes or images are first asked for.
    """

    def __init__(self, location: str | os.PathLike[str], *, labelled: bool = True) -> None:
        super().__init__(os.path.abspath(os.fsencode(location)), labelled=labelled)
        if not os.path.isfile(self._root):
            raise SourceError(f"{for_display(self._root)} does not exist, or is no file")

    @cached_property
    def _opened(self) -> _ZipTree:
        return _ZipTree(self._root, read_archive(lambda: list_members(self._root), self._root))

    @property
    def _tree(self) -> _ZipTree:
        return self._opened

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one sentence each; complete once `scan` has ended."""
        return (*super().notices, *self._tree.members.tally.notices())

    def _path_in_plan(self, path: bytes) -> bytes:
        of, at = self._tree.members, self._tree.members.place(path)
        assert at is not None, "it was listed"
        place = (of.offsets[at], of.packed[at], of.sizes[at], of.crcs[at])
        return path + b"#%d+%d+%d+%d" % place

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image; any number of threads may call it.

        Raises:
            ImageDecodeError: its content is damaged, or larger than 512 MiB.
            SourceError: `path` is none of an image in a zip, or the archive was changed.
            ResourceError: reading failed again and again, or the archive has gone.
        """
        match = self._place(path)
        name, offset, packed, size, crc = match[1], *map(int, match.groups()[1:])
        return read_archive(
            lambda: read_member(self._root, name, offset, packed, size, crc), self._root
        )

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """Returns the zip, which holds an image among others."""
        self._place(path)
        return self._root, False

    def _place(self, path: bytes) -> re.Match[bytes]:
        match = _PLACE.fullmatch(path)
        if match is None:
            raise SourceError(f"{for_display(path)} is no image below {self.location()}")
        return match
