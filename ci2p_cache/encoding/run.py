"""`encode`: stage one, from a source of images to a complete cache; run again, it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ci2p_cache.cache.commit import StagingArea, disk_errors, remove_path
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.manifest import ENCODER, MANIFEST, PLAN
from ci2p_cache.encoding.interrupt import interruptible
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary
from ci2p_cache.errors import NotACacheError, UsageError
from ci2p_cache.images.locate import open_source

__all__ = ["encode", "refuse_place"]

_BEFORE_MANIFEST = {".lock", ".staging", PLAN, ENCODER}
"""What a run killed before it wrote the manifest may have left."""


def encode(
    source: str | Path,
    out: str | Path,
    options: EncodeOptions | None = None,
    *,
    overwrite: bool = False,
    observer: EncodeObserver | None = None,
) -> EncodeSummary:
    """Runs the frozen encoder over a source of images and commits a cache of its latents.

    Called again with the same arguments it goes on where it stopped, and when everything is
    committed it returns at once. One call works on a folder at a time.

    Args:
        source: A folder of images (CLASS/..., {train,val,test}/CLASS/..., ImageNet's own), tars,
            parquet files or a list; see `open_source`.
        out: The cache folder; made if it does not exist.
        options: What to encode with; None for the defaults (official weights, int8, flip views).
        overwrite: Remove the cache in `out` first; a folder that is no cache is never touched.
        observer: Told of progress and notices.

    Returns:
        Counts, sizes and rates.

    Raises:
        UsageError: an option is out of range, or `out` lies inside `source`.
        SourceError: the source is empty, unreadable or of no known layout.
        FingerprintMismatchError: `out` holds a cache made with other settings.
        NotACacheError: `out` holds something else.
        LockedError: another process encodes into `out`.
        TooManyBadImagesError: more images failed than `options.max_errors`.
        SaturationError: the symbols do not fit the dtype.
        WeightsError, WeightsUnavailableError, DigestError: no usable encoder weights.
        ManifestError: the folder's own records are damaged.
        ResourceError: reading or writing failed; run it again later.
        InterruptedRunError: Ctrl-C or SIGTERM; run it again to go on.
    """
    root, options = Path(out), options or EncodeOptions()
    observer = observer or EncodeObserver()
    refuse_place(root, Path(source))
    images = open_source(source)
    with (
        interruptible(f"interrupted; every committed shard in {root} is safe"),
        _exclusive(root),
        StagingArea(root) as staging,
    ):
        if overwrite:
            _clear(root)
        # Only now torch is imported, which takes seconds: who loses the race for the folder is told
        # at once.
        from ci2p_cache.encoding.resume import resume

        return resume(root, images, options, staging, observer)


def refuse_place(root: Path, source: Path) -> None:
    """Refuses an output inside the source, and a folder that holds something else."""
    if root.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"`out` {root} lies inside the source {source}, where it would be listed as images",
            hint="choose an --out folder beside the source",
        )
    if root.exists() and not root.is_dir():
        raise NotACacheError(f"{root} exists and is no folder", hint="choose another --out")
    if root.is_dir() and not (root / MANIFEST).exists():
        foreign = sorted({path.name for path in root.iterdir()} - _BEFORE_MANIFEST)
        if foreign:
            raise NotACacheError(
                f"{root} holds {foreign[0]!r} and {len(foreign) - 1} other entries but no "
                f"{MANIFEST}, so it is no cache of ours and was not touched",
                hint="choose a new or empty --out folder",
            )


@contextmanager
def _exclusive(root: Path) -> Iterator[None]:
    """Makes and locks the folder; one that was made here and stays empty goes again."""
    made = not root.exists()
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    try:
        with locked(root / ".lock", what="encode"):
            yield
    finally:
        if made and not any(root.iterdir()):
            root.rmdir()


def _clear(root: Path) -> None:
    """Removes a cache's files, the manifest first: what is left of it then counts for nothing."""
    remove_path(root / MANIFEST)
    for path in root.iterdir():
        if path.name not in (".lock", ".staging"):
            remove_path(path)
