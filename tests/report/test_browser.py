"""The report in a real browser: nothing fails, nothing is fetched, nothing sticks out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ci2p_cache as cc
from ci2p_cache.cache.summary import index_parts
from ci2p_cache.pictures.reconstructions import LatentIllustrator
from ci2p_cache.report.html import write_report
from tests.support.pictures import write_image_folder
from tests.support.run_records import write_evaluation, write_run
from tests.support.tiers import thinned

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "<img src=https://example.invalid/x onerror=document.title='run'>" + "w" * 120


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of which has hostile names, and their cache."""
    root = tmp_path_factory.mktemp("browser")
    write_image_folder(root / "images", {"ant": 5, "bee": 5, "cat" * 60: 4})
    options = cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.4)
    cc.encode(root / "images", root / "shards", options)
    cache = cc.open_cache(root / "shards")
    runs = [
        write_run(root / "plain", cache=cache, epochs=30),
        write_run(root / EVIL.replace("/", "_"), cache=cache, seed=1, note=EVIL),
    ]
    (table,) = index_parts(cache["val"], ["row", "key", "label"])
    labels = table["label"].to_numpy()
    for run, shift in zip(runs, (1, 2), strict=True):
        predicted = np.where(np.arange(len(labels)) % 2 == 0, labels, (labels + shift) % 3)
        write_evaluation(
            run, rows=table["row"].to_pylist(), keys=table["key"].to_pylist(), labels=labels,
            predicted=predicted, confidence=np.linspace(0.9, 0.4, len(labels)),
            cache=str(cache.path),
        )  # fmt: skip
    out = root / "report.html"
    write_report([*runs, cache.path], out, illustrator=LatentIllustrator(num_samples=5))
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's Chromium, without a display."""
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any, report: Path) -> Iterator[Callable[..., tuple[Any, list[str]]]]:
    """Opens the report offline; what goes wrong is listed."""
    contexts = []

    def open_page(width: int, scheme: str = "light") -> tuple[Any, list[str]]:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                None
                if request.url == report.as_uri() or request.url.startswith("data:")
                else wrong.append(f"request: {request.url}")
            ),
        )
        page.goto(report.as_uri(), wait_until="load")
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", thinned([1280, 400]))
def test_it_opens_offline_without_an_error_a_request_or_overflow(opened, width):
    page, wrong = opened(width)
    assert wrong == []
    widths = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) >= 12
    assert min(widths) > 0
    root = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert root[0] <= root[1] == width
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() != "run"
    # Text of charts is text, and no smaller than can be read.
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(sizes) >= 12
    assert min(sizes) > 280


def test_dark_and_light_are_told_apart_and_readable(opened):
    colors = {}
    for scheme in ("light", "dark"):
        page, wrong = opened(1280, scheme)
        assert wrong == []
        colors[scheme] = page.evaluate(
            """() => {
                const style = element => getComputedStyle(document.querySelector(element));
                return [style('body').backgroundColor, style('body').color,
                        style('.lead').color, style('svg.chart text').fill,
                        style('svg.matrix text').fill];
            }"""
        )
    for light, dark in zip(colors["light"], colors["dark"], strict=True):
        assert light != dark
    for background, *inks in colors.values():
        for ink in inks:
            assert contrast(background, ink) >= 4.5


def contrast(one: str, other: str) -> float:
    """Contrast of two `rgb(...)` colours, 1 to 21 (WCAG 2.1, "relative luminance")."""

    def luminance(color: str) -> float:
        parts = [float(part) / 255 for part in color[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)
