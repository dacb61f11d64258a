"""What the report shows and cannot make itself, because it takes the encoder: handed over to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ci2p_cache.cache.store import Cache

__all__ = ["CacheSample", "Illustrator", "MeasuredRow", "Picture", "Reconstruction"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture as it is put into the page."""

    jpeg: bytes
    """A JPEG file."""
    width_px: int
    """Its columns."""
    height_px: int
    """Its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRow:
    """View 0 of one sample; None where it cannot be known."""

    row: int
    """Its row in the split."""
    psnr_db: float | None
    """PSNR of the reconstruction, clamped to [0, 1], against the original view."""
    bound_bytes: float | None
    """Bytes that the entropy model asks for."""
    stored_bytes: int
    """Bytes on disk."""
    jpeg_bytes: int | None
    """Bytes of the original view as JPEG of quality 90."""
    source: str
    """unchanged, changed or missing: what became of the original."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """A sample that is shown: the original view and what g_s makes of its latent."""

    group: Literal["worst", "median", "random"]
    """Why it is shown."""
    measured: MeasuredRow
    """Its figures."""
    key: str
    """Its name within the split."""
    class_title: str
    """Its class, for humans."""
    original: Picture | None
    """The view that was encoded; None where the source is gone."""
    decoded: Picture
    """The view decoded from the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSample:
    """A seeded sample of the rows of one split, measured."""

    split: str
    """Its split."""
    rows: tuple[MeasuredRow, ...]
    """In row order."""
    shown: tuple[Reconstruction, ...]
    """Worst and median by PSNR, and random ones."""


class Illustrator(Protocol):
    """Decodes latents for the report; `ci2p_cache.illustrations` has the one that is used."""

    def measure(self, cache: Cache, *, num_shown: int) -> CacheSample | None:
        """Measures a sample of a cache; None where it holds no latent.

        Args:
            cache: The cache.
            num_shown: Pictures of each group.

        Raises:
            CacheError: the cache's encoder or a shard is damaged.
        """

    def thumbnails(self, cache: Cache, split: str, rows: Sequence[int]) -> list[Picture]:
        """Decodes rows as small pictures, in the order of `rows`.

        Raises:
            CacheError: a row holds no latent, or the cache's encoder or a shard is damaged.
        """
