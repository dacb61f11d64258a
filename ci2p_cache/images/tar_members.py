"""The members of a tar file, one header after another, trusted in nothing.

Layout: POSIX.1-2017, pax, "ustar interchange format" and "pax header block"; GNU tar manual,
"Basic Tar Format", for long names and numbers in base 256. Nothing is ever extracted: names become
keys, and sizes are checked before they are believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ci2p_cache.errors import SourceError
from ci2p_cache.images.names import for_display
from ci2p_cache.images.tar_streams import TarStream

__all__ = ["BLOCK_BYTES", "Member", "members", "require_header"]

BLOCK_BYTES = 512
_MAX_NAME_BYTES = 4096
_MAX_EXTRA_BYTES = 2**20
"""Of one extended header: all of a file's extended attributes at most."""
_MAX_EXTRAS = 8
"""Extended headers before one member; two are usual."""
_MAX_PADDING_BYTES = 2**20
"""Zeros after the end marker: tar fills a record, 10 KiB unless told otherwise."""

_REGULAR = b"\x0007"
_FOLDER = b"5"
_OTHERS = b"12346"
"""Links, devices, pipes: never made; only hard links to members of the tar are followed."""
_HARD_LINK = b"1"
_ZEROS = bytes(BLOCK_BYTES)


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar, or something else that is to be skipped."""

    name: bytes
    """Its path: relative, with "/" between its parts, none of them empty, "." or ".."."""
    offset: int
    """Of its content, from the start of the (unpacked) tar; its header is the block before."""
    size: int
    """Bytes of its content."""
    is_file: bool
    """False for links, devices and pipes."""
    link: bytes = b""
    """Of a hard link: the path in the tar that it leads to, in the form of `name`; else empty."""


def members(stream: TarStream, archive: bytes) -> Iterator[Member]:
    """Yields the members but not the folders, in order.

    When one is yielded the stream stands at its content; how far it was read does not matter.

    Args:
        stream: The archive, at its start.
        archive: Its name, for messages.

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
    """Parses headers and keeps its place; see `members`."""

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
            if header == _ZEROS:
                if b"path" in long or pax:
                    raise self._error("ends after an extended header")
                return None
            if len(header) < BLOCK_BYTES:
                raise self._error("ends without an end marker; it was cut short")
            if not _has_checksum(header):
                raise self._error("has a header whose checksum is wrong")
            kind, size = header[156:157], _number(header[124:136])
            if size is None:
                raise self._error("has a header without a size")
            if kind in (b"L", b"K", b"x", b"g"):
                extra = self._extra(size)
                if kind in (b"L", b"K"):
                    long[b"path" if kind == b"L" else b"linkpath"] = extra.split(b"\0", 1)[0]
                else:
                    fields = self._pax_fields(extra)
                    if kind == b"g" and fields.keys() & {b"path", b"size"}:
                        raise self._error("gives one name or size to all members")
                    pax |= fields if kind == b"x" else {}
                continue
            return self._member(header, kind, size, long | pax)
        raise self._error(f"has more than {_MAX_EXTRAS} extended headers in a row")

    def pass_content(self, member: Member) -> None:
        """Goes to the header behind a member's content."""
        end = member.offset + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
        if self._stream.position == end:
            return
        # Short of the last byte: only reading shows whether that is there.
        self._stream.skip(end - 1 - self._stream.position)
        if self._stream.position < end - 1 or not self._stream.read(1):
            raise self._error("ends in the middle of a member; it was cut short")

    def require_end(self) -> None:
        """Refuses what is behind the end marker: other readers would not agree about it."""
        padding = 0
        while data := self._stream.read(2**16):
            padding += len(data)
            if data.strip(b"\0") or padding > _MAX_PADDING_BYTES:
                raise self._error(
                    "continues behind its end marker; are several archives put together?"
                )

    def _member(self, header: bytes, kind: bytes, size: int, pax: dict[bytes, bytes]) -> Member:
        name = pax.get(b"path")
        if name is None:
            name = header[:100].split(b"\0", 1)[0]
            if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
                name = prefix + b"/" + name
        said = pax.get(b"size")
        if any(key.startswith(b"GNU.sparse.") for key in pax) or kind == b"S":
            raise self._error(f"stores {for_display(name)} as a sparse file")
        if said is not None and said != b"%d" % size:
            raise self._error(f"has two sizes for {for_display(name)}: {said[:20]!r} and {size}")
        if kind == _FOLDER or (kind in (b"\0", b"0") and name.endswith(b"/")):
            return Member(b"", self._stream.position, size, is_file=False)
        if kind not in _REGULAR and kind not in _OTHERS:
            raise self._error(f"has a member of the unknown kind {kind!r}")
        is_file = kind not in _OTHERS
        link = b""
        if kind == _HARD_LINK:
            link = _clean(pax.get(b"linkpath", header[157:257].split(b"\0", 1)[0])) or b""
        # Links carry the size of what they lead to, and no content.
        return Member(
            self._checked(name),
            self._stream.position,
            size if is_file else 0,
            is_file=is_file,
            link=link,
        )

    def _checked(self, name: bytes) -> bytes:
        clean = _clean(name)
        if clean is None:
            raise self._error(f"has a member {for_display(name[:200])}, which leads out of it")
        if len(name) > _MAX_NAME_BYTES:
            raise self._error(f"has a name of {len(name)} bytes; at most {_MAX_NAME_BYTES}")
        return clean

    def _extra(self, size: int) -> bytes:
        """Returns the content of an extended header."""
        if size > _MAX_EXTRA_BYTES:
            raise self._error(f"has an extended header of {size} bytes; at most {_MAX_EXTRA_BYTES}")
        whole = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        data = self._stream.read(whole)
        if len(data) < whole:
            raise self._error("ends in an extended header; it was cut short")
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
                raise self._error("has a damaged extended header")
            fields[key] = value
            data = data[length:]
        return fields

    def _error(self, what: str) -> SourceError:
        return SourceError(
            f"{self._archive} {what} (at byte {self._start})",
            hint="get or make the archive again, or leave it out",
        )


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
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        return None
    return int(digits, 8)
