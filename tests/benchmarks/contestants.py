"""Who reads the latents: this package, and zarr-python.

A contestant gives an endless stream of (rows, batch); a batch is valid until the next one is asked
for. Contestants that can choose follow one order, the loader's own.

Shapes: B batch, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

import ci2p_cache as cc
from ci2p_cache.loader.order import epoch_order

__all__ = [
    "BLOCKS",
    "RANDOM",
    "Batch",
    "Contestant",
    "ours",
    "ours_first",
    "ours_read",
    "random_batches",
    "shuffled_blocks",
    "stored_as",
    "zarr_rows",
]

Batch = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Row numbers (B,), and their latents (B, M, h, w) as stored or as float32."""

RANDOM = "full random"
BLOCKS = "blocks of 128, shuffled"


@dataclass(frozen=True, kw_only=True, eq=False)
class Contestant:
    """One row of the table."""

    key: str
    """Short name that ratios refer to."""
    name: str
    stream: Callable[[], Iterator[Batch]]
    codec: str = "none"
    """What the bytes are compressed with."""
    gives: Literal["int8", "float32"] = "int8"
    """int8: as stored. float32: dequantised on the CPU too."""
    order: str = RANDOM
    checked: str = "never"
    """When a flipped bit would be noticed: every read, first read (since opening), never."""
    threads: int = 1
    """Threads that it is given, and cores that the whole process is pinned to."""


def random_batches(count: int, batch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Endless epochs of full batches of rows, in the order that `LatentLoader` has for seed 0."""
    epoch = 0
    while True:
        rows = epoch_order(np.arange(count), seed=0, epoch=epoch)
        for start in range(0, count - batch + 1, batch):
            yield rows[start : start + batch]
        epoch += 1


def shuffled_blocks(count: int, batch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Endless epochs of contiguous blocks of rows, the blocks shuffled."""
    for block in random_batches(count // batch, 1):
        yield np.arange(block[0] * batch, (block[0] + 1) * batch)


def ours(
    key: str,
    split: cc.Split,
    *,
    batch: int,
    gives: Literal["int8", "float32"],
    threads: int = 1,
    recycle: bool = True,
) -> Contestant:
    """`LatentLoader` as training uses it: as stored, or dequantised on the CPU."""

    def stream() -> Iterator[Batch]:
        with cc.LatentLoader(
            split, batch_size=batch, seed=0, threads=threads, recycle=recycle, drop_last=True
        ) as loader:
            while True:
                for found in loader:
                    latents = found.stored if gives == "int8" else found.latents
                    yield found.rows.numpy(), latents.numpy()

    name = "ours: LatentLoader" + ("" if recycle else ", batches that own their memory")
    return Contestant(
        key=key, name=name, gives=gives, threads=threads, stream=stream, **stored_as(split)
    )  # fmt: skip


def ours_read(key: str, split: cc.Split, *, batch: int) -> Contestant:
    """`Split.read_batch_into`: the checked read, without the loader and its threads around it."""

    def stream() -> Iterator[Batch]:
        buffer = np.empty((batch, *split.latent.shape), np.int8)
        views = np.zeros(batch, np.int64)
        for rows in random_batches(split.num_rows, batch):
            split.read_batch_into(rows, views, buffer)
            yield rows, buffer

    return Contestant(
        key=key, name="ours: Split.read_batch_into", stream=stream, **stored_as(split)
    )  # fmt: skip


def ours_first(key: str, split: cc.Split, *, batch: int) -> Contestant:
    """The same in an epoch that opens the cache anew: every chunk is touched for the first time."""

    def stream() -> Iterator[Batch]:
        buffer = np.empty((batch, *split.latent.shape), np.int8)
        views = np.zeros(batch, np.int64)
        orders = random_batches(split.num_rows, batch)
        while True:
            fresh = cc.open_cache(split.cache.path)["train"]
            for _ in range(split.num_rows // batch):
                rows = next(orders)
                fresh.read_batch_into(rows, views, buffer)
                yield rows, buffer

    return Contestant(
        key=key, name="ours: Split.read_batch_into, opened anew each epoch", stream=stream,
        checked="every read",
    )  # fmt: skip


def stored_as(split: cc.Split) -> dict[str, Any]:
    """How a store of ours is compressed, and when its reader checks it."""
    layout = split.cache.manifest.layout
    if split.is_mapped:
        return {"codec": "none", "checked": "first read"}
    return {"codec": f"{layout.codec} {layout.level}", "checked": "every read"}


def zarr_rows(split: cc.Split, *, batch: int, pipeline: str | None = None) -> list[Contestant]:
    """zarr-python, or another codec pipeline under it, on one core."""
    library = "zarr" if pipeline is None else "zarrs"
    label = "zarr-python" if pipeline is None else "zarrs under zarr-python"

    def opened() -> Any:
        # The pipeline belongs to the array from here on.
        settings = {"threading.max_workers": 1}
        with zarr.config.set(settings | ({"codec_pipeline.path": pipeline} if pipeline else {})):
            return zarr.open_array(split.cache.path / "latents.zarr/train/latents", mode="r")

    def one_by_one() -> Iterator[Batch]:
        array = opened()
        buffer = np.empty((batch, *split.latent.shape), np.int8)
        for rows in random_batches(split.num_rows, batch):
            for row, out in zip(rows.tolist(), buffer, strict=True):
                out[...] = array[row, 0]
            yield rows, buffer

    def oindex() -> Iterator[Batch]:
        array = opened()
        for rows in random_batches(split.num_rows, batch):
            yield rows, array.oindex[rows][:, 0]

    def blocks() -> Iterator[Batch]:
        array = opened()
        for rows in shuffled_blocks(split.num_rows, batch):
            yield rows, array[int(rows[0]) : int(rows[-1]) + 1, 0]

    return [
        Contestant(
            key=f"{library} {kind}", name=f"{label}, {text}", order=order, stream=stream,
            **stored_as(split),
        )
        for kind, text, order, stream in (
            ("one", "one by one", RANDOM, one_by_one),
            ("oindex", "oindex", RANDOM, oindex),
            ("blocks", "slices", BLOCKS, blocks),
        )
    ]  # fmt: skip
