"""What the latents of a cache still show: samples decoded again, and held to the originals.

Decoding takes the cache's own encoder.safetensors; the originals come from the source, where it is
still there and unchanged. The report's samples are drawn with a fixed seed and decoded one at a
time, so the same cache gives the same pictures, and a large one takes no more memory than a small
one.

Shape suffixes: V views, M latent channels, h w latent rows and columns, C H W of pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.index import IndexRow
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import read_row
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_recorded_encoder
from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError, UsageError
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.locate import open_reader
from ci2p_cache.images.source import ImageReader
from ci2p_cache.record import Record
from ci2p_cache.remote import url_of

__all__ = [
    "JPEG_QUALITY",
    "CacheSample",
    "Images",
    "LatentIllustrator",
    "MeasuredRow",
    "Reconstruction",
    "decode_row",
    "jpeg_bytes",
    "load_decoder",
    "opened_images",
    "pixels",
]

JPEG_QUALITY = 90
"""What FFCV stores ImageNet with (Leclerc et al. 2023, arXiv 2306.12517): the usual small copy."""

_SAMPLE_SEED = 0
_SHOWN_PX, _THUMBNAIL_PX = 256, 112
"""Reconstructions are shown pixel by pixel at the usual size; a thumbnail shows its subject."""
_SHOWN_QUALITY, _THUMBNAIL_QUALITY = 92, 85
"""High where small differences are what is looked at, low where they are not."""

SourceState = Literal["unchanged", "changed", "missing"]
_Group = Literal["worst", "median", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRow(Record):
    """What the first views of a sample show; tuples have one entry per view."""

    split: str
    """Its split."""
    row: int
    """Its row in the split."""
    key: str
    """Its name within the split."""
    class_title: str
    """Its class, for humans."""
    source: SourceState
    """Whether the original could be read again and is still the file that was encoded."""
    psnr_db: tuple[float | None, ...]
    """PSNR of the reconstruction, clamped to [0, 1], in dB; None without the original."""
    bpp: tuple[float | None, ...]
    """Bits per pixel by the entropy model; of the rounded latents where floats are stored; None for
    encoders without symbols."""
    stored_bytes: tuple[int, ...]
    """Bytes on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """A sample that is shown: the original view and what g_s makes of its latent."""

    group: _Group
    """Why it is shown: worst or median by PSNR, or drawn at random."""
    measured: MeasuredRow
    """Its figures."""
    original: bytes | None
    """The view that was encoded, a JPEG; None where the source is gone."""
    decoded: bytes
    """The view decoded from the cache, a JPEG."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSample:
    """A seeded sample of the rows of one split, view 0 of each measured."""

    split: str
    """Its split."""
    rows: tuple[MeasuredRow, ...]
    """In row order."""
    jpeg_bytes: tuple[int, ...]
    """Bytes of each original view that is known, as JPEG of quality 90."""
    shown: tuple[Reconstruction, ...]
    """Worst and median by PSNR, and random ones."""


class LatentIllustrator:
    """Decodes latents for the report.

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
        splits = sorted(cache.values(), key=lambda split: split.name != "val")
        split = next((each for each in splits if len(each.valid_rows)), None)
        if split is None:
            return None
        known = split.valid_rows
        rng = np.random.default_rng(_SAMPLE_SEED)
        rows = np.sort(rng.choice(known, min(self._num_samples, len(known)), replace=False))
        decoder = self._decoder(cache)
        measured, jpegs, shown = [], [], []
        with ExitStack() as stack:
            images = None
            if self._source is not None or url_of(cache.manifest.source) is None:
                images = stack.enter_context(opened_images(cache, self._source))
            for row in rows.tolist():
                one, _, _, originals = decode_row(split, row, 1, images, decoder)
                measured.append(one)
                if originals is not None:
                    jpegs.append(len(jpeg_bytes(pixels(originals[0]))))
            for group, chosen in _choose(measured, num_shown, rng):
                _, _, decoded, originals = decode_row(split, chosen.row, 1, images, decoder)
                original = None
                if originals is not None:
                    original = _picture(originals[0], _SHOWN_PX, _SHOWN_QUALITY)
                picture = _picture(decoded[0], _SHOWN_PX, _SHOWN_QUALITY)
                shown.append(
                    Reconstruction(group=group, measured=chosen, original=original, decoded=picture)
                )
        return CacheSample(
            split=split.name, rows=tuple(measured), jpeg_bytes=tuple(jpegs), shown=tuple(shown)
        )

    def thumbnails(self, cache: Cache, split: str, rows: Sequence[int]) -> list[bytes]:
        """Decodes view 0 of rows as JPEGs of 112 px, in the order of `rows`.

        Raises:
            ShardError: a shard is damaged, or a row holds no latent.
            WeightsError, DigestError: the cache's encoder is damaged or another.
        """
        decode = self._decoder(cache).decode
        return [
            _picture(
                decode(_stored_latents(cache[split], row, 1))[0], _THUMBNAIL_PX, _THUMBNAIL_QUALITY
            )
            for row in rows
        ]

    def _decoder(self, cache: Cache) -> FrozenEncoder:
        digest = cache.manifest.encoder.sha256
        if digest not in self._decoders:
            self._decoders[digest] = load_decoder(cache)
        return self._decoders[digest]


def _choose(
    rows: Sequence[MeasuredRow], count: int, rng: np.random.Generator
) -> list[tuple[_Group, MeasuredRow]]:
    """Returns the worst and the median rows by PSNR, then random others; none twice."""
    ranked = sorted(
        (row for row in rows if row.psnr_db[0] is not None),
        key=lambda row: (row.psnr_db[0] or 0.0, row.row),
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


def _picture(view_CHW: Tensor, side_px: int, quality: int) -> bytes:
    """Returns a view as a JPEG of at most `side_px` a side."""
    shown = Image.fromarray(pixels(view_CHW))
    if max(shown.size) > side_px:
        shown.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    # 4:4:4: halved colours would be taken for the codec's.
    shown.save(sink, "JPEG", quality=quality, optimize=True, subsampling=0)
    return sink.getvalue()


def load_decoder(cache: CacheFolder) -> FrozenEncoder:
    """Loads the cache's own encoder for decoding alone, on the CPU.

    Raises:
        WeightsError: the cache's encoder.safetensors is damaged.
        DigestError: it is another encoder than the one that made the latents.
    """
    # Only g_s is used, which runs in float32 whatever g_a ran in.
    spec = dataclasses.replace(cache.fingerprint.encoder, precision="float32")
    return load_recorded_encoder(cache.encoder_path, spec)


Images = tuple[ImageReader, Decoders]
"""The images that a cache was made from, and the process that decodes them."""


@contextmanager
def opened_images(cache: CacheFolder, source: str | Path | None = None) -> Iterator[Images | None]:
    """Opens the images that a cache was made from; None where they are no longer there.

    Raises:
        SourceError: `source`, where the images are now, is given and cannot be opened.
    """
    try:
        reader = open_reader(cache.manifest.source if source is None else source)
    except (SourceError, ResourceError):
        if source is not None:
            raise
        yield None
        return
    decoders = Decoders(cache.fingerprint.image, cache.fingerprint.views)
    try:
        yield reader, decoders
    finally:
        decoders.close()


def decode_row(
    split: Split, row: int, num_views: int, images: Images | None, decoder: FrozenEncoder
) -> tuple[MeasuredRow, Tensor, Tensor, Tensor | None]:
    """Reads, decodes and measures the first views of a sample that holds a latent.

    Returns:
        Their figures; the dequantised latents, float32 (V, M, h, w); what g_s makes of them,
        float32 (V, 3, H, W) in [0, 1]; and all views that were encoded, uint8, or None where the
        source does not have them any more.

    Raises:
        ShardError: its shard or index part is missing or damaged.
    """
    entry = read_row(split, row)
    originals, source = _original_views(split, entry, images)
    y_VMhw = _stored_latents(split, row, num_views)
    decoded_VCHW = decoder.decode(y_VMhw).clamp(0, 1)
    bpp: tuple[float | None, ...] = (None,) * num_views
    if decoder.has_symbols:
        # Floats are counted as if they were rounded at step 1.
        step, size = split.latent.step, split.cache.fingerprint.image.size
        y_hat_VMhw = decoder.dequantize(decoder.quantize(y_VMhw, step=step), step=step)
        bpp = tuple((decoder.bits(y_hat_VMhw, step=step) / size**2).tolist())
    shard, offset = divmod(row, split.record.shard_rows)
    first = offset * split.num_views
    measured = MeasuredRow(
        split=split.name,
        row=row,
        key=entry.key,
        class_title=split.cache.class_titles[entry.label] if entry.label >= 0 else "",
        source=source,
        psnr_db=tuple(
            None if originals is None else _psnr_db(decoded_VCHW[view], originals[view])
            for view in range(num_views)
        ),
        bpp=bpp,
        stored_bytes=tuple(
            split.open_shard(shard).stored_bytes(first + view) for view in range(num_views)
        ),
    )
    return measured, y_VMhw, decoded_VCHW, originals


def _original_views(
    split: Split, entry: IndexRow, images: Images | None
) -> tuple[Tensor | None, SourceState]:
    """Reads the views of a sample's image again, uint8 (V, 3, H, W), if it is what was encoded."""
    if images is None:
        return None, "missing"
    reader, decoders = images
    try:
        data = reader.read(entry.path_bytes)
    except (ImageDecodeError, ResourceError):
        return None, "missing"
    if hashlib.sha256(data).hexdigest() != entry.source_sha256:
        return None, "changed"
    try:
        return decoders.decode(data, split=split.name, key=entry.key).views, "unchanged"
    except ImageDecodeError:
        # It was decoded once: here its decoder crashes, or is another one.
        return None, "missing"


def _stored_latents(split: Split, row: int, num_views: int) -> Tensor:
    """Returns the first dequantised latents of a row, float32 (V, M, h, w)."""
    stored = np.empty((num_views, *split.latent.shape), split.latent.dtype)
    for view in range(num_views):
        split.read_into(row, view, stored[view])
    y_VMhw = torch.from_numpy(stored.astype(np.float32))
    if split.latent.is_symbols:
        y_VMhw.mul_(split.scale).add_(torch.from_numpy(split.offset)[:, None, None])
    return y_VMhw


def _psnr_db(decoded_CHW: Tensor, original_CHW: Tensor) -> float:
    """Returns 10 log10(1 / MSE) of floats in [0, 1] against uint8, 99 dB where they are equal."""
    error = decoded_CHW.double() - original_CHW.double() / 255
    mean_square = float(error.square().mean())
    return -10 * math.log10(max(mean_square, 10**-9.9))


def pixels(view_CHW: Tensor) -> npt.NDArray[np.uint8]:
    """Returns a view (3, H, W), uint8 or floats in [0, 1], as rounded uint8 (H, W, 3)."""
    if view_CHW.dtype != torch.uint8:
        view_CHW = view_CHW.clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.asarray(view_CHW.permute(1, 2, 0).numpy(), np.uint8)


def jpeg_bytes(view_HWC: npt.NDArray[np.uint8], *, quality: int = JPEG_QUALITY) -> bytes:
    """Returns pixels, uint8 (H, W, 3), as Pillow's JPEG: 4:2:0, baseline, no optimised tables."""
    sink = io.BytesIO()
    Image.fromarray(view_HWC).save(sink, "JPEG", quality=quality)
    return sink.getvalue()
