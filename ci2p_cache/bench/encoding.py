"""`bench_encoding`: stage one on the user's own images, against the parts that bound it.

::

    whole      read, decode, g_a, quantise, compress, commit: a sample, really encoded
    g_a        the lanes on batches that never change: what no pipeline around them can beat
    decoding   read, decode and resize with g_a at rest: what no device can beat
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ci2p_cache.cache.store import Cache
from ci2p_cache.encoding.forecast import dry_run
from ci2p_cache.encoding.lane import Lane, make_lanes, single_threaded
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.encoding.resume import load_chosen
from ci2p_cache.errors import UsageError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.record import Record

__all__ = ["EncodeReport", "EncodeRow", "bench_encoding", "bench_encoding_again"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeRow(Record):
    """One part of stage one, measured."""

    name: str
    """whole, g_a or decoding."""
    images_per_second: float
    """Images, all their views together."""
    views_per_second: float
    """Views; of `decoding` too, which makes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeReport(Record):
    """What `bench_encoding` found."""

    source: str
    """The source of images."""
    device: str
    """Where g_a ran, and in how many lanes."""
    precision: str
    """Arithmetic of g_a."""
    views_per_image: int
    """Views of a training image."""
    batch_size: int
    """Views per call of g_a."""
    rows: tuple[EncodeRow, ...]
    """whole, g_a, and decoding where there were images enough to tell."""
    waiting_share: float
    """Share of the time in which g_a waited for images, 0 to 1."""
    bytes_per_image: float
    """Written per image, all its views together."""

    def row(self, name: str) -> EncodeRow | None:
        """Returns the row of that name, None where it was not measured."""
        return next((row for row in self.rows if row.name == name), None)


def bench_encoding(
    source: str | Path,
    options: EncodeOptions | None = None,
    *,
    seconds: float = 5.0,
    observer: EncodeObserver | None = None,
) -> EncodeReport:
    """Measures stage one with images of a source; what it writes is temporary.

    All images count as training images, so that each has all views.

    Args:
        source: As for `encode`.
        options: As for `encode`; `seed` draws the sample.
        seconds: How long g_a alone is timed; the whole takes some 10 s, decoding 2.
        observer: Receives progress and notices.

    Raises:
        UsageError, SourceError, WeightsError, WeightsUnavailableError, DigestError,
        SaturationError, TooManyBadImagesError, ResourceError, InterruptedRunError: as `dry_run`
        has them.
    """
    options = replace(options or EncodeOptions(), val_fraction=0.0, labels="none")
    with tempfile.TemporaryDirectory(prefix="ci2p-cache-bench-") as folder:
        whole = dry_run(source, Path(folder) / "cache", options, observer=observer)
    views = options.view_spec().num_views("train")
    lanes = make_lanes(load_chosen(options, observer or EncodeObserver()), options.devices)
    batch_size = options.batch_size or (8 if lanes[0].device.type == "cpu" else 256)
    alone = _g_a_alone(lanes, batch_size, options.size, seconds)
    rates = {
        "whole": whole.images_per_second,
        "g_a": alone / views,
        "decoding": whole.decode_images_per_second,
    }
    return EncodeReport(
        source=whole.source,
        device=f"{lanes[0].device.type}, {len(lanes)} lanes",
        precision=options.precision,
        views_per_image=views,
        batch_size=batch_size,
        rows=tuple(
            EncodeRow(name=name, images_per_second=rate, views_per_second=views * rate)
            for name, rate in rates.items()
            if rate
        ),
        waiting_share=1 - whole.encoder_share,
        bytes_per_image=whole.bytes_per_image,
    )


def bench_encoding_again(
    cache: Cache, *, device: str = "auto", observer: EncodeObserver | None = None
) -> EncodeReport:
    """Measures what making a cache anew would take here, with its own encoder and settings.

    Args:
        cache: The cache; the images it was made of have to be where they were.
        device: auto, cpu, cuda or cuda:1.
        observer: Receives progress and notices.

    Raises:
        UsageError: this machine decodes with other software, which has another speed.
        CacheError: as `bench_encoding` has them.
    """
    made = cache.fingerprint
    if made.image.decoder != decoder_name():
        raise UsageError(f"the cache was made with {made.image.decoder}, here is {decoder_name()}")
    options = replace(
        EncodeOptions.of(cache.manifest),
        weights=cache.encoder_path,
        devices=device,
        max_errors="100%",
    )
    return bench_encoding(cache.manifest.source, options, seconds=0.0, observer=observer)


def _g_a_alone(lanes: list[Lane], batch_size: int, size: int, seconds: float) -> float:
    """Returns views per second of all lanes together, each on a batch in its device's memory."""
    if not seconds:
        return 0.0
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    views_B3HW = torch.rand((batch_size, 3, size, size), generator=generator)

    def work(lane: Lane) -> tuple[int, float]:
        batch, done = views_B3HW.to(lane.device, memory_format=torch.channels_last), 0
        with lane.queue():
            lane.encoder(batch).cpu()
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                # Only a byte is fetched, to know that the batch is done.
                lane.encoder(batch)[0, 0, 0, 0].cpu()
                done += batch_size
        return done, time.perf_counter() - started

    with ThreadPoolExecutor(len(lanes), "lane", single_threaded) as pool:
        found = list(pool.map(work, lanes))
    torch.set_num_threads(threads)
    return sum(done / took for done, took in found)
