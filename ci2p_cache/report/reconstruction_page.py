"""What a sample of a cache costs in bytes and still shows, from the figures handed over."""

from __future__ import annotations

import numpy as np

from ci2p_cache.cache.summary import CacheCard
from ci2p_cache.report.charts import histogram
from ci2p_cache.report.elements import (
    Cell,
    Html,
    bar,
    element,
    figure,
    image,
    join,
    notice,
    section,
    size,
    table,
)
from ci2p_cache.report.pictures import CacheSample, Reconstruction

__all__ = ["quality_figure", "reconstruction_section", "size_table"]

_GROUPS = {
    "worst": "Worst by PSNR",
    "median": "In the middle",
    "random": "Drawn at random",
}


def size_table(card: CacheCard, sample: CacheSample) -> Html:
    """Returns bytes per view against the entropy bound, JPEG and float16."""
    latent = card.fingerprint.latent
    bounds = [row.bound_bytes for row in sample.rows if row.bound_bytes is not None]
    jpegs = [row.jpeg_bytes for row in sample.rows if row.jpeg_bytes is not None]
    half = 2.0 * latent.channels * latent.height * latent.width
    codec = card.layout.codec if card.layout.has_zarr else "in tars"
    known = [
        (f"this cache: {latent.dtype}, {codec}", _mean([row.stored_bytes for row in sample.rows]))
    ]
    if bounds:
        unit = "entropy bound" if latent.is_symbols else "entropy bound, were y rounded"
        known.append((unit, _mean(bounds)))
    if jpegs:
        known.append(("JPEG, quality 90", _mean(jpegs)))
    known.append(("y as float16", half))
    known.append(("8-bit pixels", 3.0 * card.fingerprint.image.size**2))
    most, own = max(value for _, value in known), known[0][1]
    rows: list[list[Cell]] = [
        [name, bar(value / most, size(value)), f"{value / own:.2f}"] for name, value in known
    ]
    parts = [
        table(
            f"Bytes per view, mean of {len(sample.rows):,} of {sample.split}",
            ["stored as", "per view", "ratio"],
            rows,
        )
    ]
    if not bounds:
        parts.append(notice("This encoder has no symbols of its own, hence no entropy bound."))
    if not jpegs:
        parts.append(notice(_source_told(sample)))
    return element("div", *parts, class_="card")


def quality_figure(card: CacheCard, sample: CacheSample) -> Html | None:
    """Returns how the PSNR of reconstructions is spread; None where it is not known."""
    known = [row.psnr_db for row in sample.rows if row.psnr_db is not None]
    if not known:
        return None
    low, middle, high = np.min(known), np.median(known), np.max(known)
    text = (
        f"PSNR of {len(known):,} reconstructed views of {sample.split}, drawn with a fixed seed: "
        f"{low:.1f} to {high:.1f} dB, median {middle:.1f} dB (the line)."
    )
    name = f"PSNR of reconstructions of {card.path}"
    return figure(histogram(name, known, x_label="PSNR, dB", y_label="views"), text)


def reconstruction_section(sample: CacheSample) -> Html:
    """Returns originals beside what g_s makes of the latents."""
    parts = []
    for group, title in _GROUPS.items():
        shown = [_pair(one, sample.split) for one in sample.shown if one.group == group]
        if shown:
            parts += [element("h4", title), element("div", *shown, class_="pairs")]
    intro = element(
        "p", "The view that was encoded, then what is decoded from the cache: "
        "no one can take these latents for anonymised.",
    )  # fmt: skip
    return section("Reconstructions", intro, *parts, level=3)


def _pair(one: Reconstruction, split: str) -> Html:
    measured = one.measured
    side: Html | str = ""
    if one.original is not None:
        side = image(one.original, f"Original view of {one.class_title or one.key}")
    decoded = image(one.decoded, f"The same, decoded from its latent: {one.class_title or one.key}")
    quality = "PSNR unknown" if measured.psnr_db is None else f"{measured.psnr_db:.1f} dB"
    caption = join(
        element("b", one.class_title or "no class"),
        f" {quality}, {size(measured.stored_bytes)}",
        element("br"),
        element("small", f"{split} row {measured.row}, {one.key}"),
    )
    return figure(element("div", side, decoded, class_="pair"), caption)


def _source_told(sample: CacheSample) -> str:
    states = {row.source for row in sample.rows}
    if states == {"changed"}:
        return "The source images have changed since, so there is nothing to compare with."
    return (
        "The source images were not found, so PSNR and JPEG size are not known; --source says "
        "where they are now."
    )


def _mean(values: list[float] | list[int]) -> float:
    return float(np.mean(values))
