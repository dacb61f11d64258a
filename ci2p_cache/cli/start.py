"""The first lines of the command: signals and streams, before anything else is imported.

What Ctrl-C means is settled here. Standard output and error that no reader, disk or terminal takes
end no run: what cannot be written is dropped, and the work continues. That is so for a closed
stream, a pipe whose reader has enough (`... | head -1`), a terminal that hung up, or a full disk
behind `> log`. Only lost results are an error, raised after all work is done.
"""

from __future__ import annotations

import codecs
import errno
import gc
import io
import os
import select
import signal
import stat
import sys
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, TextIO, cast

from ci2p_cache.errors import ResourceError, command, stop_signals, without_overwrite

__all__ = ["OutputStream", "main", "open_streams"]

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


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


_NEW_OBJECTS = 10_000
"""Objects that are made before garbage is looked for; Python's default is 700 to 2,000."""

_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)

_SHOW_CURSOR = b"\x1b[?25h\r"


def main() -> None:
    """Runs the command line; the exit code is the error's own.

    Ctrl-C, SIGTERM and SIGHUP end the process at once, with the command that continues, wherever no
    work is guarded against them: while torch is imported an exception could be lost in C code that
    clears errors. Encoding, repairing and training put their own handlers in place. A signal that
    the parent had ignored stays ignored: SIGHUP under `nohup`, SIGINT in the background of a
    script.

    The exit code is about the work. A closed stream or a reader that has enough does not change it.
    Results that a full disk has lost end a command that succeeded with exit code 6.
    """
    # Imports make objects that stay: to look for garbage among them takes a fifth of their time.
    gc.set_threshold(_NEW_OBJECTS)
    out = open_streams()
    for number in stop_signals():
        signal.signal(number, _leave)
    _take_names_as_utf8()
    from ci2p_cache.cli.app import run_command

    code: int | str | None = None
    try:
        run_command()
    except SystemExit as ended:
        code = ended.code
    finally:
        # All is done; while Python takes itself down a signal changes nothing any more.
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    if not code and out.failure is not None:
        code = _result_lost(out.failure)
    if isinstance(code, int) and code in _INTERRUPTED:
        # Everything is put away; taking Python and torch down would take seconds more.
        sys.stderr.flush()
        os._exit(code)
    # Looking for garbage once more among all that torch has made takes 0.2 s.
    gc.freeze()
    sys.exit(code)


def _result_lost(failure: OSError) -> int:
    """Says that the work is done but its result was not printed; returns the exit code."""
    from ci2p_cache.cli import render

    error = ResourceError(
        f"the command is done, but its result could not be printed: {failure.strerror}",
        hint=command(*sys.argv[1:], note="with its output where there is space"),
    )
    render.fail(error)
    return error.exit_code


def _take_names_as_utf8() -> None:
    """Starts Python again in its UTF-8 mode where the locale reads file names in another way.

    pyarrow and safetensors take every path as UTF-8, so under another locale a folder whose name
    is not ASCII would be sought under a wrong name.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8" or sys.flags.utf8_mode:
        return
    # The terminal continues speaking its own encoding.
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    # As an option too: with `python -I` the variable is not heeded, and this would not end.
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _leave(number: int, _: FrameType | None) -> None:
    # The terminal may have hung up, or stderr's reader left: the exit code stays.
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
        # Of the processes that torchrun starts, one speaks.
        if os.environ.get("RANK", "0") == "0":
            again = command(*without_overwrite(sys.argv[1:]))
            text = f"error: interrupted; what was committed is safe\ntry:   {again}\n"
            os.write(2, text.encode("utf-8", "backslashreplace"))
    os._exit(128 + number)
