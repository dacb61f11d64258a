"""`reencode`: holds stored latents against what the encoder gives now, on rows drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.paths import data_paths
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.cache.verify import Finding
from ci2p_cache.encoder.load import load_recorded_encoder
from ci2p_cache.encoding.lane import (
    Lane,
    changed_numerics,
    encode_views,
    make_lanes,
    numerics,
    single_threaded,
)
from ci2p_cache.encoding.same_decoder import refuse_other_decoder
from ci2p_cache.errors import ImageDecodeError, ShardError, UsageError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.locate import open_reader
from ci2p_cache.images.source import ImageReader
from ci2p_cache.images.views import image_views
from ci2p_cache.record import Record

__all__ = ["ReencodeSummary", "reencode"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReencodeSummary(Record):
    """What encoding some rows again gave."""

    rows: int
    """Rows drawn."""
    compared: int
    """Rows whose source image is still the one that was encoded."""
    values: int
    """Stored values compared."""
    differing_values: int
    """Values that are not the same."""
    largest_difference: float
    """Largest absolute difference, in the unit of the stored values."""
    other_software: int
    """Compared rows that other software or another kind of device encoded: for these a few
    differing values are expected, and they are counted but are no findings."""
    changed: tuple[str, ...]
    """Source images that could not be compared, as `path (reason)`."""
    findings: tuple[Finding, ...]
    """Rows that differ although the same software and kind of device encoded them, and rows that
    cannot be read."""


@dataclass(slots=True)
class _Tally:
    compared: int = 0
    values: int = 0
    differing: int = 0
    largest: float = 0.0
    other_software: int = 0


def reencode(
    path: str | Path,
    count: int,
    *,
    seed: int = 0,
    source: str | Path | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> ReencodeSummary:
    """Encodes random rows of a cache again and compares every value.

    Args:
        path: The cache folder; it is only read.
        count: Rows to draw, over all splits alike; all of them where there are fewer.
        seed: Seed of the draw.
        source: Where the images are now; None: where they were when the cache was made.
        on_row: Called with (rows done, rows drawn).

    Raises:
        UsageError: `count` is not positive.
        IncompleteCacheError: encoding has not finished.
        ManifestError, WeightsError: the cache's own records or its encoder are damaged.
        DigestError: its encoder is another one than that which made the latents.
        SourceError: the source is not there.
        FingerprintMismatchError: the decoders here are not those that made the cache.
        ResourceError: the source cannot be read for now.
    """
    if count < 1:
        raise UsageError(f"`reencode` is {count}; it must be at least 1")
    cache = open_cache(path)
    refuse_other_decoder(cache.fingerprint)
    images = open_reader(cache.manifest.source if source is None else source)
    lanes = _Lanes(cache)
    chosen = _drawn(cache, count, seed)
    tally, changed, findings = _Tally(), [], []
    threads = torch.get_num_threads()
    single_threaded()
    try:
        for done, (split, row) in enumerate(chosen, 1):
            found = _compare(split, row, images, lanes, tally)
            if isinstance(found, Finding):
                findings.append(found)
            elif found is not None:
                changed.append(found)
            if on_row is not None:
                on_row(done, len(chosen))
    finally:
        torch.set_num_threads(threads)
    return ReencodeSummary(
        rows=len(chosen),
        compared=tally.compared,
        values=tally.values,
        differing_values=tally.differing,
        largest_difference=tally.largest,
        other_software=tally.other_software,
        changed=tuple(changed),
        findings=tuple(findings),
    )


class _Lanes:
    """The cache's encoder on each kind of device that its shards ask for and this machine has."""

    def __init__(self, cache: Cache) -> None:
        self._encoder = load_recorded_encoder(cache.encoder_path, cache.fingerprint.encoder)
        self._lanes: dict[str, Lane] = {}

    def of(self, commit: CommitRecord) -> Lane:
        wanted = commit.numerics.get("device_type")
        kind = "cuda" if wanted == "cuda" and torch.cuda.is_available() else "cpu"
        if kind not in self._lanes:
            self._lanes[kind] = make_lanes(self._encoder, kind)[0]
        return self._lanes[kind]


def _drawn(cache: Cache, count: int, seed: int) -> list[tuple[Split, int]]:
    """Draws valid rows without repetition, in ascending order."""
    splits = list(cache.values())
    ends = np.cumsum([len(split.valid_rows) for split in splits])
    total = int(ends[-1])
    numbers = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    found = []
    for number in sorted(numbers.tolist()):
        place = int(np.searchsorted(ends, number, side="right"))
        first = int(ends[place]) - len(splits[place].valid_rows)
        found.append((splits[place], int(splits[place].valid_rows[number - first])))
    return found


def _compare(
    split: Split, row: int, images: ImageReader, lanes: _Lanes, tally: _Tally
) -> Finding | str | None:
    """Compares one row: gives a finding, the name of a changed source image, or None."""
    shard = row // split.record.shard_rows

    def finding(problem: str) -> Finding:
        return Finding(
            path=data_paths(split.layout, split.name, shard)[0],
            kind="differs",
            problem=f"row {row} {problem}",
            split=split.name,
            shard=shard,
            first_row=row,
            last_row=row,
        )

    stored = np.empty((split.num_views, *split.latent.shape), split.latent.dtype)
    try:
        commit = split.read_commit(shard)
        columns = ["row", "key", "path", "path_bytes", "source_sha256", "status"]
        index = read_index(split.cache.path, split.name, shard, columns)
        for view in range(split.num_views):
            split.read_into(row, view, stored[view])
    except ShardError as error:
        return finding(f"cannot be read: {error}")
    assert commit is not None, "its shard was read"
    offset = row - split.record.rows_of(shard).start
    entry = index.slice(offset, 1).to_pylist()[0]
    views = _views(split, entry, images)
    if isinstance(views, str):
        return f"{entry['path']} ({views})"
    lane = lanes.of(commit)
    before = sum(status == "ok" for status in index["status"].to_pylist()[:offset])
    good = commit.valid_rows
    batch = int(commit.numerics.get("batch_size", 1))
    now = _encode(
        lane, views, split, first=before * len(views), total=good * len(views), size=batch
    )
    different = now != stored
    if split.latent.dtype.startswith("float"):
        gap = np.abs(now.astype(np.float64) - stored.astype(np.float64))
    else:
        gap = np.abs(now.astype(np.int64) - stored.astype(np.int64))
    lost, largest = int(different.sum()), float(gap.max())
    same = not changed_numerics(commit.numerics, numerics(lane, batch))
    tally.compared += 1
    tally.values += stored.size
    tally.differing += lost
    tally.largest = max(tally.largest, largest)
    tally.other_software += not same
    if lost and same:
        return finding(
            f"({entry['key']}): {lost} of {stored.size} values are not what the encoder gives; "
            f"the largest difference is {largest:g}"
        )
    return None


def _views(split: Split, entry: dict[str, Any], images: ImageReader) -> list[torch.Tensor] | str:
    """Makes the views of a row again, uint8 (3, size, size) each, or says why that is not fair."""
    fingerprint = split.cache.fingerprint
    try:
        data = images.read(entry["path_bytes"])
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["source_sha256"]:
            return f"its sha256 is {digest[:12]}..., {entry['source_sha256'][:12]}... was encoded"
        image = decode_image(data, fingerprint.image)
    except ImageDecodeError as error:
        return str(error)
    views, _ = image_views(
        image, fingerprint.image, fingerprint.views, split=split.name, key=entry["key"]
    )
    return list(views)


def _encode(
    lane: Lane, views: list[torch.Tensor], split: Split, *, first: int, total: int, size: int
) -> npt.NDArray[Any]:
    """Encodes the views of a row, on CUDA in batches of the size and at the place that they had.

    On CPU the size of a batch changes no bit; on CUDA it chooses the algorithm.
    """
    if lane.device.type == "cpu":
        return encode_views(lane, views, split.latent)[0]
    found = []
    for number, view in enumerate(views, first):
        start = number - number % size
        batch = [view] * (min(start + size, total) - start)
        found.append(encode_views(lane, batch, split.latent)[0][number - start])
    return np.stack(found)
