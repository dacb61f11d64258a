"""The section of one cache: what it holds, what it costs, and what its latents still show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import CacheCard, describe
from ci2p_cache.errors import CacheError, IntegrityError, SourceError, command
from ci2p_cache.parquet import read_parquet
from ci2p_cache.report.charts import energy_chart
from ci2p_cache.report.elements import (
    Cell,
    Html,
    bar,
    details,
    element,
    figure,
    notice,
    section,
    size,
    table,
    tiles,
)
from ci2p_cache.report.pictures import CacheSample, Illustrator
from ci2p_cache.report.reconstruction_page import (
    quality_figure,
    reconstruction_section,
    size_table,
)

__all__ = ["cache_section"]

_LISTED_CLASSES = 30
"""Up to this many all classes are listed; of more the largest and smallest."""
_LISTED_ERRORS = 30
_MAX_TABLE_BYTES = 2**26
"""Of errors.parquet and channels.parquet; ours have kilobytes."""


def cache_section(
    cache: Cache, *, anchor: str, illustrator: Illustrator | None, num_shown: int
) -> Html:
    """Returns the section of a cache.

    Args:
        cache: The cache; one whose encoding has not finished is described as far as it goes.
        anchor: What the list of contents points to.
        illustrator: Measures and decodes a sample; None leaves that out and says so.
        num_shown: Reconstructions of each group.

    Raises:
        ManifestError: the small arrays or a commit record are damaged.
        ShardError: an index part of an incomplete cache is damaged.
        SourceError: the illustrator was given a source that cannot be opened.
    """
    card = describe(cache)
    sample: CacheSample | None = None
    told = "Reconstructions and bounds were not asked for."
    if illustrator is not None:
        told = "No sample holds a latent yet."
        try:
            sample = illustrator.measure(cache, num_shown=num_shown)
        except SourceError:
            # The caller named a place; that it is wrong is not for the page to say.
            raise
        except CacheError as error:
            told = f"Nothing could be decoded: {error}"
    if sample is None:
        measures, shown = [], [notice(told)]
    else:
        spread = quality_figure(card, sample)
        measures = [size_table(card, sample), *([spread] if spread is not None else [])]
        shown = [reconstruction_section(sample)]
    measures.append(_channels(cache, card))
    name = cache.path.resolve().name
    return section(
        f"Cache {name}",
        element(
            "p",
            "Encoded from ",
            element("code", card.source),
            "; fingerprint ",
            element("code", card.fingerprint_digest[:16]),
            class_="lead",
        ),
        _headline(card),
        *_unfinished(card),
        section("Bytes, quality, channels", element("div", *measures, class_="grid"), level=3),
        *shown,
        _classes(card),
        _errors(cache, card),
        _settings(cache, card),
        anchor=anchor,
    )


def _headline(card: CacheCard) -> Html:
    views = sum(split.valid_rows * split.views for split in card.splits)
    per_image = "-" if card.bytes_per_image is None else size(card.bytes_per_image)
    ratio = "" if card.source_ratio is None else f"{card.source_ratio:.2f} x the source files"
    return tiles(
        [
            ("images", f"{card.images:,}", f"{views:,} views; {_per_split(card)}"),
            ("classes", f"{len(card.classes):,}", ""),
            ("per image", per_image, ratio),
            ("on disk", size(card.disk_bytes), f"{card.shards:,} shards, {card.layout.format}"),
            ("saturated", f"{card.clipped:,} symbols", f"{card.clipped_share:.2g} of all")
            if card.fingerprint.latent.is_symbols
            else ("stored as", card.fingerprint.latent.dtype, "nothing is rounded"),
            ("bad images", f"{card.bad_images:,}", "see below" if card.bad_images else "none"),
        ]
    )


def _per_split(card: CacheCard) -> str:
    return ", ".join(f"{split.name} {split.valid_rows:,}" for split in card.splits)


def _unfinished(card: CacheCard) -> list[Html]:
    if card.complete:
        return []
    text = (
        f"Encoding has not finished: {card.committed_shards:,} of {card.shards:,} shards are "
        "committed. This is what they hold."
    )
    return [notice(text, command("status", card.path))]


def _channels(cache: Cache, card: CacheCard) -> Html:
    try:
        stats = _table(cache, "stats/channels.parquet")
        if stats is None:
            return notice("Statistics of the channels come when encoding ends.")
        columns = {
            name: stats[name].to_numpy(zero_copy_only=False)
            for name in ("channel", "count", "energy", "min", "max")
        }
        num = card.fingerprint.latent.channels
        channel = columns["channel"].astype(np.int64)
        count = np.bincount(channel, columns["count"], num)[:num]
        energy = np.bincount(channel, columns["energy"] * columns["count"], num)[:num]
        energy = np.nan_to_num(energy / np.maximum(count, 1), posinf=0.0)
        low, high = np.full(num, np.inf), np.full(num, -np.inf)
        seen = columns["count"] > 0
        np.minimum.at(low, channel[seen], columns["min"][seen])
        np.maximum.at(high, channel[seen], columns["max"][seen])
    except (IntegrityError, OSError, KeyError, ValueError, IndexError, TypeError) as error:
        return notice(f"The statistics of the channels are damaged: {error}")
    dead = low >= high
    shares = np.cumsum(np.sort(energy)[::-1]) / max(float(energy.sum()), 1e-30)
    half, most = (min(int(np.searchsorted(shares, share)) + 1, num) for share in (0.5, 0.9))
    text = (
        f"Mean squares of the stored values, all splits together. Half of the energy is in "
        f"{half} of {num} channels, 90 % in {most}. "
    )
    if dead.any():
        numbers = ", ".join(map(str, np.flatnonzero(dead)[:40]))
        more = " ..." if dead.sum() > 40 else ""
        text += f"{int(dead.sum())} never change and are dead: {numbers}{more}."
    else:
        text += "None is dead, that is, holds one value only."
    chart = energy_chart(f"Energy of the {num} channels of {cache.path.name}", energy, dead)
    return figure(chart, text)


def _classes(card: CacheCard) -> Html:
    counts = np.array([split.class_counts for split in card.splits], np.int64)
    counts = counts.reshape(len(card.splits), -1)
    total = counts.sum(axis=0)
    labels = list(range(len(total)))
    caption = "Images per class"
    if len(labels) > _LISTED_CLASSES:
        half = _LISTED_CLASSES // 2
        ranked = sorted(labels, key=lambda label: (-int(total[label]), label))
        labels = [*ranked[:half], *ranked[-half:]]
        caption = (
            f"The {half} largest and the {half} smallest of {len(total):,} classes; the median has "
            f"{int(np.median(total)):,} images"
        )
    top = max(int(total.max(initial=0)), 1)
    rows: list[list[Cell]] = []
    for label in labels:
        title, name = card.class_titles[label], card.classes[label]
        rows.append(
            [
                title if title == name else f"{title} ({name})",
                bar(int(total[label]) / top, f"{int(total[label]):,}"),
                *(int(split[label]) for split in counts),
            ]
        )
    head = ["class", "images", *(split.name for split in card.splits)]
    return section("Classes", table(caption, head, rows), level=3)


def _errors(cache: Cache, card: CacheCard) -> Html:
    title = "Images that could not be decoded"
    if not card.bad_images:
        return section(title, element("p", "None."), level=3)
    try:
        found = _table(cache, "errors.parquet")
        if found is None:
            return section(title, notice("They are listed when encoding ends."), level=3)
        first = found.slice(0, _LISTED_ERRORS).to_pylist()
        reasons = pc.value_counts(found["error"]).to_pylist()
        rows: list[list[Cell]] = [
            [str(one["key"]), str(one["split"]), int(one["row"]), str(one["error"])]
            for one in first
        ]
        common: list[list[Cell]] = [
            [str(one["values"]), int(one["counts"])]
            for one in sorted(reasons, key=lambda one: (-one["counts"], str(one["values"])))[:8]
        ]
    except (IntegrityError, OSError, KeyError, ValueError, TypeError) as error:
        return section(title, notice(f"errors.parquet is damaged: {error}"), level=3)
    parts = []
    if len(common) < found.num_rows:
        parts.append(table("Reasons", ["reason", "images"], common))
    caption = f"{found.num_rows:,} images"
    if found.num_rows > len(rows):
        caption = f"The first {len(rows)} of {found.num_rows:,} images"
    parts.append(table(caption, ["image", "split", "row", "reason"], rows))
    return section(title, *parts, level=3)


def _table(cache: Cache, path: str) -> pa.Table | None:
    """Reads a table that finalising wrote, held against its digest; None before that.

    Raises:
        ManifestError: it is not what was committed.
        OSError: it cannot be read.
    """
    if not cache.is_complete:
        return None
    cache.read_committed(path, max_bytes=_MAX_TABLE_BYTES)
    return read_parquet(cache.path / path)


def _settings(cache: Cache, card: CacheCard) -> Html:
    fingerprint: list[list[Cell]] = [["digest", card.fingerprint_digest]]
    fingerprint += _flat(card.fingerprint.to_dict())
    layout = _flat(card.layout.to_dict())
    splits: list[list[Cell]] = [
        [s.name, s.rows, s.valid_rows, s.views, " x ".join(map(str, s.shape)), s.shards,
         s.shard_rows, size(s.stored_bytes), size(s.source_bytes), s.clipped]
        for s in card.splits
    ]  # fmt: skip
    head = ["split", "rows", "with latents", "views", "array", "shards", "rows per shard",
            "stored", "source files", "saturated"]  # fmt: skip
    return details(
        "Fingerprint, layout, splits and machine",
        element(
            "div",
            table(
                "Fingerprint: every setting that changes a value", ["field", "value"], fingerprint
            ),
            element(
                "div",
                table("Layout: every setting that changes a place", ["field", "value"], layout),
                _made_on(cache, card),
            ),
            class_="grid two",
        ),
        table("Splits", head, splits),
    )


def _made_on(cache: Cache, card: CacheCard) -> Html:
    """Returns the machine of the first shard; the records have no times, so no throughput."""
    rows: list[list[Cell]] = [["software", card.software]]
    for split in cache.values():
        for shard in split.committed()[:1]:
            commit = split.read_commit(shard)
            if commit is not None:
                rows += [[name, str(value)] for name, value in commit.numerics.items()]
                return table(
                    f"What {split.name} shard {shard} was made on", ["what", "value"], rows
                )
    return table("Made by", ["what", "value"], rows)


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append([f"{prefix}{name}", "none" if value is None else str(value)])
    return rows
