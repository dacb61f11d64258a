"""Files that a command writes where its user says: refused before the work, or written whole.

::

    --out, --picture --check_output--> the work --write_whole--> the file
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ci2p_cache.errors import RefusedError, ResourceError, UsageError
from ci2p_cache.remote import shown, url_of

__all__ = ["check_folder", "check_output", "refuse_unwritable", "refuse_url", "write_whole"]

_CACHE_FILES = ("cache.json", "plan.parquet")
"""What a folder holds that is one of our caches."""

_MARKED_BYTES = 2**16
"""A file's mark stands so near its start or its end."""


def check_output(
    path: Path,
    *,
    what: str,
    suffixes: Sequence[str],
    mark: bytes | None = None,
    overwrite: bool = False,
) -> None:
    """Refuses a place where a file must not or cannot be written, before any work for it.

    Args:
        path: The file. Folders above it need not exist.
        what: What it is, for messages: "report".
        suffixes: What its name may end in, such as ".html"; "" allows a name without one.
        mark: What stands near the start or end of every such file; a file with it is replaced. None
            replaces no file; the command then has `--overwrite NAME`.
        overwrite: Whether whatever is there is replaced.

    Raises:
        UsageError: the suffix is another one, a folder is there, the place is inside a cache, or
            it is a URL.
        RefusedError: a file is there that may not be replaced.
        ResourceError: the folder cannot be written.
    """
    refuse_url(path, what=what)
    check_folder(path.parent, what=what)
    if path.is_dir():
        raise UsageError(
            f"{path} is a folder; wanted a file for the {what}",
            hint=f"name a file in it: {path / f'{what.split()[-1]}{suffixes[-1]}'}",
        )
    if path.suffix.lower() not in suffixes:
        wanted = " or ".join(suffix for suffix in suffixes if suffix)
        raise UsageError(
            f"{path} does not end in {wanted}, which is how the {what} is written",
            hint=f"name it {path.with_suffix(suffixes[-1])}",
        )
    if overwrite or not os.path.lexists(path) or path.is_symlink():
        # A link is replaced, never what it leads to.
        return
    if mark is None:
        raise RefusedError(
            f"{path} is there already; nothing was changed",
            hint=f"--overwrite {shlex.quote(path.name)} replaces it",
        )
    if not (path.is_file() and _holds(path, mark)):
        raise RefusedError(
            f"{path} is there already and is no {what} of ci2p-cache; nothing was changed",
            hint="choose another name, or remove it first",
        )


def check_folder(path: Path, *, what: str) -> None:
    """Refuses a folder in which the files of a command must not or cannot be written.

    Args:
        path: The folder; it need not exist.
        what: What would be written, for messages.

    Raises:
        UsageError: it is inside a cache, or is a URL.
        ResourceError: it cannot be made or written, or is no folder.
    """
    refuse_url(path, what=what)
    real = path.resolve()
    for folder in (real, *real.parents):
        if all((folder / name).is_file() for name in _CACHE_FILES):
            raise UsageError(
                f"{path} is in the cache {folder}, which holds nothing but its own files",
                hint=f"choose another place for the {what}",
            )
    refuse_unwritable(path, what=what)


def refuse_unwritable(path: Path, *, what: str) -> None:
    """Refuses a folder that cannot be made or written.

    Args:
        path: The folder; it need not exist.
        what: What would be written, for messages.

    Raises:
        ResourceError: as it says.
    """
    real = path.resolve()
    there = next(folder for folder in (real, *real.parents) if os.path.lexists(folder))
    problem = None
    if not there.is_dir():
        problem = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} is not writable"
    if problem is not None:
        raise ResourceError(
            f"cannot write the {what} in {path}: {problem}", hint="choose another place for it"
        )


def refuse_url(path: str | Path, *, what: str) -> None:
    """Refuses a URL, which would become a local folder called `s3:`.

    Args:
        path: The file to write.
        what: What it is, for the message.

    Raises:
        UsageError: it is one.
    """
    url = url_of(path)
    if url is not None:
        raise UsageError(
            f"{shown(url)} is a URL; the {what} is written on this machine",
            hint="name a local place, and copy it to the URL when it is finished",
        )


def write_whole(path: Path, data: bytes, *, what: str) -> None:
    """Writes a file whole or not at all; folders above it are made.

    Args:
        path: The file to write; an existing one is replaced.
        data: Its content.
        what: What it is, for the message.

    Raises:
        ResourceError: it cannot be written; the earlier file stays.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(data)
        staged.replace(path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise ResourceError(
            f"cannot write the {what} {path}: {error.strerror or error}",
            hint="choose another place for it",
        ) from error


def _holds(path: Path, mark: bytes) -> bool:
    """Says whether a file holds the mark near its start or its end."""
    try:
        with path.open("rb") as file:
            start = file.read(_MARKED_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MARKED_BYTES))
            return mark in start or mark in file.read()
    except OSError:
        return False
