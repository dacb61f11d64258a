"""The section of one cache: what it holds, what it costs, and what its latents still show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import CacheCard, describe
from ci2p_cache.errors import CacheError, IntegrityError, SourceError, command, size
from ci2p_cache.parquet import read_parquet
from ci2p_cache.report.charts import energy_chart, histogram
from ci2p_cache.report.data import flattened
from ci2p_cache.report.elements import (
    Cell,
    Html,
    bar,
    details,
    figure,
    image,
    markup,
    notice,
    section,
    table,
    tiles,
)

if TYPE_CHECKING:
    from ci2p_cache.pictures.reconstructions import CacheSample, LatentIllustrator, Reconstruction

__all__ = ["cache_section"]

_LISTED_CLASSES = 30
"""Up to this many all classes are listed; of more the largest and smallest."""
_LISTED_ERRORS = 30
_MAX_TABLE_BYTES = 2**26
"""Limit for errors.parquet and channels.parquet; ours have kilobytes."""
_GROUPS = {"worst": "Worst by PSNR", "median": "In the middle", "random": "Drawn at random"}


def cache_section(
    cache: Cache, *, anchor: str, illustrator: LatentIllustrator | None, num_shown: int
) -> Html:
    """Returns the section of a cache; an unfinished one is shown as far as it is encoded.

    Raises:
        ManifestError, ShardError: small arrays, a commit record or an index part are damaged.
        SourceError: the illustrator was given a source that cannot be opened.
    """
    card = describe(cache)
    sample: CacheSample | None = None
    reason = "Reconstructions and bounds were not asked for."
    if illustrator is not None:
        reason = "No sample holds a latent yet."
        try:
            sample = illustrator.measure(cache, num_shown=num_shown)
        except SourceError:
            # The caller named it; that it is wrong is not for the page to say.
            raise
        except CacheError as error:
            reason = f"Nothing could be decoded: {error}"
    measures, shown = [_channels(cache, card)], [notice(reason)]
    if sample is not None:
        measures = [_size_table(card, sample), *_quality(card, sample), *measures]
        shown = [_reconstructions(sample)]
    lead = markup(
        '<p class="lead">Encoded from <code>{}</code>; fingerprint <code>{}</code></p>',
        card.source, card.fingerprint_digest[:16],
    )  # fmt: skip
    begun = [lead, _headline(card)]
    if not card.complete:
        text = (
            f"Encoding has not finished: {card.committed_shards:,} of {card.shards:,} shards are "
            "committed. This is what they hold."
        )
        begun.append(notice(text, command("status", card.path)))
    return section(
        f"Cache {cache.path.resolve().name}",
        *begun,
        section(
            "Bytes, quality, channels", markup('<div class="grid">{}</div>', measures), level=3
        ),
        *shown,
        _classes(card),
        _errors(cache, card),
        _settings(cache, card),
        anchor=anchor,
    )


def _headline(card: CacheCard) -> Html:
    views = sum(split.valid_rows * split.views for split in card.splits)
    per_split = ", ".join(f"{split.name} {split.valid_rows:,}" for split in card.splits)
    per_view = "-" if card.bytes_per_view is None else size(card.bytes_per_view)
    return tiles(
        [
            ("images", f"{card.images:,}", f"{views:,} views; {per_split}"),
            ("classes", f"{len(card.classes):,}", ""),
            ("per view", per_view, ", ".join(card.size_words[1:])),
            ("on disk", size(card.disk_bytes), f"{card.shards:,} shards, {card.layout.format}"),
            ("saturated", f"{card.clipped:,} symbols", f"{card.clipped_share:.2g} of all")
            if card.fingerprint.latent.is_symbols
            else ("stored as", card.fingerprint.latent.dtype, "nothing is rounded"),
            ("bad images", f"{card.bad_images:,}", "see below" if card.bad_images else "none"),
        ]
    )


def _size_table(card: CacheCard, sample: CacheSample) -> Html:
    """Returns bytes per view against the entropy bound, JPEG and float16."""
    latent = card.fingerprint.latent
    pixels = card.fingerprint.image.size**2
    bounds = [row.bpp[0] * pixels / 8 for row in sample.rows if row.bpp[0] is not None]
    half = 2.0 * latent.channels * latent.height * latent.width
    codec = card.layout.codec if card.layout.has_zarr else "in tars"
    stored = float(np.mean([row.stored_bytes[0] for row in sample.rows]))
    known = [(f"this cache: {latent.dtype}, {codec}", stored)]
    if bounds:
        unit = "entropy bound" if latent.is_symbols else "entropy bound, were y rounded"
        known.append((unit, float(np.mean(bounds))))
    if sample.jpeg_bytes:
        known.append(("JPEG, quality 90", float(np.mean(sample.jpeg_bytes))))
    known.append(("y as float16", half))
    known.append(("8-bit pixels", 3.0 * pixels))
    most = max(value for _, value in known)
    rows: list[list[Cell]] = [
        [name, bar(value / most, size(value)), f"{value / stored:.2f}"] for name, value in known
    ]
    parts = [
        table(
            f"A view's latent without its index, mean of {len(sample.rows):,} of {sample.split}",
            ["stored as", "per view", "ratio"],
            rows,
        )
    ]
    if not bounds:
        parts.append(notice("This encoder has no symbols of its own, hence no entropy bound."))
    if not sample.jpeg_bytes:
        reason = "The source images have changed since, so there is nothing to compare with."
        if {row.source for row in sample.rows} != {"changed"}:
            reason = (
                "The source images were not found, so PSNR and JPEG size are not known; --source "
                "says where they are now."
            )
        parts.append(notice(reason))
    return markup('<div class="card">{}</div>', parts)


def _quality(card: CacheCard, sample: CacheSample) -> list[Html]:
    """Returns how the PSNR of reconstructions is spread; nothing where it is not known."""
    known = [row.psnr_db[0] for row in sample.rows if row.psnr_db[0] is not None]
    if not known:
        return []
    text = (
        f"PSNR of {len(known):,} reconstructed views of {sample.split}, drawn with a fixed seed: "
        f"{min(known):.1f} to {max(known):.1f} dB, median {np.median(known):.1f} dB (the line)."
    )
    name = f"PSNR of reconstructions of {card.path}"
    return [figure(histogram(name, known, x_label="PSNR, dB", y_label="views"), text)]


def _reconstructions(sample: CacheSample) -> Html:
    """Returns originals beside what g_s makes of the latents."""
    parts = []
    for group, title in _GROUPS.items():
        shown = [_pair(one) for one in sample.shown if one.group == group]
        if shown:
            parts.append(markup('<h4>{}</h4><div class="pairs">{}</div>', title, shown))
    intro = Html(
        "<p>Left: the view that was encoded. Right: the picture decoded from the cache. Latents "
        "are not anonymised.</p>"
    )
    return section("Reconstructions", intro, *parts, level=3)


def _pair(one: Reconstruction) -> Html:
    measured, (psnr_db,) = one.measured, one.measured.psnr_db
    name = measured.class_title or measured.key
    side = image(one.original, f"Original view of {name}") if one.original is not None else ""
    decoded = image(one.decoded, f"The same, decoded from its latent: {name}")
    quality = "PSNR unknown" if psnr_db is None else f"{psnr_db:.1f} dB"
    caption = markup(
        "<b>{}</b> {}, {}<br><small>{} row {}, {}</small>",
        measured.class_title or "no class", quality, size(measured.stored_bytes[0]),
        measured.split, str(measured.row), measured.key,
    )  # fmt: skip
    return figure(markup('<div class="pair">{}{}</div>', side, decoded), caption)


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
        text += f"{int(dead.sum())} are constant: {numbers}{more}."
    else:
        text += "No channel is constant."
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
        return section(title, Html("<p>None.</p>"), level=3)
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
    """Reads a table that finalising wrote, checked against its digest; None before that.

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
    tables = markup(
        '<div class="grid two">{}<div>{}{}</div></div>',
        table("Fingerprint: every setting that changes a value", ["field", "value"], fingerprint),
        table("Layout: every setting that changes a place", ["field", "value"], layout),
        _made_on(cache, card),
    )
    title = "Fingerprint, layout, splits and machine"
    return details(title, tables, table("Splits", head, splits))


def _made_on(cache: Cache, card: CacheCard) -> Html:
    """Returns the machine of the first shard; the records have no times, so no throughput."""
    rows: list[list[Cell]] = [["software", card.software]]
    for split in cache.values():
        for shard in split.committed()[:1]:
            commit = split.read_commit(shard)
            if commit is not None:
                rows += [[name, str(value)] for name, value in commit.numerics.items()]
                title = f"What {split.name} shard {shard} was made on"
                return table(title, ["what", "value"], rows)
    return table("Made by", ["what", "value"], rows)


def _flat(data: Mapping[str, Any]) -> list[list[Cell]]:
    return [[name, "none" if value is None else str(value)] for name, value in flattened(data)]
