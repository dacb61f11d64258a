"""`ci2p-cache encode`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.cli.encode_output import print_forecast, print_summary, print_unfinished
from ci2p_cache.cli.fields import takes_options
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.errors import UsageError, command

__all__ = ["encode"]


@takes_options(EncodeOptions)
def encode(
    *,
    source: Annotated[
        Path,
        typer.Argument(
            help="Images: a folder, a zip, tars, parquet, a list.", metavar="SRC", readable=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Cache folder; made if it is not there.")],
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
        typer.Option("--dry-run", help="Encode a sample, say what all would take; write nothing."),
    ] = False,
    json: choices.Json = False,
) -> None:
    """Stage one: run the frozen encoder over images and commit their latents.

    \b
      ci2p-cache encode imagenet/ --out shards/                    256 px, int8, image + mirror
      ci2p-cache encode photos/ --out shards/ --encoder bundled    without a network
      ci2p-cache encode photos/ --out paper/ --dtype float16       continuous y, as in the paper
      ci2p-cache encode photos/ --out crops/ --views crops:4       four random-resized crops each
      ci2p-cache encode imagenet/ --out shards/ --dry-run          time, disk, bad files: a forecast
      ci2p-cache encode imagenet/ --out shards/ --shard-range 2/4  the second of four machines

    SRC is a folder of CLASS/..., of {train,val,test}/CLASS/..., or ImageNet's own; a zip of one;
    WebDataset tars ('train-{000..146}.tar'), tars of CLASS/... or of class tars; Hugging Face
    parquet; or a list with path and label (others: --image-column, --label-column, --root). A
    layout that could mean two things is refused. Run the same command again to continue after any
    interruption. Settings that change what is stored are bound to the folder: a command with
    others is refused, with the difference.
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
