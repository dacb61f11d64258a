"""Bytes of one image file to RGB pixels, by content and from an allow-list of formats.

::

    bytes -> format, pixels claimed -> 8-bit Huffman JPEG, 1 or 3 components: torchvision --+
             (headers)                 everything else: Pillow, without metadata -----------+
                                                                                            |
    DecodedImage  <-  EXIF orientation, read from the bytes, turned if asked for  <---------+

Decoding comes before EXIF: asking Pillow for the EXIF of `broken_data_stream.png` first makes a
later decode "succeed" on part of the pixels. Nothing here holds state; any number of threads may
decode, and both decoders release the interpreter's lock while they work.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import cast

import numpy as np
import PIL
import torch
from PIL import ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ci2p_cache.errors import ImageDecodeError, MissingDependencyError, UsageError
from ci2p_cache.images.headers import (
    ImageFormat,
    JpegFrame,
    canvas_size,
    exif_orientation,
    foreign_format,
    jpeg_frame,
    sniff_format,
    without_metadata,
)
from ci2p_cache.specs import ImageSpec

__all__ = ["DecodedImage", "decode_image", "decoder_name"]

_PILLOW_CLASSES: dict[ImageFormat, type[ImageFile.ImageFile]] = {
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "TIFF": TiffImageFile,
    "WEBP": WebPImageFile,
}
"""The plug-ins themselves: `Image.open` would warn of large pictures, and try other formats."""

_HUFFMAN_PROCESSES = (0, 1, 2)
"""SOF0, SOF1, SOF2: what torchvision's libjpeg-turbo decodes at 8 bits. It agrees with Pillow to
the last bit on all such files measured (1,000 flowers and the awkward folder)."""

_JPEG_MODES = {1: "L", 3: "RGB"}

_RGB = 3
"""`torchvision.io.ImageReadMode.RGB`."""

_TILE_WIDTH, _TILE_LENGTH = 322, 323

_MAX_STRETCH = 100
"""Up to this ratio of sides an image is always small enough to be resized; see `_check_pixels`."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One decoded image."""

    pixels: torch.Tensor
    """uint8 (3, H, W), 0-255, RGB, owning its memory; turned where EXIF was applied; contiguous
    unless `decode_image` need not make it so."""
    width: int
    """Pixels per row in the file, before any turn."""
    height: int
    """Rows in the file, before any turn."""
    mode: str
    """Pillow's name of the file's pixel kind: RGB, L, CMYK, P, I;16, ..."""
    format: str
    """JPEG, PNG, WEBP, BMP, GIF or TIFF, by content; MPO counts as JPEG."""
    orientation: int
    """EXIF orientation, 1-8; 1 where absent or invalid."""


def decoder_name() -> str:
    """Returns the decoders with their versions, as `ImageSpec.decoder` records them.

    Build tags such as +cpu are left out: they name the device, not another JPEG decoder.
    """
    # Not from the module: importing it takes seconds, and the processes that decode do so.
    torchvision_version = metadata.version("torchvision").partition("+")[0]
    pillow_version = PIL.__version__.partition("+")[0]
    return f"torchvision {torchvision_version} + pillow {pillow_version}"


def decode_image(data: bytes, spec: ImageSpec, *, planar: bool = True) -> DecodedImage:
    """Decodes the first frame of an image file to RGB.

    Grey, palette, alpha and CMYK become RGB as Pillow's `convert("RGB")`, hence torchvision's
    loader, has them: alpha is dropped, profiles are not applied. 16-bit grey is scaled to 8 bits by
    round(v * 255 / 65535); `convert` would clip it. Other 16-bit kinds reach Pillow's 8-bit modes
    by their high bytes. Colours of 32-bit integer or float images have no defined range: refused.

    Args:
        data: The whole file.
        spec: `exif`, `max_pixels` and `resize_side` are used. `exif="ignore"` gives the pixels as
            stored, also for TIFF, which Pillow alone would turn. Whatever `max_pixels` says, Pillow
            warns of GIF and TIFF above `PIL.Image.MAX_IMAGE_PIXELS`, and refuses them and WebP
            above twice that.
        planar: Whether pixels are brought in order plane by plane. Else they are strided as the
            decoder left them, usually pixel by pixel, which `image_views` gives the same views of,
            sooner: JPEGs of 320x240 take 1.25 instead of 1.50 ms in all (one core).

    Raises:
        ImageDecodeError: the content cannot be decoded; the message is one line without a path.
        UsageError: `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set in this process.
        MissingDependencyError: this torchvision has no JPEG decoder.
    """
    jpeg_decoder = _torchvision_jpeg_decoder()
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UsageError(
            "`PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is True in this process; truncated images would "
            "be cached as if they were whole",
            hint="switch PIL.ImageFile.LOAD_TRUNCATED_IMAGES off before encoding",
        )
    name = sniff_format(data)
    if name is None:
        raise ImageDecodeError(_unknown_format(data))
    frame = jpeg_frame(data) if name == "JPEG" else None
    if name == "JPEG" and frame is None:
        raise ImageDecodeError("JPEG: no frame header before the first scan")
    try:
        if frame is not None and _is_plain(frame):
            _check_pixels(frame.width, frame.height, spec)
            pixels, mode = _decode_plain_jpeg(data, frame, jpeg_decoder)
        else:
            pixels, mode = _decode_with_pillow(data, name, spec)
    except ImageDecodeError:
        raise
    except Exception as error:
        # Decoders fail on hostile bytes with nearly any type: SyntaxError, struct.error,
        # ValueError, OSError, RuntimeError, also MemoryError for impossible sizes.
        raise ImageDecodeError(f"{name}: {_reason(error)}") from error
    height, width = pixels.shape[1:]
    orientation = exif_orientation(data, name)
    if spec.exif == "apply":
        pixels = _turned(pixels, orientation)
    if planar:
        pixels = pixels.contiguous()
    return DecodedImage(pixels, width, height, mode, name, orientation)


def _unknown_format(data: bytes) -> str:
    allowed = ", ".join(sorted(_PILLOW_CLASSES))
    if not data:
        return "the file is empty"
    foreign = foreign_format(data)
    if foreign is not None:
        return f"the content is {foreign}; wanted one of {allowed}"
    return f"the content begins with {data[:8]!r}, which is none of {allowed}"


def _is_plain(frame: JpegFrame) -> bool:
    """Whether torchvision decodes it; CMYK, lossless, 12-bit and arithmetic are left to Pillow."""
    return (
        frame.process in _HUFFMAN_PROCESSES
        and frame.precision == 8
        and frame.num_components in _JPEG_MODES
    )


def _check_pixels(width: int, height: int, spec: ImageSpec) -> None:
    """Refuses a size before anything of that size is allocated.

    Raises:
        ImageDecodeError: there are no pixels, or more than `max_pixels`, or the image is so narrow
            that it would have more than that once its shorter side is `resize_side`.
    """
    if width < 1 or height < 1:
        raise ImageDecodeError(f"the header says {width}x{height} pixels; it has no pixels")
    if width * height > spec.max_pixels:
        raise ImageDecodeError(
            f"{width}x{height} is {width * height} pixels, more than `max_pixels` {spec.max_pixels}"
        )
    stretch = max(width, height) / min(width, height)
    resized = int(spec.resize_side**2 * stretch)
    if stretch > _MAX_STRETCH and resized > spec.max_pixels:
        raise ImageDecodeError(
            f"{width}x{height} is too narrow: resized to a shorter side of {spec.resize_side} it "
            f"has {resized} pixels, more than `max_pixels` {spec.max_pixels}"
        )


def _torchvision_jpeg_decoder() -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Returns torchvision's JPEG operator.

    `torchvision.io.decode_jpeg` is the same operator behind a DeprecationWarning on every call
    (0.29 on), which under `-W error` would make every JPEG a bad one.

    Raises:
        MissingDependencyError: torchvision was built without it, or does not fit torch.
    """
    import torchvision.io

    try:
        return cast("Callable[[torch.Tensor, int], torch.Tensor]", torch.ops.image.decode_jpeg)
    except AttributeError as error:
        raise MissingDependencyError(
            f"torchvision {torchvision.__version__} has no JPEG decoder beside torch "
            f"{torch.__version__}; wanted the build that belongs to this torch",
            hint="pip install --force-reinstall torch torchvision",
        ) from error


def _decode_plain_jpeg(
    data: bytes, frame: JpegFrame, decoder: Callable[[torch.Tensor, int], torch.Tensor]
) -> tuple[torch.Tensor, str]:
    """Decodes by torchvision; it raises on truncated files. Returns pixels (3, H, W) and mode."""
    # A copy, because torch warns of buffers that cannot be written to.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decoder(encoded, _RGB)
    assert pixels.shape == (3, frame.height, frame.width), "two readings of one frame header"
    return pixels, _JPEG_MODES[frame.num_components]


def _decode_with_pillow(
    data: bytes, name: ImageFormat, spec: ImageSpec
) -> tuple[torch.Tensor, str]:
    """Decodes the first frame by Pillow. Returns pixels (3, H, W) and the file's mode."""
    canvas = canvas_size(data, name)
    if canvas is not None:
        _check_pixels(*canvas, spec)
    with _PILLOW_CLASSES[name](io.BytesIO(without_metadata(data, name))) as image:
        _check_pixels(image.width, image.height, spec)
        if isinstance(image, TiffImageFile):
            # libtiff allocates whole tiles, however small the image in them.
            tags = image.tag_v2
            _check_pixels(tags.get(_TILE_WIDTH, 1), tags.get(_TILE_LENGTH, 1), spec)
        mode = image.mode
        if mode in ("I", "F"):
            raise ImageDecodeError(
                f"{name}: 32-bit {'float' if mode == 'F' else 'integer'} pixels (mode {mode}) have "
                "no defined range; wanted 8 or 16 bits"
            )
        image.load()
        # convert() would carry the transparent colour over, and warn where it cannot; pixels do
        # not depend on it.
        image.info.pop("transparency", None)
        if mode.startswith("I;16"):
            wide = np.asarray(image).astype(np.uint32)
            grey = ((wide + 128) // 257).astype(np.uint8)
            return torch.from_numpy(np.stack([grey] * 3)), mode
        # The copy makes the tensor own its memory; Pillow's bytes may not be written to.
        rows = np.array(image.convert("RGB"))
    return torch.from_numpy(rows).permute(2, 0, 1), mode


def _turned(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Returns pixels (3, H, W) turned as they should be shown (CIPA DC-008, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels if flips is None else pixels.flip(flips)


def _reason(error: Exception) -> str:
    """Returns a decoder's complaint as one line, without the source file that torch puts first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^.*\.cpp:\d+, ", "", lines[0])[:300]
