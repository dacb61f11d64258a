"""The record that makes a shard count: its files with their digests, and how it was computed.

How records and shards reach the disk is the staging area's business.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.paths import commit_path, shard_of
from ci2p_cache.errors import IntegrityError, ManifestError, ShardError, UsageError, command
from ci2p_cache.record import Record, read_sealed, regular_file, unsealed
from ci2p_cache.specs import FORMAT_VERSION

__all__ = [
    "CommitRecord", "FileRecord", "file_problem", "has_its_files", "listed_commits", "read_commit",
    "sha256_file",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord(Record):
    """One file as it was committed."""

    path: str
    """Posix path relative to the cache folder."""
    bytes: int
    """Size."""
    sha256: str
    """Digest of the whole file, 64 hex digits."""

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if self.path.startswith("/") or "\\" in self.path or {"", ".", ".."} & set(parts):
            raise UsageError(f"file path {self.path!r} would leave the cache folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class CommitRecord(Record):
    """What one committed shard holds and how it was computed."""

    format_version: int = FORMAT_VERSION
    """Version of the disk format."""
    split: str
    """Name of the split."""
    shard: int
    """Number of the shard within the split."""
    first_row: int
    """Its first row."""
    rows: int
    """Number of rows planned for it."""
    valid_rows: int
    """Rows that hold a latent."""
    plan_sha256: str
    """Digest of the shard's rows of the plan; a changed plan makes the shard stale."""
    fingerprint: str
    """Digest of the fingerprint."""
    index_crc32c: int
    """crc32c of the zarr shard's index: two shards of one size differ in it."""
    files: tuple[FileRecord, ...]
    """The shard's files."""
    numerics: dict[str, str | int]
    """Device kind, batch, threads, memory format and versions: what `--repair` replays."""

    def file(self, path: str) -> FileRecord:
        """Returns the record of one of its files; ShardError where it does not list that path."""
        for file in self.files:
            if file.path == path:
                return file
        raise ShardError(f"its commit record does not list {path}")


def read_commit(root: Path, split: str, shard: int) -> CommitRecord | None:
    """Returns the commit record of a shard, None where none was written.

    Raises:
        ManifestError: the record is damaged or speaks of another shard.
    """
    path, hint = root / commit_path(split, shard), command("verify", root, "--repair")
    try:
        data, intact = read_sealed(path)
        record = unsealed(CommitRecord, data, path, intact=intact)
    except FileNotFoundError:
        return None
    except (OSError, ManifestError) as error:
        reason = f"{path} cannot be read: {error}" if isinstance(error, OSError) else str(error)
        raise ManifestError(reason, hint=hint) from error
    if (record.split, record.shard) != (split, shard):
        raise ManifestError(f"{path} speaks of {record.split} shard {record.shard}", hint=hint)
    return record


def listed_commits(root: Path) -> list[tuple[str, int]]:
    """Returns (split, shard) of every commit record in the folder, in order.

    Listed, because asking for each shard would take as long as the manifest says there are.
    """
    try:
        names = os.listdir(root / "commits")  # noqa: PTH208
    except OSError:
        return []
    found = (shard_of(f"commits/{name}") for name in names)
    return sorted(shard_id for shard_id in found if shard_id is not None)


def has_its_files(root: Path, commit: CommitRecord) -> bool:
    """Whether the files of a shard are there with the sizes that they were committed with."""
    for file in commit.files:
        path = root / file.path
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
            return False
    return True


def file_problem(
    root: Path, file: FileRecord, *, max_read_bytes: float
) -> tuple[Literal["missing", "damaged"], str] | None:
    """Says what is wrong with one file, None where nothing is.

    Its digest is checked if it has at most `max_read_bytes`.
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
        if size > max_read_bytes:
            return None
        digest = sha256_file(path)
    except (OSError, IntegrityError) as error:
        return "damaged", f"it cannot be read: {error}"
    if digest != file.sha256:
        return "damaged", f"its sha256 is {digest[:12]}..., {file.sha256[:12]}... was committed"
    return None


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a regular file, 64 hex digits; raises what `regular_file` does."""
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
