"""What a whole process is set to: by our commands and workers, never by a library call."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

__all__ = ["tune_process"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def tune_process(devices: str = "auto") -> None:
    """Sets the whole process up for encoding or training: open files, and the allocator on a CPU.

    Commands do this. Library functions leave the caller's process alone; a program of your own can
    call it before its first tensor.

    On a CPU it keeps glibc from mapping and faulting every large tensor anew. Training allocates
    activations of tens of megabytes, which glibc by default maps on each call: a third or more of
    the time goes into page faults (eight images at once through g_a: 38 ms each, and 27 with these
    settings). With them freed blocks stay in the heap and are used again.

    The number of files that may be open rises to what the system allows. The soft limit is often
    1,024, for the sake of programs that use `select`, and ImageNet has 1,252 shards: opening and
    closing them all the time makes reading five times as slow.

    Args:
        devices: Where it will compute: as for `encode` or `train`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Known before torch is imported, for which a decoder need not wait.
    if devices.startswith("cuda") or (devices == "auto" and Path("/dev/nvidiactl").exists()):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # It is not glibc.
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # A thread's own arena cannot hold blocks over 64 MB; the main arena can.
    mallopt(_M_ARENA_MAX, 1)
