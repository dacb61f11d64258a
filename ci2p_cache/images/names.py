"""Names as a file system has them: bytes throughout, and text only for keys and messages."""

from __future__ import annotations

import hashlib

__all__ = ["as_key", "for_display", "hash64", "is_hidden", "join"]

_OF_SYSTEMS = frozenset(
    {b"__MACOSX", b"@eaDir", b"#recycle", b"$RECYCLE.BIN", b"System Volume Information"}
)
"""Folders that macOS, Synology's disk stations and Windows add; thumbnails may be in them."""


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


def is_hidden(path: bytes) -> bool:
    """Whether a path has a part that systems hide, or add without being asked."""
    return any(part.startswith(b".") or part in _OF_SYSTEMS for part in path.split(b"/"))


def hash64(name: bytes) -> int:
    """Returns 64 bits of a name's hash."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
