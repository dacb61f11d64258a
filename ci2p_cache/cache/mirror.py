"""A finished cache behind a URL: what is read of it is kept in a local folder, file by file.

::

    s3://bucket/shards --fetched when first needed, held against its record--> mirror folder --> as
        any other cache: the same readers, the same checks

A shard is fetched whole, in ranges, by the thread that reads it first; in block order eight are in
use at a time. The mirror grows to what was read and may be removed whenever nothing reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.open_shards import ForkedLock
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import disk_errors
from ci2p_cache.errors import IntegrityError, NotACacheError
from ci2p_cache.remote import RemoteFolder, mirrors_folder

__all__ = ["Mirror"]


class Mirror:
    """A local folder that fills with the files of a remote cache; safe to use from many threads.

    Several processes may share one: files appear whole.

    Args:
        url: Of the cache folder, as `remote.url_of` gives it.

    Raises:
        MissingDependencyError: the library for this kind of URL is not installed.
        NotACacheError: there is no `cache.json` below the URL.
        ResourceError: the server does not answer, or the mirror cannot be written.
    """

    def __init__(self, url: str) -> None:
        self.remote = RemoteFolder(url)
        self.path = _folder(self.remote.url)
        self._locks: defaultdict[str, ForkedLock] = defaultdict(ForkedLock)
        try:
            manifest = self.remote.read(MANIFEST)
        except FileNotFoundError as error:
            raise NotACacheError(f"{self.remote} is no latent cache: it has no {MANIFEST}") from (
                error
            )
        with disk_errors(self.path):
            mine = self.path / MANIFEST
            if not mine.is_file() or mine.read_bytes() != manifest:
                # Another cache is there now: nothing that was fetched of the old one counts.
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True, exist_ok=True)
                staged = self._staged()
                staged.write_bytes(manifest)
                staged.replace(mine)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.remote.url,)

    def need(self, path: str, record: FileRecord | None = None) -> None:
        """Fetches a file if it is not there yet; one that the remote cache lacks stays away.

        Args:
            path: Relative to the cache folder.
            record: What was committed at that path; a file that differs is never put in place.

        Raises:
            IntegrityError: the remote file is not what was committed.
            ResourceError: the server does not answer, or the mirror cannot be written.
        """
        target = self.path / path
        with self._locks[path]:
            if target.is_file() and (record is None or target.stat().st_size == record.bytes):
                return
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                staged = self._staged()
            try:
                size, digest = self.remote.download(path, staged)
                if record is not None and (size, digest) != (record.bytes, record.sha256):
                    raise IntegrityError(
                        f"{self.remote}/{path} has {size} bytes and sha256 {digest[:12]}..., "
                        f"{record.bytes} and {record.sha256[:12]}... were committed",
                        hint="copy that file again from the folder where the cache was made",
                    )
                with disk_errors(target):
                    staged.replace(target)
            except FileNotFoundError:
                return
            finally:
                with contextlib.suppress(OSError):
                    staged.unlink()

    def need_all(self) -> None:
        """Fetches every file of the remote cache anew, as it is, and removes what it has not.

        Raises:
            ResourceError: the server does not answer, or the mirror cannot be written.
        """
        there = {path for path in self.remote.list_files() if _stays_inside(path)}
        with disk_errors(self.path):
            for local in sorted(self.path.rglob("*")):
                if local.is_file():
                    local.unlink()
        for path in sorted(there):
            self.need(path)

    def _staged(self) -> Path:
        folder = self.path.parent / ".staging"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / uuid4().hex


def _stays_inside(path: str) -> bool:
    return not {"", ".", ".."} & set(path.split("/"))


def _folder(url: str) -> Path:
    """Returns the mirror of a URL."""
    # Two servers may have a bucket of one name.
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = url.rstrip("/").rpartition("/")[2]
    safe = "".join(c for c in name if c.isascii() and (c.isalnum() or c in "-_"))[:40]
    return (
        mirrors_folder()
        / f"{safe or 'cache'}-{hashlib.sha256(f'{server} {url}'.encode()).hexdigest()[:16]}"
    )
