"""Files behind URLs: read only, in ranges, tried again where a network fails; through fsspec.

Which server and with which credentials is the business of each library's own environment
(`AWS_PROFILE`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...). No message repeats what
a URL carries beside its path: names, passwords and signatures.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ci2p_cache.errors import MissingDependencyError, ResourceError, UsageError

__all__ = ["SCHEMES", "RemoteFolder", "mirrors_folder", "shown", "url_of"]

SCHEMES = ("s3", "gs", "http", "https")
"""What is read. fsspec knows many more, and chains of them that write to local files."""

_T = TypeVar("_T")
_WAITS_SECONDS = (0.2, 1.0, 4.0)
"""Between four tries: servers that are busy say so for a second or two."""
_CONNECT_SECONDS, _READ_SECONDS = 10, 30
_PART_BYTES = 8 * 2**20
"""Size of one request; a failed one is repeated, not the whole file."""

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_SECRETS = re.compile(
    r"(?<=://)[^/@\s]*@|\?\S*|(?:AKIA|ASIA)[A-Z0-9]{8,}"
    r"|(?i:(?:secret|token|signature|credential|password|key)\w*\s*[=:]\s*\S+)"
)


def url_of(location: str | os.PathLike[str]) -> str | None:
    """Returns the URL that a location is, None for a path of this machine.

    `Path("s3://b/x")` is `s3:/b/x`: such a path is taken for the URL that it was.

    Raises:
        UsageError: it is a URL of a kind that is not read.
    """
    text = os.fspath(location)
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        scheme, is_url, rest = text.partition(":/")
        if not is_url or scheme.lower() not in SCHEMES:
            return None
    if scheme.lower() not in SCHEMES or "::" in text or not rest.strip("/"):
        raise UsageError(
            f"{shown(text)} cannot be read; wanted a path of this machine, or a URL that begins "
            f"with {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    return f"{scheme.lower()}://{rest}"


def mirrors_folder() -> Path:
    """Returns where local copies are: CI2P_CACHE_MIRRORS, or below the user's cache folder."""
    chosen = os.environ.get("CI2P_CACHE_MIRRORS")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen) if chosen else Path(base).expanduser() / "ci2p-cache" / "mirrors"


def shown(text: str) -> str:
    """Returns a URL, or a library's message, without names, passwords, queries and keys."""
    return _SECRETS.sub(lambda found: "?..." if found[0].startswith("?") else "***", text)


class RemoteFolder:
    """The files below a URL; safe to use from many threads.

    Args:
        url: What `url_of` gave.

    Raises:
        MissingDependencyError: the library for this kind of URL is not installed.
        ResourceError: the library refuses the URL or its own settings.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(self.url, **_options(scheme))
        except ImportError as error:
            raise MissingDependencyError(
                f"{shown(url)} needs packages that are not installed: {shown(str(error))}",
                hint="pip install 'ci2p-cache[remote]'",
            ) from error
        except Exception as error:
            # The libraries raise their own errors for settings that they refuse.
            raise ResourceError(
                f"{shown(url)} cannot be opened: {shown(str(error))}"
            ) from _without_details(error)

    def __str__(self) -> str:
        return shown(self.url)

    def list_files(self) -> dict[str, int]:
        """Returns path below the URL -> size in bytes of every file.

        Raises:
            FileNotFoundError: there is no such folder.
            ResourceError: four tries failed, or it may not be listed.
        """

        def find() -> dict[str, int]:
            self._files.invalidate_cache()
            found = self._files.find(self._root, detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {path[start:]: int(info["size"]) for path, info in found.items()}

        return self._persistently(find, "")

    def num_bytes(self, path: str) -> int:
        """Returns the size of a file; raises what `list_files` does, also if no size is known."""

        def ask() -> int:
            self._files.invalidate_cache(self._place(path))
            size = self._files.info(self._place(path))["size"]
            if size is None:
                raise OSError("the server does not say how large it is")
            return int(size)

        return self._persistently(ask, path)

    def read(self, path: str) -> bytes:
        """Returns a whole file; raises what `list_files` does."""
        return b"".join(self._parts(path))

    def download(self, path: str, target: Path) -> tuple[int, str]:
        """Writes a file to a local path; returns its size and sha256.

        Raises:
            FileNotFoundError: there is no such file.
            ResourceError: four tries failed, or it may not be read.
            OSError: the local file cannot be written.
        """
        size, digest, parts = 0, hashlib.sha256(), self._parts(path)
        with target.open("wb") as file:
            for part in parts:
                size += len(part)
                digest.update(part)
                file.write(part)
        return size, digest.hexdigest()

    def _parts(self, path: str) -> Iterator[bytes]:
        """Returns the pieces of a file, each asked for when it is next."""
        size = self.num_bytes(path)

        def get(start: int) -> bytes:
            end = min(start + _PART_BYTES, size)
            found: bytes = self._files.cat_file(self._place(path), start=start, end=end)
            if len(found) == size != end - start:
                # A server that does not know of ranges sends everything.
                found = found[start:end]
            if len(found) != end - start:
                raise OSError(f"{len(found)} bytes came of {end - start}")
            return found

        starts = range(0, size, _PART_BYTES)
        return (self._persistently(partial(get, start), path) for start in starts)

    def _place(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}" if path else self._root

    def _persistently(self, action: Callable[[], _T], path: str) -> _T:
        where = shown(f"{self.url}/{path}" if path else self.url)
        for wait_seconds in (*_WAITS_SECONDS, None):
            try:
                return action()
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where} does not exist") from _without_details(error)
            except Exception as error:
                # Each library has its own errors for network failures.
                if isinstance(error, _LASTING) or wait_seconds is None:
                    tries = 1 if isinstance(error, _LASTING) else len(_WAITS_SECONDS) + 1
                    reason = shown(str(error)).split("\n")[0] or type(error).__name__
                    raise ResourceError(
                        f"{where} cannot be read after {tries} tries: {reason}",
                        hint="when the server answers again, run the same command"
                        if wait_seconds is None
                        else "check that these credentials may read it, then run it again",
                    ) from _without_details(error)
            time.sleep(wait_seconds)
        raise AssertionError("the last try returns or raises")


def _options(scheme: str) -> dict[str, Any]:
    """Returns each library's options that limit how long it waits."""
    if scheme == "s3":
        patience = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        return {"config_kwargs": patience}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        return {"client_kwargs": {"timeout": timeout}}
    return {}


def _without_details(error: BaseException) -> BaseException:
    """Returns a stand-in for a library's error: a traceback would print the whole request."""
    return RuntimeError(f"{type(error).__name__}: {shown(str(error))}")
