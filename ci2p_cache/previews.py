"""Previews: what a cache remembers of its pictures, drawn beside the pictures themselves.

::

    original square | view 0 by g_s | view 1 by g_s | energy by position | energy by channel

The reconstructions come from the stored latents and the cache's own encoder.safetensors; the
originals from the source, where it is still there and unchanged.

Shape suffixes: M latent channels, h w latent rows and columns, C H W of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import describe_row, read_row
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.errors import UsageError
from ci2p_cache.images.source import ImageReader
from ci2p_cache.outputs import check_output, write_whole
from ci2p_cache.preview_figure import MARK, PreviewRow, Square, draw_figure
from ci2p_cache.reconstructions import (
    SourceState,
    bits_per_pixel,
    decoded_pixels,
    load_decoder,
    open_images,
    original_views,
    psnr_db,
    stored_latent,
)
from ci2p_cache.record import Record

__all__ = ["PreviewResult", "PreviewSample", "check_picture", "draw_preview"]

_FORMATS: dict[str, Literal["png", "jpg", "pdf"]] = {
    ".pdf": "pdf",
    ".jpeg": "jpg",
    ".jpg": "jpg",
    ".png": "png",
}
"""Suffix -> what a picture is written as."""

_MAX_SAMPLES = 64
"""More rows of panels make a picture that no viewer opens well."""

_SHOWN_VIEWS = 2
"""The first two views of a sample show what the others are like."""

_STATE_WORDS = {"changed": "has changed", "missing": "not found"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewSample(Record):
    """One row of the picture; tuples have one entry per shown view."""

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
class PreviewResult(Record):
    """What a preview shows."""

    path: str
    """The picture."""
    rounded: bool
    """Whether the stored latents are quantised; if not, nothing was rounded before g_s."""
    samples: tuple[PreviewSample, ...]
    """Its rows, from the top."""


def draw_preview(
    cache: Cache,
    path: str | Path,
    *,
    split: str | None = None,
    rows: Sequence[int] | None = None,
    count: int = 4,
    source: str | Path | None = None,
) -> PreviewResult:
    """Writes a picture of originals, reconstructions and the energy of the latents.

    Args:
        cache: The cache; `encoder.safetensors` in it is the decoder.
        path: The picture to write, .png, .jpg, .jpeg or .pdf. Of the files that may be there only
            an earlier preview is replaced, as a whole.
        split: Which split; None: the first one.
        rows: Which rows; None: `count` rows spread evenly over those that hold a latent.
        count: How many rows if `rows` is None.
        source: Where the images are now; None: where they were when the cache was made, and if
            they are not there the picture says so.

    Raises:
        UsageError: a row does not exist or holds no latent, there are too many or none, or the
            path has another suffix, is a folder, or is in the cache or among its images.
        RefusedError: another file is at the path.
        SourceError: `source` is given and cannot be opened.
        ShardError: a shard or index part is damaged.
        WeightsError: the cache's encoder.safetensors is damaged.
        DigestError: it is another encoder than the one that made the latents.
        ResourceError: the picture cannot be written.
    """
    path = Path(path)
    check_picture(cache, path)
    part = cache[split if split is not None else cache.splits[0]]
    chosen = _chosen_rows(part, rows, count)
    images = open_images(cache, source)
    encoder = load_decoder(cache)
    pairs = [_measure(part, row, images, encoder) for row in chosen]
    picture = draw_figure(
        [panels for _, panels in pairs],
        _headings(part),
        _footer(cache),
        format=_FORMATS[path.suffix.lower()],
    )
    write_whole(path, picture, what="picture")
    return PreviewResult(
        path=str(path),
        rounded=part.latent.is_symbols,
        samples=tuple(sample for sample, _ in pairs),
    )


def check_picture(cache: Cache, path: Path) -> None:
    """Refuses a picture that `draw_preview` must not or cannot write, before it draws.

    Args:
        cache: What the picture is to be of.
        path: The picture.

    Raises:
        UsageError, RefusedError, ResourceError: as `draw_preview` raises them about the path.
    """
    check_output(path, what="picture", suffixes=tuple(_FORMATS), mark=MARK)
    images, folder = Path(cache.manifest.source).resolve(), path.parent.resolve()
    if images.is_dir() and folder != images and folder.is_relative_to(images):
        raise UsageError(
            f"{path} is among the images {images}, where the next `encode --rescan` would take "
            "it for one of them",
            hint="choose another place for the picture",
        )


def _chosen_rows(split: Split, rows: Sequence[int] | None, count: int) -> list[int]:
    """Returns the rows to draw; those asked for are checked when they are read."""
    if rows is None:
        stored = split.valid_rows
        if not len(stored):
            raise UsageError(f"split {split.name!r} of {split.cache.path} holds no latent to draw")
        wanted = min(count, len(stored))
        # The middles of `wanted` equal parts: the first rows are no better than others.
        chosen = [int(stored[(2 * i + 1) * len(stored) // (2 * wanted)]) for i in range(wanted)]
    else:
        chosen = list(rows)
    if not 1 <= len(chosen) <= _MAX_SAMPLES:
        raise UsageError(f"{len(chosen)} samples to draw; 1 to {_MAX_SAMPLES} fit a picture")
    return chosen


def _headings(split: Split) -> list[str]:
    views = split.cache.fingerprint.views
    if split.num_views == 1:
        return ["original", "decoded by g_s"]
    if views.kind == "flip":
        return ["original", "view 0, decoded by g_s", "view 1, the mirror, decoded"]
    return ["view 0, original", "view 0, decoded by g_s", "view 1, original", "view 1, decoded"]


def _footer(cache: Cache) -> tuple[str, str]:
    encoder, latent = cache.fingerprint.encoder, cache.fingerprint.latent
    stored = f"symbols, step {latent.step:g}" if latent.is_symbols else "y, nothing rounded"
    return (
        f"{encoder.arch} quality {encoder.quality} {encoder.metric}, weights "
        f"{encoder.weights_sha256[:12]}   |   {latent.dtype}: {stored}",
        "PSNR after clamping to [0, 1]   |   bpp by the entropy model   |   energy: squares of "
        "view 0 about the medians",
    )


def _measure(
    split: Split, row: int, images: ImageReader | None, encoder: FrozenEncoder
) -> tuple[PreviewSample, PreviewRow]:
    """Reads, decodes and measures one sample."""
    entry = read_row(split, row)
    if entry.status != "ok":
        raise UsageError(
            f"row {row} of split {split.name!r} ({entry.key}) holds no latent: {entry.error}",
            hint=f"choose other rows; {split.cache.path / 'errors.parquet'} lists the bad ones",
        )
    card = describe_row(split, row)
    num_views = min(split.num_views, _SHOWN_VIEWS)
    originals, state = original_views(split, entry, images)
    y_VMhw = torch.stack([stored_latent(split, row, view) for view in range(num_views)])
    decoded_VCHW = encoder.decode(y_VMhw).clamp(0, 1)
    sample = PreviewSample(
        split=split.name,
        row=row,
        key=entry.key,
        class_title=card.class_title,
        source=state,
        psnr_db=tuple(
            None if originals is None else psnr_db(decoded_VCHW[view], originals[view])
            for view in range(num_views)
        ),
        bpp=bits_per_pixel(split, encoder, y_VMhw),
        stored_bytes=tuple(latent.stored_bytes for latent in card.latents[:num_views]),
    )
    centre = encoder.medians[:, None, None] if encoder.has_symbols else 0.0
    energy_Mhw = (y_VMhw[0] - centre).double().square().numpy()
    title = f"{card.class_title or 'no class'}   |   {split.name} row {row}   |   {entry.key}"
    return sample, PreviewRow(title, _squares(split, sample, originals, decoded_VCHW), energy_Mhw)


def _squares(
    split: Split, sample: PreviewSample, originals: Tensor | None, decoded_VCHW: Tensor
) -> tuple[Square, ...]:
    """Returns the picture panels of a row, in the order of `_headings`."""
    size = split.cache.fingerprint.image.size
    squares: list[Square] = []
    for view, decoded_CHW in enumerate(decoded_VCHW):
        if view == 0 or split.cache.fingerprint.views.kind == "crops":
            if originals is None:
                squares.append(Square(None, "", f"source {_STATE_WORDS[sample.source]}"))
            else:
                squares.append(Square(_pixels(originals[view]), f"{size} x {size} pixels"))
        squares.append(Square(decoded_pixels(decoded_CHW), _caption(split, sample, view)))
    return tuple(squares)


def _caption(split: Split, sample: PreviewSample, view: int) -> str:
    psnr_db, bpp = sample.psnr_db[view], sample.bpp[view]
    quality = "PSNR unknown" if psnr_db is None else f"{psnr_db:.2f} dB"
    if bpp is None:
        rate = "no entropy model"
    else:
        rate = f"{bpp:.3f} bpp" + ("" if split.latent.is_symbols else " if it were rounded")
    return f"{quality}, {rate}\n{sample.stored_bytes[view]:,} bytes stored"


def _pixels(view_CHW: Tensor) -> npt.NDArray[np.uint8]:
    """Returns uint8 (3, H, W) as (H, W, 3)."""
    return np.asarray(view_CHW.permute(1, 2, 0).numpy(), np.uint8)
