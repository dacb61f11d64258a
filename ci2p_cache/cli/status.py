"""`ci2p-cache status`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import command

if TYPE_CHECKING:
    from ci2p_cache.cache.manifest import Manifest
    from ci2p_cache.cache.survey import CacheStatus

__all__ = ["status"]


def status(
    path: Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR")],
    json: choices.Json = False,
) -> None:
    """Say how far encoding is, who works on it now, and which commands do the rest.

    \b
      ci2p-cache status shards/           shards done and missing, hosts at work, retry commands
      ci2p-cache status shards/ --json    the same for a script

    It reads records and file sizes, in seconds, while others write; `verify` reads every byte. The
    exit code is 0 whatever it finds in a cache folder whose cache.json can be read.
    """
    from ci2p_cache.cache.growth import growth_of
    from ci2p_cache.cache.manifest import read_manifest
    from ci2p_cache.cache.survey import status as look

    found = look(path)
    if json:
        data = {**found.to_dict(), "share": found.share}
        render.print_json(data)
        return
    _print(found, read_manifest(growth_of(path) or path))


def _print(found: CacheStatus, manifest: Manifest) -> None:
    state = "complete" if found.complete else "not complete"
    if found.complete and found.missing:
        state = "DAMAGED"
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
    """Prints what is to be done by whom."""
    encode = ("encode", found.source, "--out", found.path, *_options(manifest))
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
        render.line("next: nothing; whoever ends last completes the cache")
        return
    render.line("no one works on these; give each to a machine, or leave out --shard-range:")
    for part in found.retry:
        render.line(f"  {command(*encode, '--shard-range', part)}")
    if found.num_retry > len(found.retry):
        render.line(f"  and {found.num_retry - len(found.retry):,} more ranges")
    render.notice("add --encoder, --weights and other options that are not in cache.json as before")


def _options(manifest: Manifest) -> list[str]:
    """Returns the options that bind the folder and differ from their defaults."""
    from ci2p_cache.encoding.options import EncodeOptions

    default, made = EncodeOptions(), EncodeOptions.of(manifest)
    words: list[str] = []
    for each in fields(EncodeOptions):
        value = getattr(made, each.name)
        if value != getattr(default, each.name):
            words += [f"--{each.name.replace('_', '-')}", str(value)]
    return words
