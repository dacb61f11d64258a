"""`ci2p-cache verify`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ci2p_cache.cache.verify import Finding
    from ci2p_cache.encoding.reencode import ReencodeSummary
    from ci2p_cache.encoding.repair import RepairSummary

__all__ = ["verify"]


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
    json: choices.Json = False,
) -> None:
    """Check that every byte of a cache is what was committed, and put it back where it is not.

    \b
      ci2p-cache verify shards/                 every digest, every chunk, index against arrays
      ci2p-cache verify shards/ --quick         commit records, sizes, small files; seconds
      ci2p-cache verify shards/ --repair        encode damaged shards again, restore other files
      ci2p-cache verify shards/ --reencode 100  encode 100 random images again and compare

    Prints what is wrong and which rows it costs, and exits with code 5 if anything is, or stays
    so. --repair and --reencode read the source images.
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

        return (
            f"ci2p-cache encode {shlex.quote(read_manifest(path).source)} --out "
            f"{shlex.quote(str(path))}   (with the options that it was started with)"
        )
    return f"ci2p-cache verify {shlex.quote(str(path))} --repair"
