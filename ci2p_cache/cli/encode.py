"""`ci2p-cache encode`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import UsageError, command

if TYPE_CHECKING:
    from ci2p_cache.encoding.options import EncodeOptions

from ci2p_cache.cli.encode_output import print_forecast, print_summary, print_unfinished

__all__ = ["encode"]

_WHAT = "What is stored (binds the folder)"
_LAYOUT = "Where it is stored (binds the folder)"
_RUN = "How it runs (changes no stored byte)"


def encode(
    source: Annotated[
        Path,
        typer.Argument(
            help="Images: a folder, a zip, tars, parquet, a list.", metavar="SRC", readable=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Cache folder; made if it is not there.")],
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the paths of a list start from [default: the list's own].",
            readable=False,
        ),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of the images, or of their paths in a list.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels; in tars a field of the .json.")
    ] = None,
    encoder: Annotated[
        Literal["official", "bundled"],
        typer.Option(help="CompressAI's published weights (fetched once), or the ones shipped."),
    ] = "official",
    weights: Annotated[
        Path | None,
        typer.Option(help="A weights file instead: .pth.tar or .safetensors.", readable=False),
    ] = None,
    arch: Annotated[
        str, typer.Option(help="CompressAI zoo name.", autocompletion=choices.archs)
    ] = "bmshj2018-factorized",
    quality: Annotated[int, typer.Option(help="CompressAI quality, 1 to 8.")] = 5,
    metric: Annotated[
        Literal["mse", "ms-ssim"], typer.Option(help="What the encoder was trained for.")
    ] = "mse",
    size: Annotated[
        int, typer.Option(help="Side of the square in pixels, a multiple of 32.")
    ] = 256,
    resize_side: Annotated[
        int | None, typer.Option(help="Shorter side before the centre crop [default: size].")
    ] = None,
    interpolation: Annotated[
        Literal["bilinear", "bicubic"], typer.Option(help="Resize filter, antialiased.")
    ] = "bilinear",
    views: Annotated[
        str,
        typer.Option(
            help="Views of a training image: none, flip or crops:K.", autocompletion=choices.views
        ),
    ] = "flip",
    dtype: Annotated[
        Literal["int8", "int16", "float16", "float32"],
        typer.Option(help="int8, int16: the codec's symbols. float16, float32: y itself."),
    ] = "int8",
    step: Annotated[float, typer.Option(help="Quantisation step of the symbols.")] = 1.0,
    precision: Annotated[
        Literal["float32", "tf32", "bf16"], typer.Option(help="Arithmetic of the encoder.")
    ] = "float32",
    exif: Annotated[
        Literal["ignore", "apply"], typer.Option(help="What to do with EXIF orientation.")
    ] = "ignore",
    max_pixels: Annotated[int, typer.Option(help="Larger images count as bad.")] = 89_000_000,
    format: Annotated[
        Literal["zarr", "webdataset", "both"],
        typer.Option(help="Container of the latents: zarr shards, WebDataset tars, or both."),
    ] = "zarr",
    codec: Annotated[
        Literal["zstd", "none"], typer.Option(help="Byte compressor of the zarr chunks.")
    ] = "zstd",
    level: Annotated[int, typer.Option(help="zstd level, -100 to 22; low ones decode faster.")] = 1,
    shard_samples: Annotated[int, typer.Option(help="Images per shard.")] = 1024,
    labels: Annotated[
        Literal["auto", "none"],
        typer.Option(help="none: encode images without labels; train refuses such a cache."),
    ] = "auto",
    val_fraction: Annotated[
        float, typer.Option(help="Validation share where SRC has no split folders; 0 for none.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of row order, drawn split and crops.")] = 0,
    limit: Annotated[
        int | None, typer.Option(help="Only that many images, spread over the source.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views per encoder call [default: 8 on CPU, 256 on CUDA].")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read and decode [default: one per core].")
    ] = None,
    devices: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cpu:N (lanes), cuda, cuda:0,1.", autocompletion=choices.devices
        ),
    ] = "auto",
    max_errors: Annotated[
        str, typer.Option(help="Images that may fail: a share (at least one image) or a count.")
    ] = "0.1%",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Read images again that failed.")
    ] = False,
    rescan: Annotated[
        bool, typer.Option("--rescan", help="List SRC again and append new images.")
    ] = False,
    reencode_changed: Annotated[
        bool,
        typer.Option("--reencode-changed", help="With --rescan: encode changed images again."),
    ] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="List SRC and write the plan; encode nothing.")
    ] = False,
    shard_range: Annotated[
        str | None,
        typer.Option(
            help="Encode only part i of n of the shards, from 1/n to n/n; auto: this task's part "
            "of a Slurm array or an indexed Kubernetes job.",
            metavar="i/n",
        ),
    ] = None,
    finalise: Annotated[
        bool,
        typer.Option("--finalise", help="Complete a folder whose shards are all committed."),
    ] = False,
    executor: Annotated[
        Literal["local", "processes", "ray"],
        typer.Option(help="Who encodes: this process, one per device, or a Ray cluster."),
    ] = "local",
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
    json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
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
    from ci2p_cache.encoding.options import EncodeOptions
    from ci2p_cache.encoding.run import encode as run

    if overwrite is not None and overwrite.strip("/") != out.resolve().name:
        raise UsageError(
            f"--overwrite names {overwrite!r}, the folder is {out.resolve().name!r}",
            hint=f"--overwrite {shlex.quote(out.resolve().name)} to remove that cache first",
        )
    options = EncodeOptions(
        root=root, image_column=image_column, label_column=label_column, encoder=encoder,
        weights=weights, arch=arch, quality=quality, metric=metric, size=size,
        resize_side=resize_side, interpolation=interpolation, exif=exif, max_pixels=max_pixels,
        views=views, dtype=dtype, step=step, precision=precision, format=format,
        codec=codec, level=level, shard_samples=shard_samples, labels=labels,
        val_fraction=val_fraction, seed=seed, limit=limit, batch_size=batch_size, workers=workers,
        devices=devices, max_errors=max_errors, retry_failed=retry_failed, rescan=rescan,
        reencode_changed=reencode_changed, plan_only=plan_only, shard_range=shard_range,
        finalise=finalise, executor=executor,
    )  # fmt: skip
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
