"""The members of a zip file, listed by the standard library and trusted in nothing.

Layout: PKWARE's APPNOTE.TXT, 4.3.7 (local headers) and 4.4 (fields). Nothing is ever extracted:
names become keys, and what a member unpacks to is bounded before it is unpacked.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH116

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

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.names import for_display
from ci2p_cache.images.reading import MAX_FILE_BYTES
from ci2p_cache.images.tally import Tally

__all__ = ["ZipMembers", "list_members", "read_member"]

_MAX_DIRECTORY_BYTES = 2**28
"""Of the list of members; that of ImageNet, two million names, has some 250 MB."""
_MAX_NAME_BYTES, _MAX_DEPTH = 4096, 128
_FREE_BYTES, _MAX_RATIO = 2**29, 200
"""As for packed tars: members may unpack to 512 MiB and 200 times the archive together."""
_DRIVE = re.compile(rb"[A-Za-z]:/")

_LOCAL = struct.Struct("<4s2xHH8xLLHH")
"""Of a local header, 30 bytes: signature, flags, method, sizes, lengths of name and extra field."""
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_HEAD_BYTES = 4096
"""Packed bytes that are enough to see the first bytes of a file."""

_METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "zstandard", 99: "AES encryption"}
_DAMAGE = (
    zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeDecodeError, ValueError,
    OverflowError, EOFError, MemoryError,
)  # fmt: skip


class ZipMembers:
    """The regular files of a zip, sorted by the bytes of their names; 24 bytes and a name each."""

    def __init__(self) -> None:
        self.names: list[bytes] = []
        """Paths: relative, parts joined by "/", none empty, "." or ".."; folders end in "/"."""
        self.offsets = array("Q")
        """Of the local headers."""
        self.packed = array("Q")
        self.sizes = array("Q")
        self.crcs = array("I")
        self.tally = Tally()
        """Members that are no regular files."""

    def place(self, name: bytes) -> int | None:
        """Returns the index of a file; None where there is none of that name."""
        found = bisect_left(self.names, name)
        return found if found < len(self.names) and self.names[found] == name else None


class _Bounded(io.FileIO):
    """A file that gives no more than the longest possible list of members at a time."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise SourceError(
                f"it has a list of members of {size} bytes; at most {_MAX_DIRECTORY_BYTES}"
            )
        return super().read(-1 if size is None else size) or b""


def list_members(full: bytes) -> ZipMembers:
    """Lists a zip.

    Args:
        full: Its absolute path.

    Raises:
        SourceError: it is damaged, encrypted, packed by a method that is not read, hostile, or not
            clear: a name twice, or one that leads out of it.
        OSError: it cannot be read.
    """
    found = os.stat(full)
    if not stat.S_ISREG(found.st_mode):
        raise SourceError(f"{for_display(full)} is no regular file")
    try:
        with _Bounded(os.fsdecode(full)) as file, zipfile.ZipFile(file) as archive:
            return _checked(full, archive.infolist(), found.st_size)
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


def _checked(full: bytes, infos: list[zipfile.ZipInfo], archive_bytes: int) -> ZipMembers:
    members = ZipMembers()
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
            members.names.append(name)
            members.offsets.append(info.header_offset)
            members.packed.append(info.compress_size)
            members.sizes.append(info.file_size)
            members.crcs.append(info.CRC)
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


def read_member(
    full: bytes, name: bytes, offset: int, packed: int, size: int, crc: int, *, head: int = 0
) -> bytes:
    """Returns the content of one member; the list of members is not needed.

    Args:
        full: Absolute path of the zip.
        name: The member's name, as `ZipMembers` has it.
        offset: Of its local header.
        packed: Its bytes in the archive.
        size: Its bytes unpacked; more are never unpacked.
        crc: Its CRC-32.
        head: How many of its first bytes to return, unchecked; 0 for the whole content.

    Raises:
        ImageDecodeError: its content is damaged, or it is larger than 512 MiB.
        SourceError: no such member is there any more.
        OSError: the zip cannot be read.
    """
    if max(packed, size) > MAX_FILE_BYTES:
        raise ImageDecodeError(f"the file has {size} bytes; at most {MAX_FILE_BYTES} are read")
    # Without O_NONBLOCK a pipe in the file's place would wait for a writer for ever.
    descriptor = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        header = _pread(descriptor, _LOCAL.size, offset)
        method, start = _content_of(full, descriptor, header, name, offset)
        data = _pread(descriptor, min(packed, _HEAD_BYTES) if head else packed, start)
    finally:
        os.close(descriptor)
    if head:
        return data[:head] if method == _STORED else _unpacked(data, head)[0]
    if method == _DEFLATED:
        # One byte more shows content that is longer than it says.
        content, is_whole = _unpacked(data, size + 1)
    else:
        content, is_whole = data, True
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


def _content_of(
    full: bytes, descriptor: int, header: bytes, name: bytes, offset: int
) -> tuple[int, int]:
    """Returns the method of the member at `offset`, and where its content starts."""
    found = b""
    if len(header) == _LOCAL.size:
        signature, flags, method, _, _, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start = offset + _LOCAL.size
        if signature == b"PK\3\4" and method in (_STORED, _DEFLATED) and not flags & _ENCRYPTED:
            found = _pread(descriptor, name_bytes, start)
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


def _pread(descriptor: int, count: int, offset: int) -> bytes:
    parts = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
