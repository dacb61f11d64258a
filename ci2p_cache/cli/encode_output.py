"""What `encode` shows: a forecast, a finished cache, or a part of one and what comes next."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from ci2p_cache.cli import render
from ci2p_cache.errors import command

if TYPE_CHECKING:
    from ci2p_cache.encoding.forecast import DryRunReport
    from ci2p_cache.encoding.progress import EncodeSummary

__all__ = ["print_forecast", "print_summary", "print_unfinished"]

_ARRAY_TASKS = 16
"""Tasks of the array that a plan suggests, where it has as many shards."""


def print_forecast(report: DryRunReport) -> None:
    """Prints what a run would take."""
    splits = ", ".join(
        f"{name} {count:,} x {report.views[name]}" for name, count in report.splits.items()
    )
    done = f"{report.committed_shards:,} of {report.shards:,} shards committed"
    left = f"{report.images_left:,} images left"
    rows = [
        ("images", f"{report.images:,}", f"{report.classes:,} classes; {splits} views"),
        ("to do", left, done),
    ]
    if report.images_left:
        rows += _rates(report)
    fits = "fits" if report.fits else "DOES NOT FIT"
    rows.append(
        (
            "disk",
            render.size(report.disk_bytes),
            f"{fits}: {render.size(report.free_bytes)} free; "
            f"{render.size(report.bytes_per_image)} per image, all its views",
        )
    )
    bad = f"{report.bad_found:,} of {report.checked:,} looked at; {report.bad_allowed:,} allowed"
    if report.checked < report.images_left:
        bad += f"; more than {report.bad_bound:,.0f} are unlikely (5 %)"
    rows.append(("bad images", f"about {report.bad_expected:,.0f}", bad))
    render.print_table(
        ("", "expected", ""), rows, title=f"{report.path}: a forecast, nothing was written"
    )
    for text in report.bad_files:
        render.line(f"  bad: {text}")
    if report.bad_found <= report.bad_allowed < report.bad_expected:
        render.notice(
            "a run will probably stop at its bad images; --max-errors says how many may fail"
        )


def _rates(report: DryRunReport) -> list[tuple[str, str, str]]:
    """Returns the rows of the forecast that come from timing a sample."""
    decode = (
        f"decoding alone {report.decode_images_per_second:,.0f} images/s; "
        if report.decode_images_per_second
        else ""
    )
    return [
        (
            "speed",
            f"{report.images_per_second:,.1f} images/s",
            f"g_a ran {report.encoder_share:.0%} of the time; {decode}"
            f"bottleneck: {report.bottleneck}",
        ),
        (
            "time",
            f"about {render.duration(report.seconds)}",
            f"from {report.sampled:,} images, {report.sampled_seconds:.1f} s of them timed",
        ),
        (
            "saturated",
            f"{report.clipped_share:.4%}" if report.clipped_share else "none",
            "of the sample's symbols",
        ),
    ]


def print_summary(summary: EncodeSummary) -> None:
    """Prints what a run ended with."""
    splits = ", ".join(f"{name} {count:,}" for name, count in summary.splits.items())
    classes = f"{summary.classes:,} classes" if summary.classes else "no labels"
    render.heading(f"{summary.path}: {summary.images:,} images ({splits}), {classes}, complete")
    if summary.encoded_now:
        render.line(
            f"  encoded now   {summary.encoded_now:,} images in "
            f"{render.duration(summary.seconds)}, {summary.images_per_second:.1f} images/s; "
            f"the encoder waited {summary.waiting_share:.0%} of the time"
        )
    else:
        render.line("  encoded now   nothing: everything was committed already")
    bad = f"{summary.bad:,}" + (" (see errors.parquet)" if summary.bad else "")
    render.line(f"  bad images    {bad}")
    ratio = summary.cache_bytes / max(summary.source_bytes or 0, 1)
    render.line(
        f"  size          {render.size(summary.cache_bytes)}, "
        f"{render.size(summary.bytes_per_image)} per image with "
        f"{summary.views / max(summary.images, 1):.1f} views, {ratio:.2f} x the source files"
    )
    render.line(f"  saturated     {summary.clipped or 0:,} symbols")
    if summary.exif_turned:
        render.line(
            f"  EXIF          {summary.exif_turned:,} images carry an orientation "
            "(--exif says whether it is applied; torchvision's loader ignores it)"
        )
    training = ("train", summary.path, "--model", "vitds")
    following = training if summary.classes else ("inspect", summary.path)
    render.line(f"next: {command(*following)}")


_ONCE = ("--plan-only", "--rescan", "--reencode-changed", "--retry-failed")
"""Options that the commands which encode a plan do without."""


def print_unfinished(summary: EncodeSummary) -> None:
    """Prints what a plan or a range ended with, and what comes next."""
    if summary.shard_range is None:
        words = [word for word in sys.argv[1:] if word not in _ONCE]
        count = min(summary.shards, _ARRAY_TASKS)
        render.heading(f"{summary.path}: {summary.shards:,} shards planned")
        if summary.images + summary.bad:
            render.line(f"  committed     {summary.images + summary.bad:,} images already")
        render.line(
            f"on each of {count} machines (this is the first): "
            f"{command(*words, '--shard-range', f'1/{count}')}"
        )
        script = command(*words, "--shard-range", "auto")
        render.line(f"Slurm: sbatch --array=1-{count} --wrap {shlex.quote(script)}")
        return
    render.heading(
        f"{summary.path}: range {summary.shard_range} is committed, the cache is not complete"
    )
    render.line(
        f"  encoded now   {summary.encoded_now:,} images in {render.duration(summary.seconds)}, "
        f"{summary.images_per_second:.1f} images/s"
    )
    render.line(f"  bad images    {summary.bad:,}")
    render.line(f"  size          {render.size(summary.cache_bytes)}")
    render.line(f"what is left: {command('status', summary.path)}")
