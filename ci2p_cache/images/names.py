"""Names as a file system has them, in bytes; and what a listing leaves out, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

__all__ = ["Tally", "as_key", "for_display", "is_hidden", "join", "listed"]

_OF_SYSTEMS = frozenset(
    {b"__MACOSX", b"@eaDir", b"#recycle", b"$RECYCLE.BIN", b"System Volume Information"}
)
"""Folders that macOS, Synology's disk stations and Windows add; thumbnails may be in them."""

_SENTENCES = {
    "hidden": "hidden files or folders skipped",
    "empty": "folders left out that hold no image",
    "special": "entries skipped that are neither files nor folders (pipes, sockets, devices)",
    "broken": "links skipped that lead nowhere",
    "loop": "links skipped that lead back to a folder above them",
    "ignored": "files ignored that are no images",
    "unreadable": "files of unknown kind ignored, because they may not be read",
    "member": "archive members skipped that are no files (links, pipes, devices)",
    "unlabelled": "images without a label skipped",
    "unchosen": "images left out whose extension is not that of --image-column",
    "outside": "images left out that are in no class folder",
    "stray": "images ignored that are beside the class folders, in none of them",
}


def as_key(path: bytes) -> str:
    """Returns a path as text; bytes that are not UTF-8 become escapes of the form backslash xNN."""
    return path.decode("utf-8", "backslashreplace")


def for_display(path: bytes) -> str:
    """Returns a path for messages: control characters are escaped too."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in as_key(path)
    )


def listed(names: Sequence[bytes], most: int = 5) -> str:
    """Returns the first few names for messages."""
    more = ", ..." if len(names) > most else ""
    return ", ".join(for_display(name) for name in names[:most]) + more


def join(folder: bytes, name: bytes) -> bytes:
    """Returns a path below a folder; either may be empty."""
    return folder + b"/" + name if folder and name else folder + name


def is_hidden(path: bytes) -> bool:
    """Whether a path has a part that systems hide, or add without being asked."""
    return any(part.startswith(b".") or part in _OF_SYSTEMS for part in path.split(b"/"))


class Tally:
    """Counts what a listing leaves out, with the first example of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._foreign: Counter[str] = Counter()

    def add(self, kind: str, path: bytes, count: int = 1) -> None:
        """Counts entries; `kind` is one of the kinds that have a sentence."""
        self._counts[kind] += count
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
