"""`ci2p-cache convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ci2p_cache.cli import choices, render

__all__ = ["convert"]


def convert(
    path: Annotated[Path, typer.Argument(help="Cache folder; only read.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="New folder, beside the cache.", metavar="NEW")],
    format: Annotated[
        Literal["zarr", "webdataset", "both", "npy"],
        typer.Option(help="What to write: a cache of that format, or plain .npy and parquet."),
    ],
    codec: Annotated[
        Literal["zstd", "none"] | None,
        typer.Option(help="Byte compressor of zarr chunks [default: as in DIR]."),
    ] = None,
    level: Annotated[
        int | None, typer.Option(help="zstd level, -100 to 22 [default: as in DIR].")
    ] = None,
    json: choices.Json = False,
) -> None:
    """Write the latents of a cache in another format, without encoding again.

    \b
      ci2p-cache convert shards/ --out tars/ --format webdataset     for webdataset readers
      ci2p-cache convert shards/ --out fast/ --format zarr --codec none     to read at RAM speed
      ci2p-cache convert tars/ --out shards/ --format zarr           and back, to the same bytes
      ci2p-cache convert shards/ --out arrays/ --format npy          SPLIT.npy, SPLIT.parquet

    Every value is verified on the way; rows, values and fingerprint stay the same. Needs neither
    the images nor the encoder. Run it again to continue after an interruption; npy starts again.
    """
    from ci2p_cache.encoding.convert.run import convert as run

    with render.ProgressLine("convert", unit="shards") as bar:
        summary = run(path, out, format=format, codec=codec, level=level, on_shard=bar.update)
    if json:
        render.print_json(summary.to_dict())
        return
    render.heading(f"{summary.path}: {summary.images:,} images as {summary.format}, complete")
    done = "nothing: it was complete already"
    if summary.converted_now:
        done = (
            f"{summary.converted_now:,} of {summary.shards:,} shards in "
            f"{render.duration(summary.seconds)}"
        )
    render.line(f"  converted now {done}")
    before = render.size(summary.source_bytes)
    render.line(f"  size          {render.size(summary.bytes)}; {before} in {path}")
