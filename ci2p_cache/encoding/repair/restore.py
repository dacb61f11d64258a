"""Restoring what a cache was made with: its encoder and its plan, only ever to the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.paths import PLAN
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoder.weights import BUNDLED, official_url, weights_folder
from ci2p_cache.encoding.plan import Plan, Sample
from ci2p_cache.encoding.planning import build_plan, plan_of_rows
from ci2p_cache.errors import CacheError, ManifestError, SourceError, WeightsError
from ci2p_cache.images.source import ImageSource
from ci2p_cache.specs import EncoderSpec

__all__ = ["index_samples", "restored_encoder", "restored_plan"]


def restored_encoder(
    manifest: Manifest, weights: Path | None
) -> tuple[FrozenEncoder, bytes] | None:
    """Finds the encoder of a cache among the weights at hand; nothing is downloaded.

    Args:
        manifest: The cache's manifest.
        weights: A weights file to take it from; None: the bundled or the official weights, where
            the latter are in the user's cache folder.

    Returns:
        The encoder and the bytes of its file as the manifest knows them, or None where no weights
        of that digest are at hand.

    Raises:
        WeightsError: `weights` cannot be used or is another encoder.
    """
    spec = manifest.fingerprint.encoder
    for encoder in _candidates(spec, weights):
        data = encoder.to_bytes()
        if hashlib.sha256(data).hexdigest() == manifest.encoder.sha256:
            return encoder, data
        if weights is not None:
            raise WeightsError(
                f"weights file {weights} holds an encoder of digest {encoder.spec.weights_sha256}; "
                f"the cache was made with {spec.weights_sha256}"
            )
    return None


def _candidates(spec: EncoderSpec, weights: Path | None) -> Iterator[FrozenEncoder]:
    def load(source: str) -> FrozenEncoder:
        return load_encoder(
            "bundled" if source == "bundled" else "official",
            weights=weights,
            arch=spec.arch,
            quality=spec.quality,
            metric=spec.metric,
            precision=spec.precision,
        )

    if weights is not None:
        yield load("file")
        return
    if (spec.arch, spec.quality, spec.metric) == BUNDLED:
        yield load("bundled")
    try:
        name = official_url(spec.arch, spec.quality, spec.metric).rpartition("/")[2]
        if (weights_folder() / name).is_file():
            yield load("official")
    except CacheError:
        # No such weights are published, or those in the user's folder are damaged themselves.
        return


def restored_plan(
    manifest: Manifest,
    index_of: Callable[[str, int], pa.Table | None],
    open_images: Callable[[], ImageSource],
) -> Plan:
    """Puts a lost plan together again: from the index parts, or by listing the source once more.

    Its digest in the manifest decides whether it is the plan that was lost.

    Args:
        manifest: The cache's manifest.
        index_of: Gives the index part of (split, shard) where it is intact, else None.
        open_images: Opens the source.

    Raises:
        ManifestError: neither way gives the plan that was lost.
    """
    rows: dict[str, list[Sample]] = {}
    lost: list[str] = []
    for name, record in manifest.splits.items():
        rows[name] = []
        for shard in range(record.num_shards):
            table = index_of(name, shard)
            if table is None:
                lost.append(f"{name} shard {shard}")
            else:
                rows[name] += index_samples(table)
    if not lost:
        plan = plan_of_rows(rows, manifest.splits)
        if _is_lost_plan(plan, manifest):
            return plan
        reason = "the index parts together give another plan"
    else:
        reason = f"the index of {lost[0]} and {len(lost) - 1} others is damaged too"
    try:
        views, latent = manifest.fingerprint.views, manifest.fingerprint.latent
        plan = build_plan(open_images(), manifest.layout, views, latent)
        if _is_lost_plan(plan, manifest):
            # With the shapes as recorded: the form of the index parts is one of the cache.
            return Plan(plan.tables, dict(manifest.splits))
        reason += ", and the source now lists other images"
    except SourceError as error:
        reason += f", and the source cannot be listed: {error}"
    raise ManifestError(
        f"{PLAN} is damaged and cannot be put together again: {reason}; no shard was changed",
        hint="encode into a new folder; what is intact in this one can still be read",
    )


def index_samples(table: pa.Table) -> list[Sample]:
    """Returns the planned samples that an index part speaks of, in row order."""
    columns = (table[name].to_pylist() for name in ("row", "key", "label", "path_bytes"))
    return [Sample(*values) for values in zip(*columns, strict=True)]


def _is_lost_plan(plan: Plan, manifest: Manifest) -> bool:
    return hashlib.sha256(plan.to_bytes()).hexdigest() == manifest.plan.sha256
