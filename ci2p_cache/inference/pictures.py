"""Pictures that a user names: found, read, decoded to the square that the encoder saw in training.

::

    files, folders, patterns -> one entry per picture -> bytes -> pixels -> view 0, uint8

What is wrong with one picture is said of it, and the others continue. Decoding happens in processes
of its own: a file that crashes its decoder is one bad picture.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from torch import Tensor

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.names import Tally, as_key
from ci2p_cache.images.reading import read_file
from ci2p_cache.images.tree import DiskTree

__all__ = ["find_pictures", "read_ahead", "read_picture", "shown"]


def find_pictures(names: Iterable[str | os.PathLike[str]]) -> list[tuple[str, str | None]]:
    """Lists the pictures that names stand for.

    Args:
        names: Files, folders (everything below them that is an image, hidden files left out), or
            patterns with `*`, `?`, `[...]` and `**`, where no file of that very name is there.

    Returns:
        (path, None) for each picture, in the order of the names, those of a folder or pattern in
        the order of their bytes; (name, reason) for what stands for no picture.
    """
    found: list[tuple[str, str | None]] = []
    for each in names:
        name = os.fspath(each)
        if os.path.isdir(name):  # noqa: PTH112
            found += _of_folder(name)
        elif os.path.lexists(name) or not glob.has_magic(name):
            found.append((name, None))
        else:
            matches = sorted(glob.glob(name, recursive=True), key=os.fsencode)  # noqa: PTH207
            files = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
            found += [(file, None) for file in files] or [(name, "no file is named like that")]
    return found


def _of_folder(name: str) -> list[tuple[str, str | None]]:
    try:
        paths = list(DiskTree(os.fsencode(name)).images(b"", Tally()))
    except (SourceError, ResourceError) as error:
        return [(name, str(error))]
    if not paths:
        return [(name, "the folder holds no image")]
    return [(str(Path(name) / os.fsdecode(path)), None) for path in paths]


def read_picture(path: str, decoders: Decoders) -> Tensor:
    """Reads a picture as a validation image of the cache was read.

    Args:
        path: The file.
        decoders: How images are decoded, resized and cut.

    Returns:
        uint8 (3, size, size), 0-255: the centre square.

    Raises:
        ImageDecodeError: the file is missing, unreadable or no image; one line without the path.
        ResourceError: reading failed again and again.
    """
    if not os.path.exists(path):  # noqa: PTH110
        raise ImageDecodeError("there is no such file")
    folder, name = os.path.split(os.fsencode(path))
    return decoders.decode(read_file(folder or b".", name), split="val", key="").views[0]


def read_ahead(
    entries: Iterable[tuple[str, str | None]],
    read: Callable[[str], Tensor],
    *,
    batch_size: int,
    threads: int,
) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Reads pictures in threads, always a batch ahead of the one that is worked on.

    Args:
        entries: As `find_pictures` gives them.
        read: Reads one picture; called in the threads.
        batch_size: Pictures per batch.
        threads: How many read.

    Yields:
        Batches in the order of the entries: each path with its picture, or with the reason why
        there is none.
    """
    coming = iter(entries)
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:

        def started() -> list[tuple[str, str | Future[Tensor]]]:
            return [
                (path, reason if reason is not None else pool.submit(read, path))
                for path, reason in islice(coming, batch_size)
            ]

        ahead = started()
        while ahead:
            batch, ahead = ahead, started()
            yield _read(batch)


def _read(batch: Sequence[tuple[str, str | Future[Tensor]]]) -> list[tuple[str, Tensor | str]]:
    """Waits for the pictures of a batch; what could not be read becomes its reason."""
    done: list[tuple[str, Tensor | str]] = []
    for path, coming in batch:
        try:
            done.append((path, coming if isinstance(coming, str) else coming.result()))
        except (ImageDecodeError, ResourceError) as error:
            done.append((path, str(error)))
    return done


def shown(path: str) -> str:
    """Returns a path as text that can be written anywhere."""
    return as_key(os.fsencode(path))
