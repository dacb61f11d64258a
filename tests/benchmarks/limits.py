"""What bounds any reader: of compressed chunks, of raw files, and of memory.

Shapes: B batch, M latent channels, h and w latent rows and columns.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import ci2p_cache as cc
from ci2p_cache.cache.codecs import CODECS
from tests.benchmarks.contestants import Batch, Contestant, random_batches, stored_as
from tests.benchmarks.stores import Data

__all__ = ["limits"]


def limits(
    data: Data, splits: dict[str, cc.Split], folder: Path, batch: int, threads: list[int]
) -> list[Contestant]:
    """What bounds any reader: of chunks on some threads, of raw files, of memory."""
    latents, shape = data.latents, data.latents.shape[1:]
    plain = splits["none"]
    raw_path = folder / "latents.npy"
    np.save(raw_path, latents)

    def decoded(split: cc.Split, threads: int) -> Iterator[Batch]:
        buffer = np.empty((batch, *shape), np.int8)
        outs = list(buffer.reshape(batch, -1).view(np.uint8))
        decode, pread = split._codec.decode_into, os.pread
        with ExitStack() as files:
            places = chunk_places(split, files)

            def fill(part: list[tuple[int, Any]]) -> None:
                for row, out in part:
                    descriptor, offset, size = places[row]
                    decode(pread(descriptor, size, offset), out)

            pool = files.enter_context(ThreadPoolExecutor(threads)) if threads > 1 else None
            for rows in random_batches(len(latents), batch):
                pairs = list(zip(rows.tolist(), outs, strict=True))
                if pool is None:
                    fill(pairs)
                else:
                    list(pool.map(fill, [pairs[first::threads] for first in range(threads)]))
                yield rows, buffer

    def read() -> Iterator[Batch]:
        buffer = np.empty((batch, *shape), np.int8)
        outs = [[out] for out in buffer.reshape(batch, -1).view(np.uint8)]
        with ExitStack() as files:
            places = chunk_places(plain, files)
            for rows in random_batches(len(latents), batch):
                for row, out in zip(rows.tolist(), outs, strict=True):
                    descriptor, offset, _ = places[row]
                    os.preadv(descriptor, out, offset)
                yield rows, buffer

    def gathered() -> Iterator[Batch]:
        buffer = np.empty((batch, *shape), np.int8)
        for rows in random_batches(len(latents), batch):
            # Any other mode than clip makes numpy copy by way of a buffer of its own.
            np.take(latents, rows, axis=0, out=buffer, mode="clip")
            yield rows, buffer

    def fresh() -> Iterator[Batch]:
        size = batch * data.latents[0].nbytes
        for rows in random_batches(len(latents), batch):
            # malloc would sooner or later give back what the batch before had.
            memory = mmap.mmap(-1, size)
            buffer = np.frombuffer(memory, np.int8).reshape(batch, *shape)
            np.take(latents, rows, axis=0, out=buffer, mode="clip")
            yield rows, buffer

    def mapped() -> Iterator[Batch]:
        source = np.load(raw_path, mmap_mode="r")
        buffer = np.empty((batch, *shape), np.int8)
        for rows in random_batches(len(latents), batch):
            np.take(source, rows, axis=0, out=buffer, mode="clip")
            yield rows, buffer

    ways: tuple[tuple[str, str, Literal["int8", "float32"], Any], ...] = (
        ("", "", "int8", decoded),
        (" float", ", then dequantise", "float32", lambda *each: dequantised(data, decoded(*each))),
    )
    bare = [
        Contestant(
            key=f"bare {codec}{end}{_suffix(count)}",
            name=f"limit: pread + decode{text}, into one buffer",
            stream=partial(stream, splits[codec], count),
            threads=count,
            gives=gives,
            **stored_as(splits[codec]) | {"checked": "every read"},
        )
        for codec in CODECS
        for count in threads
        for end, text, gives, stream in ways
    ]
    return [
        *bare,
        *(
            Contestant(key=key, name=name, stream=stream)
            for key, name, stream in (
                ("pread", "limit: preadv into one buffer, no checksum", read),
                ("gather", "limit: np.take in memory into one buffer", gathered),
                ("gather fresh", "the same, into memory fresh from the kernel", fresh),
                ("memmap", "np.memmap, np.take into one buffer", mapped),
            )
        ),
        Contestant(
            key="gather float", name="limit: np.take, then dequantised, each into one buffer",
            stream=lambda: dequantised(data, gathered()), gives="float32",
        ),
    ]  # fmt: skip


def _suffix(threads: int) -> str:
    return "" if threads == 1 else f" {threads}"


def dequantised(data: Data, stream: Iterator[Batch]) -> Iterator[Batch]:
    """Turns stored batches into float32 ones, in one buffer."""
    scale, offset = float(data.scale), torch.from_numpy(data.offset)
    floats: torch.Tensor | None = None
    for rows, stored in stream:
        if floats is None:
            floats = torch.empty(stored.shape, dtype=torch.float32)
        # Not torch.mul(stored, scale, out=floats): it casts by way of a temporary of its own.
        floats.copy_(torch.from_numpy(stored))
        if scale != 1.0:
            floats.mul_(scale)
        floats.add_(offset)
        yield rows, floats.numpy()


def chunk_places(split: cc.Split, files: ExitStack) -> list[tuple[int, int, int]]:
    """Descriptor, offset and size of the chunk of every row; all shards stay open."""
    places = []
    for shard in range(split.record.num_shards):
        file = split.open_shard(shard)
        descriptor = os.open(file.path, os.O_RDONLY)
        files.callback(os.close, descriptor)
        entries = file.index.entries[: len(split.record.rows_of(shard))]
        places += [(descriptor, int(offset), int(size)) for offset, size in entries]
    return places
