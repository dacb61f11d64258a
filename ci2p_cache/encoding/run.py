"""`encode`: stage one, from a source of images to a complete cache; run again, it continues."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ci2p_cache.cache.lock import LOCK
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import disk_errors, remove_path
from ci2p_cache.encoding.locks import held, interruptible, refuse_out
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary
from ci2p_cache.errors import UsageError
from ci2p_cache.images.decoders import start_decoder_server
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource

__all__ = ["encode"]


def encode(
    source: str | Path | ImageSource,
    out: str | Path,
    options: EncodeOptions | None = None,
    *,
    overwrite: bool = False,
    observer: EncodeObserver | None = None,
) -> EncodeSummary:
    """Runs the frozen encoder over a source of images and commits a cache of its latents.

    Called again with the same arguments it continues where it stopped, and when everything is
    committed it returns at once. One call works on a folder at a time, or several at once with
    disjoint `options.shard_range`; whichever of these ends last completes the cache.

    Args:
        source: A folder of images (CLASS/..., {train,val,test}/CLASS/..., ImageNet's own), tars,
            parquet files or a list; see `open_source`. Or an object that lists images and reads
            them, see `images.source.ImageSource`; it works with the executor `local` alone.
        out: The cache folder; made if it does not exist.
        options: What to encode with; None for the defaults (official weights, int8, flip views).
        overwrite: Remove the cache in `out` first; a folder that is no cache is never touched.
        observer: Receives progress and notices.

    Returns:
        Counts, sizes and rates.

    Raises:
        UsageError: an option is out of range or does not fit the source, or `out` is inside it.
        SourceError: the source is empty, unreadable or of no known layout, or has no two classes.
        FingerprintMismatchError: `out` holds a cache made with other settings.
        NotACacheError: `out` holds something else.
        LockedError: another process encodes into `out`, or an overlapping range of it.
        IncompleteCacheError: `options.finalise`, and shards are missing; the message names them.
        MissingDependencyError: `options.executor` is ray, which is not installed.
        TooManyBadImagesError: more images failed than `options.max_errors`.
        SaturationError: the symbols do not fit the dtype.
        WeightsError, WeightsUnavailableError, DigestError: no usable encoder weights.
        ManifestError: the folder's own records are damaged.
        ResourceError: reading or writing failed; run it again later.
        InterruptedRunError: a signal stopped it; run it again to continue.
    """
    root, options = Path(out), options or EncodeOptions()
    observer = observer or EncodeObserver()
    part = options.part()
    if part is not None and overwrite:
        raise UsageError(
            "`overwrite` removes the whole folder, and a range is only a part of it",
            hint="once: --plan-only --overwrite NAME; then each range without --overwrite",
        )
    if not isinstance(source, str | Path) and options.executor != "local":
        raise UsageError(
            f"`executor` is {options.executor}, and the source is an object of this process; "
            "wanted local"
        )
    refuse_out(root, Path(source if isinstance(source, str | Path) else source.location()))
    is_planned = (root / MANIFEST).exists() and not (options.rescan or overwrite)
    images = open_source(source, options.source_options(), is_listed=is_planned)
    with (
        interruptible(f"interrupted; every committed shard in {root} is safe"),
        _made(root),
        # Who loses the race for the folder hears it at once: torch, which takes seconds to import,
        # comes only afterwards. It comes with the decoders' server, before what starts threads.
        held(root, part, first=start_decoder_server) as hold,
    ):
        if overwrite:
            _clear(root)
        from ci2p_cache.encoding.resume import resume

        return resume(root, images, options, observer, hold)


@contextmanager
def _made(root: Path) -> Iterator[None]:
    """Makes the folder; one that was made here and stays empty goes again."""
    made = not root.exists()
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            # It fails where something is in it, or another range removed it this very moment.
            with suppress(OSError):
                root.rmdir()


def _clear(root: Path) -> None:
    """Removes a cache's files, the manifest first: what is left of it then counts for nothing."""
    remove_path(root / MANIFEST)
    for path in root.iterdir():
        if path.name != LOCK:
            remove_path(path)
