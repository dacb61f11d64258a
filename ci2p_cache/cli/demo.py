"""`ci2p-cache demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.cli.run import show_stage

if TYPE_CHECKING:
    from ci2p_cache.experiment.demo import DemoResult

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to put everything [default: a new temporary folder]."),
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Run both stages on generated pictures; half a minute, no network.

    \b
      ci2p-cache demo                      in a temporary folder, which is kept
      ci2p-cache demo --out tryout/        in a new or empty folder

    Generates small labelled pictures, encodes them with the bundled encoder, verifies every byte,
    trains vitds_tiny from the latents, evaluates it, and writes a report: one page with learning
    curves, confusions and reconstructions. It ends with the commands for your own images.
    """
    from ci2p_cache.images.decoders import start_decoder_server

    render.status("both stages on drawn pictures; half a minute on two idle cores ...")
    # It imports torch on the second core, while this process does so and draws.
    start_decoder_server()
    from ci2p_cache.cli.watch import EncodeWatch, TrainWatch
    from ci2p_cache.experiment.demo import run_demo
    from ci2p_cache.process import tune_process

    tune_process()
    with render.ProgressLine("demo", unit="") as line:
        result = run_demo(
            out,
            on_event=show_stage,
            encode_observer=EncodeWatch(line),
            train_observer=TrainWatch(line),
        )
    if json:
        render.print_json(result.to_dict())
    else:
        _print_result(result)


def _print_result(result: DemoResult) -> None:
    render.heading(
        f"demo: validation top-1 {result.top1:.1%} (chance {result.chance:.0%}) on "
        f"{result.images} generated pictures, in {render.duration(sum(result.seconds.values()))}"
    )
    render.line(f"  {result.note}")
    render.line(f"  cache       {result.cache}")
    render.line(f"  everything  {result.folder}")
    render.line(f"  report      {result.report}  (open it in a browser)")
    render.line("the same on your own images:")
    for command in result.commands:
        render.line(f"  {command}")
