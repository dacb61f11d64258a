"""Which files count as images, by their names or else by their first bytes."""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH122

from __future__ import annotations

import os

from ci2p_cache.errors import CacheError
from ci2p_cache.images.headers import foreign_format, sniff_format
from ci2p_cache.images.listing import walk
from ci2p_cache.images.names import join
from ci2p_cache.images.tally import Tally

__all__ = ["IMAGE_SUFFIXES", "SNIFF_BYTES", "has_image", "is_image", "is_image_content"]

IMAGE_SUFFIXES = frozenset(
    {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff"}
)
"""What names of images end in, in lower case."""

_FOREIGN_SUFFIXES = frozenset(
    {b".avif", b".heic", b".heif", b".jxl", b".jp2", b".j2k", b".svg", b".psd", b".ico", b".tga"}
    | {b".ppm", b".pgm", b".pbm", b".pnm", b".exr", b".hdr", b".dng", b".cr2", b".nef", b".arw"}
)

SNIFF_BYTES = 16
"""How much of a file `is_image_content` wants to see."""


def is_image(root: bytes, path: bytes, tally: Tally) -> bool:
    """Whether a regular file counts as an image.

    Known suffixes are believed (a wrong one shows when the content is decoded); other files count
    if their first bytes are of an allowed format, and are tallied if not.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    try:
        descriptor = os.open(join(root, path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            prefix = os.read(descriptor, SNIFF_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        tally.add("unreadable", path)
        return False
    return is_image_content(path, prefix, tally)


def has_image(root: bytes, folder: bytes) -> bool:
    """Whether a folder holds an image at any depth; one that cannot be listed may hold one.

    Args:
        root: Absolute path of the source.
        folder: Path below it.
    """
    try:
        with os.scandir(join(root, folder)) as entries:
            # Most often the first entry is one, and the others need not be listed.
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in IMAGE_SUFFIXES and entry.name[:1] != b"." and entry.is_file():
                    return True
        return any(is_image(root, path, Tally()) for path in walk(root, folder, Tally()))
    except (OSError, CacheError):
        return True


def is_image_content(path: bytes, prefix: bytes, tally: Tally) -> bool:
    """Whether the first bytes are of an allowed format; if not, the file is tallied."""
    if sniff_format(prefix) is not None:
        return True
    suffix = os.path.splitext(path)[1].lower()
    foreign = foreign_format(prefix)
    if suffix in _FOREIGN_SUFFIXES:
        tally.add_foreign(suffix.decode(), path)
    elif foreign is not None:
        tally.add_foreign(foreign, path)
    else:
        tally.add("ignored", path)
    return False
