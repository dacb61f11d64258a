"""What can be wrong with a cache: a `Finding`, and what is wrong with one file of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.commit import FileRecord, sha256_file
from ci2p_cache.errors import IntegrityError
from ci2p_cache.record import Record

__all__ = ["Finding", "FindingKind", "file_problem"]

_SMALL_BYTES = 4 * 2**20
"""Files up to this size have their digest checked even by a quick verify."""

FindingKind = Literal["missing", "damaged", "foreign", "unfinished", "differs"]
"""missing, damaged: a file that was committed. foreign: a file that no record lists. unfinished:
encoding has not ended. differs: encoding again gives other values than those stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(Record):
    """One thing that is wrong."""

    path: str
    """The file it is about, relative to the cache folder."""
    kind: FindingKind
    """What sort of thing."""
    problem: str
    """What is wrong with it."""
    split: str | None = None
    """The split that loses rows by it, if one does."""
    shard: int | None = None
    """The shard."""
    last_shard: int | None = None
    """The last one of a range of shards of which nothing is there; None where it is one."""
    first_row: int | None = None
    """First row that is lost."""
    last_row: int | None = None
    """Last row that is lost."""


def file_problem(root: Path, file: FileRecord, *, quick: bool) -> tuple[FindingKind, str] | None:
    """Says what is wrong with one file, None where nothing is.

    Args:
        root: The cache folder.
        file: What was committed.
        quick: Leave files of more than 4 MiB unread.
    """
    path = root / file.path
    try:
        if path.is_symlink() or not path.is_file():
            if not path.exists() and not path.is_symlink():
                return "missing", "it is missing"
            return "damaged", "it is no regular file"
        size = path.stat().st_size
        if size != file.bytes:
            return "damaged", f"it has {size} bytes, {file.bytes} were committed"
        if quick and size > _SMALL_BYTES:
            return None
        digest = sha256_file(path)
    except (OSError, IntegrityError) as error:
        return "damaged", f"it cannot be read: {error}"
    if digest != file.sha256:
        return "damaged", f"its sha256 is {digest[:12]}..., {file.sha256[:12]}... was committed"
    return None
