"""The folder of a cache: its manifest, and its files, fetched where it is a copy, and checked.

What a split is, and how its shards are read, is not known here.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.mirror import Mirror
from ci2p_cache.errors import CacheError, ManifestError, command
from ci2p_cache.record import read_regular
from ci2p_cache.specs import Fingerprint

__all__ = ["CacheFolder"]


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
        if self.mirror is None:
            if self._is_replaced():
                return "it was replaced or has grown since it was opened: open it again"
            return command("verify", self.path, "--repair")
        copied = shlex.quote(str(self.path))
        return f"remove the local copy and run the same command again: rm -r {copied}"

    def _is_replaced(self) -> bool:
        try:
            return read_manifest(self.path) != self.manifest
        except CacheError:
            return False

    def need(self, path: str, record: FileRecord | None = None) -> None:
        """Sees to it that a file of the cache is in its folder; of a local one nothing is done.

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
