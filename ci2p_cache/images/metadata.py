"""EXIF orientation from an image file, and the file without its metadata.

Pure functions over untrusted bytes. Pillow's own metadata code reports through the `warnings`
module, whose filters belong to the process: `catch_warnings` in one of many decoding threads would
change them for all, and under `-W error` a harmless tag would turn a good picture into a bad row.
So the orientation is read here, and Pillow is given files without the parts that make it warn.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ci2p_cache.images.headers import FormatName, jpeg_segments, sniff_format

__all__ = ["exif_orientation", "without_metadata"]

_JPEG_APP1 = 0xE1

_ORIENTATION_TAG = 274

_PIXEL_TAGS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320}
    | {322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
)
"""Baseline and extension tags that a decoder needs for pixels (TIFF 6.0, Adobe 1992)."""

_SINGLE_TAGS = frozenset({254, 256, 257, 259, 262, 266, 277, 278, 284, 317, 322, 323, 332})
"""Tags of one value; Pillow warns of more and takes the first, so only the first is handed on."""

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TYPE_BYTES |= {16: 8, 17: 8, 18: 8}
_INTEGER_FORMAT = {1: "B", 3: "H", 4: "L", 16: "Q"}


def exif_orientation(data: bytes, name: FormatName) -> int:
    """Returns the EXIF orientation (1-8) of the first image; 1 where absent, damaged or invalid.

    Only EXIF is asked (JPEG APP1, PNG eXIf, WebP EXIF, TIFF itself; CIPA DC-008, tag 0x0112), not
    XMP and not ImageMagick's raw profiles. Never raises: bad EXIF does not make an image bad.
    """
    try:
        block = _exif_block(data, name)
        if block.startswith(b"Exif\0\0"):
            block = block[6:]
        directory = _Directory(block)
        entry = directory.entries.get(_ORIENTATION_TAG)
        if entry is None:
            return 1
        kind, count, value = entry
        if kind not in _INTEGER_FORMAT or count != 1:
            return 1
        (orientation,) = struct.unpack_from(directory.order + _INTEGER_FORMAT[kind], value)
    except (ValueError, struct.error):
        return 1
    return int(orientation) if 1 <= orientation <= 8 else 1


def _exif_block(data: bytes, name: FormatName) -> bytes:
    """Returns the bytes of the EXIF block, empty where there is none."""
    if name == "TIFF":
        return data
    if name == "JPEG":
        for marker, start, end in jpeg_segments(data):
            if marker == _JPEG_APP1 and data[start + 4 : start + 10] == b"Exif\0\0":
                return data[start + 4 : end]
    elif name == "PNG":
        for kind, start, end in _png_chunks(data):
            if kind == b"eXIf":
                return data[start + 8 : end - 4]
    elif name == "WEBP":
        position = 12
        while position + 8 <= len(data):
            (num_bytes,) = struct.unpack_from("<L", data, position + 4)
            if data[position : position + 4] == b"EXIF":
                return data[position + 8 : position + 8 + num_bytes]
            position += 8 + num_bytes + num_bytes % 2
    return b""


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, start, end) of each whole chunk; what follows the last is damaged or empty."""
    position = 8
    while position + 12 <= len(data):
        (num_bytes,) = struct.unpack_from(">L", data, position)
        end = position + 12 + num_bytes
        if end > len(data):
            return
        yield data[position + 4 : position + 8], position, end
        position = end


class _Directory:
    """The first directory of a TIFF or BigTIFF stream, which is also EXIF's form.

    Args:
        data: The stream, from its byte order mark.

    Raises:
        ValueError: the bytes are no TIFF, or the directory is outside them.
    """

    def __init__(self, data: bytes) -> None:
        if sniff_format(data) != "TIFF":
            raise ValueError("no TIFF header")
        self.order = "<" if data[0] == 0x49 else ">"
        self.is_big = 43 in data[2:4]
        self.pointer = "Q" if self.is_big else "L"
        self.entries: dict[int, tuple[int, int, bytes]] = {}
        """tag -> (type, count, the value or its offset as 4 bytes, 8 in BigTIFF)."""
        record = struct.Struct(self.order + ("HHQ8s" if self.is_big else "HHL4s"))
        count_format = self.order + ("Q" if self.is_big else "H")
        try:
            (start,) = struct.unpack_from(self.order + self.pointer, data, 8 if self.is_big else 4)
            (count,) = struct.unpack_from(count_format, data, start)
            start += struct.calcsize(count_format)
            for i in range(min(count, (len(data) - start) // record.size)):
                tag, kind, num_values, value = record.unpack_from(data, start + i * record.size)
                self.entries.setdefault(tag, (kind, num_values, value))
        except (struct.error, OverflowError) as error:
            raise ValueError("the TIFF directory is outside the file") from error


def without_metadata(data: bytes, name: FormatName) -> bytes:
    """Returns the file with the same pixels and without the parts that Pillow may warn about.

    JPEG loses APP1 (EXIF), PNG its animation chunks (the default image is what is decoded), TIFF
    every tag that no pixel depends on, and all directories but the first. Pillow turns a TIFF by
    its orientation while loading; without the tag, pixels come as they are stored.

    Raises:
        ValueError: a TIFF directory, or a value in it, is outside the file.
    """
    if name == "JPEG":
        dropped = [(start, end) for kind, start, end in jpeg_segments(data) if kind == _JPEG_APP1]
    elif name == "PNG":
        animation = (b"acTL", b"fcTL", b"fdAT")
        dropped = [(start, end) for kind, start, end in _png_chunks(data) if kind in animation]
    else:
        return _pixel_tags_only(data) if name == "TIFF" else data
    if not dropped:
        return data
    starts = [0, *(end for _, end in dropped)]
    ends = [*(start for start, _ in dropped), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _pixel_tags_only(data: bytes) -> bytes:
    """Returns a TIFF whose only directory, appended to the old bytes, holds the pixel tags."""
    directory = _Directory(data)
    inline_bytes = 8 if directory.is_big else 4
    records = []
    total_bytes = 0
    for tag, (kind, count, value) in sorted(directory.entries.items()):
        if tag not in _PIXEL_TAGS or kind not in _TYPE_BYTES:
            continue
        num_bytes = count * _TYPE_BYTES[kind]
        if num_bytes > inline_bytes:
            (offset,) = struct.unpack(directory.order + directory.pointer, value)
            total_bytes += num_bytes
            if offset + num_bytes > len(data) or total_bytes > len(data):
                raise ValueError(f"the values of TIFF tag {tag} are outside the file")
            if tag in _SINGLE_TAGS and _TYPE_BYTES[kind] <= inline_bytes:
                value = data[offset : offset + _TYPE_BYTES[kind]].ljust(inline_bytes, b"\0")
        if tag in _SINGLE_TAGS:
            count = min(count, 1)
        records.append(
            struct.pack(f"{directory.order}HH{directory.pointer}", tag, kind, count) + value
        )
    body = data + b"\0" * (len(data) % 2)
    count_format = "Q" if directory.is_big else "H"
    return b"".join(
        (
            data[: 8 if directory.is_big else 4],
            struct.pack(directory.order + directory.pointer, len(body)),
            body[16 if directory.is_big else 8 :],
            struct.pack(directory.order + count_format, len(records)),
            *records,
            bytes(inline_bytes),
        )
    )
