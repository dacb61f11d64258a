"""Opening a cache: `open_cache`, and `Cache`, its manifest and its splits."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.mirror import Mirror
from ci2p_cache.cache.split import Split
from ci2p_cache.errors import IncompleteCacheError, ManifestError, UsageError, command
from ci2p_cache.record import read_regular
from ci2p_cache.remote import url_of
from ci2p_cache.specs import Fingerprint

__all__ = ["Cache", "open_cache"]


def open_cache(path: str | Path, *, partial: bool = False) -> Cache:
    """Opens a cache folder for reading.

    Args:
        path: The folder that `ci2p-cache encode --out` made, or the URL of a finished one that was
            copied: `s3://`, `gs://`, `http(s)://`. Of such a cache each file is fetched when it is
            first read, checked, and kept in a local folder (`mirror.Mirror`).
        partial: Also open one whose encoding has not finished; its committed shards can be read.
            One behind a URL is always finished.

    Raises:
        UsageError: it is a URL of a kind that is not read.
        MissingDependencyError: the library for this kind of URL is not installed.
        ResourceError: the server does not answer.
        NotACacheError: the folder is missing or is no cache.
        ManifestError: `cache.json` is damaged, absurd or of another format version, or a folder
            of the cache is a link.
        IncompleteCacheError: encoding has not finished and `partial` is false.
    """
    url = url_of(path)
    if url is not None:
        mirror = Mirror(url)
        cache = Cache(mirror.path, mirror)
        if not cache.is_complete:
            raise IncompleteCacheError(
                f"{mirror.remote} is not encoded to its end; only a finished cache can be read "
                "from there",
                hint="encode it to its end in a local folder, then copy that folder there",
            )
        return cache
    cache = Cache(Path(path))
    if not (cache.is_complete or partial):
        done = sum(len(split.committed()) for split in cache.values())
        total = sum(record.num_shards for record in cache.manifest.splits.values())
        raise IncompleteCacheError(
            f"{path} is not encoded to its end: {done} of {total} shards are committed",
            hint=command(
                "encode",
                cache.manifest.source,
                "--out",
                path,
                note="with the options that it was started with; or the `convert` that began it",
            ),
        )
    return cache


class Cache(Mapping[str, "Split"]):
    """A cache folder: a mapping from split names to `Split`, with the manifest beside it.

    Args:
        path: The folder.
        mirror: What fills the folder, where it is the local copy of a remote cache.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = path
        self.mirror = mirror
        self.manifest: Manifest = read_manifest(path)
        self._splits = {name: Split(self, name) for name in self.manifest.splits}

    def __getitem__(self, name: str) -> Split:
        if name not in self._splits:
            raise UsageError(f"{self.path} has no split {name!r}; it has {sorted(self._splits)}")
        return self._splits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __contains__(self, name: object) -> bool:
        return name in self._splits

    def __len__(self) -> int:
        return len(self._splits)

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._splits)

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
        if self.mirror is None:
            return command("verify", self.path, "--repair")
        copied = shlex.quote(str(self.path))
        return f"remove the local copy and run the same command again: rm -r {copied}"

    def need(self, path: str, record: FileRecord | None = None) -> None:
        """Sees to it that a file of the cache lies in its folder; of a local one nothing is done.

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
        """Reads one of the small files that finalising wrote, held against its digest.

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

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, splits={self.splits}, classes={len(self.classes)})"
