"""Names as a file system has them: bytes throughout, and text only for keys and messages."""

from __future__ import annotations

__all__ = ["as_key", "for_display", "join"]


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
