"""A trial of decoding alone: a sample of the images read and decoded while g_a is at rest."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ci2p_cache.encoding.dry_run.sample import BadFile, Drawn
from ci2p_cache.encoding.plan import Sample
from ci2p_cache.encoding.shard import EncodeSettings
from ci2p_cache.errors import ImageDecodeError
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.source import ImageSource

__all__ = ["DecodeTrial", "try_decoding"]


@dataclass(slots=True)
class DecodeTrial:
    """What reading and decoding a sample, with g_a at rest, showed."""

    images: int = 0
    """Images read and decoded, bad ones included."""
    images_per_second: float = 0.0
    """Without the first few, in which decoders start; 0 where there were no others."""
    bad: list[BadFile] = field(default_factory=list)
    """Those that cannot be decoded."""


def try_decoding(
    images: ImageSource, settings: EncodeSettings, drawn: Drawn, *, seconds: float
) -> DecodeTrial:
    """Reads, decodes and resizes samples on all decode threads until the time is up.

    Args:
        images: The source.
        settings: What a run would take.
        drawn: What to decode, by split.
        seconds: After that time no other image is begun.

    Raises:
        ResourceError: reading failed.
    """
    started = time.perf_counter()
    decoders = Decoders(settings.fingerprint.image, settings.fingerprint.views)
    pool = ThreadPoolExecutor(settings.decode_threads, "trial")
    found, ends = DecodeTrial(), []

    def decode(split: str, sample: Sample) -> tuple[float, BadFile | None] | None:
        if time.perf_counter() - started > seconds:
            return None
        try:
            decoders.decode(images.read(sample.path), split=split, key=sample.key)
        except ImageDecodeError as error:
            path = sample.path.decode("utf-8", "backslashreplace")
            return time.perf_counter(), BadFile(path, str(error))
        return time.perf_counter(), None

    try:
        mixed = sorted(
            ((place + 0.5) / len(own), split, place)
            for split, own in drawn.items()
            for place in range(len(own))
        )
        futures = [pool.submit(decode, split, drawn[split][place]) for _, split, place in mixed]
        for future in futures:
            result = future.result()
            if result is not None:
                ends.append(result[0])
                found.bad += [result[1]] if result[1] is not None else []
    finally:
        decoders.close()
        pool.shutdown(wait=True, cancel_futures=True)
    found.images = len(ends)
    ends.sort()
    first = 2 * settings.decode_threads
    if len(ends) > 2 * first:
        found.images_per_second = (len(ends) - 1 - first) / (ends[-1] - ends[first])
    return found
