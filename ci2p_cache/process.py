"""What a whole process is set to: by our commands and workers, never by a library call."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["give_back_large_blocks", "put_off_compiler", "tune_process"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def tune_process(devices: str = "auto") -> None:
    """Sets the whole process up for encoding or training: open files, and the allocator on a CPU.

    Commands do this. Library functions leave the caller's process alone; a program of your own can
    call it before its first tensor.

    On a CPU it keeps glibc from mapping and faulting every large tensor again. Training allocates
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
    # A thread's own arena cannot hold blocks over 64 MB; the main arena can.
    _set_allocator({_M_MMAP_THRESHOLD: 2**30, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1})


def give_back_large_blocks() -> None:
    """Has freed memory returned to the system, in a fork of a process that keeps it.

    The bounds are those that glibc itself comes to after a large block.
    """
    _set_allocator({_M_MMAP_THRESHOLD: 2**25, _M_TRIM_THRESHOLD: 2**26})


def _set_allocator(settings: dict[int, int]) -> None:
    # Another C library than glibc may have none.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for setting, value in settings.items():
            mallopt(setting, value)


class _PutOff(ModuleType):
    """Stands for a module until somebody uses more of it than was put in here."""

    def __getattr__(self, name: str) -> Any:
        # Who looks through all modules asks for a __file__; a package's __path__ is for the others
        # in it.
        if name.startswith("__") and (self.__name__, name) != (_COMPILER[0], "__path__"):
            raise AttributeError(name)
        for each in _COMPILER:
            if isinstance(sys.modules.get(each), _PutOff):
                del sys.modules[each]
        return getattr(importlib.import_module(self.__name__), name)


_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def put_off_compiler() -> None:
    """Keeps torch's compiler, a second of imports, out of this process until something compiles.

    torchvision and each optimiser of torch import `torch._dynamo`, for functions that do nothing
    where nothing is compiled: to mark what it leaves alone, and to break its graphs. Whoever asks
    for anything else gets the module itself. Commands do this, library functions do not.
    """
    if "torch._dynamo" in sys.modules:
        return
    dynamo, utils = (_PutOff(name) for name in _COMPILER)
    vars(utils).update(is_compile_supported=lambda *_: False)
    vars(dynamo).update(
        utils=utils,
        disable=lambda function, *_, **__: function,
        graph_break=lambda *_, **__: None,
    )
    sys.modules.update(zip(_COMPILER, (dynamo, utils), strict=True))
