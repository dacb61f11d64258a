"""The record that makes a shard count: its files with their digests, and how it was computed.

How records and shards reach the disk is the staging area's business.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.paths import commit_path
from ci2p_cache.cache.sealed import read_sealed
from ci2p_cache.errors import ManifestError, UsageError, command
from ci2p_cache.record import Record, regular_file
from ci2p_cache.specs import FORMAT_VERSION

__all__ = ["CommitRecord", "FileRecord", "has_its_files", "read_commit", "sha256_file"]


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
    """crc32c of the zarr shard's index: tells two shards of one size apart without reading them."""
    files: tuple[FileRecord, ...]
    """The shard's files."""
    numerics: dict[str, str | int]
    """Device kind, batch, threads, memory format and versions: what `--repair` replays."""


def read_commit(root: Path, split: str, shard: int) -> CommitRecord | None:
    """Returns the commit record of a shard, or None where none was written.

    Raises:
        ManifestError: the record is damaged or speaks of another shard.
    """
    path = root / commit_path(split, shard)
    hint = command("verify", root, "--repair")
    try:
        data, intact = read_sealed(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}", hint=hint) from error
    except ManifestError as error:
        raise ManifestError(str(error), hint=hint) from error
    if not intact:
        raise ManifestError(f"{path} is damaged: its own sha256 does not fit it", hint=hint)
    try:
        record = CommitRecord.from_dict(data)
    except ManifestError as error:
        raise ManifestError(f"{path} is damaged: {error}", hint=hint) from error
    if (record.split, record.shard) != (split, shard):
        raise ManifestError(f"{path} speaks of {record.split} shard {record.shard}", hint=hint)
    return record


def has_its_files(root: Path, commit: CommitRecord) -> bool:
    """Whether the files of a shard are there with the sizes that they were committed with."""
    for file in commit.files:
        path = root / file.path
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file.bytes:
            return False
    return True


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a regular file's bytes, 64 hex digits.

    Raises:
        OSError: it cannot be read.
        ManifestError: it is a link or no regular file.
    """
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
