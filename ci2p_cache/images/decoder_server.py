"""The process that decoder workers are forked from; what they decode is not known here."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from ci2p_cache.errors import ResourceError

__all__ = ["fork_decoder", "server_gone", "start_decoder_server"]

_PROCESS = "ci2p_cache.images.decoder_process"
"""Its module, which imports torch: this one, which is imported to start it, does not."""


class _Server:
    """The process that forks workers: one for this process and whatever is forked from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Starts it unless it runs; it imports torch meanwhile and ends with this process."""
        with self._lock:
            self._started()

    def fork(self, channel: int, memory: int) -> None:
        """Hands a channel and shared memory to a new worker."""
        with self._lock:
            for _ in range(2):
                control = self._started()
                try:
                    socket.send_fds(control, [b"fork"], [channel, memory])
                except (BrokenPipeError, ConnectionResetError):
                    control.close()
                    self._control = None
                else:
                    return
        raise server_gone()

    def _started(self) -> socket.socket:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                _spawn(theirs.fileno())
            self._control = ours
            atexit.register(ours.close)
        return self._control


_SERVER = _Server()


def start_decoder_server() -> None:
    """Starts the process that decoder workers are forked from, if it does not run yet.

    Raises:
        ResourceError: it cannot be started.
    """
    _SERVER.start()


def fork_decoder(channel: int, memory: int) -> None:
    """Starts a decoder worker.

    Args:
        channel: Descriptor of the socket that it answers on.
        memory: Descriptor of the memory that it takes bytes from and leaves views in.

    Raises:
        ResourceError: the server cannot be started, or has ended twice.
    """
    _SERVER.fork(channel, memory)


def server_gone() -> ResourceError:
    """Returns the error of a server that ends again and again."""
    return ResourceError(
        "the process that starts decoders has ended, twice",
        hint=f"{sys.executable} -m {_PROCESS} < /dev/null   (says why)",
    )


def _spawn(control: int) -> None:
    """Starts a fresh interpreter, because a fork of one with threads is not safe."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        # More threads would be lost in its forks, and none of them is wanted.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    command = [sys.executable, "-P", "-W", "ignore", "-m", _PROCESS]
    try:
        os.posix_spawn(
            sys.executable,
            command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, control, 0),
                # Who reads our output waits for all that hold it, and this one may still be
                # importing when we have gone. libjpeg's and libtiff's complaints go there too;
                # what counts of them comes as an error.
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            # Ctrl-C and the terminal's end go to all its processes; this one ends with its owner.
            setsigmask=[signal.SIGINT, signal.SIGHUP],
        )
    except OSError as error:
        raise ResourceError(f"no process for decoding can be started: {error}") from error
