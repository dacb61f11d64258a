"""`reencode`: holds stored latents against what the encoder gives now, on rows drawn at random."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.paths import data_paths
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.cache.verify import Finding
from ci2p_cache.encoder.load import load_recorded_encoder
from ci2p_cache.encoding.plan import Sample
from ci2p_cache.encoding.rows import LoadedImage, load_image
from ci2p_cache.encoding.shard import (
    Replica,
    changed_numerics,
    encode_views,
    make_replicas,
    refuse_other_decoder,
    replica_numerics,
    single_threaded,
)
from ci2p_cache.errors import ShardError, UsageError
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.locate import open_reader
from ci2p_cache.images.source import ImageReader
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


def reencode(
    path: str | Path,
    count: int,
    *,
    seed: int = 0,
    source: str | Path | ImageReader | None = None,
    on_row: Callable[[int, int], None] | None = None,
) -> ReencodeSummary:
    """Encodes random rows of a cache again and compares every value.

    Args:
        path: The cache folder; it is only read.
        count: Rows to draw, over all splits alike; all of them where there are fewer.
        seed: Seed of the draw.
        source: Where the images are now, or an object that reads them; None: where they were when
            the cache was made.
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
    made = cache.fingerprint
    refuse_other_decoder(made)
    images = open_reader(cache.manifest.source if source is None else source)
    encoder = load_recorded_encoder(cache.encoder_path, made.encoder)

    @functools.cache
    def replica_of(device: str) -> Replica:
        return make_replicas(encoder, device)[0]

    chosen = _drawn(cache, count, seed)
    found = ReencodeSummary(
        rows=len(chosen),
        compared=0,
        values=0,
        differing_values=0,
        largest_difference=0.0,
        other_software=0,
        changed=(),
        findings=(),
    )
    decoders, threads = Decoders(made.image, made.views), torch.get_num_threads()
    load = functools.partial(load_image, images, decoders, ())
    single_threaded()
    try:
        for done, (split, row) in enumerate(chosen, 1):
            found = _compared(found, split, row, load, replica_of)
            if on_row is not None:
                on_row(done, len(chosen))
    finally:
        decoders.close()
        torch.set_num_threads(threads)
    return found


def _drawn(cache: Cache, count: int, seed: int) -> list[tuple[Split, int]]:
    """Draws valid rows without repetition, in ascending order."""
    total = sum(len(split.valid_rows) for split in cache.values())
    numbers = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    numbers.sort()
    found: list[tuple[Split, int]] = []
    for split in cache.values():
        rows = split.valid_rows
        own = numbers[(numbers >= 0) & (numbers < len(rows))]
        found += [(split, row) for row in rows[own].tolist()]
        numbers -= len(rows)
    return found


def _compared(
    summary: ReencodeSummary,
    split: Split,
    row: int,
    load: Callable[[str, Sample], LoadedImage],
    replica_of: Callable[[str], Replica],
) -> ReencodeSummary:
    """Compares one row; returns the summary with it."""
    shard = row // split.record.shard_rows

    def found(problem: str) -> tuple[Finding, ...]:
        finding = Finding(
            path=data_paths(split.layout, split.name, shard)[0],
            kind="differs",
            problem=f"row {row} {problem}",
            split=split.name,
            shard=shard,
            first_row=row,
            last_row=row,
        )
        return (*summary.findings, finding)

    stored = np.empty((split.num_views, *split.latent.shape), split.latent.dtype)
    try:
        commit = split.read_commit(shard)
        columns = ["row", "key", "path", "path_bytes", "source_sha256", "status"]
        index = read_index(split.cache.path, split.name, shard, columns)
        for view, out in enumerate(stored):
            split.read_into(row, view, out)
    except ShardError as error:
        return replace(summary, findings=found(f"cannot be read: {error}"))
    assert commit is not None, "its shard was read"
    offset = row - split.record.rows_of(shard).start
    entry = index.slice(offset, 1).to_pylist()[0]
    image = load(split.name, Sample(row, entry["key"], -1, entry["path_bytes"]))
    digest, wanted = image.row.source_sha256, entry["source_sha256"]
    reason = image.row.error
    if digest is not None and digest != wanted:
        reason = f"its sha256 is {digest[:12]}..., {wanted[:12]}... was encoded"
    if reason is not None or image.views is None:
        return replace(summary, changed=(*summary.changed, f"{entry['path']} ({reason})"))
    on_cuda = commit.numerics.get("device_type") == "cuda" and torch.cuda.is_available()
    replica, batch = (
        replica_of("cuda" if on_cuda else "cpu"),
        int(commit.numerics.get("batch_size", 1)),
    )
    before = sum(status == "ok" for status in index["status"].to_pylist()[:offset])
    first, total = before * split.num_views, commit.valid_rows * split.num_views
    now = _encoded(replica, list(image.views), split, first=first, total=total, size=batch)
    wide = np.float64 if split.latent.dtype.startswith("float") else np.int64
    lost = int((now != stored).sum())
    largest = float(np.abs(now.astype(wide) - stored.astype(wide)).max())
    same = not changed_numerics(commit.numerics, replica_numerics(replica, batch))
    problem = (
        f"({entry['key']}): {lost} of {stored.size} values are not what the encoder gives; "
        f"the largest difference is {largest:g}"
    )
    return replace(
        summary,
        compared=summary.compared + 1,
        values=summary.values + stored.size,
        differing_values=summary.differing_values + lost,
        largest_difference=max(summary.largest_difference, largest),
        other_software=summary.other_software + (not same),
        findings=found(problem) if lost and same else summary.findings,
    )


def _encoded(
    replica: Replica, views: list[torch.Tensor], split: Split, *, first: int, total: int, size: int
) -> npt.NDArray[Any]:
    """Encodes the views of a row, on CUDA in a batch of the size, and in the slot, that they had.

    On CPU the size of a batch changes no bit; on CUDA it chooses the algorithm.
    """
    if replica.device.type == "cpu":
        return encode_views(replica, views, split.latent)[0]
    found = []
    for number, view in enumerate(views, first):
        start = number - number % size
        batch = [view] * (min(start + size, total) - start)
        found.append(encode_views(replica, batch, split.latent)[0][number - start])
    return np.stack(found)
