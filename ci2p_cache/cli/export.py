"""`ci2p-cache export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import UsageError

if TYPE_CHECKING:
    from ci2p_cache.inference.export import ExportSummary

__all__ = ["export"]


def export(
    run: choices.RunFolder,
    out: Annotated[Path, typer.Option(help="File to write, .onnx or .pt2.", metavar="FILE")],
    to: Annotated[
        Literal["onnx", "torch"], typer.Option(help="torch: a .pt2 of torch.export.")
    ] = "onnx",
    what: Annotated[
        Literal["full", "model"],
        typer.Option(help="full: images to logits. model: latents to logits."),
    ] = "full",
    checkpoint: choices.Checkpoint = "best",
    cache: choices.EncoderCache = None,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Check with these images [default: random ones].", metavar="IMAGES"),
    ] = None,
    count: Annotated[int, typer.Option(help="Inputs to check with.")] = 16,
    overwrite: Annotated[
        str | None,
        typer.Option(help="Replace the file --out; NAME must be its name.", metavar="NAME"),
    ] = None,
    json: choices.Json = False,
) -> None:
    """Export encoder and model as one file for other programs, checked against eager.

    \b
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers.onnx
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers.pt2 --to torch
      ci2p-cache export runs/vitds-1a2b3c4d --out head.onnx --what model
      ci2p-cache export runs/vitds-1a2b3c4d --out flowers.onnx --check photos/ --count 100

    The graph takes float32 images (batch, 3, size, size) in [0, 1] and gives logits; classes, size
    and fingerprint are in its metadata. The file is run, in onnxruntime or torch, before it is
    renamed into place; a file that is there already is refused. Needs
    `pip install 'ci2p-cache[export]'`.
    """
    from ci2p_cache.inference import export_model

    if overwrite is not None and overwrite != out.name:
        raise UsageError(
            f"--overwrite names {overwrite!r}, the file is {out.name!r}",
            hint=f"--overwrite {shlex.quote(out.name)} to replace that file",
        )
    render.status(f"exporting to {out} and running it; a minute or so")
    summary = export_model(
        run, out, to=to, what=what, checkpoint=checkpoint, cache=cache, images=check, count=count,
        overwrite=overwrite is not None,
    )  # fmt: skip
    render.print_json(summary.to_dict()) if json else _print(summary)


def _print(summary: ExportSummary) -> None:
    check = summary.check
    shape = ", ".join(map(str, summary.input_shape))
    render.heading(f"{summary.path}: {summary.format}, {render.size(summary.bytes)}")
    render.line(f"  input       float32 (batch, {shape})")
    render.line(f"  checkpoint  {summary.checkpoint}")
    render.line(
        f"  checked     {check.inputs:,} inputs: logits differ by {check.max_difference:.2g} at "
        f"most, of {check.scale:.3g}"
    )
    if check.stored_values:
        render.line(
            f"  rounding    {check.differing_values:,} of {check.stored_values:,} values fell to "
            f"the other side of a tie, in {check.differing_inputs:,} inputs; with them logits "
            f"differ by {check.end_to_end_difference:.2g}"
        )
