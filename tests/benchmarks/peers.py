"""The peers: each on its own store of the same latents, or on the very zarr array of ours.

Where a library can be used in several ways, the one that was fastest here is taken, and every
sample is copied into one batch buffer that is used again: collating costs no peer an allocation.
A peer that is not installed gives a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ci2p_cache as cc
from tests.benchmarks.contestants import (
    RANDOM,
    Batch,
    Contestant,
    random_batches,
    zarr_rows,
)
from tests.benchmarks.measure import installed
from tests.benchmarks.stores import Data

__all__ = ["PEERS", "Missing", "Shelf", "peers"]

PEERS = ("tensorstore", "zarrs", "webdataset", "mosaicml-streaming", "litdata", "ffcv")

WINDOW = 1000
"""Samples in WebDataset's shuffle buffer."""


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here."""

    name: str
    reason: str


@dataclass(frozen=True)
class Shelf:
    """What peers are built from, and where."""

    data: Data
    folder: Path
    batch: int
    compressed: cc.Split
    """zstd, in shards of the default size."""
    level: str
    plain: cc.Split
    """Uncompressed, in as few shards as there can be."""


def peers(shelf: Shelf, threads: list[int]) -> tuple[list[Contestant], list[Missing]]:
    """Builds the stores of those that are installed."""
    builders: dict[str, Callable[[], list[Contestant]]] = {
        "tensorstore": lambda: tensorstore_rows(shelf, threads),
        "zarrs": lambda: zarr_rows(
            shelf.compressed,
            batch=shelf.batch,
            codec=shelf.level,
            pipeline="zarrs.ZarrsCodecPipeline",
        ),
        "webdataset": lambda: webdataset_rows(shelf),
        "mosaicml-streaming": lambda: streaming_rows(shelf),
        "litdata": lambda: litdata_rows(shelf),
        "ffcv": lambda: ffcv_rows(shelf),
    }
    found: list[Contestant] = []
    missing: list[Missing] = []
    for name, build in builders.items():
        if installed(name) is None:
            missing.append(Missing(name, "not installed"))
        else:
            found += build()
    return found, missing


def tensorstore_rows(shelf: Shelf, threads: list[int]) -> list[Contestant]:
    """tensorstore on our own zarr array: a whole batch by one index array, into one buffer."""
    import tensorstore as ts

    def stream(split: cc.Split, workers: int) -> Iterator[Batch]:
        limit = {"limit": workers}
        array = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {
                    "driver": "file",
                    "path": str(split.cache.path / "latents.zarr/train/latents"),
                },
            },
            context=ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit}),
            read=True,
        ).result()
        buffer = np.empty((shelf.batch, 1, *split.latent.shape), np.int8)
        target = ts.array(buffer)
        for rows in random_batches(split.num_rows, shelf.batch):
            target.write(array[rows]).result()
            yield rows, buffer[:, 0]

    return [
        Contestant(
            key=f"tensorstore {codec} {workers}", name="tensorstore, one index array a batch",
            codec=level, gives="int8", order=RANDOM, checked="every read", threads=workers,
            stream=partial(stream, split, workers),
        )
        for codec, level, split in (
            ("zstd", shelf.level, shelf.compressed), ("none", "none", shelf.plain),
        )
        for workers in threads
    ]  # fmt: skip


def webdataset_rows(shelf: Shelf) -> list[Contestant]:
    """WebDataset on tars of 1,024 samples, with a shuffle buffer."""
    import webdataset as wds

    names = {}
    for kind in ("bin", "npy"):
        paths = shelf.folder / kind
        paths.mkdir()
        # Given as a template with "%", which its writer fills in.
        with wds.ShardWriter(f"{paths}/%06d.tar", maxcount=1024, verbose=0) as writer:
            for row, latent in enumerate(shelf.data.latents):
                value = latent.tobytes() if kind == "bin" else latent
                writer.write({"__key__": f"{row:09d}", f"latent.{kind}": value})
        names[kind] = sorted(map(str, paths.glob("*.tar")))

    def stream(kind: str) -> Iterator[Batch]:
        samples = wds.WebDataset(names[kind], shardshuffle=len(names[kind]), seed=0)
        samples = samples.shuffle(WINDOW).repeat()
        if kind == "npy":
            samples = samples.decode()
        return collated(
            (
                (int(sample["__key__"]), _as_array(sample[f"latent.{kind}"], shelf))
                for sample in samples
            ),
            shelf,
        )

    return [
        Contestant(
            key=f"webdataset {kind}", name=f"WebDataset, {text}", codec="none", gives="int8",
            order=f"window of {WINDOW:,}, shards shuffled", checked="never",
            stream=partial(stream, kind),
        )
        for kind, text in (("bin", "raw bytes"), ("npy", "npy"))
    ]  # fmt: skip


def streaming_rows(shelf: Shelf) -> list[Contestant]:
    """MosaicML streaming on uncompressed MDS shards of 64 MiB: its own order, and indexing."""
    import streaming

    local = shelf.folder / "mds"
    columns = {"row": "int", "latent": "bytes"}
    with streaming.MDSWriter(out=str(local), columns=columns, size_limit=2**26) as writer:
        for row, latent in enumerate(shelf.data.latents):
            writer.write({"row": row, "latent": latent.tobytes()})
    # Two data sets may not share a folder, so both rows share one.
    opened: list[Any] = []

    def samples() -> Any:
        if not opened:
            opened.append(
                streaming.StreamingDataset(
                    local=str(local), shuffle=True, shuffle_seed=0, batch_size=shelf.batch
                )
            )
        return opened[0]

    def iterated() -> Iterator[Batch]:
        def forever() -> Iterator[tuple[int, Any]]:
            while True:
                for sample in samples():
                    yield sample["row"], _as_array(sample["latent"], shelf)

        return collated(forever(), shelf)

    def indexed() -> Iterator[Batch]:
        buffer = np.empty((shelf.batch, *shelf.data.latents.shape[1:]), np.int8)
        source = samples()
        for rows in random_batches(len(shelf.data.latents), shelf.batch):
            for row, out in zip(rows.tolist(), buffer, strict=True):
                out[...] = _as_array(source[row]["latent"], shelf)
            yield rows, buffer

    return [
        Contestant(
            key=f"streaming {key}", name=f"MosaicML streaming, {text}", codec="none", gives="int8",
            order=order, checked="never", stream=stream,
        )
        for key, text, order, stream in (
            ("iterated", "iterated", "its py1e shuffle", iterated),
            ("indexed", "indexed one by one", RANDOM, indexed),
        )
    ]  # fmt: skip


def litdata_rows(shelf: Shelf) -> list[Contestant]:
    """LitData on uncompressed chunks of 64 MB, samples as bytes (faster there than as arrays)."""
    import litdata
    from litdata.streaming import Cache

    folder = shelf.folder / "litdata"
    folder.mkdir()
    writer = Cache(str(folder), chunk_bytes="64MB")
    for row, latent in enumerate(shelf.data.latents):
        writer[row] = {"row": row, "latent": latent.tobytes()}
    writer.done()
    writer.merge()

    def stream() -> Iterator[Batch]:
        def forever() -> Iterator[tuple[int, Any]]:
            samples = litdata.StreamingDataset(str(folder), shuffle=True, seed=0)
            while True:
                for sample in samples:
                    yield sample["row"], _as_array(sample["latent"], shelf)

        return collated(forever(), shelf)

    return [
        Contestant(
            key="litdata", name="LitData, bytes", codec="none", gives="int8",
            order="its chunk-wise shuffle", checked="never", stream=stream,
        )
    ]  # fmt: skip


def ffcv_rows(shelf: Shelf) -> list[Contestant]:
    """FFCV on one .beton of arrays, in memory maps: one thread beside the one that asks."""
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    folder = shelf.folder / "ffcv"
    folder.mkdir()
    path = str(folder / "latents.beton")
    latents = shelf.data.latents
    fields = {"row": IntField(), "latent": NDArrayField(latents.dtype, latents.shape[1:])}
    writer = DatasetWriter(path, fields, num_workers=1)
    writer.from_indexed_dataset(list(enumerate(latents)))

    def stream() -> Iterator[Batch]:
        loader = Loader(
            path, batch_size=shelf.batch, num_workers=1, order=OrderOption.RANDOM, seed=0,
            os_cache=True, drop_last=True,
            pipelines={"row": [IntDecoder()], "latent": [NDArrayDecoder()]},
        )  # fmt: skip
        while True:
            for rows, batch in loader:
                yield rows[:, 0], batch

    return [
        Contestant(
            key="ffcv", name="FFCV, arrays", codec="none", gives="int8", order=RANDOM,
            checked="never", stream=stream,
        )
    ]  # fmt: skip


def collated(samples: Iterator[tuple[int, Any]], shelf: Shelf) -> Iterator[Batch]:
    """Copies samples into one batch buffer."""
    buffer = np.empty((shelf.batch, *shelf.data.latents.shape[1:]), np.int8)
    rows = np.empty(shelf.batch, np.int64)
    place = 0
    for row, latent in samples:
        buffer[place], rows[place] = latent, row
        place += 1
        if place == shelf.batch:
            yield rows, buffer
            place = 0


def _as_array(value: Any, shelf: Shelf) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return np.frombuffer(value, np.int8).reshape(shelf.data.latents.shape[1:])
    return value
