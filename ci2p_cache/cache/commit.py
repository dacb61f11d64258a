"""How bytes become part of a cache: staged, synced, renamed, and vouched for by a commit record.

One shard has one writer and is written whole. Only its commit record, renamed into place last,
makes it count; whatever lies at a target path without one is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci2p_cache.errors import (
    DiskFullError,
    ManifestError,
    ResourceError,
    UsageError,
    command,
)
from ci2p_cache.record import MAX_JSON_BYTES, Record, read_regular, regular_file
from ci2p_cache.specs import FORMAT_VERSION

__all__ = [
    "CommitRecord",
    "FileRecord",
    "StagingArea",
    "commit_path",
    "disk_errors",
    "json_bytes",
    "read_commit",
    "read_sealed",
    "refuse_link",
    "remove_path",
    "sealed_bytes",
    "sha256_file",
    "sync_folder",
]

_SEAL = "sha256"
_BLANK = "0" * 64


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


def commit_path(split: str, shard: int) -> str:
    """Returns the commit record's path relative to the cache folder."""
    return f"commits/{split}-{shard:06d}.json"


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


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Serialises to UTF-8 JSON, the same bytes for the same data."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def sealed_bytes(data: Mapping[str, Any]) -> bytes:
    """Serialises to JSON that vouches for itself: its last field is the sha256 of the whole file.

    The digest is taken with the field's own 64 digits as zeros, so that a reader in any language
    can hold the file's bytes against it, and every flipped bit is noticed.
    """
    fields = {name: value for name, value in data.items() if name != _SEAL}
    head, blank, tail = json_bytes(fields | {_SEAL: _BLANK}).rpartition(_BLANK.encode())
    return head + hashlib.sha256(head + blank + tail).hexdigest().encode() + tail


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """Reads what `sealed_bytes` made.

    Returns:
        Its fields without the digest, and whether the digest fits. The caller looks at the format
        version first: another version may be sealed in another way.

    Raises:
        OSError: it cannot be read; FileNotFoundError where there is none.
        ManifestError: it is a link, too large, no JSON, nested too deeply, or no object.
    """
    raw = read_regular(path, max_bytes=MAX_JSON_BYTES)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{path} is damaged: wanted an object, got {type(data).__name__}")
    seal = data.pop(_SEAL, None)
    if not isinstance(seal, str) or not seal.isascii() or len(seal) != len(_BLANK):
        return data, False
    blank = _BLANK.encode().join(raw.rsplit(seal.encode(), 1))
    return data, hashlib.sha256(blank).hexdigest() == seal


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a regular file's bytes, 64 hex digits.

    Raises:
        OSError: it cannot be read.
        ManifestError: it is a link or no regular file.
    """
    with regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a failed write into an error with exit code 6 that says the run can be continued."""
    try:
        yield
    except ResourceError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raised: type[ResourceError] = DiskFullError if full else ResourceError
        raise raised(
            f"cannot write {path}: {error.strerror or error}. What was committed before is safe.",
            hint="make space, then run the same command again"
            if full
            else "when the disk answers again, run the same command",
        ) from error


class StagingArea:
    """A folder inside the cache where files are written before they are renamed into place.

    Opening it removes what an earlier, killed process of the same name left there; closing it
    removes the folder. The caller holds the lock that makes it the only user of that name.

    Args:
        root: The cache folder; staging lies in it because a rename must not cross file systems.
        name: Tells concurrent writers of disjoint shard ranges apart.
    """

    def __init__(self, root: Path, *, name: str = "all") -> None:
        self.root = root
        self.name = name
        self._folder = root / ".staging" / name

    def __enter__(self) -> StagingArea:
        try:
            with disk_errors(self._folder):
                if self._folder.parent.is_symlink() or not self._folder.parent.is_dir():
                    remove_path(self._folder.parent)
                remove_path(self._folder)
                self._make_folder(self._folder)
        except ResourceError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.parent.rmdir()
        except OSError:
            # Another range is still staging there.
            return

    def put(self, path: str, parts: bytes | Iterable[bytes | memoryview]) -> FileRecord:
        """Writes one file of the cache: staged, synced, renamed, its folder synced.

        Anything that lies at the target, be it a folder or a link, is replaced, and so is a file
        where a folder of the cache should be. A folder that is a link is refused: what it leads to
        is not ours.

        Args:
            path: Posix path relative to the cache folder.
            parts: The file's bytes, whole or in pieces.

        Raises:
            DiskFullError: no space is left; the staged bytes are removed.
            ResourceError: another write error.
            ManifestError: a folder on the way is a link.
        """
        target = self.root / path
        staged = self._folder / path.replace("/", "__")
        digest, size = hashlib.sha256(), 0
        with disk_errors(target):
            try:
                with staged.open("wb") as file:
                    for part in (parts,) if isinstance(parts, bytes) else parts:
                        file.write(part)
                        digest.update(part)
                        size += len(part)
                    file.flush()
                    os.fsync(file.fileno())
                self._make_folder(target.parent)
                if target.is_dir() and not target.is_symlink():
                    remove_path(target)
                staged.replace(target)
                sync_folder(target.parent)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
        return FileRecord(path=path, bytes=size, sha256=digest.hexdigest())

    def _make_folder(self, folder: Path) -> None:
        """Makes a folder below the root, and the root itself, where it is not there yet."""
        self.root.mkdir(parents=True, exist_ok=True)
        below = self.root
        for name in folder.relative_to(self.root).parts:
            below /= name
            refuse_link(below, self.root)
            if below.is_dir():
                continue
            try:
                below.mkdir()
            except FileExistsError:
                # Another range has made it meanwhile, or a file lies in its place.
                if not below.is_dir():
                    below.unlink(missing_ok=True)
                    below.mkdir(exist_ok=True)

    def put_json(self, path: str, data: Mapping[str, Any]) -> FileRecord:
        """Writes a JSON file the way `put` does."""
        return self.put(path, json_bytes(data))

    def put_sealed(self, path: str, data: Mapping[str, Any]) -> FileRecord:
        """Writes a JSON file that vouches for itself, the way `put` does."""
        return self.put(path, sealed_bytes(data))

    def scratch(self, name: str) -> Path:
        """Returns a new, empty folder that goes when the area is closed; nothing in it counts."""
        folder = self._folder / f"scratch-{name}"
        with disk_errors(folder):
            remove_path(folder)
            folder.mkdir()
        return folder

    def commit(self, record: CommitRecord) -> None:
        """Makes a shard count: its record is written last, after all files that it lists."""
        self.put_sealed(commit_path(record.split, record.shard), record.to_dict())


def refuse_link(folder: Path, root: Path) -> None:
    """Refuses a folder of a cache that is a link.

    Raises:
        ManifestError: it is one.
    """
    if folder.is_symlink():
        raise ManifestError(
            f"{folder} is a link; a cache must lie in one folder",
            hint=f"put the folder itself in its place, or move all of {root}",
        )


def remove_path(path: Path) -> None:
    """Removes whatever lies at `path`, never what a link there points to.

    Raises:
        ResourceError: it cannot be removed.
    """
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
