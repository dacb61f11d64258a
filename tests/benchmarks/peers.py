"""The peers: each on its own store of the same latents, or on the very zarr array of ours.

Where a library can be used in several ways, the one that was fastest here is taken, and every
sample is copied into one batch buffer that is used again: collating costs no peer an allocation.
Libraries without a compression that suits latents hold zstd frames, as anyone would write them, and
get them decoded by the fastest way that Python has. A store is written by the first row that reads
it, in that row's process: some libraries have threads, which no fork takes along.
A peer that is not installed gives a row that says so.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader

import ci2p_cache as cc
from tests.benchmarks.contestants import (
    Batch,
    Contestant,
    random_batches,
    stored_as,
    zarr_rows,
)
from tests.benchmarks.limits import chunk_places
from tests.benchmarks.measure import installed
from tests.benchmarks.stores import PEER, Data, frame_decoder

__all__ = ["PEERS", "Missing", "Shelf", "peers"]

PEERS = (
    "tensorstore", "zarrs", "webdataset", "mosaicml-streaming", "litdata", "ffcv", "lmdb",
    "pylance", "vortex-data", "array-record", "bagz", "webshart", "spdl",
)  # fmt: skip

WINDOW = 1000
"""Samples in WebDataset's shuffle buffer."""
WINDOWED = f"window of {WINDOW:,}, shards shuffled"


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
    """By the default codec."""
    plain: cc.Split
    """Uncompressed."""

    def store(self, name: str, write: Callable[[Path], object]) -> Path:
        """The folder of a store, written when it is first asked for."""
        folder = self.folder / (PEER + name)
        if not folder.is_dir():
            folder.mkdir()
            write(folder)
        return folder

    def buffer(self) -> npt.NDArray[np.int8]:
        return np.empty((self.batch, *self.data.latents.shape[1:]), np.int8)

    def filled(self, fill: Callable[[list[int], npt.NDArray[np.uint8]], None]) -> Iterator[Batch]:
        """Batches in random order, each filled into one buffer: uint8 (B, bytes of a latent)."""
        buffer = self.buffer()
        flat = buffer.reshape(self.batch, -1).view(np.uint8)
        for rows in random_batches(len(self.data.latents), self.batch):
            fill(rows.tolist(), flat)
            yield rows, buffer

    def decoded(
        self,
        fetch: Callable[[list[int]], Iterable[Any]],
        decode: Callable[[Any, npt.NDArray[np.uint8]], None] | None = None,
    ) -> Iterator[Batch]:
        """Batches of the frames, or other values, that `fetch` gives for rows."""
        decode = decode or frame_decoder()

        def fill(rows: list[int], flat: npt.NDArray[np.uint8]) -> None:
            for frame, out in zip(fetch(rows), flat, strict=True):
                decode(frame, out)

        return self.filled(fill)

    def collated(self, samples: Iterator[tuple[int, Any]]) -> Iterator[Batch]:
        """Copies the raw latents of a peer with an order of its own into one buffer."""
        buffer = self.buffer()
        rows = np.empty(self.batch, np.int64)
        for place, (row, latent) in zip(cycle(range(self.batch)), samples, strict=False):
            buffer[place], rows[place] = self.as_array(latent), row
            if place == self.batch - 1:
                yield rows, buffer

    def as_array(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value
        return np.frombuffer(value, np.int8).reshape(self.data.latents.shape[1:])


@dataclass(frozen=True)
class Row:
    """A way to read with a library."""

    package: str
    key: str
    name: str
    reads: str | None
    """Which split of the shelf it reads; None: a store of its own."""
    fields: dict[str, Any]
    stream: Callable[..., Iterator[Batch]]


ROWS: list[Row] = []
FRAMES = {"codec": "zstd 1", "checked": "every read"}


def row(
    package: str, key: str, name: str, *args: Any, reads: str | None = None, **fields: Any
) -> Callable[[Callable[..., Iterator[Batch]]], Any]:
    """Lists a function of a shelf and `args` as one row; `fields` are a contestant's."""

    def listed(stream: Callable[..., Iterator[Batch]]) -> Any:
        ROWS.append(Row(package, key, name, reads, fields, lambda shelf: stream(shelf, *args)))
        return stream

    return listed


def peers(shelf: Shelf, threads: list[int]) -> tuple[list[Contestant], list[Missing]]:
    """Rows of those that are installed, and of what users write themselves."""
    lacking = [name for name in PEERS if installed(name) is None]
    found = []
    for each in ROWS:
        if each.package not in lacking and each.fields.get("threads", 1) in threads:
            stored = stored_as(getattr(shelf, each.reads)) if each.reads else {}
            stream = partial(each.stream, shelf)
            found.append(
                Contestant(key=each.key, name=each.name, stream=stream, **stored | each.fields)
            )
    if "zarrs" not in lacking:
        pipeline = "zarrs.ZarrsCodecPipeline"
        found += zarr_rows(shelf.compressed, batch=shelf.batch, pipeline=pipeline)
    return found, [Missing(name, "not installed") for name in lacking]


@row("tensorstore", "tensorstore none 2", "tensorstore, one index array a batch",
     "plain", 2, reads="plain", threads=2, checked="every read")  # fmt: skip
@row("tensorstore", "tensorstore none 1", "tensorstore, one index array a batch",
     "plain", 1, reads="plain", threads=1, checked="every read")  # fmt: skip
@row("tensorstore", "tensorstore zstd 2", "tensorstore, one index array a batch",
     "compressed", 2, reads="compressed", threads=2, checked="every read")  # fmt: skip
@row("tensorstore", "tensorstore zstd 1", "tensorstore, one index array a batch",
     "compressed", 1, reads="compressed", threads=1, checked="every read")  # fmt: skip
def tensorstore_batches(shelf: Shelf, name: str, threads: int) -> Iterator[Batch]:
    """tensorstore on our own zarr array: a whole batch by one index array, into one buffer."""
    import tensorstore as ts

    split, limit = getattr(shelf, name), {"limit": threads}
    path = str(split.cache.path / "latents.zarr/train/latents")
    array = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}},
        context=ts.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit}),
        read=True,
    ).result()
    buffer = np.empty((shelf.batch, 1, *split.latent.shape), np.int8)
    target = ts.array(buffer)
    for rows in random_batches(split.num_rows, shelf.batch):
        target.write(array[rows]).result()
        yield rows, buffer[:, 0]


@row("webdataset", "webdataset npy", "WebDataset, npy", "npy", order=WINDOWED)
@row("webdataset", "webdataset bin", "WebDataset, raw bytes", "bin", order=WINDOWED)
def webdataset_batches(shelf: Shelf, kind: str) -> Iterator[Batch]:
    """WebDataset on tars of 1,024 samples, with a shuffle buffer."""
    import webdataset as wds

    def write(folder: Path) -> None:
        latents = shelf.data.latents
        write_tars(folder, f"latent.{kind}", map(bytes, latents) if kind == "bin" else latents)

    paths = sorted(map(str, shelf.store(f"WebDataset {kind}", write).glob("*.tar")))
    samples = wds.WebDataset(paths, shardshuffle=len(paths), seed=0).shuffle(WINDOW).repeat()
    if kind == "npy":
        samples = samples.decode()
    return shelf.collated((int(each["__key__"]), each[f"latent.{kind}"]) for each in samples)


def write_tars(folder: Path, suffix: str, values: Iterable[Any]) -> None:
    import webdataset as wds

    # Given as a template with "%", which its writer fills in.
    with wds.ShardWriter(f"{folder}/%06d.tar", maxcount=1024, verbose=0) as writer:
        for row, value in enumerate(values):
            writer.write({"__key__": f"{row:09d}", suffix: value})


@row("mosaicml-streaming", "streaming indexed", "MosaicML streaming, indexed one by one", True)
@row("mosaicml-streaming", "streaming iterated", "MosaicML streaming, iterated", False,
     order="its py1e shuffle")  # fmt: skip
def streaming_batches(shelf: Shelf, is_indexed: bool) -> Iterator[Batch]:
    """MosaicML streaming on uncompressed MDS shards of 64 MiB: its own order, or indexing."""
    import streaming

    def write(folder: Path) -> None:
        columns = {"row": "int", "latent": "bytes"}
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=2**26) as writer:
            for row, latent in enumerate(shelf.data.latents):
                writer.write({"row": row, "latent": latent.tobytes()})

    local = str(shelf.store("MDS of MosaicML streaming", write))
    source = streaming.StreamingDataset(
        local=local, shuffle=True, shuffle_seed=0, batch_size=shelf.batch
    )
    if not is_indexed:
        return shelf.collated((each["row"], each["latent"]) for _ in cycle([0]) for each in source)

    def fill(rows: list[int], flat: npt.NDArray[np.uint8]) -> None:
        for row, out in zip(rows, flat, strict=True):
            out[:] = np.frombuffer(source[row]["latent"], np.uint8)

    return shelf.filled(fill)


@row("litdata", "litdata", "LitData, bytes", order="its chunk-wise shuffle")
def litdata_batches(shelf: Shelf) -> Iterator[Batch]:
    """LitData on uncompressed chunks of 64 MB, samples as bytes (faster there than as arrays)."""
    import litdata
    from litdata.streaming import Cache

    def write(folder: Path) -> None:
        writer = Cache(str(folder), chunk_bytes="64MB")
        for row, latent in enumerate(shelf.data.latents):
            writer[row] = {"row": row, "latent": latent.tobytes()}
        writer.done()
        writer.merge()

    source = litdata.StreamingDataset(str(shelf.store("LitData", write)), shuffle=True, seed=0)
    return shelf.collated((each["row"], each["latent"]) for _ in cycle([0]) for each in source)


@row("ffcv", "ffcv", "FFCV, arrays")
def ffcv_batches(shelf: Shelf) -> Iterator[Batch]:
    """FFCV on one .beton of arrays, in memory maps: one thread beside the one that asks."""
    from ffcv.fields import IntField, NDArrayField
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    def write(folder: Path) -> None:
        latents = shelf.data.latents
        fields = {"row": IntField(), "latent": NDArrayField(latents.dtype, latents.shape[1:])}
        writer = DatasetWriter(str(folder / "latents.beton"), fields, num_workers=1)
        writer.from_indexed_dataset(list(enumerate(latents)))

    loader = Loader(
        str(shelf.store("FFCV", write) / "latents.beton"), batch_size=shelf.batch, num_workers=1,
        order=OrderOption.RANDOM, seed=0, os_cache=True, drop_last=True,
        pipelines={"row": [IntDecoder()], "latent": [NDArrayDecoder()]},
    )  # fmt: skip
    while True:
        for rows, batch in loader:
            yield rows[:, 0], batch


@row("lmdb", "lmdb", "LMDB, a loop", False, **FRAMES)
@row("lmdb", "lmdb chunks", "LMDB of our own chunks, a loop", True, reads="compressed")
def lmdb_batches(shelf: Shelf, holds_chunks: bool) -> Iterator[Batch]:
    """LMDB: the frames as values, in its memory map; or the very chunks of ours."""
    import lmdb

    def write(folder: Path) -> None:
        values: Iterable[bytes] = shelf.data.frames
        with (
            ExitStack() as files,
            lmdb.open(str(folder), map_size=2**40) as made,
            made.begin(write=True) as writing,
        ):
            if holds_chunks:
                places = chunk_places(shelf.compressed, files)
                values = (os.pread(file, size, offset) for file, offset, size in places)
            for row, value in enumerate(values):
                writing.put(b"%09d" % row, value)

    folder = shelf.store("LMDB of our chunks" if holds_chunks else "LMDB", write)
    environment = lmdb.open(str(folder), readonly=True, lock=False)
    decode = shelf.compressed._codec.decode_into if holds_chunks else frame_decoder()
    with environment.begin(buffers=not holds_chunks) as reading:
        yield from shelf.decoded(lambda rows: [reading.get(b"%09d" % row) for row in rows], decode)


@row("pylance", "lance", "Lance, `take` of a batch", **FRAMES)
def lance_batches(shelf: Shelf) -> Iterator[Batch]:
    """Lance: a column of frames."""
    import lance
    import pyarrow as pa

    def write(folder: Path) -> None:
        lance.write_dataset(pa.table({"frame": shelf.data.frames}), folder / "latents")

    source = lance.dataset(shelf.store("Lance", write) / "latents")

    def fetch(rows: list[int]) -> Iterator[Any]:
        return (value.as_buffer() for value in source.take(rows, columns=["frame"])["frame"])

    return shelf.decoded(fetch)


@row("vortex-data", "vortex", "Vortex, a scan of sorted rows", **FRAMES)
def vortex_batches(shelf: Shelf) -> Iterator[Batch]:
    """Vortex: a column of frames; its scans take ascending rows only."""
    import pyarrow as pa
    import vortex

    def write(folder: Path) -> None:
        vortex.io.write(pa.table({"frame": shelf.data.frames}), str(folder / "latents.vortex"))

    path = str(shelf.store("Vortex", write) / "latents.vortex")
    source = vortex.open(path, memory_map=True)

    def fetch(rows: list[int]) -> list[Any]:
        order = np.argsort(rows)
        indices = vortex.array(pa.array(np.array(rows)[order], pa.uint64()))
        found = source.scan(["frame"], indices=indices).read_all().to_arrow_table()["frame"]
        frames = [value.as_buffer() for value in found]
        return [frames[place] for place in np.argsort(order).tolist()]

    return shelf.decoded(fetch)


@row("array-record", "array_record", "ArrayRecord, `read` of a batch", **FRAMES)
def array_record_batches(shelf: Shelf) -> Iterator[Batch]:
    """ArrayRecord: a frame each group, which is its setting for random access."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    def write(folder: Path) -> None:
        writer = ArrayRecordWriter(str(folder / "latents"), "group_size:1,uncompressed")
        for frame in shelf.data.frames:
            writer.write(frame)
        writer.close()

    path = str(shelf.store("ArrayRecord", write) / "latents")
    return shelf.decoded(ArrayRecordReader(path, "readahead_buffer_size:0").read)


@row("bagz", "bagz", "bagz, `read_indices` of a batch", **FRAMES)
def bagz_batches(shelf: Shelf) -> Iterator[Batch]:
    """bagz: the frames as records; it has a zstd of its own, without a checksum."""
    import bagz

    def write(folder: Path) -> None:
        with bagz.Writer(str(folder / "latents.bag")) as writer:
            for frame in shelf.data.frames:
                writer.write(frame)

    return shelf.decoded(bagz.Reader(str(shelf.store("bagz", write) / "latents.bag")).read_indices)


@row("webshart", "webshart", "webshart, a loop over files of its shards", **FRAMES)
def webshart_batches(shelf: Shelf) -> Iterator[Batch]:
    """webshart: tars of frames, each with an index of its files."""
    import webshart

    def write(folder: Path) -> None:
        write_tars(folder, "zst", shelf.data.frames)
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as tar:
                files = {at.name: {"offset": at.offset_data, "length": at.size} for at in tar}
            index = {"path": path.name, "filesize": path.stat().st_size, "files": files}
            path.with_suffix(".json").write_text(json.dumps(index))

    source = webshart.discover_dataset(str(shelf.store("webshart tars", write)))
    shards = [source.open_shard(number) for number in range(source.num_shards)]
    return shelf.decoded(lambda rows: [shards[row // 1024].read_file(row % 1024) for row in rows])


@row("spdl", "spdl 2", "SPDL, a batch each task", 2, threads=2, **FRAMES)
@row("spdl", "spdl 1", "SPDL, a batch each task", 1, threads=1, **FRAMES)
def spdl_batches(shelf: Shelf, threads: int) -> Iterator[Batch]:
    """SPDL: its threads read and decode batches of one file of frames, into buffers of a ring."""
    from spdl.pipeline import PipelineBuilder

    def write(folder: Path) -> None:
        (folder / "latents").write_bytes(b"".join(shelf.data.frames))
        np.save(folder / "ends.npy", np.cumsum([len(frame) for frame in shelf.data.frames]))

    folder = shelf.store("one file, for SPDL", write)
    ends = [0, *np.load(folder / "ends.npy").tolist()]
    descriptor = os.open(folder / "latents", os.O_RDONLY)
    # One for each batch that is read, waits, or is in use.
    buffers = cycle([shelf.buffer() for _ in range(2 * threads + 4)])

    def read(item: Batch) -> Batch:
        rows, buffer = item
        decode = frame_decoder()
        flat = buffer.reshape(shelf.batch, -1).view(np.uint8)
        for row, out in zip(rows.tolist(), flat, strict=True):
            decode(os.pread(descriptor, ends[row + 1] - ends[row], ends[row]), out)
        return item

    source = zip(random_batches(len(shelf.data.latents), shelf.batch), buffers, strict=False)
    builder = PipelineBuilder().add_source(source).pipe(read, concurrency=threads).add_sink(2)
    with (pipeline := builder.build(num_threads=threads)).auto_stop():
        yield from pipeline


@row("numpy", "npy files", "np.load, a file for each")
def npy_batches(shelf: Shelf) -> Iterator[Batch]:
    """A file for each latent: what many write first."""

    def write(folder: Path) -> None:
        for row, latent in enumerate(shelf.data.latents):
            np.save(folder / f"{row}.npy", latent)

    folder = shelf.store("npy files", write)
    for rows in random_batches(len(shelf.data.latents), shelf.batch):
        yield rows, np.stack([np.load(folder / f"{row}.npy") for row in rows])


@row("ci2p-cache", "ours indexed", "ours: split[rows]", "", reads="compressed", gives="float32")
@row("ci2p-cache", "ours DataLoader", "ours: torch's DataLoader(split)", "split",
     reads="compressed", gives="float32")  # fmt: skip
@row("ci2p-cache", "ours as_dataset", "ours: torch's DataLoader(split.as_dataset())", "as_dataset",
     reads="compressed", gives="float32")  # fmt: skip
def indexed_batches(shelf: Shelf, loaded: str) -> Iterator[Batch]:
    """Ours as a data set, in the fewest lines."""
    split, count = shelf.compressed, len(shelf.data.latents)
    order: Any = random_batches(count, shelf.batch)
    batches: Iterator[Any] = (split[rows] for rows in order)
    if loaded:
        dataset: Any = split if loaded == "split" else split.as_dataset()
        batches = iter(DataLoader(dataset, batch_sampler=order))
    for rows, (latents, _) in zip(random_batches(count, shelf.batch), batches, strict=True):
        yield rows, latents.numpy().reshape(len(rows), *split.latent.shape)
