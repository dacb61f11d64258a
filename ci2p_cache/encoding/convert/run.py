r"""`convert`: the same latents in another container, without the encoder and without the images.

::

    cache --every value verified--> shards of the other layout --> a cache of the same fingerprint
                                \-> SPLIT.npy, SPLIT.parquet    --> a folder of plain arrays
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.encoding.convert.arrays import write_arrays
from ci2p_cache.encoding.convert.conversion import Conversion
from ci2p_cache.encoding.interrupt import interruptible
from ci2p_cache.encoding.place import refuse_foreign_folder
from ci2p_cache.errors import UsageError
from ci2p_cache.outputs import refuse_url
from ci2p_cache.record import Record
from ci2p_cache.specs import CodecName, FormatName

__all__ = ["ConvertSummary", "convert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertSummary(Record):
    """What a conversion ended with."""

    path: str
    """The new folder."""
    format: Literal["zarr", "webdataset", "both", "npy"]
    """What it holds."""
    images: int
    """Samples that hold a latent, over all splits."""
    shards: int
    """Shards over all splits."""
    converted_now: int
    """Of them, those that this call converted; the others were there already."""
    source_bytes: int
    """Bytes of the shards and index parts that were read from."""
    bytes: int
    """Bytes of those written; for npy, of the arrays and their tables."""
    seconds: float
    """Wall time."""


def convert(
    path: str | Path,
    out: str | Path,
    *,
    format: FormatName | Literal["npy"],
    codec: CodecName | None = None,
    level: int | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> ConvertSummary:
    """Writes the latents of a cache in another container into a new folder.

    A cache of the new format has the same fingerprint, plan, rows and values; its layout differs in
    `format`, `codec` and `level` alone. It is what `encode` would have written with that layout, to
    the byte, on the same software. Called again after an interruption it continues. `npy` writes
    plain arrays, which are no cache; they appear whole or not at all.

    Args:
        path: The cache folder; only read.
        out: The new folder; not inside the other one.
        format: Its container.
        codec: Byte compressor of zarr chunks; None: as the cache's layout has it.
        level: zstd level; None: as the cache's layout has it.
        on_shard: Called with (shards done, shards in all).

    Raises:
        UsageError: `out` is a URL, is inside the cache or the cache in it, or codec or level are
            given for npy or out of range.
        NotACacheError: the cache folder is no cache, or `out` holds something else.
        IncompleteCacheError: encoding has not finished.
        FingerprintMismatchError: `out` holds another cache, or one of another layout.
        ShardError, ManifestError: the cache is damaged; what was converted before is safe.
        LockedError: another process writes to `out`.
        ResourceError: reading or writing failed; run it again later.
        InterruptedRunError: a signal stopped it; run it again to continue.
    """
    started = time.perf_counter()
    cache, root = open_cache(path), Path(out)
    _refuse_place(root, cache)
    shards = sum(split.record.num_shards for split in cache.values())
    if format == "npy":
        if codec is not None or level is not None:
            raise UsageError("plain arrays are not compressed", hint="leave out --codec, --level")
        with interruptible(f"interrupted; nothing was written to {root}"):
            size = write_arrays(cache, root, on_shard=on_shard)
        now = shards
    else:
        layout = dataclasses.replace(
            cache.manifest.layout,
            format=format,
            codec=codec or cache.manifest.layout.codec,
            level=cache.manifest.layout.level if level is None else level,
        )
        job = Conversion(cache, root, layout, on_shard or (lambda done, total: None))
        with interruptible(f"interrupted; what was converted so far in {root} is in place"):
            size, now = job.run()
    return ConvertSummary(
        path=str(root),
        format=format,
        images=sum(len(split.valid_rows) for split in cache.values()),
        shards=shards,
        converted_now=now,
        source_bytes=sum(split.record.bytes or 0 for split in cache.values()),
        bytes=size,
        seconds=time.perf_counter() - started,
    )


def _refuse_place(root: Path, cache: Cache) -> None:
    """Refuses a folder inside the cache or around it, and one that holds something else."""
    refuse_url(root, what="converted cache")
    new, old = root.resolve(), cache.path.resolve()
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise UsageError(
            f"`out` {root} and the cache {cache.path} are in each other",
            hint="choose an --out folder beside the cache",
        )
    refuse_foreign_folder(root)
