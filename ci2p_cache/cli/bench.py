"""`ci2p-cache bench`: three commands that measure this machine with the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ci2p_cache.cli import render

if TYPE_CHECKING:
    from ci2p_cache.bench.training import TrainReport

__all__ = ["bench"]

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Measure this machine with your own data: loading and training.

    \b
      ci2p-cache bench loader shards/                    batches per second out of the cache
      ci2p-cache bench train shards/ --model vitds       cached, encoder in the loop, ViT-B/16

    How fast encoding is, `ci2p-cache encode SRC --out DIR --dry-run` measures.
    """,
)


@bench.command()
def loader(
    cache: Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR", readable=False)],
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 128,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read [default: one per core].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of each repeat of each way.")] = 3.0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """How fast batches come out of a cache, in the random order of training.

    \b
      ci2p-cache bench loader shards/
      ci2p-cache bench loader shards/ --workers 8 --batch-size 512

    Each way is timed five times, in turns with the others, after a round that does not count.
    """
    from ci2p_cache.bench.loading import bench_loading

    report = bench_loading(
        cache, batch_size=batch_size, device=device, threads=workers, seconds=seconds
    )
    if json:
        render.print_json(report.to_dict())
        return
    render.print_table(
        ("what", "threads", "images/s", "slowest", "fastest", "MB/s"),
        [
            (
                row.name,
                row.threads,
                round(row.images_per_second),
                round(row.slowest),
                round(row.fastest),
                round(row.images_per_second * report.bytes_per_image / 1e6),
            )
            for row in report.rows
        ],
        title=f"batches of {report.batch_size} on {report.device}, random order",
    )
    if report.note:
        render.line(f"  {report.note}")


@bench.command()
def train(
    cache: Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR", readable=False)],
    model: Annotated[str, typer.Option(help="As for `ci2p-cache train`.")] = "vitds",
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    precision: Annotated[
        Literal["float32", "bf16"], typer.Option(help="As for `ci2p-cache train`.")
    ] = "float32",
    workers: Annotated[
        int | None, typer.Option(help="Threads that read and decode [default: one per core].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of each way, after two steps.")] = 20.0,
    encode_rate: Annotated[
        float | None,
        typer.Option(help="Images/s of `encode --dry-run`: tells when the cache has paid."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Training from the cache against its compute alone, the encoder in the loop, and ViT-B/16.

    \b
      ci2p-cache bench train shards/ --model vitds
      ci2p-cache bench train shards/ --model vit --precision bf16 --batch-size 256
      ci2p-cache bench train shards/ --encode-rate 38      and after how many epochs it has paid

    Runs the real training loop for some time in each way; nothing is written. The last two need
    the images that the cache was made of.
    """
    from ci2p_cache.bench.training import bench_training
    from ci2p_cache.training.spec import TrainSpec

    report = bench_training(
        cache,
        spec=TrainSpec(model=model, batch_size=batch_size, precision=precision),
        device=device,
        threads=workers,
        seconds=seconds,
        tell=lambda text: render.status(f"measuring {text} ..."),
    )
    if json:
        render.print_json(report.to_dict())
    else:
        _print_training(report, encode_rate)


def _print_training(report: TrainReport, encode_rate: float | None) -> None:
    cached = report.rows[0]
    render.print_table(
        ("way", "images/s", "against cached", "waiting", "utilisation", "an epoch takes"),
        [
            (
                row.name,
                f"{row.images_per_second:.1f}",
                f"{row.images_per_second / cached.images_per_second:.2f} x",
                f"{row.wait_share:.1%}",
                f"{row.utilisation:.0%}",
                render.duration(row.epoch_seconds),
            )
            for row in report.rows
        ],
        title=f"{report.model}, {report.precision}, batches of {report.batch_size} on "
        f"{report.device} (matrix products: {report.matmul_flops / 1e12:.2f} TFLOP/s)",
    )
    for text in report.missing:
        render.line(f"  not measured: {text}")
    if encode_rate is None:
        return
    seconds = cached.epoch_seconds * cached.images_per_second / encode_rate
    for row in report.rows[2:]:
        epochs = report.pays_after(seconds, row.name)
        told = "never: it is no slower"
        if epochs is not None:
            told = "within the first epoch" if epochs < 1 else f"after {epochs:.1f} epochs"
        render.line(f"  encoding ({render.duration(seconds)}) has paid against {row.name} {told}")
