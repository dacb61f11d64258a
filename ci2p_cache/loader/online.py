"""`OnlineLoader`: the encoder in the loop, the reference that training from a cache must equal.

It gives the batches of `LatentLoader`, in the same order and views, from the source images: read,
decoded, encoded and quantised as the cache's fingerprint says, each time anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.split import Split
from ci2p_cache.encoder.frozen import FrozenEncoder, load_saved_encoder
from ci2p_cache.encoder.quantize import saturate
from ci2p_cache.errors import InputDataError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource
from ci2p_cache.images.views import image_views
from ci2p_cache.loader.batches import BatchLoader, Shuffle
from ci2p_cache.loader.order import Rows

__all__ = ["OnlineLoader"]


class OnlineLoader(BatchLoader):
    """Loads batches by running the frozen encoder on the source images.

    Args:
        split: The split whose images, order, views and settings are used.
        batch_size: Samples per batch, of all ranks together.
        seed: Seed of the order and of the views.
        device: Where the encoder runs and batches are put.
        shuffle: Whether to shuffle.
        views: random, or the number of one view.
        drop_last: Whether to leave out the last, smaller batch.
        threads: Threads that read and decode; None: one per core.
        source: Where the images are now; None: where they were when the cache was made.
        rank: This process among those that share the batches, 0 <= rank < world_size.
        world_size: Number of processes that share the batches.

    Raises:
        UsageError: a value is out of range.
        InputDataError: the split holds no latent; while iterating: an image has changed since.
        SourceError: the images are not there any more.
        WeightsError: the cache's encoder.safetensors is damaged.
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
        source: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            split,
            batch_size=batch_size,
            seed=seed,
            device=device,
            shuffle=shuffle,
            views=views,
            drop_last=drop_last,
            threads=threads,
            rank=rank,
            world_size=world_size,
        )
        self._images: ImageSource = open_source(source or split.cache.manifest.source)

    def _prepare(self) -> None:
        cache = self.split.cache
        self._fingerprint = cache.fingerprint
        self._encoder: FrozenEncoder = load_saved_encoder(
            cache.encoder_path, precision=self._fingerprint.encoder.precision, device=self.device
        )
        columns = ["key", "path_bytes", "source_sha256"]
        self._index = pa.concat_tables(
            read_index(cache.path, self.split.name, shard, columns).replace_schema_metadata(None)
            for shard in range(self.split.record.num_shards)
        )

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        pairs = zip(rows.tolist(), views.tolist(), strict=True)
        futures = [self._pool.submit(self._view, row, view) for row, view in pairs]
        self._futures.update(futures)

        def finish() -> Tensor:
            views_BCHW = [future.result() for future in futures]
            self._futures.difference_update(futures)
            if not views_BCHW:
                dtype = getattr(torch, self.split.latent.dtype)
                return torch.empty((0, *self.split.latent.shape), dtype=dtype, device=self.device)
            return self._stored(torch.stack(views_BCHW).to(self.device))

        return finish

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

    def _stored(self, images: Tensor) -> Tensor:
        """Encodes uint8 (B, 3, size, size) to what the cache would store, (B, M, h, w)."""
        latent = self._fingerprint.latent
        dtype = getattr(torch, latent.dtype)
        y = self._encoder(images.to(torch.float32).div_(255))
        if not latent.is_symbols:
            return y.to(dtype)
        symbols = self._encoder.quantize(y, step=latent.step)
        stored, _ = saturate(symbols, latent.symbol_limit)
        return stored.to(dtype)
