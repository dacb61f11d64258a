"""Hostile image files: bombs, damage, and metadata that must neither warn nor fail an image."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ci2p_cache.errors import ImageDecodeError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.specs import ImageSpec
from tests.images.test_decode import (
    APPLY,
    GENERATED,
    SMALL,
    SPEC,
    encoded,
    max_difference,
    pillow_pixels,
)


def jpeg_with_app1(payload: bytes, image: Image.Image = SMALL) -> bytes:
    data = encoded(image, "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(payload)) + payload + data[2:]


@pytest.mark.parametrize(
    "payload",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
        b"Exif\0\0" + struct.pack("<4sLHHHLHH", b"II*\0", 8, 1, 274, 2, 9000, 3, 0),
        b"Exif\0\0" + struct.pack("<4sLHHHLHH", b"II*\0", 8, 1, 274, 3, 1, 9, 0),
        b"Exif\0\0" + bytes(range(200)),
    ],
    ids=["empty", "no offset", "offset outside", "cut", "odd type", "value 9", "noise"],
)
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_bad_exif_fails_no_image_and_warns_of_nothing(payload: bytes, mode: str) -> None:
    data = jpeg_with_app1(payload, SMALL.convert(mode))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decode_image(data, APPLY)
    assert not caught
    assert image.orientation == 1
    assert torch.equal(
        image.pixels, decode_image(encoded(SMALL.convert(mode), "JPEG"), SPEC).pixels
    )


# --- metadata that Pillow would warn about ------------------------------------------------------


def tiff_file(tags: list[tuple[int, int, int, bytes]], body: bytes = b"") -> bytes:
    """A little-endian TIFF: `body` at offset 8, then one directory of (tag, type, count, value)."""
    records = b"".join(struct.pack("<HHL", *tag[:3]) + tag[3].ljust(4, b"\0") for tag in tags)
    start = struct.pack("<4sL", b"II*\0", 8 + len(body))
    return start + body + struct.pack("<H", len(tags)) + records + bytes(4)


def short(value: int) -> bytes:
    return struct.pack("<H", value)


def long(value: int) -> bytes:
    return struct.pack("<L", value)


def grey_tiff(width: int, height: int, extra: list[tuple[int, int, int, bytes]]) -> bytes:
    body = bytes(range(width * height))
    tags = [
        (256, 3, 1, short(width)),
        (257, 3, 1, short(height)),
        (258, 3, 1, short(8)),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(1)),
        (273, 4, 1, long(8)),
        (277, 3, 1, short(1)),
        (278, 3, 1, short(height)),
        (279, 4, 1, long(len(body))),
    ]
    replaced = {tag[0] for tag in extra}
    return tiff_file(sorted([t for t in tags if t[0] not in replaced] + extra), body)


@pytest.mark.parametrize(
    "extra",
    [
        (270, 2, 5000, long(9_000_000)),
        (700, 1, 2**31, long(8)),
        (274, 3, 7, long(8)),
        (34665, 4, 1, long(2**32 - 1)),
        (278, 3, 2, struct.pack("<HH", 5, 5)),
        (284, 99, 1, b""),
        (278, 4, 2, long(8)),
        (317, 5, 1, long(8)),
    ],
    ids=["outside", "huge", "values", "exif", "two values", "odd type", "two far", "rational"],
)
def test_odd_tiff_metadata_warns_of_nothing(extra: tuple[int, int, int, bytes]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decode_image(grey_tiff(7, 5, [extra]), SPEC)
    assert not caught
    assert image.pixels[0].flatten().tolist() == list(range(35))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ((273, 4, 900, long(8)), "values of TIFF tag 273 are outside the file"),
        ((322, 4, 1, long(100_000)), "100000x100000 is 10000000000 pixels"),
        ((257, 3, 1, short(0)), "."),
    ],
    ids=["strips outside", "giant tile", "no rows"],
)
def test_damaged_tiff_is_refused(extra: tuple[int, int, int, bytes], reason: str) -> None:
    more = [extra, (323, 4, 1, long(100_000))] if extra[0] == 322 else [extra]
    with pytest.raises(ImageDecodeError, match=reason):
        decode_image(grey_tiff(7, 5, more), SPEC)


def test_tiff_without_a_directory_is_refused() -> None:
    with pytest.raises(ImageDecodeError, match="TIFF: the TIFF directory is outside the file"):
        decode_image(b"II*\0\xff\xff\xff\xff" + bytes(20), SPEC)


def test_invalid_animation_chunks_of_a_png_warn_of_nothing() -> None:
    data = encoded(SMALL, "PNG")
    chunk = b"acTL" + bytes(8)
    chunk = struct.pack(">L", 8) + chunk + struct.pack(">L", zlib.crc32(chunk))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decode_image(data[:33] + chunk + chunk + data[33:], SPEC)
    assert not caught
    assert max_difference(image, pillow_pixels(data)) == 0


@pytest.mark.parametrize("name", ["JPEG", "PNG", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_max_pixels_decides_and_not_pillow(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    data = encoded(SMALL.convert(mode), name)
    expected = decode_image(data, SPEC).pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert torch.equal(decode_image(data, SPEC).pixels, expected)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_exactly_max_pixels_decodes_and_one_less_is_refused(name: str) -> None:
    data = encoded(SMALL, name)
    assert decode_image(data, limited(37 * 29)).width == 37
    with pytest.raises(ImageDecodeError, match="37x29 is 1073 pixels, more than `max_pixels` 1072"):
        decode_image(data, limited(37 * 29 - 1))


def limited(max_pixels: int) -> ImageSpec:
    return ImageSpec(size=32, resize_side=32, max_pixels=max_pixels, decoder="x")


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_a_line_that_would_be_resized_to_gigabytes_is_refused(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size), "PNG")
    with pytest.raises(ImageDecodeError, match="too narrow: resized to a shorter side of 64"):
        decode_image(data, SPEC)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1)])
def test_single_pixels_and_short_lines_decode(size: tuple[int, int]) -> None:
    image = decode_image(encoded(Image.new("RGB", size, (9, 8, 7)), "PNG"), SPEC)
    assert image.pixels.shape == (3, size[1], size[0])
    assert image.pixels.amax((1, 2)).tolist() == [9, 8, 7]


BOMBS = {
    "png": b"\x89PNG\r\n\x1a\n"
    + struct.pack(">L4sLLBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    + struct.pack(
        ">L", zlib.crc32(struct.pack(">4sLLBBBBB", b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0))
    )
    + struct.pack(">L4s", 100, b"IDAT")
    + bytes(104),
    "jpeg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 60_000, 60_000, 3) + bytes(200),
    "jpeg cmyk": b"\xff\xd8\xff\xc0"
    + struct.pack(">HBHHB", 20, 8, 60_000, 60_000, 4)
    + b"\1\x11\0\2\x11\0\3\x11\0\4\x11\0"
    + b"\xff\xda"
    + bytes(200),
    "gif screen": struct.pack("<6sHHBBB", b"GIF89a", 60_000, 60_000, 0, 0, 0)
    + b"\x21\xf9\x04\x08\0\0\0\0,"
    + struct.pack("<HHHHBB", 0, 0, 60_000, 60_000, 0, 8)
    + bytes(20),
    "gif frame": struct.pack("<6sHHBBB", b"GIF89a", 10, 10, 0, 0, 0)
    + b"\x21\xfe\x03abc\0\x21\xf9\x04\x08\0\0\0\0,"
    + struct.pack("<HHHHBB", 0, 0, 10_000, 10_000, 0, 8)
    + bytes(20),
    "webp": b"RIFF"
    + struct.pack("<L", 100)
    + b"WEBPVP8X\x0a\0\0\0\0\0\0\0"
    + (15_999).to_bytes(3, "little") * 2
    + bytes(70),
    "webp lossless": b"RIFF"
    + struct.pack("<L", 100)
    + b"WEBPVP8L\x0a\0\0\0\x2f"
    + struct.pack("<L", 0x3FFF | 0x3FFF << 14)
    + bytes(70),
    "webp lossy": b"RIFF"
    + struct.pack("<L", 100)
    + b"WEBPVP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a"
    + struct.pack("<HH", 16_000, 16_000)
    + bytes(70),
    "bmp": b"BM"
    + struct.pack("<LLLLLLHHLLLLLL", 100, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    + bytes(50),
    "tiff": grey_tiff(7, 5, [(256, 4, 1, long(60_000)), (257, 4, 1, long(60_000))]),
    "tiff tile": grey_tiff(
        7, 5, [(259, 3, 1, short(8)), (322, 4, 1, long(40_000)), (323, 4, 1, long(40_000))]
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_by_its_header(name: str) -> None:
    with pytest.raises(ImageDecodeError, match="more than `max_pixels`"):
        decode_image(BOMBS[name], SPEC)


@pytest.mark.slow
def test_bombs_cost_little_memory(tmp_path: Path) -> None:
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    script = """
import pathlib, resource, sys
from ci2p_cache.errors import ImageDecodeError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.specs import ImageSpec
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        decode_image(path.read_bytes(), ImageSpec(decoder="x"))
    except ImageDecodeError:
        print("refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    *refused, grown_kib = done.stdout.split()
    assert refused == ["refused"] * len(BOMBS)
    assert int(grown_kib) < 64 * 1024


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_cut_anywhere_is_refused(mode: str, progressive: bool) -> None:
    data = encoded(SMALL.convert(mode), "JPEG", progressive=progressive)
    for end in range(0, len(data), 7):
        with pytest.raises(ImageDecodeError):
            decode_image(data[:end], SPEC)


@pytest.mark.parametrize("name", GENERATED)
def test_damaged_bytes_give_pixels_or_one_error_and_no_warning(name: str) -> None:
    data = GENERATED[name][0]
    rng = np.random.default_rng(len(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for trial in range(40):
            damaged = bytearray(data[: rng.integers(1, len(data)) if trial % 4 == 0 else None])
            for position in rng.integers(0, len(damaged), 1 + trial % 5):
                damaged[position] = rng.integers(0, 256)
            with contextlib.suppress(ImageDecodeError):
                image = decode_image(bytes(damaged), SPEC)
                assert image.pixels.dtype == torch.uint8
                assert image.pixels.shape[0] == 3
    assert not caught


def test_content_that_is_no_image_is_named() -> None:
    with pytest.raises(ImageDecodeError, match="the file is empty"):
        decode_image(b"", SPEC)
    with pytest.raises(ImageDecodeError, match="content is HEIC; wanted one of BMP, GIF"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(30), SPEC)
    with pytest.raises(ImageDecodeError, match=r"begins with b'BMW M3\.\.', which is none of"):
        decode_image(b"BMW M3... a car, no bitmap", SPEC)
    with pytest.raises(ImageDecodeError, match="60000x0 pixels; it has no pixels"):
        decode_image(
            b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 0, 60_000, 3) + bytes(9), SPEC
        )
