"""`ci2p-cache encode`: a forecast, a finished cache, or a part of one and what comes next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.cli.fields import takes_options
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.errors import UsageError, command, without_overwrite

__all__ = ["encode", "print_forecast", "print_summary", "print_unfinished"]

if TYPE_CHECKING:
    from ci2p_cache.encoding.forecast import DryRunReport
    from ci2p_cache.encoding.progress import EncodeSummary


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
            f"{fits}: {render.size(report.free_bytes)} free; the encoder and records "
            f"{render.size(report.disk_bytes - report.latent_bytes)}, each image "
            f"{render.size(report.bytes_per_image)}",
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
    bottleneck = "no clear bottleneck: few images, or a busy machine"
    if report.bottleneck:
        bottleneck = f"bottleneck: {report.bottleneck}"
    return [
        (
            "speed",
            f"{report.images_per_second:,.1f} images/s",
            f"g_a ran {report.encoder_share:.0%} of the time; {decode}{bottleneck}",
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
    words = [f"{render.size(summary.cache_bytes)} of latents", *summary.stored.size_words]
    render.line(f"  size          {', '.join(words)}")
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
        words = [word for word in without_overwrite(sys.argv[1:]) if word not in _ONCE]
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


@takes_options(EncodeOptions)
def encode(
    *,
    source: Annotated[
        Path,
        typer.Argument(
            help="Images: a folder, a zip, tars, parquet, a list.", metavar="SRC", readable=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Cache folder; created if missing.")],
    options: EncodeOptions,
    overwrite: Annotated[
        str | None,
        typer.Option(
            help="Remove the cache in --out first; NAME must be that folder's name.",
            metavar="NAME",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate time, disk and bad files from a sample."),
    ] = False,
    json: choices.JsonOption = False,
) -> None:
    """Stage one: run the frozen encoder over images and commit their latents.

    \b
      ci2p-cache encode imagenet/ --out shards/                    256 px, int8
      ci2p-cache encode photos/ --out shards/ --encoder bundled    no network
      ci2p-cache encode photos/ --out paper/ --dtype float16       continuous y
      ci2p-cache encode photos/ --out crops/ --views crops:4       4 random crops
      ci2p-cache encode imagenet/ --out shards/ --dry-run          a forecast
      ci2p-cache encode imagenet/ --out shards/ --shard-range 2/4  2nd of 4 parts

    SRC is a folder of CLASS/..., of {train,val,test}/CLASS/..., or ImageNet's own; a zip of one;
    WebDataset tars ('train-{000..146}.tar'), tars of CLASS/... or of class tars; Hugging Face
    parquet; or a list with path and label (others: --image-column, --label-column, --root). A
    layout that could mean two things is refused. Run the same command again to continue after any
    interruption. A command whose settings differ from the cache's is refused, and the difference
    is shown.
    """
    from ci2p_cache.cli.watch import EncodeWatch
    from ci2p_cache.encoding.run import encode as run
    from ci2p_cache.process import tune_process

    tune_process(options.devices)
    if overwrite is not None and overwrite.strip("/") != out.resolve().name:
        raise UsageError(
            f"--overwrite names {overwrite!r}, the folder is {out.resolve().name!r}",
            hint=f"--overwrite {shlex.quote(out.resolve().name)} to remove that cache first",
        )
    if dry_run:
        _forecast(source, out, options, overwrite=overwrite is not None, json=json)
        return
    with render.ProgressLine("encode", unit="images") as line:
        summary = run(
            source, out, options, overwrite=overwrite is not None, observer=EncodeWatch(line)
        )
    if json:
        render.print_json(summary.to_dict())
    elif summary.complete:
        print_summary(summary)
    else:
        print_unfinished(summary)


def _forecast(
    source: Path, out: Path, options: EncodeOptions, *, overwrite: bool, json: bool
) -> None:
    """Predicts a run, and ends with the error that it is certain to end with."""
    from ci2p_cache.cli.watch import EncodeWatch
    from ci2p_cache.encoding.forecast import dry_run

    with render.ProgressLine("sample", unit="images") as line:
        report = dry_run(source, out, options, overwrite=overwrite, observer=EncodeWatch(line))
    if json:
        render.print_json(report.to_dict())
    else:
        print_forecast(report)
    blocker = report.blocker()
    if blocker is not None:
        raise blocker
    if not json:
        words = [word for word in sys.argv[1:] if word != "--dry-run"]
        render.line(f"run it: {command(*words)}")
