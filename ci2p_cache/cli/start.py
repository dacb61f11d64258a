"""The very first line of the command: what Ctrl-C means is settled before anything is imported."""

from __future__ import annotations

import codecs
import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from ci2p_cache.cli.streams import open_streams
from ci2p_cache.errors import ResourceError, command, stop_signals

__all__ = ["main"]

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
            text = (
                f"error: interrupted; what was committed is safe\ntry:   {command(*sys.argv[1:])}\n"
            )
            os.write(2, text.encode("utf-8", "backslashreplace"))
    os._exit(128 + number)
