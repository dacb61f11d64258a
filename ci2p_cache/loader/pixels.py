"""Batches made from the source images, in the order and views of a cache: `PixelLoader`.

What the encoder in the loop and models on images share: each image is read, held against the digest
that the cache recorded, decoded, and cut to the view, as the cache's fingerprint says.

Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.errors import InputDataError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource
from ci2p_cache.images.views import image_views
from ci2p_cache.loader.batches import BatchLoader, Shuffle
from ci2p_cache.loader.order import Rows

__all__ = ["PixelLoader", "SourceLoader"]


class SourceLoader(BatchLoader):
    """Loads batches from the images that a cache was made of, read and decoded each time anew.

    Args:
        split: The split whose images, order, views and settings are used.
        batch_size: Samples per batch, of all ranks together.
        seed: Seed of the order and of the views.
        device: Where batches are put.
        shuffle: Whether to shuffle, and how.
        views: random, or the number of one view.
        drop_last: Whether to leave out the last, smaller batch.
        threads: Threads that read and decode; None: one per core.
        recycle: Whether the memory of a batch is used again for later ones.
        source: Where the images are now; None: where they were when the cache was made.
        rank: This process among those that share the batches, 0 <= rank < world_size.
        world_size: Number of processes that share the batches.

    Raises:
        UsageError: a value is out of range.
        InputDataError: the split holds no latent; while iterating: an image has changed since.
        SourceError: the images are not there any more.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        shuffle: Shuffle = True,
        views: Literal["random"] | int = "random",
        drop_last: bool = False,
        threads: int | None = None,
        recycle: bool = False,
        source: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._source = source
        super().__init__(
            split,
            batch_size=batch_size,
            seed=seed,
            device=device,
            shuffle=shuffle,
            views=views,
            drop_last=drop_last,
            threads=threads,
            recycle=recycle,
            rank=rank,
            world_size=world_size,
        )

    def _prepare(self) -> None:
        cache = self.split.cache
        self._fingerprint = cache.fingerprint
        self._images: ImageSource = open_source(self._source or cache.manifest.source, to_read=True)
        columns = ["key", "path_bytes", "source_sha256"]
        self._index = pa.concat_tables(
            self.split.read_index(shard, columns).replace_schema_metadata(None)
            for shard in range(self.split.record.num_shards)
        )

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        pairs = zip(rows.tolist(), views.tolist(), strict=True)
        futures = [self._pool.submit(self._view, row, view) for row, view in pairs]
        self._futures.update(futures)

        def finish() -> Tensor:
            size = self._fingerprint.image.size
            images_B3HW = torch.empty((len(futures), 3, size, size), dtype=torch.uint8)
            for image_3HW, future in zip(images_B3HW, futures, strict=True):
                image_3HW.copy_(future.result())
            self._futures.difference_update(futures)
            return self._stored(images_B3HW.to(self.device))

        return finish

    @abstractmethod
    def _stored(self, images_B3HW: Tensor) -> Tensor:
        """Turns uint8 images on the device into what a batch holds; there may be none."""

    def _view(self, row: int, view: int) -> Tensor:
        """Returns one view of a source image, uint8 (3, size, size)."""
        entry = {name: self._index[name][row].as_py() for name in self._index.column_names}
        data = self._images.read(entry["path_bytes"])
        if hashlib.sha256(data).hexdigest() != entry["source_sha256"]:
            raise InputDataError(
                f"{entry['key']} (row {row} of split {self.split.name!r}) has changed since the "
                "cache was made",
                hint="encode the images into a new cache",
            )
        spec = self._fingerprint
        views, _ = image_views(
            decode_image(data, spec.image),
            spec.image,
            spec.views,
            split=self.split.name,
            key=entry["key"],
        )
        return views[view]


class PixelLoader(SourceLoader):
    """Loads images for models that read pixels: the baselines.

    `batch.stored` is uint8 (B, 3, size, size); `batch.latents`, what the model reads, is float32 of
    that shape in [0, 1]: a model that wants another range normalises inside. Arguments and errors
    are those of `SourceLoader`.
    """

    def _stored(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW

    def _dequantised(self, stored: Tensor) -> Tensor:
        return self._float_memory(stored).copy_(stored).div_(255)
