"""Encoding shards: read, decode, g_a, quantise, compress, commit, each stage overlapping the next.

::

    readers: file -> bytes -> decoder processes: views --+
                                                         +--> replicas: g_a, quantise --+
    (bounded look-ahead) --------------------------------+                              |
       committer: shard, index, record  <--  readers: crc32c, compress  <---------------+

Images are decoded ahead across shards, so replicas do not run dry at a shard's end; batches never
cross a shard and are filled in row order whatever the timing: the same plan gives the same bytes.

A replica is an encoder on a device. On CPU there is one per core, each with one torch thread. That
is the reference setting: two threads inside one convolution change about 3 in a million symbols,
two replicas change none. A CUDA device has two that share its encoder, each with a stream and
pinned memory of its own: one uploads and downloads while the other computes.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch

from ci2p_cache.cache.codecs import codec_of
from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.containers import put_shard
from ci2p_cache.cache.index import ChannelSums, IndexRow
from ci2p_cache.cache.manifest import Manifest, SplitRecord
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.zoo import ARCH
from ci2p_cache.encoding.options import BATCH_SIZES, EncodeOptions
from ci2p_cache.encoding.plan import ShardPlan
from ci2p_cache.encoding.rows import Awaited, Carrier, LoadedImage, load_image, read_ahead
from ci2p_cache.errors import (
    FingerprintMismatchError,
    SaturationError,
    TooManyBadImagesError,
    UsageError,
)
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.source import ImageReader
from ci2p_cache.machine import chosen_devices, num_cores
from ci2p_cache.specs import Fingerprint, LatentSpec, LayoutSpec

__all__ = [
    "EncodeSettings",
    "ErrorBudget",
    "Replica",
    "ShardEncoder",
    "changed_numerics",
    "encode_views",
    "make_replicas",
    "parse_max_errors",
    "refuse_more_bad",
    "refuse_other_decoder",
    "replica_numerics",
    "single_threaded",
]  # fmt: skip

_ALL_BAD = 64
"""When that many images, the first ones, all fail, the source or the settings are wrong."""

_MAX_CLIPPED_SHARE = 1e-4
"""Share of saturated int8 symbols above which int16 is asked for; the official q5 is far below."""

_PROBE_IMAGES = 512
"""Images over which that share is judged."""


def parse_max_errors(text: str, total: int) -> int:
    """Returns how many of `total` images `--max-errors` allows to be bad: a share or a number.

    A share above 0 allows at least one, but never all: 0.1% of 60 images would be none.

    Raises:
        UsageError: the text is neither.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                least = min(1, total - 1) if share else 0
                return max(int(share * total + 1e-9), least)
        elif int(text) >= 0:
            return int(text)
    except ValueError:
        pass
    raise UsageError(f"`max_errors` is {text!r}; wanted a share such as 0.1% or a count such as 5")


@dataclass
class ErrorBudget:
    """Counts images that cannot be decoded."""

    allowed: int
    """Bad images that the whole cache may hold."""
    already_bad: int = 0
    """Bad images in shards committed earlier."""
    _seen: int = 0
    _bad: int = 0

    def count(self, row: IndexRow) -> None:
        """Counts one image.

        Raises:
            TooManyBadImagesError: the budget is used up, or none of the first images was good.
        """
        self._seen += 1
        if row.status == "ok":
            return
        self._bad += 1
        reason = f"the last one is {row.path}: {row.error}"
        if self._bad == self._seen == _ALL_BAD:
            raise TooManyBadImagesError(
                f"the first {_ALL_BAD} images could all not be decoded; {reason}",
                hint="is this the right folder? Look at that file first",
            )
        refuse_more_bad(self.already_bad + self._bad, self.allowed, reason)


def refuse_more_bad(bad: int, allowed: int, reason: str) -> None:
    """Holds a number of bad images against the budget; `reason` says what is known of the last one.

    Raises:
        TooManyBadImagesError: more are bad than are allowed.
    """
    if bad > allowed:
        raise TooManyBadImagesError(
            f"{bad} images could not be decoded, {allowed} are allowed; {reason}. "
            "Shards committed so far are safe",
            hint="mend or remove such files, or run the same command with --max-errors 1% "
            "(or a count): bad images then become rows without a latent, listed in "
            "errors.parquet",
        )


_REPLICAS_PER_CUDA_DEVICE = 2
"""Not measured: two are what overlap takes."""


@dataclass(slots=True)
class Replica:
    """One encoder on one device; used by one thread at a time."""

    encoder: FrozenEncoder
    """Replicas of one device share it."""
    device: torch.device
    stream: torch.cuda.Stream | None = None
    """Where its work is queued; None on CPU."""
    _pinned: torch.Tensor | None = field(default=None, repr=False)

    def queue(self) -> contextlib.AbstractContextManager[object]:
        """Makes what is computed inside run on the replica's own stream."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def upload(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Returns views as one tensor on the device, uint8 (B, 3, size, size).

        On CUDA by way of pinned memory, which holds them until the stream has come that far: a
        replica waits for its results before it takes other views.
        """
        if self.stream is None:
            return torch.stack(views).to(self.device)
        if self._pinned is None or len(self._pinned) < len(views):
            shape = (len(views), *views[0].shape)
            self._pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        stacked = torch.stack(views, out=self._pinned[: len(views)])
        return stacked.to(self.device, non_blocking=True)


def make_replicas(encoder: FrozenEncoder, devices: str) -> list[Replica]:
    """Builds the replicas for `devices`, from an encoder on the CPU.

    Raises:
        UsageError: the text is none of these, or such a device is not there.
    """
    chosen = chosen_devices(devices)
    if chosen[0].type == "cpu":
        return [Replica(encoder, device) for device in chosen]
    replicas = []
    for device in chosen:
        own = copy.deepcopy(encoder).to(device)
        # The replicas' streams do not wait for the one on which the weights were laid out.
        torch.cuda.synchronize(device)
        for _ in range(_REPLICAS_PER_CUDA_DEVICE):
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch stub
            replicas.append(Replica(own, device, stream))
    return replicas


def single_threaded() -> None:
    """Makes torch use one thread in the calling thread."""
    torch.set_num_threads(1)


def encode_views(
    replica: Replica, views: list[torch.Tensor], latent: LatentSpec
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Runs g_a over B views, uint8 (3, size, size) each, and turns y into what is stored.

    Returns:
        stored (B, M, h, w) of the stored dtype, and the number of saturated symbols per sample and
        channel, int64 (B, M).

    Raises:
        SaturationError: y holds values that the float dtype cannot hold.
    """
    with replica.queue():
        images = replica.upload(views).to(torch.float32).div_(255)
        found = replica.encoder.stored(replica.encoder(images), latent)
        stored, clipped = (each.cpu() for each in found)
    if not (latent.is_symbols or bool(torch.isfinite(stored).all())):
        raise SaturationError(
            f"the encoder gives values that {latent.dtype} cannot hold",
            hint="repeat the command with --dtype float32 into a new --out folder",
        )
    return stored.numpy(), clipped.numpy()


def replica_numerics(replica: Replica, batch_size: int) -> dict[str, str | int]:
    """Returns what a bit-identical repetition needs to know; every commit record holds it."""
    cpu = replica.device.type == "cpu"
    own = replica.encoder.spec.arch == ARCH
    return {
        "device_type": replica.device.type,
        "device": torch.backends.cpu.get_cpu_capability()
        if cpu
        else torch.cuda.get_device_name(replica.device),
        "batch_size": batch_size,
        "threads": 1,
        "memory_format": "channels_last",
        "torch": torch.__version__,
        "numcodecs": version("numcodecs"),
        **({"encoder": "ci2p_cache"} if own else {"compressai": version("compressai")}),
    }


def changed_numerics(
    then: Mapping[str, str | int], now: Mapping[str, str | int]
) -> dict[str, tuple[str | int | None, str | int | None]]:
    """Returns what of `replica_numerics` was another then, by name, and may give other bits.

    Who computed the paper's encoder is left out, compressai once or this package: the bits are the
    same.
    """
    left_out = {"encoder", "compressai"} if "encoder" in now else set()
    names = [name for name in {**now, **then} if name not in left_out]
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def refuse_other_decoder(fingerprint: Fingerprint) -> None:
    """Holds this machine's decoders against those of a cache.

    Raises:
        FingerprintMismatchError: they differ, so images would give other pixels.
    """
    made, here = fingerprint.image.decoder, decoder_name()
    if made != here:
        raise FingerprintMismatchError(
            f"the cache was made with {made}; here is {here}, which may give other pixels. "
            "Nothing was changed",
            hint=f"install {made}, then run the same command",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSettings:
    """Everything that encoding a shard needs to know besides the plan and the devices."""

    format_version: int
    fingerprint: Fingerprint
    layout: LayoutSpec
    splits: dict[str, SplitRecord]
    classes: tuple[str, ...]
    batch_size: int
    """Views per call of g_a; changes no value."""
    decode_threads: int
    """Threads that read and compress, each with a process that decodes."""

    @classmethod
    def of(cls, manifest: Manifest, replicas: Sequence[Replica], options: EncodeOptions) -> Self:
        """Returns what a manifest asks for, with the defaults that depend on the machine."""
        on_cpu = replicas[0].device.type == "cpu"
        return cls(
            format_version=manifest.format_version,
            fingerprint=manifest.fingerprint,
            layout=manifest.layout,
            splits=manifest.splits,
            classes=manifest.classes,
            batch_size=options.batch_size or BATCH_SIZES["cpu" if on_cpu else "cuda"],
            decode_threads=options.workers or num_cores(),
        )


@dataclass(slots=True)
class _Shard:
    """One shard while it is being built; `raw`, `crc32c` and `clipped` by (row, view)."""

    plan: ShardPlan
    rows: list[IndexRow] = field(default_factory=list)
    chunks: list[bytes | None] = field(default_factory=list)
    raw: dict[tuple[int, int], memoryview] = field(default_factory=dict)
    crc32c: dict[tuple[int, int], int] = field(default_factory=dict)
    batches: list[Future[Future[ChannelSums]]] = field(default_factory=list)
    carried: list[Future[ChannelSums]] = field(default_factory=list)
    clipped: dict[tuple[int, int], int] = field(default_factory=dict)


class ShardEncoder:
    """Encodes planned shards and commits each; a context manager that owns its threads, processes.

    Host memory is bounded by two shards of encoded chunks or raw latents (at most 128 MiB each,
    uncompressed; with format `both`, chunks and raw latents),
    the images decoded ahead (their views), two batches per replica, and one full-size image per
    decoder process (at most 24 bytes times `max_pixels`, where it ends as a bad image).

    Args:
        source: Where the images are read from.
        settings: What to make of them.
        replicas: The encoders; all give the same values.
        staging: Where committed files go.
        budget: Counts images that cannot be decoded, and ends the run when they are too many.
        on_image: Called in the caller's thread after each image, with whether it was good.
        carrier: Gives rows that were committed before, of a cache that grows; they are neither read
            nor counted. None where all are encoded.
    """

    def __init__(
        self,
        source: ImageReader,
        settings: EncodeSettings,
        replicas: list[Replica],
        staging: StagingArea,
        *,
        budget: ErrorBudget,
        on_image: Callable[[bool], None],
        carrier: Carrier | None = None,
    ) -> None:
        self._settings = settings
        self._staging = staging
        self._budget = budget
        self._on_image = on_image
        self._latent: LatentSpec = settings.fingerprint.latent
        self._probed = ChannelSums.empty(self._latent.channels)
        self._codec = codec_of(settings.format_version, settings.layout, self._latent)
        self._free_replicas: deque[Replica] = deque(replicas)
        self._num_replicas = len(replicas)
        self._numerics = replica_numerics(replicas[0], settings.batch_size)
        self._free_slots = threading.Semaphore(2 * len(replicas) + settings.decode_threads)
        self._num_threads = torch.get_num_threads()
        self._busy_lock = threading.Lock()
        self._busy_seconds = 0.0
        self._decoders = Decoders(settings.fingerprint.image, settings.fingerprint.views)
        self._readers = ThreadPoolExecutor(settings.decode_threads, "read", single_threaded)
        self._read_ahead = partial(
            read_ahead,
            pool=self._readers,
            load=partial(load_image, source, self._decoders, settings.classes),
            most=max(32, 2 * settings.batch_size * len(replicas)),
            carrier=carrier,
        )
        self._replicas = ThreadPoolExecutor(len(replicas), "replica", single_threaded)
        self._committer = ThreadPoolExecutor(1, "commit")

    def __enter__(self) -> ShardEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()
        pools = (self._readers, self._replicas, self._committer)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)
        # Set in a replica it also reaches MKL's global count; the caller gets its own back.
        torch.set_num_threads(self._num_threads)

    @property
    def busy_seconds(self) -> float:
        """Seconds that g_a ran so far, averaged over the replicas."""
        with self._busy_lock:
            return self._busy_seconds / self._num_replicas

    def encode(self, shards: Iterable[ShardPlan]) -> Iterator[CommitRecord]:
        """Encodes and commits shards in order, yielding each once it is committed.

        Raises:
            TooManyBadImagesError: the error budget is used up; the shard is not committed.
            SaturationError: the symbols do not fit the dtype; the shard is not committed.
            ResourceError: reading or writing failed for good; the same command continues later.
        """
        committing: Future[CommitRecord] | None = None
        awaited = self._read_ahead(shards)
        for _, loads in groupby(awaited, key=lambda item: (item[0].split, item[0].shard)):
            built = self._encode_shard(loads)
            if committing is not None:
                yield committing.result()
            committing = self._committer.submit(self._finish, built)
        if committing is not None:
            yield committing.result()

    def _encode_shard(self, loads: Iterator[Awaited]) -> _Shard:
        shard: _Shard | None = None
        views: list[torch.Tensor] = []
        slots: list[tuple[int, int]] = []
        for plan, sample, future in loads:
            if shard is None:
                record = self._settings.splits[plan.split]
                shard = _Shard(plan, chunks=[None] * (record.shard_rows * record.views))
            loaded = future.result()
            shard.rows.append(loaded.row)
            if loaded.is_carried:
                shard.carried.append(self._readers.submit(self._carry, shard, loaded))
                if loaded.views is None:
                    continue
            else:
                self._budget.count(loaded.row)
            self._on_image(loaded.views is not None)
            first = 0 if loaded.stored is None else len(loaded.stored)
            for number, view in enumerate(loaded.views if loaded.views is not None else (), first):
                views.append(view)
                slots.append((sample.row, number))
                if len(views) == self._settings.batch_size:
                    self._submit(shard, views, slots)
                    views, slots = [], []
        assert shard is not None, "a planned shard holds at least one sample"
        if views:
            self._submit(shard, views, slots)
        return shard

    def _carry(self, shard: _Shard, loaded: LoadedImage) -> ChannelSums:
        """Takes a row over; returns its sums, with the clipped values that come with it."""
        row, channels = loaded.row, self._latent.channels
        sums = ChannelSums.empty(channels)
        if loaded.stored is not None:
            slots = [(row.row, view) for view in range(len(loaded.stored))]
            # How many values were clipped is known of the row alone.
            self._keep(shard, loaded.stored, slots, [row.clipped or 0, *(0 for _ in slots[1:])])
            sums = ChannelSums.of(loaded.stored, sums.clipped)
        return sums if loaded.clipped is None else replace(sums, clipped=loaded.clipped)

    def _submit(
        self, shard: _Shard, views: list[torch.Tensor], slots: list[tuple[int, int]]
    ) -> None:
        self._free_slots.acquire()
        shard.batches.append(self._replicas.submit(self._run_batch, shard, views, slots))

    def _run_batch(
        self, shard: _Shard, views: list[torch.Tensor], slots: list[tuple[int, int]]
    ) -> Future[ChannelSums]:
        try:
            replica = self._free_replicas.popleft()
            started = time.perf_counter()
            try:
                stored, clipped = encode_views(replica, views, self._latent)
            finally:
                self._free_replicas.append(replica)
                with self._busy_lock:
                    self._busy_seconds += time.perf_counter() - started
            return self._readers.submit(self._pack, shard, stored, clipped, slots)
        except BaseException:
            self._free_slots.release()
            raise

    def _pack(
        self,
        shard: _Shard,
        stored: npt.NDArray[Any],
        clipped: npt.NDArray[Any],
        slots: list[tuple[int, int]],
    ) -> ChannelSums:
        try:
            self._keep(shard, stored, slots, clipped.sum(axis=1).tolist())
            return ChannelSums.of(stored, clipped.sum(axis=0))
        finally:
            self._free_slots.release()

    def _keep(
        self,
        shard: _Shard,
        stored: npt.NDArray[Any],
        slots: list[tuple[int, int]],
        clipped: list[int],
    ) -> None:
        """Compresses latents into their slots (row, view)."""
        layout, num_views = self._settings.layout, self._settings.splits[shard.plan.split].views
        for latent, (row, view), lost in zip(stored, slots, clipped, strict=True):
            raw = memoryview(latent.reshape(-1).view(np.uint8))
            if layout.has_zarr:
                chunk = (row - shard.plan.first_row) * num_views + view
                shard.chunks[chunk] = self._codec.encode(raw)
            if layout.has_tar:
                shard.raw[row, view] = raw
            shard.crc32c[row, view] = google_crc32c.value(bytes(raw))
            shard.clipped[row, view] = lost

    def _finish(self, shard: _Shard) -> CommitRecord:
        sums = ChannelSums.empty(self._latent.channels)
        for carried in shard.carried:
            sums = sums + carried.result()
        for batch in shard.batches:
            sums = sums + batch.result().result()
        self._refuse_saturated(sums)
        plan, settings = shard.plan, self._settings
        shape = settings.splits[plan.split]
        good = [row for row in shard.rows if row.status == "ok"]
        for row in good:
            slots = [(row.row, view) for view in range(shape.views)]
            row.latent_crc32c = [shard.crc32c[slot] for slot in slots]
            row.clipped = sum(shard.clipped[slot] for slot in slots)
        return put_shard(
            self._staging,
            partial(
                CommitRecord,
                format_version=settings.format_version,
                first_row=plan.first_row,
                rows=len(plan.samples),
                valid_rows=len(good),
                plan_sha256=plan.sha256,
                fingerprint=settings.fingerprint.digest,
                numerics=self._numerics,
            ),
            shard_id=(plan.split, plan.shard),
            layout=settings.layout,
            shape=shape,
            latent=self._latent,
            rows=shard.rows,
            sums=sums,
            chunks=shard.chunks,
            raw=shard.raw,
        )

    def _refuse_saturated(self, sums: ChannelSums) -> None:
        """Refuses a dtype that too many symbols do not fit, before a shard is committed.

        For int8 that is judged over the first images, for int16 over all.
        """
        latent, probed = self._latent, self._probed
        clipped = sums.clipped.sum()
        if latent.dtype == "int16" and clipped:
            raise SaturationError(
                f"{int(clipped)} symbols exceed int16 at step {latent.step}",
                hint="repeat with a larger --step, or with --dtype float32 into a new folder",
            )
        if probed.count >= _PROBE_IMAGES * latent.height * latent.width:
            return
        self._probed = probed = probed + sums
        share = probed.clipped.sum() / max(probed.count * latent.channels, 1)
        if share > _MAX_CLIPPED_SHARE:
            raise SaturationError(
                f"{share:.2%} of the symbols exceed {latent.symbol_limit} in absolute value "
                f"at step {latent.step}; {_MAX_CLIPPED_SHARE:.2%} are accepted for int8. "
                "Nothing of this shard was committed",
                hint="repeat the command with --dtype int16 into a new --out folder",
            )
