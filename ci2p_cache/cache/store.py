"""Opening a cache: `open_cache`, and `Cache`, its folder and its splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ci2p_cache.cache.folder import CacheFolder, Mirror
from ci2p_cache.cache.growth import settle_for_reading
from ci2p_cache.cache.split import Split
from ci2p_cache.errors import IncompleteCacheError, RefusedError, UnknownSplitError, command
from ci2p_cache.remote import url_of

__all__ = ["Cache", "open_cache"]


def open_cache(path: str | Path, *, partial: bool = False) -> Cache:
    """Opens a cache folder for reading.

    Args:
        path: The folder that `ci2p-cache encode --out` made, or the URL of a finished one that was
            copied: `s3://`, `gs://`, `http(s)://`. Of such a cache each file is fetched when it is
            first read, checked, and stored in a local folder (`mirror.Mirror`).
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
    settle_for_reading(Path(path))
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


class Cache(CacheFolder, Mapping[str, "Split"]):
    """A cache folder: a mapping from split names to `Split`, with the manifest beside it.

    A pickle holds the absolute path, or the URL, and opens the cache again.

    Args:
        path: The folder.
        mirror: What fills the folder, where it is the local copy of a remote cache.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        super().__init__(path, mirror)
        self._splits = {name: Split(self, name) for name in self.manifest.splits}

    def __getitem__(self, name: str) -> Split:
        """Returns a split.

        Raises:
            UnknownSplitError: there is none of that name; a KeyError and a UsageError.
        """
        if name not in self._splits:
            raise UnknownSplitError(
                f"{self.path} has no split {name!r}; it has {sorted(self._splits)}"
            )
        return self._splits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)

    def __hash__(self) -> int:
        # A mapping has no hash by default. Two are equal if they hold the very same splits.
        return hash(frozenset(self._splits.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.path.absolute(), self.mirror, _identity(self))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self._splits)

    def __repr__(self) -> str:
        return f"Cache({str(self.path)!r}, splits={self.splits}, classes={len(self.classes)})"


def _identity(cache: Cache) -> tuple[str, str]:
    """Returns what two openings share if they have the same rows, labels and values."""
    return cache.manifest.plan.sha256, cache.fingerprint.digest


def _unpickled(path: Path, mirror: Mirror | None, identity: tuple[str, str]) -> Cache:
    cache = Cache(path, mirror)
    if _identity(cache) != identity:
        raise RefusedError(
            f"{path} is another cache than the one that was pickled: its samples or its settings "
            "have changed since",
            hint="open it again with `open_cache`, then start the workers anew",
        )
    return cache
