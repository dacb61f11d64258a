"""`ci2p-cache bench`: three commands that measure this machine with the user's own data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.cli.fields import PanelCommand, takes_options
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.training.spec import TrainSpec

if TYPE_CHECKING:
    from ci2p_cache.bench import EncodeReport, TrainReport

__all__ = ["bench"]

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    short_help="Measure this machine with your own data.",
    help="""Measure this machine with your own data: encoding, loading and training.

    \b
      ci2p-cache bench encode photos/ --encoder bundled   stage one
      ci2p-cache bench loader shards/                     reading the cache
      ci2p-cache bench train shards/ --model vitds        stage two, and others

    Nothing is kept of what they write.
    """,
)


@bench.command(cls=PanelCommand)
@takes_options(
    EncodeOptions,
    only=("encoder", "weights", "size", "views", "precision", "batch_size", "workers", "devices"),
)
def encode(
    *,
    source: Annotated[
        Path, typer.Argument(help="As for `ci2p-cache encode`.", metavar="SRC", readable=False)
    ],
    options: EncodeOptions,
    seconds: Annotated[float, typer.Option(help="That g_a alone is timed.")] = 5.0,
    json: choices.JsonOption = False,
) -> None:
    """How fast stage one is here, and what bounds it: the encoder, or decoding.

    \b
      ci2p-cache bench encode imagenet/
      ci2p-cache bench encode photos/ --encoder bundled --precision bf16
      ci2p-cache bench encode photos/ --workers 8 --batch-size 16

    A sample of the images is really encoded for some 10 s, into a temporary folder. How long all of
    them take and how much disk, `ci2p-cache encode ... --dry-run` forecasts.
    """
    from ci2p_cache.bench import bench_encoding
    from ci2p_cache.cli.watch import EncodeWatch
    from ci2p_cache.process import tune_process

    tune_process(options.devices)
    with render.ProgressLine("sample", unit="images") as line:
        report = bench_encoding(source, options, seconds=seconds, observer=EncodeWatch(line))
    if json:
        render.print_json(report.to_dict())
    else:
        _print_encoding(report)


_PARTS = {
    "whole": "all of stage one",
    "g_a": "the encoder alone",
    "decoding": "reading and decoding alone",
}


def _print_encoding(report: EncodeReport) -> None:
    whole = report.rows[0]
    render.print_table(
        ("what", "images/s", "views/s", "against all of it"),
        [
            (
                _PARTS[row.name],
                f"{row.images_per_second:,.1f}",
                f"{row.views_per_second:,.1f}",
                f"{row.images_per_second / whole.images_per_second:.2f} x",
            )
            for row in report.rows
        ],
        title=f"{report.views_per_image} views of each image, batches of {report.batch_size}, "
        f"{report.precision} on {report.device}",
    )
    render.line(
        f"  the encoder waited for images {report.waiting_share:.0%} of the time; "
        f"{render.size(report.bytes_per_image)} written per image"
    )


@bench.command(cls=PanelCommand)
def loader(
    cache: choices.CacheArgument,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 128,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read [default: one per core].")
    ] = None,
    device: choices.DeviceOption = "auto",
    seconds: Annotated[float, typer.Option(help="Of each repeat of each way.")] = 3.0,
    json: choices.JsonOption = False,
) -> None:
    """How fast batches come out of a cache, in the random order of training.

    \b
      ci2p-cache bench loader shards/
      ci2p-cache bench loader shards/ --workers 8 --batch-size 512

    Each way is timed five times, in turns with the others, after a round that does not count.
    """
    from ci2p_cache.bench import bench_loading
    from ci2p_cache.process import tune_process

    tune_process(device)
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


@bench.command(cls=PanelCommand)
@takes_options(TrainSpec, only=("model", "batch_size", "precision"))
def train(
    *,
    cache: choices.CacheArgument,
    options: TrainSpec,
    workers: Annotated[
        int | None, typer.Option(help="Threads that read and decode [default: one per core].")
    ] = None,
    device: choices.DeviceOption = "auto",
    seconds: Annotated[float, typer.Option(help="Of each way, after two steps.")] = 20.0,
    encode_rate: Annotated[
        float | None,
        typer.Option(help="Images/s of stage one [default: measured, 10 s]."),
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Training from the cache against its compute alone, the encoder in the loop, and ViT-B/16.

    \b
      ci2p-cache bench train shards/ --model vitds
      ci2p-cache bench train shards/ --model vit --precision bf16 --batch-size 256
      ci2p-cache bench train shards/ --encode-rate 38   as timed elsewhere

    Runs the real training loop for some time in each way, and encodes a sample to find after how
    many epochs the cache has paid for itself; nothing is kept. The last two ways and the sample
    need the images that the cache was made of.
    """
    from ci2p_cache.bench import bench_training
    from ci2p_cache.process import tune_process

    tune_process(device)
    report = bench_training(
        cache,
        spec=options,
        device=device,
        threads=workers,
        seconds=seconds,
        notify=lambda text: render.status(f"measuring {text} ..."),
    )
    if encode_rate is None and not report.missing:
        encode_rate = _encode_rate(cache, device)
    if json:
        epochs = {} if encode_rate is None else report.paid_after(encode_rate)
        render.print_json(
            {**report.to_dict(), "encode_images_per_second": encode_rate, "paid_after": epochs}
        )
    else:
        _print_training(report, encode_rate)


def _encode_rate(path: Path, device: str) -> float | None:
    """Measures stage one as the cache was made; None, and a notice, where that cannot be done."""
    from ci2p_cache.bench import encode_rate
    from ci2p_cache.cache.store import open_cache
    from ci2p_cache.errors import CacheError

    render.status("measuring stage one ...")
    try:
        return encode_rate(open_cache(path), device=device)
    except (CacheError, ImportError) as error:
        render.notice(f"how fast stage one is here was not measured: {error}")
        return None


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
    took = render.duration(cached.epoch_seconds * cached.images_per_second / encode_rate)
    for name, epochs in report.paid_after(encode_rate).items():
        when = "never: it is no slower"
        if epochs is not None:
            when = "within the first epoch" if epochs < 1 else f"after {epochs:.1f} epochs"
        render.line(f"  encoding ({took}) has paid against {name} {when}")
