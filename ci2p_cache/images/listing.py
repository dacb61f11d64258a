"""What lies in a folder of images: listing and walking that survive whatever they meet.

Names are bytes throughout, as the file system has them; only for keys and messages are they text.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH116, PTH122

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.headers import foreign_format, sniff_format

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_FILE_BYTES",
    "SNIFF_BYTES",
    "Tally",
    "as_key",
    "for_display",
    "is_image",
    "is_image_content",
    "join",
    "list_folder",
    "persistently",
    "read_file",
    "walk",
]

_T = TypeVar("_T")

IMAGE_SUFFIXES = frozenset(
    {b".jpg", b".jpeg", b".jpe", b".jfif", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff"}
)
"""What names of images end in, in lower case."""
_FOREIGN_SUFFIXES = frozenset(
    {b".avif", b".heic", b".heif", b".jxl", b".jp2", b".j2k", b".svg", b".psd", b".ico", b".tga"}
    | {b".ppm", b".pgm", b".pbm", b".pnm", b".exr", b".hdr", b".dng", b".cr2", b".nef", b".arw"}
)
SNIFF_BYTES = 16
"""How much of a file `is_image_content` wants to see."""

MAX_FILE_BYTES = 512 * 2**20
"""Of one image file; the default `max_pixels` as uncompressed 16-bit RGB still fits."""

_WAITS_SECONDS = (0.1, 0.5)
"""Pauses between three tries: long enough for a network file system to find its server again."""

_LASTING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP}
    | {errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL}
)
"""Errors that say something about the file; all others may be the machine's, and are retried."""

_SENTENCES = {
    "hidden": "hidden files or folders skipped",
    "special": "entries skipped that are neither files nor folders (pipes, sockets, devices)",
    "broken": "links skipped that lead nowhere",
    "loop": "links skipped that lead back to a folder above them",
    "ignored": "files ignored that are no images",
    "unreadable": "files of unknown kind ignored, because they may not be read",
    "member": "archive members skipped that are no files (links, pipes, devices)",
    "unlabelled": "images without a label skipped",
    "stray": "images ignored that lie beside the class folders, in none of them",
}


class Tally:
    """Counts what a listing leaves out, with the first example of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._foreign: Counter[str] = Counter()

    def add(self, kind: str, path: bytes) -> None:
        """Counts one entry; `kind` is one of the kinds that have a sentence."""
        self._counts[kind] += 1
        self._examples.setdefault(kind, for_display(path))

    def add_foreign(self, name: str, path: bytes) -> None:
        """Counts one image of a format that is not read; `name` is its suffix or format."""
        self._foreign[name] += 1
        self._examples.setdefault("foreign", for_display(path))

    def merge(self, other: Tally) -> None:
        """Adds what another tally counted."""
        self._counts += other._counts
        self._foreign += other._foreign
        self._examples = {**other._examples, **self._examples}

    def notices(self) -> tuple[str, ...]:
        """Returns one sentence per kind that was met."""
        found = [
            f"{self._counts[kind]} {sentence}, for example {self._examples[kind]}"
            for kind, sentence in _SENTENCES.items()
            if self._counts[kind]
        ]
        if self._foreign:
            kinds = ", ".join(f"{count} {name}" for name, count in sorted(self._foreign.items()))
            found.append(
                f"{self._foreign.total()} images ignored whose format is not read ({kinds}), for "
                f"example {self._examples['foreign']}; convert them to PNG or JPEG to use them"
            )
        return tuple(found)


def as_key(path: bytes) -> str:
    """Returns a path as text; bytes that are not UTF-8 become escapes of the form backslash xNN."""
    return path.decode("utf-8", "backslashreplace")


def for_display(path: bytes) -> str:
    """Returns a path for messages: control characters are escaped too."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in as_key(path)
    )


def join(folder: bytes, name: bytes) -> bytes:
    """Returns a path below a folder; either may be empty."""
    return folder + b"/" + name if folder and name else folder + name


def is_image(root: bytes, path: bytes, tally: Tally) -> bool:
    """Whether a regular file counts as an image.

    Known suffixes are believed (a wrong one shows when the content is decoded); other files count
    if their first bytes are of an allowed format, and are tallied if not.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    try:
        descriptor = os.open(join(root, path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            prefix = os.read(descriptor, SNIFF_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        tally.add("unreadable", path)
        return False
    return is_image_content(path, prefix, tally)


def is_image_content(path: bytes, prefix: bytes, tally: Tally) -> bool:
    """Whether the first bytes are of an allowed format; if not, the file is tallied."""
    if sniff_format(prefix) is not None:
        return True
    suffix = os.path.splitext(path)[1].lower()
    foreign = foreign_format(prefix)
    if suffix in _FOREIGN_SUFFIXES:
        tally.add_foreign(suffix.decode(), path)
    elif foreign is not None:
        tally.add_foreign(foreign, path)
    else:
        tally.add("ignored", path)
    return False


def list_folder(root: bytes, folder: bytes, tally: Tally) -> tuple[list[bytes], list[bytes]]:
    """Lists one folder, links followed.

    Args:
        root: Absolute path of the source.
        folder: Path below it, empty for the root itself.
        tally: Takes what is skipped: hidden entries, broken links, pipes and devices.

    Returns:
        Names of the folders and of the regular files in it, each sorted by their bytes.

    Raises:
        SourceError: it cannot be listed, or two names look the same as text.
        ResourceError: listing failed again and again.
    """
    path = join(root, folder)
    try:
        entries = persistently(lambda: _scandir(path), path)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise SourceError(
            f"folder {for_display(path)} cannot be listed: {error.strerror}",
            hint="make it readable, or move it out of the source",
        ) from error
    folders: list[bytes] = []
    files: list[bytes] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        kind = _kind(entry)
        if kind == "folder":
            folders.append(entry.name)
        elif kind == "file":
            files.append(entry.name)
        else:
            tally.add(kind, join(folder, entry.name))
    names = folders + files
    if len({as_key(name) for name in names}) != len(names):
        raise SourceError(
            f"folder {for_display(path)} has two names that are the same once bytes that are not "
            "UTF-8 are written as \\xNN; keys could not tell them apart",
            hint="rename one of them",
        )
    return folders, files


def _scandir(path: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(path) as entries:
        return list(entries)


def _kind(entry: os.DirEntry[bytes]) -> str:
    """Returns folder, file, or the kind under which an entry is tallied."""
    if entry.name.startswith(b".") or entry.name == b"__MACOSX":
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:
        return "broken"
    return "special"


def walk(root: bytes, folder: bytes, tally: Tally) -> Iterator[bytes]:
    """Yields the path below `root` of every regular file in `folder`, at any depth.

    Entries of a folder come in the order of their bytes, folders and files mixed. A link to a
    folder is followed unless it leads to one of the folders it lies in.

    Raises:
        SourceError: a folder cannot be listed.
        ResourceError: listing failed again and again.
    """
    chain = [_identity(root, parent) for parent in _parents(folder)]
    stack = [(folder, _entries(root, folder, tally))]
    while stack:
        current, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            chain.pop()
            continue
        name, is_folder = entry
        path = join(current, name)
        if not is_folder:
            yield path
            continue
        identity = _identity(root, path)
        if identity in chain:
            tally.add("loop", path)
            continue
        chain.append(identity)
        stack.append((path, _entries(root, path, tally)))


def _entries(root: bytes, folder: bytes, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    folders, files = list_folder(root, folder, tally)
    return iter(sorted([(name, True) for name in folders] + [(name, False) for name in files]))


def _parents(folder: bytes) -> list[bytes]:
    """Returns the root (empty), every folder on the way, and the folder itself."""
    parts = folder.split(b"/") if folder else []
    return [b"/".join(parts[:count]) for count in range(len(parts) + 1)]


def _identity(root: bytes, folder: bytes) -> tuple[int, int]:
    path = join(root, folder)
    try:
        found = persistently(lambda: os.stat(path), path)
    except OSError as error:
        if isinstance(error, ResourceError):
            raise
        raise SourceError(
            f"folder {for_display(path)} cannot be looked at: {error.strerror}"
        ) from error
    return found.st_dev, found.st_ino


def read_file(root: bytes, path: bytes) -> bytes:
    """Returns the content of a regular file below `root`; errors as `ImageSource.read` has them."""
    full = join(root, path)
    try:
        return persistently(lambda: _read_regular(full), full)
    except ResourceError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        # An unmounted disk must not turn every image into a bad one.
        if not _has_entries(root):
            raise ResourceError(
                f"the source {for_display(root)} is empty or gone; {for_display(path)} was wanted",
                hint="mount it again and run the same command",
            ) from error
        raise ImageDecodeError("the file has vanished since the plan was made") from error
    except PermissionError as error:
        raise ImageDecodeError("permission to read the file is denied") from error
    except OSError as error:
        raise ImageDecodeError(f"the file cannot be opened: {error.strerror}") from error


def _read_regular(full: bytes) -> bytes:
    # Without O_NONBLOCK a pipe in the file's place would wait for a writer for ever.
    descriptor = os.open(full, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ImageDecodeError("it is no regular file any more")
        if found.st_size > MAX_FILE_BYTES:
            raise ImageDecodeError(
                f"the file has {found.st_size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.readall()
    finally:
        os.close(descriptor)


def _has_entries(root: bytes) -> bool:
    try:
        with os.scandir(root) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def persistently(action: Callable[[], _T], path: bytes) -> _T:
    """Calls `action`, again where it fails for a reason that may pass.

    Args:
        action: What to do; it starts from the beginning each time.
        path: What it reads, for messages.

    Raises:
        ResourceError: it failed three times; the message names `path`.
        OSError: it failed for a reason that lies in the file itself.
    """
    for wait_seconds in (*_WAITS_SECONDS, None):
        try:
            return action()
        except OSError as error:
            if error.errno in _LASTING:
                raise
            if wait_seconds is None:
                raise ResourceError(
                    f"{for_display(path)} cannot be read after {len(_WAITS_SECONDS) + 1} tries: "
                    f"{error.strerror or error}",
                    hint="when the disk or network is well again, run the same command",
                ) from error
            time.sleep(wait_seconds)
    raise AssertionError("the last try returns or raises")
