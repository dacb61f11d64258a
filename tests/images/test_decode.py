"""Decoding: every awkward file, every mode, every orientation, and what hostile bytes may cost."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from ci2p_cache.errors import ImageDecodeError, MissingDependencyError, UsageError
from ci2p_cache.images.decode import DecodedImage, decode_image, decoder_name
from ci2p_cache.specs import ImageSpec
from tests.support.pictures import picture

SPEC = ImageSpec(size=64, resize_side=64, decoder=decoder_name())
APPLY = ImageSpec(size=64, resize_side=64, exif="apply", decoder=decoder_name())

# Every file of the awkward folder that decodes: format, mode, width, height, EXIF orientation.
AWKWARD_OK = {
    "bad_exif.jpg": ("JPEG", "L", 500, 500, 1),
    "bit1_trns.png": ("PNG", "1", 64, 64, 1),
    "bitflips_goldfish.JPEG": ("JPEG", "RGB", 376, 263, 1),
    "bmp_pal8.bmp": ("BMP", "P", 127, 64, 1),
    "bomb_extents.gif": ("GIF", "P", 100, 100, 1),
    "caltech_jpeg_without_extension": ("JPEG", "RGB", 184, 140, 1),
    "cmyk_adobe_noicc.jpg": ("JPEG", "CMYK", 114, 199, 1),
    "cmyk_icc.jpg": ("JPEG", "CMYK", 500, 333, 1),
    "cmyk_noprofile.jpg": ("JPEG", "CMYK", 500, 333, 1),
    "cmyk_pil_sample.jpg": ("JPEG", "CMYK", 100, 100, 1),
    "dnl_marker.jpg": ("JPEG", "RGB", 194, 132, 1),
    "duplicate_component_ids.jpg": ("JPEG", "CMYK", 367, 242, 1),
    "exif_invalid_9.jpg": ("JPEG", "RGB", 480, 369, 1),
    "exif_landscape_1.jpg": ("JPEG", "RGB", 600, 450, 1),
    "exif_landscape_2.jpg": ("JPEG", "RGB", 600, 450, 2),
    "exif_landscape_3.jpg": ("JPEG", "RGB", 600, 450, 3),
    "exif_landscape_4.jpg": ("JPEG", "RGB", 600, 450, 4),
    "exif_landscape_5.jpg": ("JPEG", "RGB", 450, 600, 5),
    "exif_landscape_6.jpg": ("JPEG", "RGB", 450, 600, 6),
    "exif_landscape_7.jpg": ("JPEG", "RGB", 450, 600, 7),
    "exif_landscape_8.jpg": ("JPEG", "RGB", 450, 600, 8),
    "exif_portrait_1.jpg": ("JPEG", "RGB", 1200, 1800, 1),
    "exif_portrait_2.jpg": ("JPEG", "RGB", 1200, 1800, 2),
    "exif_portrait_3.jpg": ("JPEG", "RGB", 1200, 1800, 3),
    "exif_portrait_4.jpg": ("JPEG", "RGB", 1200, 1800, 4),
    "exif_portrait_5.jpg": ("JPEG", "RGB", 1800, 1200, 5),
    "exif_portrait_6.jpg": ("JPEG", "RGB", 1800, 1200, 6),
    "exif_portrait_7.jpg": ("JPEG", "RGB", 1800, 1200, 7),
    "exif_portrait_8.jpg": ("JPEG", "RGB", 1800, 1200, 8),
    "exif_small_portrait_2.jpg": ("JPEG", "RGB", 113, 150, 2),
    "gain_map.jpg": ("JPEG", "RGB", 3840, 2160, 1),
    "gif_animated.gif": ("GIF", "P", 80, 80, 1),
    "gif_animated_chi.gif": ("GIF", "P", 320, 240, 1),
    "gif_inside.JPG": ("GIF", "P", 320, 240, 1),
    "gif_single_photo.gif": ("GIF", "P", 800, 533, 1),
    "gray_128.jpg": ("JPEG", "L", 128, 128, 1),
    "gray_alpha_8bit.png": ("PNG", "LA", 400, 300, 1),
    "gray_sample.jpg": ("JPEG", "L", 386, 396, 1),
    "i_trns.png": ("PNG", "I;16", 64, 64, 1),
    "icc_adobe_rgb.jpg": ("JPEG", "RGB", 626, 76, 1),
    "icc_profile_big.jpg": ("JPEG", "RGB", 425, 250, 1),
    "invalid_exif.jpg": ("JPEG", "RGB", 200, 200, 1),
    "iphone_exif_thumb.jpg": ("JPEG", "RGB", 1168, 1088, 1),
    "lab.tif": ("TIFF", "LAB", 128, 128, 1),
    "lossless_jpeg_8.jpg": ("JPEG", "L", 800, 535, 1),
    "mpo_two_frames.jpg": ("JPEG", "RGB", 640, 480, 1),
    "multiple_exif.jpg": ("JPEG", "L", 1, 1, 1),
    "name with spaces \u2013 \u00fcn\u00efcode \u753b\u50cf.JPG": ("JPEG", "RGB", 500, 375, 1),
    "palette_pil123p.png": ("PNG", "P", 162, 150, 1),
    "palette_swiss.png": ("PNG", "P", 68, 68, 1),
    "palette_trns_single.png": ("PNG", "P", 64, 64, 1),
    "photo_exif0_n01728572_thunder_snake.JPEG": ("JPEG", "RGB", 500, 333, 1),
    "photo_exif0_n03337140_file.JPEG": ("JPEG", "RGB", 1600, 1200, 1),
    "photo_exif6_n02951585_can_opener.JPEG": ("JPEG", "RGB", 392, 294, 6),
    "photo_gray_n02096051_Airedale.JPEG": ("JPEG", "L", 500, 330, 1),
    "photo_gray_n02676566_acoustic_guitar.JPEG": ("JPEG", "L", 700, 467, 1),
    "photo_tiny_n01871265_tusker.JPEG": ("JPEG", "RGB", 75, 56, 1),
    "png16_gray_alpha.png": ("PNG", "RGBA", 109, 96, 1),
    "png16_gray_large.png": ("PNG", "I;16", 3072, 2048, 1),
    "png16_la_bkgd_32px.png": ("PNG", "RGBA", 32, 32, 1),
    "png16_monkey.png": ("PNG", "RGB", 149, 227, 1),
    "png16_rgb_flag.png": ("PNG", "RGB", 900, 600, 1),
    "png16_rgb_trns_32px.png": ("PNG", "RGB", 32, 32, 1),
    "png_inside.JPEG": ("PNG", "RGB", 768, 512, 1),
    "progressive_3.jpg": ("JPEG", "RGB", 650, 470, 1),
    "progressive_cat.jpg": ("JPEG", "RGB", 320, 240, 1),
    "progressive_invalid_dht.jpg": ("JPEG", "RGB", 719, 994, 1),
    "rgb.tif": ("TIFF", "RGB", 128, 128, 1),
    "rgb_colourspace.jpg": ("JPEG", "RGB", 225, 156, 1),
    "rgb_looks_gray.jpg": ("JPEG", "RGB", 258, 222, 1),
    "rgb_trns.png": ("PNG", "RGB", 64, 64, 1),
    "rgba_full_transparent.png": ("PNG", "P", 300, 300, 1),
    "rgba_image_in_alpha.png": ("PNG", "RGBA", 928, 169, 1),
    "webp_alpha.webp": ("WEBP", "RGBA", 300, 300, 1),
    "webp_animated.webp": ("WEBP", "RGBA", 80, 80, 1),
    "webp_big_height.webp": ("WEBP", "RGB", 13, 169, 1),
    "webp_inside.jpg": ("WEBP", "RGB", 1024, 772, 1),
    "webp_orientation6.webp": ("WEBP", "RGB", 128, 128, 6),
    "webp_photo.webp": ("WEBP", "RGB", 1024, 772, 1),
    "ycck_marker_3channel.jpg": ("JPEG", "RGB", 310, 384, 1),
}

# Every file of the awkward folder that does not decode, and why.
AWKWARD_BAD = {
    "avif.avif": "content is AVIF; wanted one of BMP, GIF, JPEG, PNG, TIFF, WEBP",
    "bomb.gif": "65535x66601 is 4364696535 pixels, more than `max_pixels` 89000000",
    "bomb_65536.png": "65536x65536 is 4294967296 pixels, more than `max_pixels` 89000000",
    "bomb_giant.jpg": "20000x14000 is 280000000 pixels, more than `max_pixels` 89000000",
    "broken.png": "PNG: broken PNG file",
    "broken_data_stream.png": "PNG: unrecognized data stream",
    "corrupt_header.jpg": "JPEG: no frame header before the first scan",
    "cut_tench.JPEG": "JPEG: Image is incomplete or truncated",
    "empty.jpg": "the file is empty",
    "html_inside.jpg": "begins with b'<!DOCTYP', which is none of",
    "jpeg_12bit.jpg": "JPEG: cannot handle 12-bit",
    "lossless_jpeg_16bit.jpg": "JPEG: cannot handle 16-bit",
    "tm_5145e95a-02a8-11e7-8372-4787a7307ab8.jpg": "which is none of",
    "tm_514c48ea-02a8-11e7-8789-bb75321f404f.jpg": "no frame header before the first scan",
    "tm_broken-adobe-marker-bad-length.jpg": "no frame header before the first scan",
    "tm_broken-bogus-data-prepended-real-jfif-start-at-4801.jpg": "no frame header",
    "tm_broken-bogus-segment-length.jpg": "JPEG: Bogus marker length",
    "tm_broken-no-sof-ascii-transfer-mode.jpg": "no frame header before the first scan",
    "tm_broken-sos-before-sof.jpg": "no frame header before the first scan",
    "truncated.jpg": "JPEG: Image is incomplete or truncated",
    "truncated.png": "PNG: image file is truncated",
    "truncated_pillow.jpg": "JPEG: Image is incomplete or truncated",
}


def encoded(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def pillow_pixels(data: bytes, *, turned: bool = False) -> torch.Tensor:
    """What `Image.open(...).convert("RGB")` gives, 16-bit grey scaled by its definition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode.startswith("I;16"):
                grey = np.floor(np.asarray(image).astype(np.float64) * 255 / 65535 + 0.5)
                rgb = np.stack([grey.astype(np.uint8)] * 3, axis=2)
            else:
                upright = ImageOps.exif_transpose(image) if turned else image
                rgb = np.array(upright.convert("RGB"))
    return torch.from_numpy(rgb).permute(2, 0, 1)


def max_difference(image: DecodedImage, expected: torch.Tensor) -> int:
    assert image.pixels.shape == expected.shape
    return int((image.pixels.int() - expected.int()).abs().max())


# --- real files -----------------------------------------------------------------------------------


def test_the_awkward_table_names_every_file(shared_data: Path) -> None:
    names = {path.name for path in (shared_data / "awkward").iterdir()} - {"README.md"}
    assert names == AWKWARD_OK.keys() | AWKWARD_BAD.keys()


@pytest.mark.parametrize("name", AWKWARD_OK)
def test_awkward_file_decodes_as_pillow_has_it(shared_data: Path, name: str) -> None:
    data = (shared_data / "awkward" / name).read_bytes()
    image = decode_image(data, SPEC)
    found = (image.format, image.mode, image.width, image.height, image.orientation)
    assert found == AWKWARD_OK[name]
    assert image.pixels.dtype == torch.uint8
    assert image.pixels.is_contiguous()
    # Measured: torchvision and Pillow agree to the last bit on all of these.
    assert max_difference(image, pillow_pixels(data)) == 0


@pytest.mark.parametrize("name", [n for n, row in AWKWARD_OK.items() if row[4] != 1])
def test_awkward_file_is_turned_where_exif_is_applied(shared_data: Path, name: str) -> None:
    data = (shared_data / "awkward" / name).read_bytes()
    image = decode_image(data, APPLY)
    assert (image.width, image.height) == AWKWARD_OK[name][2:4]
    assert max_difference(image, pillow_pixels(data, turned=True)) == 0


@pytest.mark.parametrize("name", AWKWARD_BAD)
def test_awkward_file_is_refused_with_one_line(shared_data: Path, name: str) -> None:
    data = (shared_data / "awkward" / name).read_bytes()
    with pytest.raises(ImageDecodeError) as caught:
        decode_image(data, SPEC)
    assert AWKWARD_BAD[name] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert ".cpp" not in str(caught.value)


def test_torchvision_differs_from_pillow_by_at_most_one_level(shared_data: Path) -> None:
    # 0 on all 1,000 flowers with torchvision 0.29.2 and Pillow 13.0.0; 1 leaves room for another
    # libjpeg-turbo in one of them.
    for path in sorted((shared_data / "flowers").glob("*/*.jpg"))[::20]:
        data = path.read_bytes()
        assert max_difference(decode_image(data, SPEC), pillow_pixels(data)) <= 1, path.name


# --- formats and modes ----------------------------------------------------------------------------

SMALL = picture(1, width=37, height=29)
HALF_CLEAR = picture(2, width=37, height=29).convert("RGBA")
HALF_CLEAR.putalpha(SMALL.convert("L"))
PALETTE = SMALL.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)

GENERATED = {
    "jpeg": (encoded(SMALL, "JPEG"), "JPEG", "RGB"),
    "jpeg progressive": (encoded(SMALL, "JPEG", progressive=True), "JPEG", "RGB"),
    "jpeg 4:4:4": (encoded(SMALL, "JPEG", subsampling=0), "JPEG", "RGB"),
    "jpeg kept RGB": (encoded(SMALL, "JPEG", keep_rgb=True), "JPEG", "RGB"),
    "jpeg restarts": (encoded(SMALL, "JPEG", restart_marker_blocks=1), "JPEG", "RGB"),
    "jpeg grey": (encoded(SMALL.convert("L"), "JPEG"), "JPEG", "L"),
    "jpeg cmyk": (encoded(SMALL.convert("CMYK"), "JPEG"), "JPEG", "CMYK"),
    "jpeg trailing bytes": (encoded(SMALL, "JPEG") + b"trailing", "JPEG", "RGB"),
    "mpo": (
        encoded(SMALL, "MPO", save_all=True, append_images=[picture(3, 37, 29)]),
        "JPEG",
        "RGB",
    ),
    "png": (encoded(SMALL, "PNG"), "PNG", "RGB"),
    "png 1 bit": (encoded(SMALL.convert("1"), "PNG"), "PNG", "1"),
    "png grey": (encoded(SMALL.convert("L"), "PNG"), "PNG", "L"),
    "png grey alpha": (encoded(SMALL.convert("LA"), "PNG"), "PNG", "LA"),
    "png alpha": (encoded(HALF_CLEAR, "PNG"), "PNG", "RGBA"),
    "png palette": (encoded(PALETTE, "PNG"), "PNG", "P"),
    "png palette clear index": (encoded(PALETTE, "PNG", transparency=3), "PNG", "P"),
    "png palette alphas": (
        encoded(PALETTE, "PNG", transparency=bytes(range(0, 160, 10))),
        "PNG",
        "P",
    ),
    "png rgb clear colour": (encoded(SMALL, "PNG", transparency=(1, 2, 3)), "PNG", "RGB"),
    "png animated": (
        encoded(HALF_CLEAR, "PNG", save_all=True, append_images=[SMALL.convert("RGBA")], blend=1),
        "PNG",
        "RGBA",
    ),
    "png animated without default": (
        encoded(
            SMALL, "PNG", save_all=True, append_images=[picture(4, 37, 29)], default_image=True
        ),
        "PNG",
        "RGB",
    ),
    "webp": (encoded(SMALL, "WEBP"), "WEBP", "RGB"),
    "webp lossless": (encoded(SMALL, "WEBP", lossless=True), "WEBP", "RGB"),
    "webp alpha": (encoded(HALF_CLEAR, "WEBP"), "WEBP", "RGBA"),
    "webp animated": (
        encoded(SMALL, "WEBP", save_all=True, append_images=[picture(5, 37, 29)]),
        "WEBP",
        "RGB",
    ),
    "bmp": (encoded(SMALL, "BMP"), "BMP", "RGB"),
    "bmp palette": (encoded(PALETTE, "BMP"), "BMP", "P"),
    "bmp 1 bit": (encoded(SMALL.convert("1"), "BMP"), "BMP", "1"),
    "gif": (encoded(PALETTE, "GIF"), "GIF", "P"),
    "gif clear": (encoded(PALETTE, "GIF", transparency=2), "GIF", "P"),
    "gif animated": (
        encoded(PALETTE, "GIF", save_all=True, append_images=[picture(6, 37, 29)], disposal=2),
        "GIF",
        "P",
    ),
    "tiff": (encoded(SMALL, "TIFF"), "TIFF", "RGB"),
    "tiff lzw": (encoded(SMALL, "TIFF", compression="tiff_lzw"), "TIFF", "RGB"),
    "tiff jpeg": (encoded(SMALL, "TIFF", compression="jpeg"), "TIFF", "RGB"),
    "tiff deflate tiles": (
        encoded(SMALL, "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 5}),
        "TIFF",
        "RGB",
    ),
    "tiff big": (encoded(SMALL, "TIFF", big_tiff=True), "TIFF", "RGB"),
    "tiff 1 bit fax": (encoded(SMALL.convert("1"), "TIFF", compression="group4"), "TIFF", "1"),
    "tiff grey alpha": (encoded(SMALL.convert("LA"), "TIFF"), "TIFF", "LA"),
    "tiff palette": (encoded(PALETTE, "TIFF"), "TIFF", "P"),
    "tiff alpha": (encoded(HALF_CLEAR, "TIFF"), "TIFF", "RGBA"),
    "tiff cmyk": (encoded(SMALL.convert("CMYK"), "TIFF"), "TIFF", "CMYK"),
    "tiff frames": (
        encoded(SMALL, "TIFF", save_all=True, append_images=[picture(7, 20, 10)]),
        "TIFF",
        "RGB",
    ),
}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_file_decodes_as_pillow_has_it_without_a_warning(name: str) -> None:
    data, format_name, mode = GENERATED[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decode_image(data, SPEC)
    assert not caught
    assert (image.format, image.mode) == (format_name, mode)
    assert (image.width, image.height, image.orientation) == (37, 29, 1)
    assert max_difference(image, pillow_pixels(data)) == 0


WIDE = (np.arange(29 * 37, dtype=np.uint32) * 65535 // (29 * 37 - 1)).astype(np.uint16)
WIDE = WIDE.reshape(29, 37)


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encoded(Image.fromarray(WIDE), "PNG"), "I;16"),
        (encoded(Image.fromarray(WIDE), "TIFF"), "I;16"),
        (encoded(Image.fromarray(WIDE.astype(">u2")), "TIFF"), "I;16B"),
        (encoded(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"), "I;16"),
    ],
    ids=["png", "tiff", "tiff big-endian", "tiff lzw"],
)
def test_16_bit_grey_is_scaled_and_rounded(data: bytes, mode: str) -> None:
    image = decode_image(data, SPEC)
    assert image.mode == mode
    exact = np.floor(WIDE.astype(np.float64) * 255 / 65535 + 0.5)
    for plane in image.pixels:
        assert np.array_equal(plane.numpy(), exact)


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_a_range_are_refused(kind: type, mode: str) -> None:
    data = encoded(Image.fromarray(WIDE.astype(kind)), "TIFF")
    with pytest.raises(ImageDecodeError, match=rf"\(mode {mode}\) have no defined range"):
        decode_image(data, SPEC)


# --- orientation ----------------------------------------------------------------------------------


def exif_with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_turns_pixels_only_where_it_is_applied(name: str, orientation: int) -> None:
    stored = decode_image(encoded(SMALL, name), SPEC).pixels
    if name == "TIFF":
        data = encoded(SMALL, name, tiffinfo={0x0112: orientation})
    else:
        data = encoded(SMALL, name, exif=exif_with_orientation(orientation))
    ignored, applied = decode_image(data, SPEC), decode_image(data, APPLY)
    assert ignored.orientation == applied.orientation == orientation
    assert (ignored.width, ignored.height) == (applied.width, applied.height) == (37, 29)
    assert torch.equal(ignored.pixels, stored)
    assert max_difference(applied, pillow_pixels(data, turned=True)) == 0
    assert applied.pixels.is_contiguous()


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_pixels_own_their_memory(name: str) -> None:
    data = GENERATED[name][0]
    image = decode_image(data, SPEC)
    assert image.pixels.is_contiguous()
    assert image.pixels.untyped_storage().nbytes() == image.pixels.numel()
    before = image.pixels.clone()
    image.pixels.fill_(7)
    assert torch.equal(decode_image(data, SPEC).pixels, before)


def test_many_threads_decode_the_same_pixels() -> None:
    items = [GENERATED[name][0] for name in GENERATED] * 6
    alone = [decode_image(data, APPLY).pixels for data in items]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode_image(data, APPLY).pixels, items))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_lenient_pillow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UsageError, match="truncated images would be cached as if they were whole"):
        decode_image(GENERATED["png"][0], SPEC)


def test_a_torchvision_without_jpeg_is_no_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "image", object())
    with pytest.raises(MissingDependencyError, match="has no JPEG decoder"):
        decode_image(GENERATED["jpeg"][0], SPEC)


def test_decoder_name_holds_base_versions() -> None:
    name = decoder_name()
    assert name.startswith("torchvision ")
    assert " + pillow " in name
    assert "+" not in name.replace(" + ", " ")
