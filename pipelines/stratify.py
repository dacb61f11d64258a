"""Write a list of images with an exact share of each class for validation.

Command:  python pipelines/stratify.py animals10/ --out animals10.csv
          ci2p-cache encode animals10.csv --out shards/
Expect:   of a class with n images, round(0.1 n) are `val`: those with the smallest sha256 of seed
          and path. The same files give the same list, byte for byte, on every machine.

`ci2p-cache encode FOLDER` alone draws each image for itself, with a tenth as the chance: that needs
no list and moves no file when others are added, but the shares of small classes vary. The list has
to be above or beside the images, because its paths are relative to it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ci2p_cache.cli import render
from ci2p_cache.cli.ending import reported_errors
from ci2p_cache.errors import SourceError, UsageError
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.outputs import check_output, write_whole


def stratified(
    images: Path, out: Path, *, val_fraction: float, seed: int
) -> list[tuple[str, str, str]]:
    """Returns (path relative to the list's folder, class, split) of every image, sorted.

    Args:
        images: A folder with one folder per class.
        out: Where the list will be.
        val_fraction: Share of each class for validation, 0 < share < 1.
        seed: Another seed gives another split.

    Raises:
        UsageError: the share is none, or the list would not be above or beside the images.
        SourceError: there is no image, the folder has splits already, or a name is not UTF-8.
    """
    if not 0 < val_fraction < 1:
        raise UsageError(f"`--val-fraction` is {val_fraction}; 0 < share < 1 is wanted")
    root, place = images.resolve(), out.resolve().parent
    if not root.is_relative_to(place):
        raise UsageError(
            f"`--out` {out} is in {place}, which is not above {root}; paths are relative to it",
            hint=f"--out {root}.csv",
        )
    source = FolderSource(images)
    by_class: dict[str, list[str]] = defaultdict(list)
    for ref in source.scan():
        if ref.split is not None:
            raise SourceError(f"{images} has split folders already; nothing is to be drawn")
        try:
            path = ref.path.decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{ref.path!r} is no UTF-8 name, which a list cannot hold") from error
        by_class[source.classes[ref.label]].append(path)
    rows = []
    below = root.relative_to(place)
    for name, paths in by_class.items():
        ranked = sorted(paths, key=lambda path: _rank(path, seed))
        held_out = set(ranked[: round(len(ranked) * val_fraction)])
        rows += [
            ((below / path).as_posix(), name, "val" if path in held_out else "train")
            for path in paths
        ]
    return sorted(rows)


def _rank(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{path}".encode()).digest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, help="folder with one folder per class")
    parser.add_argument("--out", type=Path, required=True, help="the .csv, above the images")
    parser.add_argument("--val-fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    with reported_errors(go_on="run the same command again"):
        mark = b"path,label,split\n"
        check_output(asked.out, what="list", suffixes=(".csv",), mark=mark)
        rows = stratified(asked.images, asked.out, val_fraction=asked.val_fraction, seed=asked.seed)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows(rows)
        write_whole(asked.out, text.getvalue().encode(), what="list")
    held_out = sum(split == "val" for _, _, split in rows)
    render.line(f"{asked.out}: {len(rows) - held_out:,} train, {held_out:,} val")


if __name__ == "__main__":
    main()
