"""Small caches, what their files hold, and ways to damage them."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import ci2p_cache as cc

__all__ = ["SMALL", "data_digests", "flip", "swap", "with_options"]

SMALL = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=4, val_fraction=0.25)


def with_options(**changes: Any) -> cc.EncodeOptions:
    return dataclasses.replace(SMALL, **changes)


def data_digests(root: Path) -> dict[str, str]:
    """sha256 of every file of a cache, commit records and manifest included."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    mine, theirs = one.read_bytes(), other.read_bytes()
    one.write_bytes(theirs)
    other.write_bytes(mine)
