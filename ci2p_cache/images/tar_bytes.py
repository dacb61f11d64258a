"""The bytes of a tar file, packed or not, and its members: never trusted.

A plain tar is read by position. A packed one (gzip, zstandard) can only be read in sequence: a
`Window` keeps the last bytes that were unpacked, goes forward for what is ahead and begins again
for what is behind. No file stays open between two calls.

Layout: POSIX.1-2017, pax, "ustar interchange format" and "pax header block"; GNU tar manual,
"Basic Tar Format", for long names and numbers in base 256. Nothing is ever extracted: names become
keys, and sizes are checked before they are believed.
"""

from __future__ import annotations

import gzip
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

import zstandard

from ci2p_cache.errors import SourceError
from ci2p_cache.images.names import for_display
from ci2p_cache.images.reading import changed, identity, opened, pread

__all__ = ["BLOCK_BYTES", "Member", "TarStream", "Window", "is_packed", "members", "open_stream",
           "read_at", "require_header"]  # fmt: skip

_GZIP_SUFFIXES = (b".gz", b".tgz")
_ZSTD_SUFFIXES = (b".zst", b".zstd", b".tzst")

_UNPACKED_BYTES = 2**20
"""Unpacked at a time."""
_WINDOW_BYTES = 32 * 2**20
"""Stays behind the position that is read: images that several threads ask for out of order."""

_FREE_BYTES, _MAX_RATIO = 2**29, 200
"""A packed tar may unpack to 512 MiB and 200 times its size. Compressed images hardly shrink; a
bitmap of one colour shrinks a thousandfold, but not a whole data set."""

_MAX_ZSTD_WINDOW_BYTES = 2**27
"""Memory that one stream may ask for: what `zstd --long` uses unless asked otherwise."""

BLOCK_BYTES = 512
_MAX_NAME_BYTES = 4096
_MAX_EXTRA_BYTES = 2**20
"""Largest extended header: at most all extended attributes of a file."""
_MAX_EXTRAS = 8
"""Extended headers before one member; two are usual."""
_MAX_PADDING_BYTES = 2**20
"""Zeros after the end marker: tar fills a record, 10 KiB unless asked otherwise."""

_REGULAR = b"\x0007"
_FOLDER = b"5"
_OTHERS = b"12346"
"""Links, devices, pipes: never made; only hard links to members of the tar are followed."""
_HARD_LINK = b"1"
_LONG = {b"L": b"path", b"K": b"linkpath"}
"""Kinds of GNU's headers whose content is a long name, and the pax fields that they stand for."""


class TarStream(Protocol):
    """Bytes in sequence."""

    position: int
    """Position of the next byte, from the start of the (unpacked) tar."""

    def read(self, count: int) -> bytes:
        """Returns the next `count` bytes; fewer only where the archive ends.

        Raises:
            SourceError: the archive is damaged, or unpacks to far more than it has.
            OSError: it cannot be read.
        """

    def skip(self, count: int) -> None:
        """Passes over `count` bytes, or to the end; errors as `read` has them."""


def is_packed(path: bytes) -> bool:
    """Whether the name is one of a packed tar."""
    return path.lower().endswith(_GZIP_SUFFIXES + _ZSTD_SUFFIXES)


def open_stream(path: bytes) -> TarStream:
    """Opens an archive by the kind its name announces; errors as `TarStream.read` has them."""
    return _Unpacked(path) if is_packed(path) else _Plain(path)


def read_at(path: bytes, start: int, stop: int) -> bytes:
    """Returns a range of a plain tar, fewer bytes where it ends before; errors as `open_stream`."""
    return _Plain(path).read_at(start, stop)


class _Plain:
    """A `TarStream` over a regular file, which must not change.

    It is opened again for each read. Skipped parts are not read.
    """

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._identity = identity(path)
        self.size = self._identity[2]
        self._ahead = b""
        self._start = 0
        self.position = 0

    def read_at(self, start: int, stop: int) -> bytes:
        if min(stop, self.size) <= start:
            return b""
        with opened(self._path) as descriptor:
            if identity(self._path, os.fstat(descriptor)) != self._identity:
                raise changed(self._path)
            return pread(descriptor, min(stop, self.size) - start, start)

    def read(self, count: int) -> bytes:
        offset = self.position - self._start
        if not 0 <= offset <= len(self._ahead) - count:
            # Headers of small members are close to each other.
            self._start, offset = self.position, 0
            self._ahead = self.read_at(self._start, self._start + max(count, 2**14))
        data = self._ahead[offset : offset + count]
        self.position += len(data)
        return data

    def skip(self, count: int) -> None:
        self.position = min(self.position + count, self.size)


class _Unpacked:
    """A `TarStream` that unpacks; bounded, whatever the archive says."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._file = file = _Plain(path)
        self._max_bytes = _FREE_BYTES + _MAX_RATIO * file.size
        self.position = 0
        if path.lower().endswith(_GZIP_SUFFIXES):
            self._read = gzip.GzipFile(fileobj=file, mode="rb").read  # type: ignore[call-overload]
        else:
            unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
            reader = unpacker.stream_reader(file, read_across_frames=True, closefd=False)  # type: ignore[arg-type]
            self._read = reader.read

    def read(self, count: int) -> bytes:
        shown = for_display(self._path)
        parts = []
        try:
            while count > 0 and (part := self._read(min(count, _UNPACKED_BYTES))):
                parts.append(part)
                self.position += len(part)
                count -= len(part)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise SourceError(
                f"{shown} is damaged after {self.position} unpacked bytes: {error}",
                hint="get the archive again, or leave it out",
            ) from error
        if self.position > self._max_bytes:
            raise SourceError(
                f"{shown} unpacks from {self._file.size} to more than {self._max_bytes} bytes; "
                "at that ratio it is taken for an attack",
                hint="unpack it yourself if you trust it, and name the plain .tar",
            )
        return b"".join(parts)

    def skip(self, count: int) -> None:
        while count > 0 and (data := self.read(min(count, _UNPACKED_BYTES))):
            count -= len(data)


class Window:
    """Reads a packed tar by position, best from front to back; from any number of threads."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stream: TarStream | None = None
        self._blocks: deque[tuple[int, bytes]] = deque()

    def read(self, start: int, stop: int) -> bytes:
        """Returns a range of the unpacked tar, as `TarStream.read` returns bytes."""
        with self._lock:
            try:
                return self._range(start, stop)
            except BaseException:
                # The blocks may have a gap; the next call begins again.
                self._stream = None
                raise

    def _range(self, start: int, stop: int) -> bytes:
        if self._stream is None or (start < (self._blocks[0][0] if self._blocks else 0)):
            self._stream = open_stream(self._path)
            self._blocks.clear()
        while self._stream.position < stop:
            first = self._stream.position
            data = self._stream.read(_UNPACKED_BYTES)
            if not data:
                break
            self._blocks.append((first, data))
            # Blocks in front of the range and out of the window are dropped.
            while (
                self._blocks[0][0] + len(self._blocks[0][1]) <= start
                and self._stream.position - self._blocks[0][0] > _WINDOW_BYTES
            ):
                self._blocks.popleft()
        return b"".join(
            data[max(start - first, 0) : stop - first]
            for first, data in self._blocks
            if first < stop and first + len(data) > start
        )


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar, or something else, which is skipped."""

    name: bytes
    """Its path: relative, with "/" between its parts, none of them empty, "." or ".."."""
    offset: int
    """Where its content starts in the (unpacked) tar; the header is the block before."""
    size: int
    """Bytes of its content."""
    is_file: bool = True
    """False for links, devices and pipes."""
    link: bytes = b""
    """Target of a hard link, a path in the tar in the form of `name`; else empty."""


def members(stream: TarStream, archive: bytes) -> Iterator[Member]:
    """Yields the members but not the folders, in order.

    When one is yielded the stream stands at its content; how far it was read does not matter.
    `archive` is its name, for messages.

    Raises:
        SourceError: it is damaged, ends before its end marker, holds something behind that, or has
            a member that leads out or that is stored in parts.
        OSError: it cannot be read.
    """
    reader = _Reader(stream, archive)
    while (member := reader.next()) is not None:
        if member.name:
            yield member
        reader.pass_content(member)
    reader.require_end()


def require_header(header: bytes, size: int) -> bool:
    """Whether a block is the header of a regular member of that size."""
    return (
        len(header) == BLOCK_BYTES
        and _has_checksum(header)
        and header[156] in _REGULAR
        and _number(header[124:136]) == size
    )


class _Reader:
    """Parses one header after another; see `members`."""

    def __init__(self, stream: TarStream, archive: bytes) -> None:
        self._stream = stream
        self._archive = for_display(archive)
        self._start = 0

    def next(self) -> Member | None:
        """Returns the next member, with an empty name for folders; None at the end marker."""
        long: dict[bytes, bytes] = {}
        pax: dict[bytes, bytes] = {}
        for _ in range(_MAX_EXTRAS):
            self._start = self._stream.position
            header = self._stream.read(BLOCK_BYTES)
            if header == bytes(BLOCK_BYTES):
                if b"path" in long or pax:
                    self._refuse("ends after an extended header")
                return None
            if len(header) < BLOCK_BYTES:
                self._refuse("ends without an end marker; it was cut short")
            if not _has_checksum(header):
                self._refuse("has a header whose checksum is wrong")
            kind, size = header[156:157], _number(header[124:136])
            if size is None:
                self._refuse("has a header without a size")
            if kind in _LONG:
                long[_LONG[kind]] = _text(self._extra(size))
            elif kind in (b"x", b"g"):
                fields = self._pax_fields(self._extra(size))
                if kind == b"g" and fields.keys() & {b"path", b"size"}:
                    self._refuse("gives one name or size to all members")
                pax |= fields if kind == b"x" else {}
            else:
                return self._member(header, kind, size, long | pax)
        return self._refuse(f"has more than {_MAX_EXTRAS} extended headers in a row")

    def pass_content(self, member: Member) -> None:
        """Passes to the header behind a member's content."""
        end = member.offset + _in_blocks(member.size)
        if self._stream.position == end:
            return
        # Short of the last byte: only reading shows whether that is there.
        self._stream.skip(end - 1 - self._stream.position)
        if self._stream.position < end - 1 or not self._stream.read(1):
            self._refuse("ends in the middle of a member; it was cut short")

    def require_end(self) -> None:
        """Refuses what is behind the end marker: other readers would not agree about it."""
        padding = 0
        while data := self._stream.read(2**16):
            padding += len(data)
            if data.strip(b"\0") or padding > _MAX_PADDING_BYTES:
                self._refuse("continues behind its end marker; are several archives put together?")

    def _member(self, header: bytes, kind: bytes, size: int, pax: dict[bytes, bytes]) -> Member:
        name = pax.get(b"path")
        if name is None:
            name = _text(header[:100])
            if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
                name = prefix + b"/" + name
        said = pax.get(b"size")
        if any(key.startswith(b"GNU.sparse.") for key in pax) or kind == b"S":
            self._refuse(f"stores {for_display(name)} as a sparse file")
        if said is not None and said != b"%d" % size:
            self._refuse(f"has two sizes for {for_display(name)}: {said[:20]!r} and {size}")
        offset = self._stream.position
        if kind == _FOLDER or (kind in (b"\0", b"0") and name.endswith(b"/")):
            return Member(b"", offset, size, is_file=False)
        if kind not in _REGULAR and kind not in _OTHERS:
            self._refuse(f"has a member of the unknown kind {kind!r}")
        clean, link = _clean(name), None
        if clean is None:
            self._refuse(f"has a member {for_display(name[:200])}, which leads out of it")
        if len(name) > _MAX_NAME_BYTES:
            self._refuse(f"has a name of {len(name)} bytes; at most {_MAX_NAME_BYTES}")
        if kind == _HARD_LINK:
            link = _clean(pax.get(b"linkpath", _text(header[157:257])))
        if kind in _OTHERS:
            # Links carry the size of what they lead to, and no content.
            return Member(clean, offset, 0, is_file=False, link=link or b"")
        return Member(clean, offset, size)

    def _extra(self, size: int) -> bytes:
        """Returns the content of an extended header."""
        if size > _MAX_EXTRA_BYTES:
            self._refuse(f"has an extended header of {size} bytes; at most {_MAX_EXTRA_BYTES}")
        data = self._stream.read(_in_blocks(size))
        if len(data) < _in_blocks(size):
            self._refuse("ends in an extended header; it was cut short")
        return data[:size]

    def _pax_fields(self, data: bytes) -> dict[bytes, bytes]:
        """Parses records of the form "LENGTH KEY=VALUE" and a line feed."""
        fields: dict[bytes, bytes] = {}
        while data:
            digits, space, _ = data[:12].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            record = data[:length]
            key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if not (space and equals and key and len(record) == length and record[-1:] == b"\n"):
                self._refuse("has a damaged extended header")
            fields[key] = value
            data = data[length:]
        return fields

    def _refuse(self, what: str) -> NoReturn:
        raise SourceError(
            f"{self._archive} {what} (at byte {self._start})",
            hint="get or make the archive again, or leave it out",
        )


def _in_blocks(size: int) -> int:
    """Returns the bytes of the whole blocks that so many bytes take."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _clean(name: bytes) -> bytes | None:
    """Returns a path without empty parts and "."; None where it leads out or is none."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if not parts or name.startswith(b"/") or b".." in parts or b"\0" in name:
        return None
    return b"/".join(parts)


def _has_checksum(header: bytes) -> bool:
    """Whether the sum of its bytes is the one it says; old tars summed signed bytes."""
    stored = _number(header[148:156])
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored == total:
        return True
    signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    return stored is not None and stored == signed


def _number(field: bytes) -> int | None:
    """Parses an octal number, or one in base 256; None where it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)
