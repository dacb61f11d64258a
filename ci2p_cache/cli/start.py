"""The very first line of the command: what Ctrl-C means is settled before anything is imported."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from types import FrameType

from ci2p_cache.errors import command, stop_signals

__all__ = ["main"]

_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)

_SHOW_CURSOR = b"\x1b[?25h\r"


def main() -> None:
    """Runs the command line; the exit code is the error's own.

    Ctrl-C, SIGTERM and SIGHUP end the process at once, with the command that goes on, wherever no
    work is guarded against them: while torch is imported an exception could be lost in C code that
    clears errors. Encoding, repairing and training put their own handlers in place. A signal that
    the parent had ignored stays ignored: SIGHUP under `nohup`, SIGINT in the background of a
    script.
    """
    for number in stop_signals():
        signal.signal(number, _leave)
    _take_names_as_utf8()
    for stream in (sys.stdout, sys.stderr):
        # What a terminal has no letter for is shown as an escape; it must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from ci2p_cache.cli.app import run_command

    try:
        run_command()
    except SystemExit as ended:
        if ended.code in _INTERRUPTED:
            # Everything is put away; taking Python and torch down would take seconds more.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)
        raise
    finally:
        # All is said and done; while Python takes itself down a signal changes nothing any more.
        for number in stop_signals():
            signal.signal(number, signal.SIG_IGN)


def _take_names_as_utf8() -> None:
    """Starts Python again in its UTF-8 mode where the locale reads file names in another way.

    pyarrow and safetensors take every path as UTF-8, so under another locale a folder whose name
    is not ASCII would be sought under a wrong name.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8" or sys.flags.utf8_mode:
        return
    # The terminal goes on speaking its own encoding.
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    # As an option too: with `python -I` the variable is not heeded, and this would not end.
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _leave(number: int, _: FrameType | None) -> None:
    if os.isatty(2):
        os.write(2, _SHOW_CURSOR)
    # Of the processes that torchrun starts, one speaks.
    if os.environ.get("RANK", "0") == "0":
        text = f"error: interrupted; what was committed is safe\ntry:   {command(*sys.argv[1:])}\n"
        os.write(2, text.encode("utf-8", "backslashreplace"))
    os._exit(128 + number)
