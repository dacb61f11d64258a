"""Standard output and error that no reader, disk or terminal can turn into the end of a run.

What cannot be written is dropped, and the work continues: a closed stream, a pipe whose reader has
enough (`... | head -1`), a terminal that hung up, a full disk behind `> log`. Only lost results are
an error, and only after all work is done; `start.py` raises it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["OutputStream", "open_streams"]


class OutputStream(io.FileIO):
    """Writes to a standard stream, and drops what cannot be written.

    Args:
        number: The file descriptor; it stays open.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.failure: OSError | None = None
        """The first failed write; None where all was written, or where the reader has left."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Returns the number of bytes written or dropped, always at least one."""
        while True:
            try:
                # typeshed leaves out None, for a pipe that another program made non-blocking.
                written = cast("int | None", super().write(data))
            except OSError as error:
                if self.failure is None and not self._has_lost_reader(error):
                    self.failure = error
                return memoryview(data).nbytes
            if written is not None:
                return written
            select.select([], [self], [])

    def _has_lost_reader(self, error: OSError) -> bool:
        """Says whether the other end is gone: the command is not at fault."""
        if error.errno == errno.EIO:
            # A terminal that hung up; of a file it is a broken disk.
            return stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return error.errno in (errno.EPIPE, errno.ECONNRESET)


def open_streams() -> OutputStream:
    """Replaces `sys.stdout` and `sys.stderr`; call it before anything else is opened or printed.

    A standard stream that the parent has closed becomes /dev/null. Otherwise the next file that is
    opened, a shard for example, would get its number, and what a library prints would go into it.
    A character that the stream's encoding lacks is shown as an escape.

    Returns:
        Where `sys.stdout` writes, to ask for its `failure`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is the closed stream's.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # What a caller in Python has printed before it comes first.
        with suppress(OSError):
            stream.flush()
    out = OutputStream(1)
    sys.stdout = _text(out, sys.stdout)
    sys.stderr = _text(OutputStream(2), sys.stderr)
    return out


def _text(raw: OutputStream, earlier: TextIO | None) -> TextIO:
    """Returns a text stream like the one that Python has opened; None where it was closed."""
    encoding, by_line = "utf-8", True
    if isinstance(earlier, io.TextIOWrapper):
        encoding, by_line = earlier.encoding, earlier.line_buffering or earlier.write_through
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=by_line
    )
