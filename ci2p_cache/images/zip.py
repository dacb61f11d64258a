"""Images in a zip file, as Kaggle gives them: read in place, never unpacked onto the disk.

::

    zip --list of members--> tree --layout, as of a folder--> ImageRef
        b"cats/1.jpg#4096+8712+9001+305419896": member, offset, packed and unpacked bytes, CRC-32

The members are listed by the standard library and never trusted. Layout: PKWARE's APPNOTE.TXT,
4.3.7 (local headers) and 4.4 (fields). Names become keys, and what a member unpacks to is bounded
before it is unpacked.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH100, PTH113

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from array import array
from bisect import bisect_left
from functools import cached_property

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.folder import TreeSource
from ci2p_cache.images.names import Tally, for_display
from ci2p_cache.images.reading import (
    MAX_FILE_BYTES,
    identity,
    opened,
    pread,
    read_archive,
    too_large,
)
from ci2p_cache.images.tree import SNIFF_BYTES, ArchiveTree, has_image_suffix, is_image_content

__all__ = ["ZIP_SUFFIXES", "ZipSource"]

ZIP_SUFFIXES = (b".zip",)

_Extent = tuple[int, int, int, int]
"""Offset of a member's local header, its bytes packed and unpacked, and its CRC-32."""

_FORM = re.compile(rb"(.+)#(\d{1,18})\+(\d{1,18})\+(\d{1,18})\+(\d{1,10})", re.DOTALL)
_MAX_DIRECTORY_BYTES = 2**28
"""Largest list of members; two million names take some 250 MB."""
_MAX_NAME_BYTES, _MAX_DEPTH = 4096, 128
_FREE_BYTES, _MAX_RATIO = 2**29, 200
"""As for packed tars: members may unpack to 512 MiB and 200 times the archive together."""
_DRIVE = re.compile(rb"[A-Za-z]:/")

_LOCAL = struct.Struct("<4s2xHH8xLLHH")
"""A local header, 30 bytes: signature, flags, method, sizes, lengths of name and extra field."""
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_HEAD_BYTES = 4096
"""Packed bytes that are enough to see the first bytes of a file."""

_METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "zstandard", 99: "AES encryption"}
_DAMAGE = (
    zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ValueError,
    OverflowError, EOFError, MemoryError,
)  # fmt: skip


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
        if not os.path.isfile(self._location):
            raise SourceError(f"{for_display(self._location)} does not exist, or is no file")

    @cached_property
    def _tree(self) -> _ZipTree:
        full = self._location
        return _ZipTree(full, read_archive(lambda: _list_members(full), full))

    @property
    def notices(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        return (*super().notices, *self._tree.members.tally.notices())

    def _path_in_plan(self, path: bytes) -> bytes:
        extent = self._tree.members.extent(path)
        assert extent is not None, "it was listed"
        return path + b"#%d+%d+%d+%d" % extent

    def read(self, path: bytes) -> bytes:
        """See `ImageReader`."""
        name, extent = self._parsed(path)
        full = self._location
        return read_archive(lambda: _read_member(full, name, extent), full)

    def file_of(self, path: bytes) -> tuple[bytes, bool]:
        """See `ImageSource`."""
        self._parsed(path)
        return self._location, False

    def _parsed(self, path: bytes) -> tuple[bytes, _Extent]:
        match = _FORM.fullmatch(path)
        if match is None:
            raise SourceError(f"{for_display(path)} is no image below {self.location()}")
        name, offset, packed, size, crc = match.groups()
        return name, (int(offset), int(packed), int(size), int(crc))


class _Members:
    """The regular files of a zip, sorted by the bytes of their names; 32 bytes and a name each."""

    def __init__(self) -> None:
        self.names: list[bytes] = []
        """Paths: relative, parts joined by "/", none empty, "." or ".."; folders end in "/"."""
        self._extents = array("Q")
        self.tally = Tally()
        """Members that are not regular files."""

    def add(self, name: bytes, extent: _Extent) -> None:
        self.names.append(name)
        self._extents.extend(extent)

    def extent(self, name: bytes) -> _Extent | None:
        """Returns where a file is; None where there is none of that name."""
        at = bisect_left(self.names, name)
        if at == len(self.names) or self.names[at] != name:
            return None
        offset, packed, size, crc = self._extents[4 * at : 4 * at + 4]
        return offset, packed, size, crc


class _ZipTree(ArchiveTree):
    """A `Tree` over the members of a zip."""

    def __init__(self, root: bytes, members: _Members) -> None:
        super().__init__(root, members.names)
        self.members = members

    def is_image(self, path: bytes, tally: Tally) -> bool:
        if has_image_suffix(path):
            return True
        try:
            return is_image_content(path, self._read(path, head=SNIFF_BYTES), tally)
        except ImageDecodeError:
            tally.add("unreadable", path)
            return False

    def is_file(self, path: bytes) -> bool:
        return self.members.extent(self._below(path)) is not None

    def content(self, path: bytes, most_bytes: int) -> bytes | None:
        extent = self.members.extent(self._below(path))
        if extent is not None and extent[2] > most_bytes:
            return None
        return self._read(self._below(path))

    def _read(self, path: bytes, *, head: int = 0) -> bytes:
        extent = self.members.extent(path)
        if extent is None:
            raise FileNotFoundError(f"{for_display(self.root)} has no {for_display(path)}")
        return read_archive(lambda: _read_member(self.root, path, extent, head=head), self.root)


class _Bounded(io.FileIO):
    """A file that gives no more than the longest possible list of members at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise SourceError(
                f"it has a list of members of {size} bytes; at most {_MAX_DIRECTORY_BYTES}"
            )
        return super().read(-1 if size is None else size) or b""


def _list_members(full: bytes) -> _Members:
    """Lists a zip; one that is damaged, encrypted, hostile or not clear is refused."""
    num_bytes = identity(full)[2]
    try:
        with _Bounded(os.fsdecode(full)) as file, zipfile.ZipFile(file) as archive:
            return _checked(full, archive.infolist(), num_bytes)
    except SourceError as error:
        raise SourceError(
            f"{for_display(full)}: {error}",
            hint=error.hint or "unpack it yourself if you trust it, and name the folder",
        ) from error
    except _DAMAGE as error:
        raise SourceError(
            f"{for_display(full)} is no zip, or is damaged or cut short: "
            f"{for_display(str(error).encode('utf-8', 'replace'))[:300]}",
            hint="get or make the archive again; parts of a split zip (.z01) have to be joined",
        ) from error


def _checked(full: bytes, infos: list[zipfile.ZipInfo], archive_bytes: int) -> _Members:
    members = _Members()
    rows = sorted(((_name(info), info) for info in infos), key=lambda row: row[0])
    unpacked, packed, last = 0, 0, b""
    for name, info in rows:
        if name == last and not name.endswith(b"/"):
            raise SourceError(
                f"it has {for_display(name)} twice; readers do not agree which of them counts",
                hint="make the archive again, each name once",
            )
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            # A link's content is where it leads to.
            members.tally.add("member", full + b"/" + name)
            continue
        if info.header_offset >= archive_bytes:
            raise SourceError(f"{for_display(name)} would be behind its end; is it cut short?")
        if not name.endswith(b"/"):
            unpacked, packed = unpacked + info.file_size, packed + info.compress_size
            _require_readable(name, info)
        if name != last:
            sizes = (info.compress_size, info.file_size)
            members.add(name, (info.header_offset, *sizes, info.CRC))
        last = name
    if packed > archive_bytes:
        raise SourceError(
            f"its members have {packed} packed bytes, more than the {archive_bytes} of the whole "
            "archive; they overlap, which is taken for an attack"
        )
    if unpacked > _FREE_BYTES + _MAX_RATIO * archive_bytes:
        raise SourceError(
            f"it unpacks from {archive_bytes} to {unpacked} bytes; at that ratio it is taken for "
            "an attack"
        )
    return members


def _name(info: zipfile.ZipInfo) -> bytes:
    """Returns the name as it is in the archive, in one form; a folder's ends in "/"."""
    # The standard library decodes names as CP437 where they are not marked as UTF-8, also those of
    # macOS, which are UTF-8 without a mark. As bytes both are what they were.
    raw = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    return _in_one_form(raw, is_dos=info.create_system == 0)


def _in_one_form(raw: bytes, *, is_dos: bool) -> bytes:
    name = raw.replace(b"\\", b"/") if is_dos else raw
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if not parts or name.startswith(b"/") or b".." in parts or b"\0" in name or _DRIVE.match(name):
        raise SourceError(f"it has a member {for_display(raw[:200])!r}, which leads out of it")
    if len(name) > _MAX_NAME_BYTES or len(parts) > _MAX_DEPTH:
        raise SourceError(
            f"it has a name of {len(name)} bytes with {len(parts)} parts; at most "
            f"{_MAX_NAME_BYTES} and {_MAX_DEPTH}"
        )
    return b"/".join(parts) + (b"/" if name.endswith(b"/") else b"")


def _require_readable(name: bytes, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & _ENCRYPTED or info.compress_type == 99:
        raise SourceError(
            f"{for_display(name)} is encrypted, which is not read",
            hint="unpack it with its password, and name the folder",
        )
    if info.compress_type not in (_STORED, _DEFLATED):
        method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        raise SourceError(
            f"{for_display(name)} is packed by {method}; deflate and stored are read",
            hint="unpack it, and name the folder; or pack it again with `zip -r`",
        )


def _read_member(full: bytes, name: bytes, extent: _Extent, *, head: int = 0) -> bytes:
    """Returns the content of one member; the list of members is not needed.

    More than `extent` says is never unpacked. With `head`, only so many of its first bytes are
    returned, unchecked.
    """
    offset, packed, size, crc = extent
    if max(packed, size) > MAX_FILE_BYTES:
        raise too_large(size)
    with opened(full) as descriptor:
        method, start = _content_of(full, descriptor, name, offset)
        data = pread(descriptor, min(packed, _HEAD_BYTES) if head else packed, start)
    if head:
        return data[:head] if method == _STORED else _unpacked(data, head)[0]
    # One byte more shows content that is longer than it says.
    content, is_whole = (data, True) if method == _STORED else _unpacked(data, size + 1)
    if not is_whole or len(content) != size or zlib.crc32(content) != crc:
        raise ImageDecodeError("its content in the archive is damaged (CRC-32 or size)")
    return content


def _unpacked(data: bytes, most: int) -> tuple[bytes, bool]:
    """Returns at most so many unpacked bytes, and whether the content ends there."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return unpacker.decompress(data, most), unpacker.eof
    except zlib.error:
        return b"", False


def _content_of(full: bytes, descriptor: int, name: bytes, offset: int) -> tuple[int, int]:
    """Returns the method of the member at `offset`, and where its content starts."""
    header = pread(descriptor, _LOCAL.size, offset)
    if len(header) == _LOCAL.size:
        signature, flags, method, _, _, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start = offset + _LOCAL.size
        if signature == b"PK\3\4" and method in (_STORED, _DEFLATED) and not flags & _ENCRYPTED:
            found = pread(descriptor, name_bytes, start)
            for is_dos in (False, True):
                try:
                    if _in_one_form(found, is_dos=is_dos) == name:
                        return method, start + name_bytes + extra_bytes
                except SourceError:
                    break
    raise SourceError(
        f"{for_display(full)} has no member {for_display(name[:200])} at byte {offset}; it was "
        "changed since the plan was made, or its list of members is wrong",
        hint="put the archive back, or encode into a new folder",
    )
