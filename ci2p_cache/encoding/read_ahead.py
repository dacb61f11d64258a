"""Reading ahead: images read and decoded before they are wanted, and handed on in their order.

What their views are encoded with, and where they go, is not known here.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.index import IndexRow
from ci2p_cache.encoding.carry import Carrier
from ci2p_cache.encoding.plan import Sample, ShardPlan
from ci2p_cache.errors import ImageDecodeError
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.source import ImageReader

__all__ = ["Awaited", "LoadedImage", "ReadAhead"]


@dataclass(slots=True)
class LoadedImage:
    """One image read and decoded, or the reason why not."""

    row: IndexRow
    """What the index says of it, but for what only encoding shows."""
    views: torch.Tensor | None = None
    """uint8 (V, 3, size, size); None where it could not be decoded."""
    is_carried: bool = False
    """Whether its row was committed before and is taken over: nothing was read."""
    stored: npt.NDArray[Any] | None = None
    """Stored values (V, M, h, w) of a row that is carried over and valid."""
    clipped: npt.NDArray[np.float64] | None = None
    """Clipped values per channel (M,) of all rows of the shard that are carried over, at the first
    of them; None at the others."""


Awaited = tuple[ShardPlan, Sample, Future[LoadedImage]]
"""A planned sample, the shard that it belongs to, and what it becomes."""


class ReadAhead:
    """Reads and decodes planned samples, up to so many of them ahead.

    Args:
        source: Where the images are read from.
        decoders: What decodes them.
        pool: Whose threads read and wait for the decoders.
        classes: Class names, by label.
        most: Images that are read or being read at a time.
        carrier: Gives rows that were committed before; None where all are read.
    """

    def __init__(
        self,
        source: ImageReader,
        decoders: Decoders,
        pool: ThreadPoolExecutor,
        *,
        classes: Sequence[str],
        most: int,
        carrier: Carrier | None = None,
    ) -> None:
        self._source = source
        self._decoders = decoders
        self._pool = pool
        self._classes = classes
        self._most = most
        self._carrier = carrier

    def read(self, shards: Iterable[ShardPlan]) -> Iterator[Awaited]:
        """Yields every sample in the order of the plan."""
        waiting: deque[Awaited] = deque()
        for shard in shards:
            carried = self._carrier.values(shard.split, shard.shard) if self._carrier else None
            clipped = carried.clipped if carried is not None else None
            for sample in shard.samples:
                if carried is not None and sample.row in carried.rows:
                    row, stored = carried.rows[sample.row], carried.latents.get(sample.row)
                    future: Future[LoadedImage] = Future()
                    future.set_result(
                        LoadedImage(row, is_carried=True, stored=stored, clipped=clipped)
                    )
                    clipped = None
                else:
                    future = self._pool.submit(self._load, sample, shard.split)
                waiting.append((shard, sample, future))
                if len(waiting) >= self._most:
                    yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _load(self, sample: Sample, split: str) -> LoadedImage:
        row = IndexRow(
            row=sample.row,
            key=sample.key,
            label=sample.label,
            class_name=self._classes[sample.label] if sample.label >= 0 else "",
            path=sample.path.decode("utf-8", "backslashreplace"),
            path_bytes=sample.path,
        )
        try:
            data = self._source.read(sample.path)
            row.source_bytes = len(data)
            row.source_sha256 = hashlib.sha256(data).hexdigest()
            image = self._decoders.decode(data, split=split, key=sample.key)
        except ImageDecodeError as error:
            row.status, row.error = "invalid", str(error)
            return LoadedImage(row)
        row.width, row.height = image.width, image.height
        row.mode, row.format = image.mode, image.format
        row.exif_orientation = image.orientation
        row.boxes = image.boxes
        return LoadedImage(row, image.views)
