"""Pictures for the report, decoded from the latents of a cache by the cache's own encoder.

Samples are drawn with a fixed seed and decoded one at a time, so the same cache gives the same
pictures, and a large one takes no more memory than a small one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import read_row
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.errors import UsageError
from ci2p_cache.images.source import ImageReader
from ci2p_cache.reconstructions import (
    bits_per_pixel,
    decoded_pixels,
    jpeg_bytes,
    load_decoder,
    open_images,
    original_views,
    psnr_db,
    stored_latent,
)
from ci2p_cache.remote import url_of
from ci2p_cache.report.pictures import CacheSample, MeasuredRow, Picture, Reconstruction

__all__ = ["LatentIllustrator"]

_SAMPLE_SEED = 0
_SHOWN_PX, _THUMBNAIL_PX = 256, 112
"""Reconstructions are shown pixel by pixel at the usual size; a thumbnail shows its subject."""
_SHOWN_QUALITY, _THUMBNAIL_QUALITY = 92, 85
"""High where small differences are what is looked at, low where they are not."""


class LatentIllustrator:
    """Decodes latents for the report; see `report.pictures.Illustrator`.

    Args:
        source: Where the images are now; None: where they were when a cache was made, unless that
            is a URL, from which a report fetches nothing.
        num_samples: Rows measured of each cache: 64 give the mean PSNR to about 0.3 dB.

    Raises:
        UsageError: `num_samples` is not positive.
    """

    def __init__(self, *, source: str | Path | None = None, num_samples: int = 64) -> None:
        if num_samples < 1:
            raise UsageError(f"`num_samples` is {num_samples}; it must be at least 1")
        self._source = source
        self._num_samples = num_samples
        self._decoders: dict[str, FrozenEncoder] = {}

    def measure(self, cache: Cache, *, num_shown: int) -> CacheSample | None:
        """Measures a seeded sample of one split, val where there is one; None without a latent.

        Raises:
            SourceError: the source was given and cannot be opened.
            ShardError: a shard or index part is damaged.
            WeightsError, DigestError: the cache's encoder is damaged or another.
        """
        split = next((s for s in (*self._val_first(cache),) if len(s.valid_rows)), None)
        if split is None:
            return None
        known = split.valid_rows
        rng = np.random.default_rng(_SAMPLE_SEED)
        count = min(self._num_samples, len(known))
        rows = np.sort(rng.choice(known, count, replace=False)).tolist()
        images = self._images(cache)
        measured = tuple(self._measured(split, row, images) for row in rows)
        chosen = _choose(measured, num_shown, rng)
        shown = tuple(self._shown(split, one, group, images) for group, one in chosen)
        return CacheSample(split=split.name, rows=measured, shown=shown)

    def thumbnails(self, cache: Cache, split: str, rows: Sequence[int]) -> list[Picture]:
        """Decodes view 0 of rows as pictures of 112 px, in the order of `rows`.

        Raises:
            ShardError: a shard is damaged, or a row holds no latent.
            WeightsError, DigestError: the cache's encoder is damaged or another.
        """
        return [
            _picture(self._decoded(cache[split], row), _THUMBNAIL_PX, _THUMBNAIL_QUALITY)
            for row in rows
        ]

    @staticmethod
    def _val_first(cache: Cache) -> list[Split]:
        return sorted(cache.values(), key=lambda split: split.name != "val")

    def _images(self, cache: Cache) -> ImageReader | None:
        if self._source is None and url_of(cache.manifest.source) is not None:
            return None
        return open_images(cache, self._source)

    def _decoder(self, cache: CacheFolder) -> FrozenEncoder:
        digest = cache.manifest.encoder.sha256
        if digest not in self._decoders:
            self._decoders[digest] = load_decoder(cache)
        return self._decoders[digest]

    def _decoded(self, split: Split, row: int) -> npt.NDArray[np.uint8]:
        decoder = self._decoder(split.cache)
        return decoded_pixels(decoder.decode(stored_latent(split, row, 0)[None])[0])

    def _measured(self, split: Split, row: int, images: ImageReader | None) -> MeasuredRow:
        entry = read_row(split, row)
        views, state = original_views(split, entry, images)
        decoder = self._decoder(split.cache)
        y_Mhw = stored_latent(split, row, 0)
        (bpp,) = bits_per_pixel(split, decoder, y_Mhw[None])
        shard, offset = divmod(row, split.record.shard_rows)
        psnr = jpeg = None
        if views is not None:
            psnr = psnr_db(decoder.decode(y_Mhw[None])[0].clamp(0, 1), views[0])
            jpeg = len(jpeg_bytes(views[0].permute(1, 2, 0).numpy()))
        return MeasuredRow(
            row=row,
            psnr_db=psnr,
            bound_bytes=None if bpp is None else bpp * split.cache.fingerprint.image.size**2 / 8,
            stored_bytes=split.open_shard(shard).stored_bytes(offset * split.num_views),
            jpeg_bytes=jpeg,
            source=state,
        )

    def _shown(
        self,
        split: Split,
        measured: MeasuredRow,
        group: Literal["worst", "median", "random"],
        images: ImageReader | None,
    ) -> Reconstruction:
        entry = read_row(split, measured.row)
        views, _ = original_views(split, entry, images)
        original = None
        if views is not None:
            pixels = np.asarray(views[0].permute(1, 2, 0).numpy(), np.uint8)
            original = _picture(pixels, _SHOWN_PX, _SHOWN_QUALITY)
        return Reconstruction(
            group=group,
            measured=measured,
            key=entry.key,
            class_title=split.cache.class_titles[entry.label] if entry.label >= 0 else "",
            original=original,
            decoded=_picture(self._decoded(split, measured.row), _SHOWN_PX, _SHOWN_QUALITY),
        )


def _choose(
    rows: Sequence[MeasuredRow], count: int, rng: np.random.Generator
) -> list[tuple[Literal["worst", "median", "random"], MeasuredRow]]:
    """Returns the worst and the median rows by PSNR, then random others; none twice."""
    ranked = sorted(
        (row for row in rows if row.psnr_db is not None),
        key=lambda row: (row.psnr_db or 0.0, row.row),
    )
    worst = ranked[:count]
    # The middles of the ranking that are not among the worst.
    middle = max((len(ranked) - count) // 2, len(worst))
    median = ranked[middle : middle + count]
    taken = {row.row for row in (*worst, *median)}
    left = [row for row in rows if row.row not in taken]
    order = rng.permutation(len(left))[:count]
    return [
        *(("worst", row) for row in worst),
        *(("median", row) for row in median),
        *(("random", left[i]) for i in sorted(order)),
    ]


def _picture(pixels: npt.NDArray[np.uint8], side_px: int, quality: int) -> Picture:
    """Returns pixels, uint8 (H, W, 3), as a JPEG of at most `side_px` a side."""
    shown = Image.fromarray(pixels)
    if max(shown.size) > side_px:
        shown.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    # 4:4:4: halved colours would be taken for the codec's.
    shown.save(sink, "JPEG", quality=quality, optimize=True, subsampling=0)
    return Picture(jpeg=sink.getvalue(), width_px=shown.width, height_px=shown.height)
