"""Replaying damaged shards: encoded again beside the cache, compared, and only then put in place.

::

    plan, source held to the index's digests --> ShardEncoder --> scratch folder
        --> same bytes as its commit record or checksums.sha256 say? --> renamed into the cache
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import torch

from ci2p_cache.cache.commit import CommitRecord, sha256_file
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.paths import commit_path, data_paths
from ci2p_cache.cache.staging import StagingArea, remove_path
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoding.budget import ErrorBudget
from ci2p_cache.encoding.lane import changed_numerics, make_lanes, numerics
from ci2p_cache.encoding.plan import ShardPlan
from ci2p_cache.encoding.progress import EncodeObserver, ProgressMeter
from ci2p_cache.encoding.shard import EncodeSettings, ShardEncoder
from ci2p_cache.errors import (
    ImageDecodeError,
    RefusedError,
    SourceError,
    TooManyBadImagesError,
)
from ci2p_cache.images.source import ImageReader
from ci2p_cache.machine import num_cores

__all__ = [
    "DamagedShard",
    "Replay",
    "changed_sources",
    "source_digests",
]

_CPU_BATCH, _CUDA_BATCH = 8, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedShard:
    """A shard to be encoded again, with what is still known of it."""

    plan: ShardPlan
    """Its samples."""
    numerics: Mapping[str, str | int]
    """How it was encoded, from its own commit record or a neighbour's; empty: not known."""
    digests: Mapping[str, str]
    """Path -> sha256 of its files as committed, as far as a witness is left."""
    sources: Mapping[bytes, str | None]
    """Path -> sha256 of the source files, None for one that could not be read; empty where its
    index part is damaged."""

    @property
    def place(self) -> str:
        """How messages call it."""
        return f"{self.plan.split} shard {self.plan.shard}"


def source_digests(index: pa.Table | None) -> dict[bytes, str | None]:
    """Returns path -> sha256 of the source files that an index part speaks of."""
    if index is None:
        return {}
    return dict(
        zip(index["path_bytes"].to_pylist(), index["source_sha256"].to_pylist(), strict=True)
    )


def changed_sources(images: ImageReader, shard: DamagedShard) -> list[str]:
    """Names the source images of a shard that are not what was encoded, as `path (reason)`."""
    found: list[str] = []
    for path, wanted in shard.sources.items():
        try:
            digest = hashlib.sha256(images.read(path)).hexdigest()
        except ImageDecodeError as error:
            reason = None if wanted is None else str(error)
        else:
            reason = None if digest == wanted else f"its sha256 is {digest[:12]}..."
            if wanted is None:
                reason = "it could not be read then, and can be now"
        if reason is not None:
            found.append(f"{path.decode('utf-8', 'backslashreplace')} ({reason})")
    return found


class Replay:
    """Encodes damaged shards again with the numerics that their records hold.

    Args:
        root: The cache folder.
        manifest: Its manifest.
        images: The source.
        encoder: The cache's encoder, on CPU.
        staging: Where files are staged.
        observer: Receives progress and notices.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        images: ImageReader,
        encoder: FrozenEncoder,
        staging: StagingArea,
        observer: EncodeObserver,
    ) -> None:
        self._root = root
        self._manifest = manifest
        self._images = images
        self._encoder = encoder
        self._staging = staging
        self._observer = observer

    def encode(
        self, shards: Sequence[DamagedShard], *, allowed_bad: int
    ) -> Iterator[tuple[CommitRecord, bool]]:
        """Puts shards back one by one.

        Args:
            shards: What to encode.
            allowed_bad: Images among them that were bad when the cache was made.

        Yields:
            The new commit record, and whether every byte is known to be as committed.

        Raises:
            RefusedError: the device that encoded a shard is not here; nothing was changed.
            SourceError: the source gives other latents than those committed, or more bad images;
                that shard was not changed.
            ResourceError: reading or writing failed; run it again later.
        """
        groups = [
            (key, list(group)) for key, group in groupby(sorted(shards, key=_setting), key=_setting)
        ]
        for (device, _), group in groups:
            if device == "cuda" and not torch.cuda.is_available():
                raise RefusedError(
                    f"{group[0].place} was encoded on cuda; this machine has none, and a CPU gives "
                    "slightly other values. No shard was changed",
                    hint="run the same command on a machine with a CUDA device",
                )
        total = sum(len(shard.plan.samples) for shard in shards)
        meter = ProgressMeter(self._observer, total=total, done=0, bad=0)
        budget = ErrorBudget(allowed_bad)
        try:
            for key, group in groups:
                yield from self._encode_group(key, group, budget, meter)
        except TooManyBadImagesError as error:
            raise SourceError(
                f"the source no longer gives what the cache was made from: {error}",
                hint="put the images back as they were, then run the same command",
            ) from error
        meter.report()

    def _encode_group(
        self,
        setting: tuple[str, int],
        group: list[DamagedShard],
        budget: ErrorBudget,
        meter: ProgressMeter,
    ) -> Iterator[tuple[CommitRecord, bool]]:
        device, batch_size = setting
        lanes = make_lanes(self._encoder, device)
        self._tell_other_numerics(group, numerics(lanes[0], batch_size))
        scratch = self._staging.scratch("replay")
        settings = EncodeSettings(
            fingerprint=self._manifest.fingerprint,
            layout=self._manifest.layout,
            splits=self._manifest.splits,
            classes=self._manifest.classes,
            batch_size=batch_size,
            decode_threads=num_cores(),
        )
        with (
            StagingArea(scratch) as beside,
            ShardEncoder(
                self._images,
                settings,
                lanes,
                beside,
                budget=budget,
                on_image=lambda good: meter.count(good, encoder.busy_seconds),
            ) as encoder,
        ):
            records = encoder.encode(shard.plan for shard in group)
            for shard, made in zip(group, records, strict=True):
                record = made
                if not changed_numerics(shard.numerics, made.numerics):
                    # Whoever computed the same bits first stays named: the record is as it was.
                    record = replace(made, numerics=dict(shard.numerics))
                    beside.commit(record)
                yield record, self._put_in_place(scratch, shard, record)
        remove_path(scratch)

    def _put_in_place(self, scratch: Path, shard: DamagedShard, record: CommitRecord) -> bool:
        """Moves an encoded shard into the cache if it is the one that was committed."""
        commit = commit_path(record.split, record.shard)
        digests = {file.path: file.sha256 for file in record.files}
        digests[commit] = sha256_file(scratch / commit)
        differing = [path for path, made in shard.digests.items() if digests[path] != made]
        latents = data_paths(self._manifest.layout, record.split, record.shard)
        if set(latents) & set(differing) and shard.numerics == record.numerics:
            raise SourceError(
                f"{shard.place} encoded again gives other latents than those committed, on the "
                "same software and kind of device: its source images have changed. The shard was "
                "left as it is",
                hint="put the images back as they were, then run the same command",
            )
        for path in digests:
            self._staging.put(path, (scratch / path).read_bytes())
            remove_path(scratch / path)
        if differing:
            self._observer.notice(
                f"{shard.place} is whole again, but other software wrote it: {len(differing)} of "
                "its files differ in bytes from those first committed"
            )
        return not differing and set(shard.digests) >= {file.path for file in record.files}

    def _tell_other_numerics(
        self, group: Iterable[DamagedShard], here: Mapping[str, str | int]
    ) -> None:
        then = next((shard.numerics for shard in group if shard.numerics), here)
        changes = [
            f"{name} {before} then, {value} now"
            for name, (before, value) in changed_numerics(then, here).items()
        ]
        if changes:
            self._observer.notice(
                "repaired shards may differ slightly from those first committed: "
                + "; ".join(changes)
            )


def _setting(shard: DamagedShard) -> tuple[str, int]:
    """Returns (device type, batch size) to encode a shard with."""
    device = str(shard.numerics.get("device_type", "cpu"))
    default = _CPU_BATCH if device == "cpu" else _CUDA_BATCH
    return device, int(shard.numerics.get("batch_size", default))
