"""The members of a tar and, where it holds tars, of these: `CLASS.tar` counts as a folder `CLASS`.

ImageNet's training images come so (`ILSVRC2012_img_train.tar`). The inner tars are plain, so their
content is in the outer one as it is: a place in it is enough to read an image, and nothing is
unpacked. Tars in tars in tars are refused.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH119

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import TAR_SUFFIXES
from ci2p_cache.images.kinds import IMAGE_SUFFIXES
from ci2p_cache.images.names import for_display, is_hidden, join
from ci2p_cache.images.tar_members import Member, members
from ci2p_cache.images.tar_streams import TarStream

__all__ = ["TarWalk", "repacked", "stem"]

_INNER = b".tar"
_OF_SAMPLES = (*IMAGE_SUFFIXES, b".cls", b".json")


class TarWalk:
    """Goes through one archive.

    Args:
        stream: The archive, at its start.
        path: Its path, for messages.
    """

    is_nested: bool
    """Whether it holds tars that were gone through."""

    def __init__(self, stream: TarStream, path: bytes) -> None:
        self._stream = stream
        self._path = path
        self.is_nested = False
        self._is_flat = False
        self._packed: bytes | None = None

    def members(self) -> Iterator[tuple[Member, TarStream]]:
        """Yields the members but not the folders, in order, with a stream that stands at each.

        Members of inner tars have `CLASS/` before their name and their place in the outer one.

        Raises:
            SourceError: an archive is damaged, tars are beside images, or one cannot be read in
                place.
            OSError: it cannot be read.
        """
        for member in members(self._stream, self._path):
            if not member.is_file or is_hidden(member.name):
                yield member, self._stream
                continue
            name = member.name.lower()
            if name.endswith(_OF_SAMPLES):
                self._is_flat = True
                if self.is_nested:
                    raise self._error(f"holds {for_display(member.name)} beside tars", "")
            if name.endswith(_INNER) and not self._is_flat:
                self.is_nested = True
                yield from self._inner(member)
                continue
            if name.endswith(TAR_SUFFIXES) and not self._is_flat:
                self._packed = self._packed or member.name
            yield member, self._stream
        if self._packed is not None and not self._is_flat:
            raise self._error(
                f"holds the packed tar {for_display(self._packed)}",
                "; a tar in a tar is read in place, so it must be plain",
            )

    def _inner(self, outer: Member) -> Iterator[tuple[Member, TarStream]]:
        folder = outer.name[: -len(_INNER)]
        own = os.path.basename(folder) + b"/"
        stream = _Inner(self._stream, outer.size)
        for member in members(stream, join(self._path, outer.name)):
            if member.name.lower().endswith(TAR_SUFFIXES) and not is_hidden(member.name):
                raise self._error(
                    f"holds {for_display(outer.name)}, which holds {for_display(member.name)}",
                    "; tars in tars in tars are not read",
                )
            yield (
                dataclasses.replace(
                    member,
                    # Packed as `tar cf daisy.tar daisy/`, the class stands there twice.
                    name=join(folder, member.name.removeprefix(own)),
                    link=member.link and join(folder, member.link.removeprefix(own)),
                    offset=outer.offset + member.offset,
                ),
                stream,
            )

    def _error(self, what: str, more: str) -> SourceError:
        folder = shlex.quote(for_display(stem(self._path)))
        return SourceError(
            f"{for_display(self._path)} {what}{more}; wanted images with labels, or tars alone, "
            "one for each class",
            hint=f"mkdir {folder} && tar -xf {shlex.quote(for_display(self._path))} -C {folder}; "
            "then sort what is in it into class folders, and encode the folder",
        )


class _Inner:
    """A `TarStream` over a member of another; it ends where the member ends.

    Args:
        outer: Stands at the member's content.
        size: Bytes of it.
    """

    def __init__(self, outer: TarStream, size: int) -> None:
        self._outer = outer
        self._size = size
        self.position = 0

    def read(self, count: int) -> bytes:
        data = self._outer.read(min(count, self._size - self.position))
        self.position += len(data)
        return data

    def skip(self, count: int) -> None:
        before = self._outer.position
        self._outer.skip(min(count, self._size - self.position))
        self.position += self._outer.position - before


def repacked(archive: bytes, *, options: str = "", ending: str = "sorted") -> str:
    """Returns the command that packs an archive again, its members sorted by their names.

    Args:
        archive: Its path.
        options: More for the second `tar`.
        ending: What the new archive's name ends in.
    """
    folder = for_display(stem(archive))
    old, folder, new = map(shlex.quote, (for_display(archive), folder, f"{folder}-{ending}.tar"))
    return (
        f"mkdir {folder} && tar -xf {old} -C {folder} && "
        f"tar --sort=name{options} -cf {new} -C {folder} ."
    )


def stem(path: bytes) -> bytes:
    """Returns an archive's path without its suffix."""
    suffix = max((s for s in TAR_SUFFIXES if path.lower().endswith(s)), key=len, default=b"")
    return path[: len(path) - len(suffix)]
