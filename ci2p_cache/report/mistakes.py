"""The images that a run is most sure of and wrong about."""

from __future__ import annotations

import numpy as np

from ci2p_cache.cache.store import Cache
from ci2p_cache.cache.summary import read_row
from ci2p_cache.errors import CacheError
from ci2p_cache.report.elements import (
    Html,
    element,
    figure,
    image,
    join,
    notice,
    percent,
    section,
)
from ci2p_cache.report.evaluations import Predictions
from ci2p_cache.report.pictures import Illustrator, Picture
from ci2p_cache.report.run_data import RunData

__all__ = ["mistakes_section"]


def mistakes_section(
    run: RunData,
    predictions: Predictions,
    cache: Cache | None,
    illustrator: Illustrator | None,
    *,
    count: int,
) -> Html:
    """Returns the mistakes of a run that it was most sure of, as pictures where they can be made.

    Args:
        run: The run.
        predictions: What it said of each image.
        cache: The cache it was trained from; None where that cannot be reached.
        illustrator: Decodes the images; None: they are listed without pictures.
        count: How many are shown.
    """
    wrong = np.flatnonzero(~predictions.correct)
    order = np.lexsort((predictions.row[wrong], -predictions.confidence[wrong]))
    chosen = wrong[order][:count].tolist()
    if not chosen:
        return section("Mistakes", element("p", "None: every image is classified right."), level=3)
    split = run.evaluation.split if run.evaluation is not None else "val"
    samples = {int(predictions.row[i]): predictions.key[i] for i in chosen}
    pictures, told = _pictures(run, split, samples, cache, illustrator)
    cards = [
        _card(run, predictions, i, None if pictures is None else pictures[place])
        for place, i in enumerate(chosen)
    ]
    intro = (
        f"{len(wrong):,} of {len(predictions.correct):,} images are classified wrong; these with "
        "the highest confidence."
    )
    if pictures is not None:
        intro += " Pictures are decoded from the cached latents."
    parts = [element("p", intro), *([notice(told)] if told else [])]
    return section(
        "Most confident mistakes", *parts, element("div", *cards, class_="thumbs"), level=3
    )


def _card(run: RunData, predictions: Predictions, i: int, picture: Picture | None) -> Html:
    """Returns one mistake: what it was taken for, how sure, what it is, and its key."""
    label = run.title_of(int(predictions.label[i]))
    taken = run.title_of(int(predictions.predicted[i]))
    words = join(
        element("b", taken),
        f" {percent(float(predictions.confidence[i]), 0)}",
        element("br"),
        "is ",
        element("b", label),
        element("br"),
        element("small", predictions.key[i]),
    )
    if picture is None:
        return element("figure", element("figcaption", words))
    return figure(image(picture, f"{label}, taken for {taken}"), words)


def _pictures(
    run: RunData,
    split: str,
    samples: dict[int, str],
    cache: Cache | None,
    illustrator: Illustrator | None,
) -> tuple[list[Picture] | None, str]:
    """Returns pictures of rows with these keys, or None and why there are none."""
    if illustrator is None:
        return None, "Shown without pictures: none were asked for."
    if cache is None or split not in cache:
        return None, f"Shown without pictures: {run.cache} is not there, or not the run's cache."
    try:
        for row, key in samples.items():
            if read_row(cache[split], row).key != key:
                return None, f"Shown without pictures: {cache.path} holds other images."
        return illustrator.thumbnails(cache, split, list(samples)), ""
    except CacheError as error:
        return None, f"Shown without pictures: {error}"
