"""`ci2p-cache status`, `verify`, `inspect` and `convert`: commands about a cache that is there."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import IntegrityError, UsageError, command

__all__ = ["convert", "inspect", "status", "verify"]
from ci2p_cache.specs import CodecName

if TYPE_CHECKING:
    from ci2p_cache.cache.manifest import Manifest
    from ci2p_cache.cache.survey import CacheStatus


def status(
    path: Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR")],
    json: choices.JsonOption = False,
) -> None:
    """Show how far encoding is, which processes work on it, and which commands do the rest.

    \b
      ci2p-cache status shards/           shards, hosts at work, commands to run
      ci2p-cache status shards/ --json    the same for a script

    It reads records and file sizes, in seconds, even while others write; `verify` reads every byte.
    The exit code is 0 if cache.json can be read.
    """
    from ci2p_cache.cache.growth import growth_of
    from ci2p_cache.cache.manifest import read_manifest
    from ci2p_cache.cache.survey import status as look

    found = look(path)
    if json:
        render.print_json({**found.to_dict(), "share": found.share})
        return
    _print_status(found, read_manifest(growth_of(path) or path))


def _print_status(found: CacheStatus, manifest: Manifest) -> None:
    state = "DAMAGED" if found.missing else "complete"
    state = state if found.complete else "not complete"
    render.heading(f"{found.path}: {found.share:.1%} of {found.rows:,} images committed, {state}")
    render.line(
        f"  shards        {found.committed:,} of {found.shards:,} committed, "
        f"{render.size(found.bytes)}"
    )
    render.line(f"  bad images    {found.bad:,}")
    if found.growing:
        render.line("  growing       the cache that is there stays in use until all is committed")
    if found.missing:
        render.line(f"  missing       {found.missing}")
    if found.working:
        render.print_table(
            ("at work", "host", "process", "committed"),
            [
                (
                    f"range {each.shard_range}" if each.shard_range else each.what or "a run",
                    each.host or "unknown",
                    str(each.pid or "unknown"),
                    f"{each.committed:,} of {each.shards:,} shards",
                )
                for each in found.working
            ],
        )
    for text in found.damaged:
        render.line(f"  damaged: {text}")
    if found.num_damaged > len(found.damaged):
        render.line(f"  damaged: {found.num_damaged - len(found.damaged):,} more")
    _print_next(found, manifest)


def _print_next(found: CacheStatus, manifest: Manifest) -> None:
    """Prints which ranges are missing, and who works on which."""
    encode = ("encode", found.source, "--out", found.path, *_encode_words(manifest))
    if found.complete and not found.missing:
        training = ("train", found.path, "--model", "vitds")
        following = training if manifest.classes else ("inspect", found.path)
        render.line(f"next: {command(*following)}")
        return
    if found.complete:
        render.line(f"next: {command('verify', found.path, '--repair')}")
        return
    if found.committed == found.shards:
        if not found.working:
            render.line(f"next: {command(*encode, '--finalise')}")
        return
    if not found.retry:
        render.line("next: nothing; the last run to end completes the cache")
        return
    render.line("not in work; give each to a machine, or leave out --shard-range:")
    for part in found.retry:
        render.line(f"  {command(*encode, '--shard-range', part)}")
    if found.num_retry > len(found.retry):
        render.line(f"  and {found.num_retry - len(found.retry):,} more ranges")
    render.notice("add --encoder, --weights and other options that are not in cache.json as before")


def _encode_words(manifest: Manifest) -> list[str]:
    """Returns the options that bind the folder and differ from their defaults."""
    from ci2p_cache.encoding.options import EncodeOptions

    default, made = EncodeOptions(), EncodeOptions.of(manifest)
    words: list[str] = []
    for each in fields(EncodeOptions):
        value = getattr(made, each.name)
        if value != getattr(default, each.name):
            words.append(f"--{each.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return words


if TYPE_CHECKING:
    from collections.abc import Sequence

    from ci2p_cache.cache.verify import Finding
    from ci2p_cache.encoding.reencode import ReencodeSummary
    from ci2p_cache.encoding.repair import RepairSummary


def verify(
    path: Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Records, sizes and small files only.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put back what is damaged, to the same bytes.")
    ] = False,
    reencode: Annotated[
        int | None,
        typer.Option(help="Also encode that many random images again and compare.", metavar="N"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --reencode's draw.")] = 0,
    source: Annotated[
        Path | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="For --repair: restore a damaged encoder from this weights file."),
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Check that every byte of a cache is as committed, and repair what is not.

    \b
      ci2p-cache verify shards/                 every digest and every chunk
      ci2p-cache verify shards/ --quick         records and sizes, in seconds
      ci2p-cache verify shards/ --repair        put back what is damaged
      ci2p-cache verify shards/ --reencode 100  compare 100 images encoded again

    Prints what is damaged and which rows are lost. Exit code 5: there is damage, or some is left
    after --repair. --repair and --reencode read the source images.
    """
    if quick and repair:
        raise UsageError("--repair checks every byte", hint="leave out --quick")
    if weights is not None and not repair:
        raise UsageError("--weights is only for --repair")
    result: dict[str, Any] = {}
    if repair:
        repaired = _repair(path, source, weights)
        result["repair"], findings = repaired.to_dict(), list(repaired.remaining)
        if not json:
            _print_repair(repaired)
    else:
        from ci2p_cache.cache.verify import verify as run

        with render.ProgressLine("verify", unit="shards") as bar:
            findings = run(path, quick=quick, on_shard=bar.update)
    if reencode is not None:
        again = _reencode(path, reencode, seed, source)
        result["reencode"] = again.to_dict()
        findings += again.findings
        if not json:
            _print_reencode(again)
    if json:
        shown = [finding.to_dict() for finding in findings]
        render.print_json({"findings": shown, **result} if result else shown)
    elif findings:
        _print_findings(findings)
    elif not repair:
        how = "records, sizes and small files are" if quick else "every byte is"
        render.line(f"{path}: {how} as committed")
    if findings:
        raise IntegrityError(f"{len(findings)} findings in {path}", hint=_hint(path, findings))


def _repair(path: Path, source: Path | None, weights: Path | None) -> RepairSummary:
    from ci2p_cache.cli.watch import EncodeWatch
    from ci2p_cache.encoding.repair import repair
    from ci2p_cache.process import tune_process

    tune_process()
    with render.ProgressLine("repair", unit="steps") as bar:
        return repair(
            path, source=source, weights=weights, observer=EncodeWatch(bar), on_shard=bar.update
        )


def _reencode(path: Path, count: int, seed: int, source: Path | None) -> ReencodeSummary:
    from ci2p_cache.encoding.reencode import reencode
    from ci2p_cache.process import tune_process

    tune_process()
    with render.ProgressLine("encode again", unit="images") as bar:
        return reencode(path, count, seed=seed, source=source, on_row=bar.update)


def _print_repair(summary: RepairSummary) -> None:
    if not summary.found:
        render.line(f"{summary.path}: every byte is as committed, nothing to repair")
        return
    found = {finding.path: finding for finding in summary.found}
    render.print_table(
        ("file", "was", "now"),
        [
            (
                path,
                found[path].problem if path in found else "rewritten with its shard",
                "repaired" if path in summary.repaired else "as it was",
            )
            for path in sorted({*found, *summary.repaired})
        ],
    )
    same = (
        "every byte is as first committed"
        if summary.identical
        else "the bytes are not known to be those first committed (see the notes above)"
    )
    render.line(
        f"{summary.path}: {len(summary.repaired)} files repaired, {summary.shards} shards "
        f"({summary.images:,} images) encoded again; {same}"
    )


def _print_reencode(summary: ReencodeSummary) -> None:
    render.line(
        f"encoded again: {summary.compared:,} of {summary.rows:,} images; "
        f"{summary.differing_values:,} of {summary.values:,} values differ"
        + (f", at most by {summary.largest_difference:g}" if summary.differing_values else "")
    )
    if summary.other_software:
        render.line(
            f"  {summary.other_software:,} of them were first encoded by other software or on "
            "another kind of device, where a few values may differ"
        )
    for name in summary.changed:
        render.line(f"  not compared: {name}")


def _print_findings(findings: Sequence[Finding]) -> None:
    render.print_table(
        ("file", "kind", "rows lost", "problem"),
        [
            (
                finding.path,
                finding.kind,
                ""
                if finding.first_row is None
                else f"{finding.split} {finding.first_row}-{finding.last_row}",
                finding.problem,
            )
            for finding in findings
        ],
    )


def _hint(path: Path, findings: Sequence[Finding]) -> str:
    """Returns the command that gets on: encode, repair, or removing what is not ours."""
    kinds = {finding.kind for finding in findings}
    if kinds == {"foreign"}:
        return shlex.join(["rm", *(str(path / finding.path) for finding in findings)])
    if kinds == {"unfinished"}:
        from ci2p_cache.cache.manifest import read_manifest

        note = "with the options that it was started with"
        return command("encode", read_manifest(path).source, "--out", path, note=note)
    return command("verify", path, "--repair")


if TYPE_CHECKING:
    from ci2p_cache.cache.summary import CacheCard, SampleCard
    from ci2p_cache.pictures.previews import PreviewResult


def inspect(
    path: choices.CacheArgument,
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
    count: Annotated[
        int | None, typer.Option(help="Samples in the picture [default: one per class].")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show what is in the folder.")] = False,
    json: choices.JsonOption = False,
) -> None:
    """Show what a cache holds: a card, one sample, or a picture of reconstructions.

    \b
      ci2p-cache inspect shards/                       the card
      ci2p-cache inspect shards/ --key daisy/1.jpg     one sample
      ci2p-cache inspect shards/ --split val --row 7   the same, by row
      ci2p-cache inspect shards/ --picture look.png    reconstructions
      ci2p-cache inspect shards/ --tree                files and sizes

    Works on an unfinished cache too. --picture replaces only an earlier picture of this command.
    """
    from ci2p_cache.cache.store import open_cache
    from ci2p_cache.cache.summary import describe, describe_sample, folder_tree

    cache = open_cache(path, partial=True)
    chosen = split or cache.splits[0]
    if picture is not None:
        from ci2p_cache.pictures.previews import check_picture, draw_preview

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
    fingerprint = card.fingerprint
    encoder, latent, image = fingerprint.encoder, fingerprint.latent, fingerprint.image
    state = "complete" if card.complete else "NOT complete"
    render.heading(f"{card.path}: {card.images:,} images in {len(card.classes)} classes, {state}")
    kind = f"symbols, step {latent.step:g}" if latent.is_symbols else "continuous y"
    crop = f"shorter side {image.resize_side}, centre {image.size} px, {image.interpolation}"
    lines = {
        "shards": f"{card.committed_shards} of {card.shards} committed",
        "latents": f"{latent.dtype} ({kind}) of {latent.channels} x {latent.height} x "
        f"{latent.width}; views: {fingerprint.views.words}",
        "images": f"{crop}, EXIF {image.exif}, {image.decoder}",
        "encoder": f"{encoder.arch}, quality {encoder.quality}, {encoder.metric}, "
        f"{encoder.precision}; weights sha256 {encoder.weights_sha256[:16]}",
        "size": ", ".join([f"{render.size(card.disk_bytes)} on disk", *card.size_words]),
        "format": card.layout.format,
        "codec": card.layout.codec_words,
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
    # Titles are shown where they say more: n01440764 is a tench.
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


def convert(
    path: Annotated[Path, typer.Argument(help="Cache folder; only read.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="New folder, beside the cache.", metavar="NEW")],
    format: Annotated[
        Literal["zarr", "webdataset", "both", "npy"],
        typer.Option(help="What to write: a cache of that format, or plain .npy and parquet."),
    ],
    codec: Annotated[
        CodecName | None, typer.Option(help="Compressor of zarr chunks [default: as in DIR].")
    ] = None,
    level: Annotated[
        int | None, typer.Option(help="Level, 1 to 9 [default: as in DIR, or the codec's own].")
    ] = None,
    fold: Annotated[
        bool | None, typer.Option(help="Fold symbols, for fewer bytes [default: as in DIR].")
    ] = None,
    json: choices.JsonOption = False,
) -> None:
    """Write the latents of a cache in another format, without encoding again.

    \b
      ci2p-cache convert shards/ --out tars/ --format webdataset
      ci2p-cache convert shards/ --out fast/ --format zarr --codec lz4
      ci2p-cache convert shards/ --out small/ --format zarr --fold
      ci2p-cache convert tars/ --out shards/ --format zarr    the same bytes again
      ci2p-cache convert shards/ --out arrays/ --format npy   SPLIT.npy, .parquet

    Every value is verified on the way; rows, values and fingerprint stay the same. Needs neither
    the images nor the encoder. Run it again to continue after an interruption; npy starts again.
    """
    from ci2p_cache.encoding.convert import convert as run

    with render.ProgressLine("convert", unit="shards") as bar:
        made = run(
            path, out, format=format, codec=codec, level=level, fold=fold, on_shard=bar.update
        )
    if json:
        render.print_json(made.to_dict())
        return
    render.heading(f"{made.path}: {made.images:,} images as {made.format}, complete")
    done = "nothing: it was complete already"
    if made.converted_now:
        spent = render.duration(made.seconds)
        done = f"{made.converted_now:,} of {made.shards:,} shards in {spent}"
    render.line(f"  converted now {done}")
    before = render.size(made.source_bytes)
    render.line(f"  size          {render.size(made.bytes)}; {before} in {path}")
