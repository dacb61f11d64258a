"""Batches made from the source images, in the order and views of a cache.

Each image is read, held against the digest that the cache recorded, decoded, and cut to the view,
as the cache's fingerprint says. Decoding happens in processes of its own: a decoder that crashes is
an error of its image. `PixelLoader` is for models on images. `OnlineLoader` has the encoder in the
loop: the reference that training from a cache must equal.

Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_saved_encoder
from ci2p_cache.errors import ImageDecodeError, InputDataError, UsageError, command
from ci2p_cache.images.decoders import MOST_AT_ONCE, Decoders
from ci2p_cache.images.locate import open_reader
from ci2p_cache.images.source import ImageReader
from ci2p_cache.loader.batches import BatchLoader, Shuffle
from ci2p_cache.loader.order import Rows

__all__ = ["OnlineLoader", "PixelLoader", "SourceLoader", "require_crops"]

_AT_ONCE_BYTES = 2**23
"""Of files that are read before they are decoded."""


def require_crops(split: Split) -> None:
    """Refuses a split whose views are no random crops: an epoch cannot have new ones.

    Raises:
        UsageError: it is such a split.
    """
    views = split.cache.fingerprint.views
    if split.name != "train" or views.kind != "crops":
        raise UsageError(
            f"`fresh_views` (--fresh-views) cuts new crops; split {split.name!r} of "
            f"{split.cache.path} has {views if split.name == 'train' else 'the centre square'}",
            hint=command("encode", "IMAGES", "--out", "NEW_FOLDER", "--views", "crops:1"),
        )


class SourceLoader(BatchLoader):
    """Loads batches from the images that a cache was made of, read and decoded each time anew."""

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        shuffle: Shuffle = True,
        views: Literal["random", "fresh"] | int = "random",
        drop_last: bool = False,
        threads: int | None = None,
        recycle: bool = False,
        source: str | ImageReader | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Makes a loader at the start of epoch 0.

        Args:
            split: The split whose images, order, views and settings are used.
            batch_size: Samples per batch, of all ranks together.
            seed: Seed of the order and of the views.
            device: Where batches are put.
            shuffle: Whether to shuffle, and how.
            views: random, the number of one view, or fresh: new crops in each epoch, the crops
                number e in epoch e, which the cache need not hold.
            drop_last: Whether to leave out the last, smaller batch.
            threads: Threads that read and decode; None: one per core.
            recycle: Whether the memory of a batch is used again for later ones.
            source: Where the images are now, or a source that gives them; None: where they were
                when the cache was made.
            rank: This process among those that share the batches, 0 <= rank < world_size.
            world_size: Number of processes that share the batches.

        Raises:
            UsageError: a value is out of range, or the split has no crops that could be `fresh`.
            InputDataError: the split holds no latent; while iterating: an image has changed since,
                or cannot be decoded.
            SourceError: the images are not there any more.
        """
        self._source = source
        self._is_fresh = views == "fresh"
        if self._is_fresh:
            require_crops(split)
        super().__init__(
            split,
            batch_size=batch_size,
            seed=seed,
            device=device,
            shuffle=shuffle,
            views="random" if views == "fresh" else views,
            drop_last=drop_last,
            threads=threads,
            recycle=recycle,
            rank=rank,
            world_size=world_size,
        )

    def _prepare(self) -> None:
        cache = self.split.cache
        self._fingerprint = fingerprint = cache.fingerprint
        self._decoders = Decoders(fingerprint.image, fingerprint.views).end_with(self)
        self._images: ImageReader = open_reader(self._source or cache.manifest.source)
        columns = ["key", "path_bytes", "source_sha256"]
        self._index = pa.concat_tables(
            self.split.read_index(shard, columns).replace_schema_metadata(None)
            for shard in range(self.split.record.num_shards)
        )

    def close(self) -> None:
        """Ends the threads and the decoders; a loop over a closed loader raises."""
        # First: a decoder without end would hold up its thread.
        self._decoders.close()
        super().close()

    def _sequence(self, epoch: int) -> tuple[Rows, Rows]:
        rows, views = super()._sequence(epoch)
        return rows, np.full_like(views, epoch) if self._is_fresh else views

    def _start(self, rows: Rows, views: Rows) -> Callable[[], Tensor]:
        starts = range(0, len(rows), MOST_AT_ONCE)
        parts = [slice(start, start + MOST_AT_ONCE) for start in starts]
        futures = [self._pool.submit(self._images_of, rows[each], views[each]) for each in parts]
        pending = self._futures
        pending.update(futures)

        def finish() -> Tensor:
            size = self._fingerprint.image.size
            # By numpy: torch would share each copy with threads that spin while they wait.
            images_B3HW = np.empty((len(rows), 3, size, size), np.uint8)
            for part, future in zip(parts, futures, strict=True):
                for image_3HW, view_3HW in zip(images_B3HW[part], future.result(), strict=True):
                    image_3HW[:] = view_3HW.numpy()
            pending.difference_update(futures)
            return self._stored(torch.from_numpy(images_B3HW).to(self.device))

        return finish

    @abstractmethod
    def _stored(self, images_B3HW: Tensor) -> Tensor:
        """Turns uint8 images on the device into what a batch holds; there may be none."""

    def _images_of(self, rows: Rows, views: Rows) -> list[Tensor]:
        """Returns one view of each of a few source images, uint8 (3, size, size) each."""
        found: list[Tensor] = []
        images: list[tuple[bytes, str]] = []
        for row in rows.tolist():
            images.append(self._read(row))
            done = len(found) + len(images)
            if done == len(rows) or sum(len(data) for data, _ in images) > _AT_ONCE_BYTES:
                part = slice(len(found), done)
                found += self._decoded(images, rows[part], views[part].tolist())
                images = []
        return found

    def _read(self, row: int) -> tuple[bytes, str]:
        """Returns a source image and its key."""
        entry = {name: self._index[name][row].as_py() for name in self._index.column_names}
        try:
            data = self._images.read(entry["path_bytes"])
        except ImageDecodeError as error:
            raise ImageDecodeError(
                f"{entry['key']} (row {row} of split {self.split.name!r}): {error}",
                hint="put the image back, or train from the cache without the images",
            ) from error
        if hashlib.sha256(data).hexdigest() != entry["source_sha256"]:
            raise InputDataError(
                f"{entry['key']} (row {row} of split {self.split.name!r}) has changed since the "
                "cache was made",
                hint="encode the images into a new cache",
            )
        return data, entry["key"]

    def _decoded(
        self, images: list[tuple[bytes, str]], rows: Rows, views: list[int]
    ) -> Sequence[Tensor]:
        """Returns a view of each image; an error names the one that cannot be decoded."""
        name = self.split.name
        if len(images) > 1:
            with suppress(ImageDecodeError):
                return list(self._decoders.views(images, split=name, numbers=views))
        found = []
        for row, view, (data, key) in zip(rows.tolist(), views, images, strict=True):
            try:
                image = self._decoders.decode(data, split=name, key=key, numbers=[view])
                found.append(image.views[0])
            except ImageDecodeError as error:
                raise ImageDecodeError(f"{key} (row {row} of split {name!r}): {error}") from error
        return found


class PixelLoader(SourceLoader):
    """Loads images for models that read pixels: the baselines.

    `batch.stored` is uint8 (B, 3, size, size); `batch.latents`, what the model reads, is float32 of
    that shape in [0, 1]: a model that wants another range normalises inside. Arguments and errors
    are those of `__init__`.
    """

    def _stored(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW

    def _dequantised(self, stored: Tensor) -> Tensor:
        return self._float_memory(stored).copy_(stored).div_(255)


class OnlineLoader(SourceLoader):
    """Loads batches by running the frozen encoder on the source images.

    Arguments and errors are those of `__init__`; the encoder runs on the batches' device.

    Raises:
        WeightsError: the cache's encoder.safetensors is damaged.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._encoder: FrozenEncoder = load_saved_encoder(
            self.split.cache.encoder_path,
            precision=self._fingerprint.encoder.precision,
            device=self.device,
        )

    def _stored(self, images_B3HW: Tensor) -> Tensor:
        """Encodes images to what the cache would store, (B, M, h, w) of its dtype."""
        latent = self._fingerprint.latent
        if not len(images_B3HW):
            dtype = getattr(torch, latent.dtype)
            return torch.empty((0, *latent.shape), dtype=dtype, device=self.device)
        y = self._encoder(images_B3HW.to(torch.float32).div_(255))
        return self._encoder.stored(y, latent)[0]
