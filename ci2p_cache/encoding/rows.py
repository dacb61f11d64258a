"""The rows of a shard: read and decoded ahead of the encoder, or carried over from a committed one.

What their views are encoded with, and where they go, is not known here.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from ci2p_cache.cache.commit import CommitRecord, has_its_files
from ci2p_cache.cache.growth import GROWTH, NOTES
from ci2p_cache.cache.index import (
    ChannelSums,
    IndexRow,
    index_rows,
    read_index,
    read_sums,
    require_intact,
)
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache
from ci2p_cache.encoding.plan import Sample, ShardPlan
from ci2p_cache.errors import ImageDecodeError, ManifestError, SourceError
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.source import ImageReader
from ci2p_cache.record import read_sealed

__all__ = [
    "Awaited", "Carrier", "LoadedImage", "ShardValues", "load_image", "read_ahead", "read_notes",
    "read_values",
]  # fmt: skip


@dataclass(slots=True)
class LoadedImage:
    """One image read and decoded, or the reason why not; or a row that is carried over."""

    row: IndexRow
    """What the index says of it, but for what only encoding shows."""
    views: torch.Tensor | None = None
    """uint8 (V, 3, size, size), those that are to be encoded; None where there are none."""
    is_carried: bool = False
    """Whether its row was committed before and is taken over: read only if it gets more views."""
    stored: npt.NDArray[Any] | None = None
    """Stored values (V, M, h, w) of a row that is carried over and valid; its first views."""
    clipped: npt.NDArray[np.float64] | None = None
    """Clipped values per channel (M,) of all rows of the shard that are carried over, at the first
    of them; None at the others."""


def load_image(
    source: ImageReader, decoders: Decoders, classes: Sequence[str], split: str, sample: Sample
) -> LoadedImage:
    """Reads and decodes one planned sample of a split.

    Raises:
        SourceError, ResourceError: reading failed for another reason than the image itself.
    """
    row = IndexRow(
        row=sample.row,
        key=sample.key,
        label=sample.label,
        class_name=classes[sample.label] if sample.label >= 0 else "",
        path=sample.path.decode("utf-8", "backslashreplace"),
        path_bytes=sample.path,
    )
    try:
        data = source.read(sample.path)
        row.source_bytes = len(data)
        row.source_sha256 = hashlib.sha256(data).hexdigest()
        image = decoders.decode(data, split=split, key=sample.key)
    except ImageDecodeError as error:
        row.status, row.error = "invalid", str(error)
        return LoadedImage(row)
    row.width, row.height = image.width, image.height
    row.mode, row.format = image.mode, image.format
    row.exif_orientation = image.orientation
    row.boxes = image.boxes
    return LoadedImage(row, image.views)


Awaited = tuple[ShardPlan, Sample, Future[LoadedImage]]
"""A planned sample, the shard that it belongs to, and what it becomes."""


def read_ahead(
    shards: Iterable[ShardPlan],
    pool: ThreadPoolExecutor,
    load: Callable[[str, Sample], LoadedImage],
    *,
    most: int,
    carrier: Carrier | None = None,
) -> Iterator[Awaited]:
    """Yields planned samples in order, while the next ones are read and decoded.

    Args:
        shards: What to read.
        pool: Whose threads read and wait for the decoders.
        load: `load_image`, for a split and a sample.
        most: Images that are read or being read at a time.
        carrier: Gives rows that were committed before; None where all are read.
    """
    waiting: deque[Awaited] = deque()
    for shard in shards:
        carried = carrier.load(shard.split, shard.shard) if carrier is not None else {}
        for sample in shard.samples:
            known = carried.get(sample.row)
            if known is None:
                future = pool.submit(load, shard.split, sample)
            elif known.stored is not None and carrier and carrier.adds_views(shard.split):
                future = pool.submit(_with_more_views, load, shard.split, sample, known)
            else:
                future = Future()
                future.set_result(known)
            waiting.append((shard, sample, future))
            if len(waiting) >= most:
                yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _with_more_views(
    load: Callable[[str, Sample], LoadedImage], split: str, sample: Sample, known: LoadedImage
) -> LoadedImage:
    """Reads the original of a committed row for the views that it lacks.

    Raises:
        SourceError: the original is gone, or is not what was encoded.
    """
    loaded, stored = load(split, sample), known.stored
    assert stored is not None, "a row without a latent gets no views"
    if loaded.views is None or loaded.row.source_sha256 != known.row.source_sha256:
        reason = loaded.row.error or "its sha256 is another one"
        raise SourceError(
            f"{loaded.row.path} is not what was encoded ({reason}), so it gets no more views; "
            "the cache stays as it is",
            hint="put the original back, then run the same command",
        )
    loaded.row.clipped = known.row.clipped
    return replace(known, row=loaded.row, views=loaded.views[len(stored) :])


class ShardValues(NamedTuple):
    """What one committed shard holds, whatever its container."""

    commit: CommitRecord
    rows: list[IndexRow]
    sums: ChannelSums
    latents: dict[int, npt.NDArray[Any]]
    """Stored values (V, M, h, w) of each valid row, in row order."""


def read_values(split: Split, shard: int, pool: ThreadPoolExecutor) -> ShardValues:
    """Reads a whole shard; every latent is checked against its crc32c in the index part.

    Raises:
        ShardError: the shard is missing, damaged or not committed.
        ManifestError: its commit record is damaged.
    """
    commit = split.read_commit(shard)
    if commit is None:
        raise split.damage(shard, "it has no commit record")
    require_intact(split.cache.path, commit)
    table = read_index(split.cache.path, split.name, shard)
    rows = index_rows(table)

    def read(row: IndexRow) -> npt.NDArray[Any]:
        stored = np.empty((split.num_views, *split.latent.shape), split.latent.dtype)
        for view, out in enumerate(stored):
            split.read_into(row.row, view, out)
        if [google_crc32c.value(latent.tobytes()) for latent in stored] != row.latent_crc32c:
            raise split.damage(shard, f"row {row.row} is not what its index part speaks of")
        return stored

    good = [row for row in rows if row.status == "ok"]
    latents = dict(zip((row.row for row in good), pool.map(read, good), strict=True))
    return ShardValues(commit, rows, read_sums(table), latents)


def read_notes(growth: Path) -> dict[str, Any] | None:
    """Returns what a growth was begun with; None where that is not known."""
    try:
        data, intact = read_sealed(growth / NOTES)
    except (OSError, ManifestError):
        return None
    return data if intact else None


class Carrier:
    """Gives the rows that a growth takes from the cache in whose folder it is made.

    Raises:
        ManifestError: the records of the cache or of the growth are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(folder.parent)
        notes = read_notes(folder)
        if notes is None:
            raise ManifestError(f"{folder / NOTES} is damaged")
        self._again = {split: set(rows) for split, rows in notes["again"].items()}
        self._splits = read_manifest(folder).splits

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """Returns the carrier of a growth's folder; None where the folder is that of a cache."""
        return cls(folder) if folder.name == GROWTH else None

    def adds_views(self, split: str) -> bool:
        """Whether rows that are carried over get more views than they have."""
        return split in self._cache and self._cache[split].num_views < self._splits[split].views

    def _rows(self, split: str, shard: int) -> dict[int, set[int]]:
        """Returns the rows of a shard that are carried over, by the cache's shard that has them.

        Samples with more views may make smaller shards, so these are not always the same.
        """
        found: dict[int, set[int]] = {}
        if split in self._cache:
            own, again = self._cache[split].record, self._again.get(split, set())
            for row in self._splits[split].rows_of(shard):
                if row < own.rows and row not in again:
                    found.setdefault(row // own.shard_rows, set()).add(row)
        return {number: rows for number, rows in found.items() if self._counts(split, number)}

    def _counts(self, split: str, shard: int) -> bool:
        try:
            commit = self._cache[split].read_commit(shard)
        except ManifestError:
            return False
        return commit is not None and has_its_files(self._cache.path, commit)

    def count(self, split: str, shard: int) -> tuple[int, int]:
        """Returns how many rows of a shard need no original, valid ones and failed ones."""
        num_good = num_failed = 0
        for number, rows in self._rows(split, shard).items():
            table = read_index(self._cache.path, split, number, ["row", "status"])
            good = table.filter(pc.equal(table["status"], "ok"))["row"].to_pylist()
            num_failed += len(rows) - sum(row in rows for row in good)
            num_good += sum(row in rows for row in good)
        return 0 if self.adds_views(split) else num_good, num_failed

    def load(self, split: str, shard: int) -> dict[int, LoadedImage]:
        """Reads what is carried over of a shard; each latent is checked against its crc32c.

        Raises:
            ShardError: the shard of the cache is damaged.
        """
        carried: dict[int, LoadedImage] = {}
        for number, rows in self._rows(split, shard).items():
            carried |= self._load(split, number, rows)
        return carried

    def _load(self, split: str, shard: int, rows: Collection[int]) -> dict[int, LoadedImage]:
        """Reads some rows of a shard of the cache."""
        latent = self._cache.fingerprint.latent
        with ThreadPoolExecutor(1, "carry") as pool:
            found = read_values(self._cache[split], shard, pool)
        carried: dict[int, LoadedImage] = {}
        clipped = found.sums.clipped
        for row in found.rows:
            stored = found.latents.get(row.row)
            if row.row in rows:
                carried[row.row] = LoadedImage(row, is_carried=True, stored=stored)
            elif row.clipped:
                # Which channels were clipped is known of the shard alone; such values are limits.
                magnitude = np.abs(found.latents[row.row].astype(np.int64))
                at_limit = (magnitude == latent.symbol_limit).sum((0, 2, 3))
                clipped = np.maximum(clipped - at_limit, 0.0)
        next(iter(carried.values())).clipped = clipped
        return carried
