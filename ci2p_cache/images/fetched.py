"""Images behind URLs: `s3://`, `gs://`, `http(s)://`, fetched whole into a local folder first.

::

    s3://bucket/train-{000..146}.tar --listed, fetched, sizes held--> folder --> the source that
        reads such files here: tars, parquet files, a list, class folders

Listing a source goes through all of an archive anyway, and encoding reads it a second time. What
was fetched stays, so a run that continues, repairs or reads images again fetches nothing twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from ci2p_cache.errors import ResourceError, SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, TAR_SUFFIXES, expand_braces
from ci2p_cache.images.zip import ZIP_SUFFIXES
from ci2p_cache.remote import RemoteFolder, mirrors_folder, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from ci2p_cache.images.source import ImageReader, ImageRef, ImageSource, SourceOptions

__all__ = ["FetchedSource"]

_THREADS = 8
_LISTS = (b".csv", b".tsv")
_FILES = TAR_SUFFIXES + PARQUET_SUFFIXES + ZIP_SUFFIXES
_CLASS_FILES = ("classes.json", "classes.txt")
"""Names of classes beside archives, where `labels.LabelTable` looks for them."""


class FetchedSource:
    """An `ImageSource` over files behind a URL.

    Nothing is fetched before images or classes are asked for; then all files are, eight at a time,
    each tried four times and compared with the size that the server lists. A list of paths is
    fetched with all files of its folder. A file that changed its size since is fetched again.

    Args:
        url: A folder, a file, or a pattern in the last part, as `remote.url_of` gives it. A web
            server cannot be listed: there, only single tar, parquet and zip files are possible.
        open_local: Opens what was fetched.
        open_reader: Opens it for reading alone.
        options: The columns of a list or of parquet files, where they are named.

    Raises:
        MissingDependencyError: the library for this kind of URL is not installed.
        ResourceError: the library refuses the URL or its own settings.
    """

    def __init__(
        self,
        url: str,
        open_local: Callable[[Path, SourceOptions], ImageSource],
        open_reader: Callable[[Path], ImageReader],
        options: SourceOptions,
    ) -> None:
        self._url = url.rstrip("/")
        self._open_local = open_local
        self._open_reader = open_reader
        self._options = options
        parent, _, name = self._url.rpartition("/")
        lowered = name.lower().encode()
        self._is_pattern = any(sign in name for sign in "*?[{")
        self._is_file = lowered.endswith(_FILES) and not self._is_pattern
        self._name = name if self._is_pattern or lowered.endswith(_FILES + _LISTS) else ""
        self._remote = RemoteFolder(parent if self._name else self._url)
        folder, own = (
            hashlib.sha256(each.encode()).hexdigest()[:16] for each in (self._remote.url, self._url)
        )
        self._folder = mirrors_folder() / f"images-{folder}"
        self._record = mirrors_folder() / f"images-{folder}-{own}.json"
        self._source: ImageSource | None = None
        self._reader: ImageReader | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        return self._fetched().classes

    @property
    def class_titles(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        return self._fetched().class_titles

    @property
    def notices(self) -> tuple[str, ...]:
        """See `ImageSource`."""
        where = f"the images of {shown(self._url)} were fetched into {self._folder}"
        return (where, *self._fetched().notices)

    def location(self) -> str:
        """Returns the URL, without any name, password or query."""
        return shown(self._url)

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image; errors as the source of what was fetched has them.

        Raises:
            SourceError: there is no such folder or file, or a name leads out of it.
            ResourceError: the server does not answer, or the disk is full.
        """
        self._source = self._reader = None
        return self._fetched().scan()

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image; asks no server where everything was fetched before."""
        if self._reader is None:
            is_here = self._source is None and self._is_complete()
            local = self._folder / self._name
            self._reader = self._open_reader(local) if is_here else self._fetched()
        return self._reader.read(path)

    def file_of(self, path: bytes) -> None:
        """Returns None: what was fetched shows nothing of what the server has now."""

    def _fetched(self) -> ImageSource:
        if self._source is None:
            local = self._folder / self._name
            wanted = self._fetch_all()
            if self._is_file and self._name.lower().endswith(".parquet"):
                from ci2p_cache.images.table import is_table

                if is_table(os.fsencode(local), self._options):
                    # It names images that are beside it.
                    self._is_file = False
                    wanted = self._fetch_all()
            with self._writing(self._record) as staged:
                staged.write_text(json.dumps(wanted), "utf-8")
            self._source = self._open_local(local, self._options)
        return self._source

    def _is_complete(self) -> bool:
        """Whether all files that this URL named the last time are here."""
        try:
            wanted = json.loads(self._record.read_text("utf-8"))
            return all((self._folder / path).stat().st_size == wanted[path] for path in wanted)
        except (OSError, ValueError, TypeError):
            return False

    def _fetch_all(self) -> dict[str, int]:
        """Fetches what is not here; returns path -> size of all files."""
        wanted = self._wanted()
        with ThreadPoolExecutor(_THREADS, "fetch") as pool:
            for done in [pool.submit(self._fetch, *item) for item in sorted(wanted.items())]:
                done.result()
        return wanted

    def _wanted(self) -> dict[str, int]:
        where = shown(self._url)
        try:
            if self._is_file:
                own = {self._name: self._remote.num_bytes(self._name)}
                for name in _CLASS_FILES:
                    with contextlib.suppress(FileNotFoundError):
                        own[name] = self._remote.num_bytes(name)
                return own
            found = self._remote.list_files()
        except FileNotFoundError as error:
            raise SourceError(f"{where} does not exist") from error
        if self._is_pattern:
            patterns = [*_CLASS_FILES, *map(os.fsdecode, expand_braces(self._name.encode()))]
            # fnmatch's wildcards match "/" too; a pattern names files of one folder.
            found = {
                path: size
                for path, size in found.items()
                if "/" not in path and any(fnmatchcase(path, each) for each in patterns)
            }
        for path in found:
            if {"", ".", ".."} & set(path.split("/")) or "\\" in path or "\0" in path:
                raise SourceError(f"{where} holds {path!r:.200}, and that is not a path below it")
        if not found.keys() - set(_CLASS_FILES):
            raise SourceError(f"{where} names no file")
        return found

    def _fetch(self, path: str, size: int) -> None:
        target = self._folder / path
        if target.is_file() and target.stat().st_size == size:
            return
        try:
            with self._writing(target) as staged:
                got, _ = self._remote.download(path, staged)
                if got != size:
                    raise SourceError(f"{self._remote}/{path} has {got} bytes, {size} were listed")
        except FileNotFoundError as error:
            raise SourceError(f"{self._remote}/{path} has vanished") from error

    @contextlib.contextmanager
    def _writing(self, target: Path) -> Iterator[Path]:
        """Yields a path to write to, which becomes `target` when that went well."""
        staged = mirrors_folder() / ".staging" / uuid4().hex
        try:
            for folder in (target.parent, staged.parent):
                folder.mkdir(parents=True, exist_ok=True)
            yield staged
            staged.replace(target)
        except (FileNotFoundError, ResourceError):
            raise
        except OSError as error:
            raise ResourceError(
                f"{target} cannot be written: {error.strerror or error}",
                hint="make space, or name another folder: CI2P_CACHE_MIRRORS",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                staged.unlink()
