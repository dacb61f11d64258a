"""Forecasts: from what a sample of a source showed to what encoding all of it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ci2p_cache.encoding.dry_run.decode_trial import DecodeTrial
from ci2p_cache.encoding.dry_run.trial import EncodeTrial, shard_index_bytes
from ci2p_cache.encoding.intent import Intent
from ci2p_cache.errors import CacheError, DiskFullError, TooManyBadImagesError
from ci2p_cache.images.source import ImageSource
from ci2p_cache.record import Record

__all__ = ["DryRunReport", "Findings", "Work", "report"]

_BAD_SHOWN = 10
_WAITING = 0.1
"""From that share of the time on in which g_a waits, images do not come fast enough."""

_Z = 1.645
"""Of a normal distribution, 95 % are below so many standard deviations."""

_FOLDER_BYTES = 16_000
_SPLIT_BYTES = 11_000
_CHECKSUM_BYTES = 96
"""Files that speak of the whole cache, those of each split, and the line in checksums.sha256 of
each file of a shard: what caches of 90 images with 192 channels have (measured)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRunReport(Record):
    """What a run with the same arguments would do, as far as a sample can tell."""

    path: str
    """The cache folder."""
    source: str
    """The source of images."""
    images: int
    """Images planned, committed ones included."""
    classes: int
    """Number of classes."""
    splits: dict[str, int] = field(hash=False)
    """Images planned per split."""
    views: dict[str, int] = field(hash=False)
    """Views of each image, per split."""
    shards: int
    """Shards planned."""
    committed_shards: int
    """Shards that earlier runs committed."""
    images_left: int
    """Images that would be encoded now; all other figures speak of these."""
    sampled: int
    """Images that were encoded to find out, warm-up included."""
    sampled_seconds: float
    """Time over which the rate was measured, after the warm-up; 0 when nothing is left to do."""
    images_per_second: float
    """Expected rate; 0 when nothing is left to do."""
    encoder_share: float
    """Share of that time in which g_a ran; the rest it waited for images."""
    decode_images_per_second: float
    """Reading, decoding and resizing alone, all decode threads, g_a at rest; 0 where too few images
    are left to tell."""
    bottleneck: Literal["g_a", "decoding", ""]
    """What a faster machine should have more of; empty when nothing is left to do."""
    seconds: float
    """Expected wall time of the whole call: loading, listing and warm-up included."""
    disk_bytes: int
    """Expected size of all files that would be written."""
    latent_bytes: int
    """Of these, the shards with their index parts: what a run's summary calls the cache's size."""
    bytes_per_image: float
    """`latent_bytes` per image, all its views together."""
    free_bytes: int
    """Free space on the folder's disk."""
    checked: int
    """Images that were read and decoded."""
    bad_found: int
    """Those of them that cannot be decoded."""
    bad_files: tuple[str, ...]
    """The first ten of these, as `path: reason`."""
    bad_expected: float
    """Bad images to be expected, those of earlier runs included."""
    bad_bound: float
    """There are 95 of 100 chances that no more are bad (Wilson 1927, "Probable inference, the law
    of succession, and statistical inference", one-sided)."""
    bad_allowed: int
    """Bad images at which a run still continues."""
    clipped_share: float
    """Share of the sample's symbols that saturate at the dtype's limit."""

    @property
    def fits(self) -> bool:
        """Whether what would be written fits the disk."""
        return self.disk_bytes <= self.free_bytes

    def blocker(self) -> CacheError | None:
        """Returns the error that a run is certain to end with; None where none is."""
        if self.bad_found > self.bad_allowed:
            return TooManyBadImagesError(
                f"{self.bad_found} of {self.checked} images could not be decoded, "
                f"{self.bad_allowed} are allowed; the first one is {self.bad_files[0]}",
                hint="mend or remove such files, or say how many may fail: --max-errors 1% "
                "(or a count)",
            )
        if not self.fits:
            return DiskFullError(
                f"about {self.disk_bytes / 1e9:.2f} GB would be written and "
                f"{self.free_bytes / 1e9:.2f} GB are free on the disk of {self.path}",
                hint="make space, or choose an --out folder on another disk",
            )
        return None


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do."""

    intent: Intent
    """What the folder is to become."""
    missing: list[tuple[str, int]]
    """Shards that are not committed, as (split, number)."""
    already_bad: int
    """Bad images in shards committed earlier."""
    bad_allowed: int
    """Bad images at which a run still continues."""

    @property
    def rows(self) -> dict[str, int]:
        """Rows that are left, per split."""
        splits, found = self.intent.plan.splits, dict.fromkeys(self.intent.plan.splits, 0)
        for split, number in self.missing:
            found[split] += len(splits[split].rows_of(number))
        return found


@dataclass(frozen=True, slots=True)
class Findings:
    """What is to be done, and what trying some of it showed."""

    work: Work
    encoded: EncodeTrial
    decoded: DecodeTrial
    prepared_seconds: float

    @property
    def images_per_second(self) -> float:
        """Rate of the sample."""
        return self.encoded.images / max(self.encoded.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Wall time of a run: what came before the sample, its warm-up, the rest at its rate."""
        if not self.encoded.images:
            return self.prepared_seconds
        trial, left = self.encoded, sum(self.work.rows.values())
        steady = (left - trial.warm_images) / self.images_per_second
        # Without a warm-up all of it was timed from start to end.
        drain = trial.drain_seconds if trial.warm_images else 0.0
        return self.prepared_seconds + trial.warm_seconds + steady + drain

    @property
    def latent_bytes(self) -> float:
        """Bytes of shards and index parts."""
        trial, plan, rows = self.encoded, self.work.intent.plan, self.work.rows
        if trial.encoded == sum(rows.values()):
            return trial.shard_bytes
        good = 1.0 - len(trial.bad) / max(1, trial.encoded)
        known = trial.view_bytes.values()
        mean = sum(known) / max(1, len(known))
        total = 0.0
        for split, count in rows.items():
            views = count * good * plan.splits[split].views
            total += views * trial.view_bytes.get(split, mean) + count * trial.index_row_bytes
        for split, _ in self.work.missing:
            whole = shard_index_bytes(plan.splits[split], self.work.intent.manifest.layout)
            total += whole + trial.index_part_bytes
        return total

    def other_bytes(self) -> float:
        """Bytes of everything else that a run writes."""
        intent, shards = self.work.intent, len(self.work.missing)
        if intent.manifest.is_complete and not shards:
            return 0.0
        plan = intent.plan
        layout, manifest = intent.manifest.layout, intent.manifest
        files = 2 + layout.has_zarr + layout.has_tar
        records = shards * (self.encoded.commit_bytes + files * _CHECKSUM_BYTES)
        begun = 0 if intent.is_begun else manifest.plan.bytes + manifest.encoder.bytes
        return begun + records + _FOLDER_BYTES + len(plan.splits) * _SPLIT_BYTES


def report(
    root: Path,
    images: ImageSource,
    found: Findings,
    free_bytes: int,
) -> DryRunReport:
    """Makes the forecast.

    Args:
        root: The cache folder.
        images: The source.
        found: What is to be done, and what a sample showed.
        free_bytes: Free space on the folder's disk.
    """
    plan, trial, work = found.work.intent.plan, found.encoded, found.work
    left = sum(work.rows.values())
    # A batch counts when it has ended, so a short time may hold more than its own.
    share = min(1.0, trial.busy_seconds / max(trial.seconds, 1e-9))
    checked, bad = trial.encoded + found.decoded.images, [*trial.bad, *found.decoded.bad]
    latents = found.latent_bytes
    return DryRunReport(
        path=str(root),
        source=images.location().encode("utf-8", "backslashreplace").decode(),
        images=plan.num_samples,
        classes=len(work.intent.manifest.classes),
        splits={name: record.rows for name, record in plan.splits.items()},
        views={name: record.views for name, record in plan.splits.items()},
        shards=plan.num_shards,
        committed_shards=plan.num_shards - len(work.missing),
        images_left=left,
        sampled=trial.encoded,
        sampled_seconds=trial.seconds,
        images_per_second=found.images_per_second,
        encoder_share=share,
        decode_images_per_second=found.decoded.images_per_second,
        bottleneck=("decoding" if share < 1 - _WAITING else "g_a") if trial.images else "",
        seconds=found.seconds,
        disk_bytes=round(latents + found.other_bytes()),
        latent_bytes=round(latents),
        bytes_per_image=latents / max(1, left),
        free_bytes=free_bytes,
        checked=checked,
        bad_found=work.already_bad + len(bad),
        bad_files=tuple(f"{file.path}: {file.error}" for file in bad[:_BAD_SHOWN]),
        bad_expected=work.already_bad + left * len(bad) / max(1, checked),
        bad_bound=work.already_bad + left * _highest_share(len(bad), checked),
        bad_allowed=work.bad_allowed,
        clipped_share=trial.clipped / max(1, trial.symbols),
    )


def _highest_share(found: int, checked: int) -> float:
    """Returns the upper end of Wilson's interval for a share, 1 where nothing was looked at."""
    if not checked:
        return 1.0
    share, ratio = found / checked, _Z**2 / checked
    spread = math.sqrt(share * (1 - share) * ratio + ratio**2 / 4)
    return min(1.0, (share + ratio / 2 + spread) / (1 + ratio))
