"""What an image file says of itself: format, pixels, orientation; and it without its metadata.

Pure functions over untrusted bytes, asked before any decoder is: which one may see the file, and
whether the file is small enough, must not depend on a decoder's own care. Pillow's own metadata
code reports through the `warnings` module, whose filters belong to the process, and under
`-W error` a harmless tag would turn a good picture into a bad row. So the orientation is read here,
and Pillow is given files without the parts that make it warn.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["ImageFormat", "JpegFrame", "canvas_size", "exif_orientation", "foreign_format",
           "jpeg_frame", "sniff_format", "without_metadata"]  # fmt: skip

ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]

_BMP_HEADER_BYTES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
"""Sizes of the known BMP headers; "BM" alone also begins many a text file."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""TIFF and BigTIFF, both byte orders."""

_FOREIGN_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\x01\0", "ICO"),
)

# JPEG markers, ITU-T T.81 table B.1.
_RST0, _SOI, _EOI, _SOS, _APP1 = 0xD0, 0xD8, 0xD9, 0xDA, 0xE1
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)

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


@dataclass(frozen=True, slots=True)
class JpegFrame:
    """The start-of-frame header of a JPEG (ITU-T T.81, B.2.2)."""

    process: int
    """n of SOFn: 0 baseline, 1 extended, 2 progressive, 3 lossless, 9 and 10 arithmetic."""
    precision: int
    """Bits per sample."""
    width: int
    """Pixels per line."""
    height: int
    """Lines; 0 where a DNL marker gives them later."""
    num_components: int
    """1 grey, 3 colour, 4 CMYK or YCCK."""


def sniff_format(prefix: bytes) -> ImageFormat | None:
    """Returns which format of the allow-list the first 16 bytes or more announce, or None."""
    if prefix.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if prefix.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if prefix.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if prefix.startswith(b"RIFF") and prefix[8:12] == b"WEBP":
        return "WEBP"
    if prefix.startswith(_TIFF_MAGIC):
        return "TIFF"
    if prefix.startswith(b"BM") and int.from_bytes(prefix[14:16], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    return None


def foreign_format(prefix: bytes) -> str | None:
    """Returns the name of an image format that is known but not on the allow-list, or None."""
    for offset, magic, name in _FOREIGN_MAGIC:
        if prefix[offset : offset + len(magic)] == magic:
            return name
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, end) of each segment up to and including SOS; start is at the 0xFF.

    Skips garbage, fill bytes and parameterless markers exactly as libjpeg does, so that both see
    the same first frame header: a disagreement would let a picture past the limit on pixels.
    """
    position = 2
    while True:
        position = data.find(b"\xff", position)
        while 0 <= position < len(data) and data[position] == 0xFF:
            position += 1
        if position < 0 or position + 3 > len(data):
            return
        marker = data[position]
        position += 1
        if marker in (_SOI, _EOI):
            return
        if marker in (0, 1) or _RST0 <= marker < _SOI:
            continue
        end = position + max(int.from_bytes(data[position : position + 2], "big"), 2)
        yield marker, position - 2, min(end, len(data))
        if marker == _SOS:
            return
        position = end


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """Returns the frame header, or None where there is none before the first scan."""
    for marker, start, end in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            if end - start < 10:
                return None
            precision, height, width, num_components = struct.unpack_from(">BHHB", data, start + 4)
            return JpegFrame(marker - 0xC0, precision, width, height, num_components)
    return None


def canvas_size(data: bytes, name: ImageFormat) -> tuple[int, int] | None:
    """Returns (width, height) that the decoder of a GIF or WebP will allocate while it opens it.

    None for headers too damaged to say, and for the other formats: these allocate nothing before
    they are asked for pixels.
    """
    try:
        if name == "GIF":
            return _gif_canvas(data)
        if name == "WEBP":
            return _webp_canvas(data)
    except (IndexError, struct.error):
        return None
    return None


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Reads the canvas from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<L", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(data) >= 30:
        return (
            int.from_bytes(data[24:27], "little") + 1,
            int.from_bytes(data[27:30], "little") + 1,
        )
    return None


def _gif_canvas(data: bytes) -> tuple[int, int]:
    """Returns the screen, grown to hold the first frame, whose blocks are read as Pillow does."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while position < len(data) and data[position] != 0x3B:
        if data[position] == 0x21:
            is_comment = data[position + 1] == 0xFE
            first_bytes = data[position + 2]
            position += 3 + first_bytes
            # Pillow reads on after an empty first block, except in a comment.
            while (first_bytes or not is_comment) and (block_bytes := data[position]):
                position += 1 + block_bytes
            position += bool(first_bytes) or not is_comment
        elif data[position] == 0x2C:
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        else:
            position += 1
    return width, height


def exif_orientation(data: bytes, name: ImageFormat) -> int:
    """Returns the EXIF orientation (1-8) of the first image; 1 where absent, damaged or invalid.

    Only EXIF is asked (JPEG APP1, PNG eXIf, WebP EXIF, TIFF itself; CIPA DC-008, tag 0x0112), not
    XMP and not ImageMagick's raw profiles. Never raises: bad EXIF does not make an image bad.
    """
    try:
        directory = _Directory(_exif_block(data, name).removeprefix(b"Exif\0\0"))
        kind, count, value = directory.entries[_ORIENTATION_TAG]
        (orientation,) = struct.unpack_from(directory.order + _INTEGER_FORMAT[kind], value)
    except (KeyError, ValueError, struct.error):
        return 1
    return int(orientation) if count == 1 and 1 <= orientation <= 8 else 1


def _exif_block(data: bytes, name: ImageFormat) -> bytes:
    """Returns the bytes of the EXIF block, empty where there is none."""
    if name == "TIFF":
        return data
    if name == "JPEG":
        for marker, start, end in _jpeg_segments(data):
            if marker == _APP1 and data.startswith(b"Exif\0\0", start + 4):
                return data[start + 4 : end]
    elif name == "PNG":
        for kind, start, end in _png_chunks(data):
            if kind == b"eXIf":
                return data[start + 8 : end - 4]
    elif name == "WEBP":
        position = 12
        while position + 8 <= len(data):
            (num_bytes,) = struct.unpack_from("<L", data, position + 4)
            if data.startswith(b"EXIF", position):
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
        is_big = 43 in data[2:4]
        self.order = "<" if data[0] == 0x49 else ">"
        self.pointer = self.order + ("Q" if is_big else "L")
        self.count = self.order + ("Q" if is_big else "H")
        self.inline_bytes = 8 if is_big else 4
        """Size of a value in its entry; the pointer to the directory is there too."""
        self.record = struct.Struct(f"{self.order}HH{self.pointer[1]}{self.inline_bytes}s")
        self.entries: dict[int, tuple[int, int, bytes]] = {}
        """tag -> (type, count, the value or its offset)."""
        try:
            (start,) = struct.unpack_from(self.pointer, data, self.inline_bytes)
            (count,) = struct.unpack_from(self.count, data, start)
            start += struct.calcsize(self.count)
            for i in range(min(count, (len(data) - start) // self.record.size)):
                tag, *entry = self.record.unpack_from(data, start + i * self.record.size)
                self.entries.setdefault(tag, (entry[0], entry[1], entry[2]))
        except (struct.error, OverflowError) as error:
            raise ValueError("the TIFF directory is outside the file") from error


def without_metadata(data: bytes, name: ImageFormat) -> bytes:
    """Returns the file with the same pixels and without the parts that Pillow may warn about.

    JPEG loses APP1 (EXIF), PNG its animation chunks (the default image is what is decoded), TIFF
    every tag that no pixel depends on, and all directories but the first. Pillow turns a TIFF by
    its orientation while loading; without the tag, pixels come as they are stored. It is a
    ValueError that a TIFF directory, or a value in it, is outside the file.
    """
    if name == "TIFF":
        return _pixel_tags_only(data)
    dropped: list[tuple[int, int]] = []
    if name == "JPEG":
        dropped = [(start, end) for kind, start, end in _jpeg_segments(data) if kind == _APP1]
    elif name == "PNG":
        animation = (b"acTL", b"fcTL", b"fdAT")
        dropped = [(start, end) for kind, start, end in _png_chunks(data) if kind in animation]
    starts = [0, *(end for _, end in dropped)]
    ends = [*(start for start, _ in dropped), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _pixel_tags_only(data: bytes) -> bytes:
    """Returns a TIFF whose only directory, appended to the old bytes, holds the pixel tags."""
    directory = _Directory(data)
    inline_bytes = directory.inline_bytes
    records = []
    total_bytes = 0
    for tag, (kind, count, value) in sorted(directory.entries.items()):
        if tag not in _PIXEL_TAGS or kind not in _TYPE_BYTES:
            continue
        num_bytes = count * _TYPE_BYTES[kind]
        if num_bytes > inline_bytes:
            (offset,) = struct.unpack(directory.pointer, value)
            total_bytes += num_bytes
            if offset + num_bytes > len(data) or total_bytes > len(data):
                raise ValueError(f"the values of TIFF tag {tag} are outside the file")
            if tag in _SINGLE_TAGS and _TYPE_BYTES[kind] <= inline_bytes:
                value = data[offset : offset + _TYPE_BYTES[kind]]
        if tag in _SINGLE_TAGS:
            count = min(count, 1)
        records.append(directory.record.pack(tag, kind, count, value))
    body = data + b"\0" * (len(data) % 2)
    return b"".join(
        (
            data[:inline_bytes],
            struct.pack(directory.pointer, len(body)),
            body[2 * inline_bytes :],
            struct.pack(directory.count, len(records)),
            *records,
            bytes(inline_bytes),
        )
    )
