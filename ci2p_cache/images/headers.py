"""What the first bytes of an image file say: its format, and how many pixels it claims to have.

Pure functions over untrusted bytes, asked before any decoder is: which one may see the file, and
whether the file is small enough, must not depend on a decoder's own care.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "FormatName",
    "JpegFrame",
    "canvas_size",
    "foreign_format",
    "jpeg_frame",
    "jpeg_segments",
    "sniff_format",
]

FormatName = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]

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
_RST0, _SOI, _EOI, _SOS = 0xD0, 0xD8, 0xD9, 0xDA
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)


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


def sniff_format(prefix: bytes) -> FormatName | None:
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


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
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
    for marker, start, end in jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            if end - start < 10:
                return None
            precision, height, width, num_components = struct.unpack_from(">BHHB", data, start + 4)
            return JpegFrame(marker - 0xC0, precision, width, height, num_components)
    return None


def canvas_size(data: bytes, name: FormatName) -> tuple[int, int] | None:
    """Returns (width, height) that the decoder of a GIF or WebP will allocate while it opens it.

    The other formats allocate nothing before they are asked for pixels.

    Returns:
        The size in pixels, or None for other formats and for headers too damaged to tell.
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
