"""The folder of a cache: its manifest, its checked files, and `checksums.sha256`.

::

    s3://bucket/shards --fetched when first needed, checked with its record--> mirror folder --> as
        any other cache: the same readers, the same checks

What a split is, and how its shards are read, is not known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from ci2p_cache.cache.commit import CommitRecord, FileRecord, file_problem, sha256_file
from ci2p_cache.cache.lock import ForkedLock
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import CHECKSUMS, MANIFEST, commit_path
from ci2p_cache.cache.staging import disk_errors
from ci2p_cache.errors import CacheError, IntegrityError, ManifestError, NotACacheError, command
from ci2p_cache.record import read_regular
from ci2p_cache.remote import RemoteFolder, mirrors_folder
from ci2p_cache.specs import Fingerprint

__all__ = ["CacheFolder", "Mirror", "checksums_bytes", "listed_digests"]


class CacheFolder:
    """A cache folder with the manifest that is in it.

    Args:
        path: The folder.
        mirror: What fills the folder, where it is the local copy of a remote cache.

    Raises:
        NotACacheError: the folder is missing or is no cache.
        ManifestError: `cache.json` is damaged, absurd or of another format version.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = path
        self.mirror = mirror
        self.manifest: Manifest = read_manifest(path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.manifest.classes

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for humans, in the order of `classes`."""
        return self.manifest.class_titles

    @property
    def fingerprint(self) -> Fingerprint:
        """Every field that changes a stored value."""
        return self.manifest.fingerprint

    @property
    def is_complete(self) -> bool:
        """Whether encoding has finished."""
        return self.manifest.is_complete

    @property
    def encoder_path(self) -> Path:
        """The frozen encoder that made the latents, as safetensors."""
        self.need(self.manifest.encoder.path, self.manifest.encoder)
        return self.path / self.manifest.encoder.path

    @property
    def repair_hint(self) -> str:
        """What to do where a file is not what was committed."""
        if self.mirror is not None:
            copied = shlex.quote(str(self.path))
            return f"remove the local copy and run the same command again: rm -r {copied}"
        with contextlib.suppress(CacheError):
            if read_manifest(self.path) != self.manifest:
                return "it was replaced or has grown since it was opened: open it again"
        return command("verify", self.path, "--repair")

    def need(self, path: str, record: FileRecord | None = None) -> None:
        """Fetches a file of a remote cache into the folder; does nothing for a local cache.

        Args:
            path: Its path relative to the cache folder.
            record: What was committed there, where that is known.

        Raises:
            IntegrityError: the remote file is not what was committed.
            ResourceError: the server does not answer, or the local copy cannot be written.
        """
        if self.mirror is not None:
            self.mirror.need(path, record)

    def read_committed(self, path: str, *, max_bytes: int) -> bytes:
        """Reads one of the small files that finalising wrote, checked against its digest.

        Args:
            path: Its path relative to the cache folder, as `Manifest.files` lists it.
            max_bytes: The most that is plausible.

        Raises:
            ManifestError: it is not listed, missing, larger, or not what was committed.
        """
        file = next((file for file in self.manifest.files if file.path == path), None)
        if file is None:
            raise ManifestError(f"cache.json does not list {path}")
        self.need(path, file)
        try:
            content = read_regular(self.path / path, max_bytes=max_bytes)
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror}") from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            raise ManifestError(
                f"{path} has sha256 {digest[:12]}..., {file.sha256[:12]}... was committed"
            )
        return content


def listed_digests(cache: CacheFolder) -> dict[str, str]:
    """Returns path -> sha256 of what `checksums.sha256` lists; empty where that cannot be read.

    It is the second witness: it knows a shard's files where the commit record is lost.
    """
    record = next((file for file in cache.manifest.files if file.path == CHECKSUMS), None)
    if record is None or file_problem(cache.path, record, max_read_bytes=record.bytes) is not None:
        return {}
    lines = (cache.path / CHECKSUMS).read_text("utf-8").splitlines()
    return {path: digest for digest, _, path in (line.partition("  ") for line in lines)}


def checksums_bytes(
    root: Path,
    manifest: Manifest,
    commits: Sequence[CommitRecord],
    written: Sequence[FileRecord],
) -> bytes:
    """Lists every file but `cache.json` and itself in the form that `sha256sum -c` reads."""
    files = [manifest.plan, manifest.encoder, *written]
    lines = {file.path: file.sha256 for file in files}
    for commit in commits:
        lines |= {file.path: file.sha256 for file in commit.files}
        path = commit_path(commit.split, commit.shard)
        lines[path] = sha256_file(root / path)
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(lines.items())).encode()


class Mirror:
    """A local folder that fills with the files of a remote cache; safe to use from many threads.

    A shard is fetched whole, in ranges, by the thread that reads it first; in block order eight are
    in use at a time. Several processes may share one mirror: files appear whole. It grows to what
    was read, and may be removed whenever nothing reads it.

    Args:
        url: Of the cache folder, as `remote.url_of` gives it.

    Raises:
        MissingDependencyError: the library for this kind of URL is not installed.
        NotACacheError: there is no `cache.json` below the URL.
        ResourceError: the server does not answer, or the mirror cannot be written.
    """

    def __init__(self, url: str) -> None:
        self.remote = RemoteFolder(url)
        self.path = _mirror_of(self.remote.url)
        self._locks: defaultdict[str, ForkedLock] = defaultdict(ForkedLock)
        try:
            manifest = self.remote.read(MANIFEST)
        except FileNotFoundError as error:
            raise NotACacheError(f"{self.remote} is no latent cache: it has no {MANIFEST}") from (
                error
            )
        mine = self.path / MANIFEST
        with disk_errors(self.path):
            if not mine.is_file() or mine.read_bytes() != manifest:
                # Another cache is there now: nothing that was fetched of the old one counts.
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True, exist_ok=True)
                with self._staged(mine) as staged:
                    staged.write_bytes(manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.remote.url,)

    def need(self, path: str, record: FileRecord | None = None) -> None:
        """Fetches a file as `CacheFolder.need` does; what the remote cache lacks stays missing."""
        target = self.path / path
        with self._locks[path]:
            if target.is_file() and (record is None or target.stat().st_size == record.bytes):
                return
            with contextlib.suppress(FileNotFoundError), self._staged(target) as staged:
                size, digest = self.remote.download(path, staged)
                if record is not None and (size, digest) != (record.bytes, record.sha256):
                    raise IntegrityError(
                        f"{self.remote}/{path} has {size} bytes and sha256 {digest[:12]}..., "
                        f"{record.bytes} and {record.sha256[:12]}... were committed",
                        hint="copy that file again from the folder where the cache was made",
                    )

    def need_all(self) -> None:
        """Fetches every file of the remote cache again, and removes local files that it lacks.

        Raises:
            ResourceError: the server does not answer, or the mirror cannot be written.
        """
        there = self.remote.list_files()
        with disk_errors(self.path):
            for local in sorted(self.path.rglob("*")):
                if local.is_file():
                    local.unlink()
        for path in sorted(there):
            if not {"", ".", ".."} & set(path.split("/")):
                self.need(path)

    @contextlib.contextmanager
    def _staged(self, target: Path) -> Iterator[Path]:
        """Yields a path to write to; renames it to `target` if the block raises nothing."""
        staged = self.path.parent / ".staging" / uuid4().hex
        with disk_errors(target):
            for folder in (staged.parent, target.parent):
                folder.mkdir(parents=True, exist_ok=True)
        try:
            yield staged
            with disk_errors(target):
                staged.replace(target)
        finally:
            with contextlib.suppress(OSError):
                staged.unlink()


def _mirror_of(url: str) -> Path:
    """Returns the mirror of a URL."""
    # Two servers may have a bucket of one name.
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    name = url.rstrip("/").rpartition("/")[2]
    safe = "".join(c for c in name if c.isascii() and (c.isalnum() or c in "-_"))[:40] or "cache"
    digest = hashlib.sha256(f"{server} {url}".encode()).hexdigest()
    return mirrors_folder() / f"{safe}-{digest[:16]}"
