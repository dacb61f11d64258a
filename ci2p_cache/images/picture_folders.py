"""Pictures of plain folders, without classes or splits: what a codec is trained and measured on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from torch import Tensor

from ci2p_cache.errors import ImageDecodeError, SourceError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.names import Tally, for_display
from ci2p_cache.images.reading import read_file
from ci2p_cache.images.tree import DiskTree
from ci2p_cache.specs import ImageSpec

__all__ = ["PictureFolders"]

_HELD_BYTES = 4 * 2**30
"""Limit for decoded pictures in memory."""


class PictureFolders(Sequence[Tensor]):
    """Pictures of some folders, uint8 (3, H, W) each, as they were decoded.

    Decoded once to find out which can be used; up to 4 GiB of them stay in memory, the others are
    decoded again whenever they are asked for.

    Args:
        folders: Folder and how often its pictures are drawn, as (path, times).
        shortest_px: Pictures with a shorter side are left out.

    Raises:
        SourceError: a folder is none, or no picture in them can be used.
        ResourceError: reading failed again and again.
    """

    draws: list[float]
    """How often each picture is drawn."""
    counts: list[int]
    """Pictures of each folder that can be used."""
    left_out: list[str]
    """Pictures that cannot be used, each with its reason."""
    notices: list[str]
    """What else a user should know, one sentence each."""
    digest: str
    """sha256 over the contents and how often they are drawn, 64 hex digits."""

    def __init__(self, folders: Sequence[tuple[Path, float]], *, shortest_px: int) -> None:
        # Only the decoder's own fields matter here: nothing is resized.
        spec = ImageSpec(exif="apply", decoder=decoder_name())
        self._decoders = Decoders(spec).end_with(self)
        self._paths: list[tuple[bytes, bytes]] = []
        self._pixels: list[Tensor | None] = []
        self.draws, self.counts, self.left_out, self.notices = [], [], [], []
        digest = hashlib.sha256()
        room = _HELD_BYTES
        for folder, times in folders:
            before = len(self._paths)
            for root, path in self._listed(folder):
                content = read_file(root, path)
                pixels = self._usable(path, content, shortest_px)
                if pixels is None:
                    continue
                digest.update(hashlib.sha256(content).digest())
                room -= pixels.nbytes
                self._paths.append((root, path))
                self._pixels.append(pixels if room >= 0 else None)
                self.draws.append(times)
            self.counts.append(len(self._paths) - before)
            digest.update(f"/{times}/".encode())
        self.digest = digest.hexdigest()
        if not self._paths:
            names = ", ".join(str(folder) for folder, _ in folders)
            why = f"; the first left out is {self.left_out[0]}" if self.left_out else ""
            raise SourceError(
                f"{names}: no picture that can be used, {len(self.left_out)} left out{why}. Wanted "
                f"JPEG, PNG, WebP, BMP, GIF or TIFF with sides of at least {shortest_px} pixels"
            )

    def _usable(self, path: bytes, content: bytes, shortest_px: int) -> Tensor | None:
        """Returns the pixels of a picture; None where it is left out, which is noted."""
        try:
            pixels = self._decoders.pixels(content)
        except ImageDecodeError as error:
            self.left_out.append(f"{for_display(path)}: {error}")
            return None
        height, width = pixels.shape[1:]
        if min(height, width) < shortest_px:
            self.left_out.append(
                f"{for_display(path)}: {width}x{height}, smaller than {shortest_px}"
            )
            return None
        return pixels

    def _listed(self, folder: Path) -> Iterator[tuple[bytes, bytes]]:
        if not folder.is_dir():
            raise SourceError(f"{folder} is no folder; wanted a folder with pictures in it")
        root, tally = os.fsencode(folder.absolute()), Tally()
        for path in DiskTree(root).images(b"", tally):
            yield root, path
        self.notices += tally.notices()

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pixels = self._pixels[index]
        if pixels is not None:
            return pixels
        return self._decoders.pixels(read_file(*self._paths[index]))
