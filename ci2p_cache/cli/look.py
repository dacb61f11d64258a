"""`ci2p-cache inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render

if TYPE_CHECKING:
    from ci2p_cache.cache.summary import CacheCard, SampleCard
    from ci2p_cache.previews import PreviewResult

__all__ = ["inspect"]

_CacheFolder = Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR", readable=False)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def inspect(
    path: _CacheFolder,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the sample or picture [default: the first].",
            autocompletion=choices.splits,
        ),
    ] = None,
    row: Annotated[int | None, typer.Option(help="Show the sample in this row.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Show the sample of this key, such as daisy/1.jpg.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Write a picture (.png, .jpg, .pdf): originals, reconstructions."),
    ] = None,
    count: Annotated[int, typer.Option(help="Samples in the picture.")] = 4,
    source: Annotated[
        Path | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show what is in the folder.")] = False,
    json: _Json = False,
) -> None:
    """Show what a cache holds: a card, one sample, or a picture of reconstructions.

    \b
      ci2p-cache inspect shards/                                 the card
      ci2p-cache inspect shards/ --key daisy/1.jpg               one sample
      ci2p-cache inspect shards/ --split val --row 7             the same, by row
      ci2p-cache inspect shards/ --picture look.png --count 6    what the latents still show
      ci2p-cache inspect shards/ --tree                          files and sizes

    Works on a cache that is still being encoded, as far as it goes. --picture replaces an earlier
    picture of its own, and no other file.
    """
    from ci2p_cache.cache.store import open_cache
    from ci2p_cache.cache.summary import describe, describe_sample, folder_tree

    cache = open_cache(path, partial=True)
    chosen = split or cache.splits[0]
    if picture is not None:
        from ci2p_cache.previews import check_picture, draw_preview

        check_picture(cache, picture)
    if row is not None or key is not None:
        sample = describe_sample(cache, chosen, row=row, key=key)
        render.print_json(sample.to_dict()) if json else _print_sample(sample)
        rows = [sample.row]
    else:
        rows = None
        if tree:
            entries = folder_tree(path)
            if json:
                render.print_json([entry.to_dict() for entry in entries])
            else:
                render.print_table(
                    ("path", "files", "shards", "size"),
                    [(e.path, e.files, e.shards, render.size(e.bytes)) for e in entries],
                )
        elif picture is None or json:
            card = describe(cache)
            render.print_json(card.to_dict()) if json else _print_card(card)
    if picture is not None:
        _print_preview(
            draw_preview(cache, picture, split=chosen, rows=rows, count=count, source=source),
            quiet=json,
        )


def _print_card(card: CacheCard) -> None:
    from ci2p_cache.cache.codecs import CODECS

    fingerprint = card.fingerprint
    encoder, latent, image = fingerprint.encoder, fingerprint.latent, fingerprint.image
    state = "complete" if card.complete else "NOT complete"
    render.heading(f"{card.path}: {card.images:,} images in {len(card.classes)} classes, {state}")
    kind = f"symbols, step {latent.step:g}" if latent.is_symbols else "continuous y"
    crop = f"shorter side {image.resize_side}, centre {image.size} px, {image.interpolation}"
    lines = {
        "shards": f"{card.committed_shards} of {card.shards} committed",
        "latents": f"{latent.dtype} ({kind}) of {latent.channels} x {latent.height} x "
        f"{latent.width}; views: {fingerprint.views}",
        "images": f"{crop}, EXIF {image.exif}, {image.decoder}",
        "encoder": f"{encoder.arch}, quality {encoder.quality}, {encoder.metric}, "
        f"{encoder.precision}; weights sha256 {encoder.weights_sha256[:16]}",
        "size": f"{render.size(card.disk_bytes)} on disk"
        + (f", {render.size(card.bytes_per_image)} per image" if card.bytes_per_image else "")
        + (f", {card.source_ratio:.2f} x the source files" if card.source_ratio else ""),
        "format": card.layout.format,
        "codec": f"{card.layout.codec}"
        + (f" level {card.layout.level}" if CODECS[card.layout.codec].has_level else ""),
        "saturated": f"{card.clipped:,} symbols",
        "bad images": f"{card.bad_images:,}" + (" (errors.parquet)" if card.bad_images else ""),
        "source": card.source,
        "fingerprint": card.fingerprint_digest[:16],
        "made by": card.software,
    }
    for name, text in lines.items():
        render.line(f"  {name:<12}{text}")
    render.line()
    render.print_table(
        ("split", "images", "bad", "views", "shards", "rows/shard", "array shape"),
        [
            (s.name, s.valid_rows, s.bad_rows, s.views, s.shards, s.shard_rows, _shape(s.shape))
            for s in card.splits
        ],
    )
    render.line()
    shown = 20
    # Titles are told where they say more: n01440764 is a tench.
    names = (
        [card.classes] if card.classes == card.class_titles else [card.classes, card.class_titles]
    )
    counts = [split.class_counts for split in card.splits]
    render.print_table(
        ("label", *("class", "title")[: len(names)], *(split.name for split in card.splits)),
        [
            (label, *(each[label] for each in (*names, *counts)))
            for label in range(min(shown, len(card.classes)))
        ],
    )
    if len(card.classes) > shown:
        render.line(f"... and {len(card.classes) - shown:,} more classes (--json lists them)")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{length:,}" for length in shape)


def _print_sample(sample: SampleCard) -> None:
    render.heading(f"{sample.split} row {sample.row}: {sample.key}")
    lines = {
        "class": f"{sample.label} {sample.class_name}"
        + (f" ({sample.class_title})" if sample.class_title != sample.class_name else ""),
        "file": sample.source_file,
        "image": f"{sample.format}, {sample.width} x {sample.height} px, {sample.mode}, EXIF "
        f"orientation {sample.exif_orientation}, {render.size(sample.source_bytes or 0)}",
        "sha256": sample.source_sha256,
        "shard": sample.shard,
        "status": sample.status + (f": {sample.error}" if sample.error else ""),
        "saturated": f"{sample.clipped} symbols",
    }
    for name, text in lines.items():
        render.line(f"  {name:<12}{text}")
    if sample.latents:
        render.line()
        render.print_table(
            ("view", "box (top, left, height, width)", "mirrored", "stored", "of raw", "min",
             "max", "mean", "zeros"),
            [
                (
                    str(number),
                    ", ".join(str(box[name]) for name in ("top", "left", "height", "width")),
                    "yes" if box["flip"] else "no",
                    render.size(latent.stored_bytes),
                    f"{latent.stored_bytes / latent.raw_bytes:.0%}",
                    f"{latent.minimum:g}",
                    f"{latent.maximum:g}",
                    f"{latent.mean:.3f}",
                    f"{latent.zero_share:.0%}",
                )
                for number, (box, latent) in enumerate(
                    zip(sample.boxes or (), sample.latents, strict=True)
                )
            ],
        )  # fmt: skip


def _print_preview(result: PreviewResult, *, quiet: bool) -> None:
    if quiet:
        return
    render.print_table(
        ("row", "key", "view", "PSNR dB", "bits/pixel", "stored"),
        [
            (
                str(sample.row),
                sample.key,
                str(view),
                "-" if psnr is None else f"{psnr:.2f}",
                "-" if bpp is None else f"{bpp:.3f}",
                render.size(stored),
            )
            for sample in result.samples
            for view, (psnr, bpp, stored) in enumerate(
                zip(
                    sample.psnr_db,
                    sample.bpp,
                    sample.stored_bytes,
                    strict=True,
                )
            )
        ],
    )
    render.line(f"written: {result.path}")
