"""What a run is evaluated on: a cache that fits it, and the split or fold that is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.errors import (
    CacheError,
    FingerprintMismatchError,
    InputDataError,
    NotACacheError,
    UsageError,
)
from ci2p_cache.inference.run_folder import RunFolder
from ci2p_cache.record import differing_fields
from ci2p_cache.training.inputs import data_digest, train_and_val
from ci2p_cache.training.ranks import Ranks

__all__ = ["chosen_split", "open_data"]


_STATISTICS = "stats/channels.parquet"
"""Follows from the latents alone, not from how they are stored."""


def open_data(run: RunFolder, cache: str | Path | None) -> tuple[Cache, str | None]:
    """Opens the cache, and says whether it holds the run's own samples.

    Other images may have the same names and labels: a data set and its corrupted versions do. Where
    the run's cache is still in its place, their latents tell them apart.

    Args:
        run: The run.
        cache: A cache with its fingerprint and classes; None: where its own was.

    Returns:
        The cache, and a sha256 over what it holds; None where it holds the run's own samples.

    Raises:
        FingerprintMismatchError: the cache has another fingerprint or other classes; names them.
        NotACacheError, IncompleteCacheError, ManifestError: it cannot be read.
    """
    settings = run.args.settings
    try:
        data = open_cache(cache or run.args.cache)
    except NotACacheError as error:
        if cache is not None:
            raise
        raise NotACacheError(
            f"the run's cache is not where it was: {error}", hint="say where it is: --cache DIR"
        ) from error
    lines = [
        f"  {name}: {ours!r} in the run, {theirs!r} in the cache"
        for name, ours, theirs in differing_fields(settings.fingerprint, data.fingerprint)
    ]
    if data.classes != run.file.classes:
        ours, theirs = set(run.file.classes), set(data.classes)
        lines.append(
            f"  classes: {len(run.file.classes)} in the run, {len(data.classes)} in the cache; "
            f"only in the run: {_few(ours - theirs)}; only in the cache: {_few(theirs - ours)}"
            + ("; in another order" if ours == theirs else "")
        )
    if lines:
        raise FingerprintMismatchError(
            f"{data.path} does not fit the run {run.path}:\n" + "\n".join(lines),
            hint="name a cache that was encoded with the run's options: --cache DIR",
        )
    if _is_own(run, data, is_named=cache is not None):
        return data, None
    content = f"{data_digest(data)} {_statistics(data)}"
    return data, hashlib.sha256(content.encode()).hexdigest()


def _is_own(run: RunFolder, data: Cache, *, is_named: bool) -> bool:
    """Says whether a cache holds the run's own samples; `is_named`: it may be elsewhere."""
    wanted = run.args.settings.data_sha256
    if data_digest(data) != wanted or not is_named:
        return data_digest(data) == wanted
    try:
        own = open_cache(run.args.cache)
    except CacheError:
        # It has moved, to where `data` was found for all that is known.
        return True
    return data_digest(own) != wanted or _statistics(own) == _statistics(data)


def _statistics(cache: Cache) -> str | None:
    """Returns the sha256 of a cache's statistics; None where it has none."""
    return next((each.sha256 for each in cache.manifest.files if each.path == _STATISTICS), None)


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return (", ".join(shown) + (", ..." if len(names) > len(shown) else "")) or "none"


def chosen_split(cache: Cache, run: RunFolder, name: str, *, is_own: bool) -> Split:
    """Returns the split, or the part of it that the run's fold is.

    Args:
        cache: What `open_data` has opened.
        run: The run.
        name: Name of the split.
        is_own: Whether the cache holds the run's own samples.

    Raises:
        UsageError: there is no such split.
        InputDataError: it holds no image, or one has no label.
    """
    spec = run.args.settings.spec
    found: Split | None = None
    if is_own and name in ("train", "val"):
        train, val = train_and_val(cache, spec, Ranks())
        found = train if name == "train" else val
    elif name in cache:
        found = cache[name]
    if found is None or not len(found.valid_rows):
        raise UsageError(
            f"{cache.path} has no image in split {name!r}; its splits are {list(cache.splits)}",
            hint="choose another: --split train",
        )
    labels = found.labels[found.valid_rows]
    unknown = int(((labels < 0) | (labels >= len(cache.classes))).sum())
    if unknown:
        raise InputDataError(
            f"{unknown} of {len(labels)} images of split {name!r} of {cache.path} have no label; "
            "evaluation needs them all",
            hint="`predict` takes pictures without labels",
        )
    return found
