"""How bytes reach a cache: staged, synced, renamed into place. Their content plays no part here.

One shard has one writer and is written whole. Only its commit record, renamed into place last,
makes it count; whatever is at a target path without one is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ci2p_cache.cache.commit import CommitRecord, FileRecord
from ci2p_cache.cache.paths import commit_path
from ci2p_cache.errors import DiskFullError, LockedError, ManifestError, ResourceError
from ci2p_cache.record import json_bytes, sealed_bytes

__all__ = [
    "StagingArea", "disk_errors", "refuse_link", "remove_path", "remove_staged", "sync_folder",
]  # fmt: skip


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

    Opening it removes what earlier holders of that name staged; closing it removes the folder. The
    caller holds the lock that makes it the only user of the name. Each area has a folder of its
    own: a process whose lock was taken over while it was suspended finds its folder gone.

    Args:
        root: The cache folder; staging is in it because a rename must not cross file systems.
        name: Distinguishes concurrent writers of disjoint shard ranges.
    """

    def __init__(self, root: Path, *, name: str = "all") -> None:
        self.root = root
        self.name = name
        self._folder = root / ".staging" / f"{name}-{secrets.token_hex(4)}"

    def __enter__(self) -> StagingArea:
        try:
            with disk_errors(self._folder):
                if self._folder.parent.is_symlink() or not self._folder.parent.is_dir():
                    remove_path(self._folder.parent)
                remove_staged(self.root, self.name)
                self._make_folder(self._folder)
        except ResourceError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        # Another range may still be staging there.
        with suppress(OSError):
            self._folder.parent.rmdir()

    def put(self, path: str, parts: bytes | Iterable[bytes | memoryview]) -> FileRecord:
        """Writes one file of the cache: staged, synced, renamed, its folder synced.

        Anything that is at the target, be it a folder or a link, is replaced, and so is a file
        where a folder of the cache should be. A folder that is a link is refused: what it leads to
        is not ours.

        Raises:
            DiskFullError: no space is left; the staged bytes are removed.
            ResourceError: another write error.
            ManifestError: a folder on the way is a link.
            LockedError: the staging folder is gone, so another process has taken over.
        """
        target = self.root / path
        staged = self._folder / path.replace("/", "__")
        digest, size = hashlib.sha256(), 0
        with self._held(target):
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

    @contextmanager
    def _held(self, target: Path) -> Iterator[None]:
        """Raises what a failed write means: that it may be continued, or is another's by now."""
        with disk_errors(target):
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                raise LockedError(
                    f"another process took over {self.root}, or removed its .staging, while this "
                    f"one was suspended; {target.relative_to(self.root)} was not written",
                    hint="if no other process works there, run the same command again",
                ) from error

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
                # Another range has made it meanwhile, or a file is in its place.
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
        """Returns a new, empty folder, which is removed when the area is closed.

        Raises:
            LockedError: as `put` has it.
            ResourceError: as `put` has it.
        """
        folder = self._folder / f"scratch-{name}"
        with self._held(folder):
            remove_path(folder)
            folder.mkdir()
        return folder

    def remove(self, path: str) -> None:
        """Removes a file or a folder, unless the staging folder is gone: it is moved there first.

        Raises:
            LockedError: as `put` has it.
            ResourceError: it cannot be removed.
        """
        away = self._folder / "removed"
        remove_path(away)
        with self._held(self.root / path):
            (self.root / path).rename(away)
        remove_path(away)

    def put_folder(self, scratch: Path, path: str) -> None:
        """Renames a scratch folder, whose files were put, into place; what is there is replaced.

        Raises:
            LockedError: as `put` has it.
            ResourceError: as `put` has it.
        """
        target = self.root / path
        if os.path.lexists(target):
            self.remove(path)
        with self._held(target):
            self._make_folder(target.parent)
            scratch.rename(target)
            sync_folder(target.parent)

    def commit(self, record: CommitRecord) -> None:
        """Makes a shard count: its record is written last, after all files that it lists."""
        self.put_sealed(commit_path(record.split, record.shard), record.to_dict())


def refuse_link(folder: Path, root: Path) -> None:
    """Refuses a folder of a cache that is a link, with a ManifestError."""
    if folder.is_symlink():
        raise ManifestError(
            f"{folder} is a link; a cache must be in one folder",
            hint=f"put the folder itself in its place, or move all of {root}",
        )


def remove_staged(root: Path, name: str) -> None:
    """Removes what was staged under a name, by whichever process."""
    for path in (root / ".staging").glob(f"{name}*"):
        if path.name == name or path.name.startswith(f"{name}-"):
            remove_path(path)


def remove_path(path: Path) -> None:
    """Removes whatever is at `path`, never what a link there points to."""
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
