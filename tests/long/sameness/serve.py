"""The warm process of one tree: imports its package once, then forks a child for each request.

It knows two things of the package: its name, and that `python -m` runs it. It imports every module
below it, so that no child spends seconds on that; a module that cannot be imported is left to the
command that needs it. Requests and answers are lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PACKAGE = "ci2p_cache"

_LATE = (
    *("compressai", "compressai.zoo", "matplotlib.pyplot", "onnxscript", "onnx"),
    *("tensorboard.backend.event_processing.event_accumulator", "timm", "torch.onnx", "zarr"),
    *("torch._dynamo", "torch.export", "torch.utils.tensorboard", "torchvision", "yaml"),
    *("torch.distributed", "torch.utils.flop_counter", "pyarrow.parquet", "rich.console"),
)
"""What commands import when they need it; importing it here saves time and decides nothing.

onnxruntime is not here: it starts a thread, which a fork would lose.
"""


def _imported() -> str:
    """Imports the package and all below it; returns where it is."""
    package = importlib.import_module(PACKAGE)
    names = [each.name for each in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.", _nothing)]
    for name in (*_LATE, *(name for name in names if not name.endswith("__main__"))):
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name} is not imported beforehand: {error!r}", file=sys.stderr)
    return str(package.__file__)


def _nothing(_: str) -> None:
    """What `walk_packages` calls for a package that cannot be imported."""


def _start_decoders() -> None:
    """Starts the process that decodes images, if this tree has one that can be shared.

    Without it each command that reads images starts its own, which takes seconds.
    """
    for name, module in list(sys.modules.items()):
        start = getattr(module, "start_decoder_server", None)
        if name.startswith(f"{PACKAGE}.") and callable(start):
            start()
            return


def _child(job: dict[str, Any]) -> int:
    """Does what was asked for, with files for streams; returns the exit code."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, job["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o644), descriptor)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    code = 0
    try:
        if "call" in job:
            api = importlib.import_module("tests.long.sameness.api")
            assert job["call"] in api.__all__, job["call"]
            print(json.dumps(getattr(api, job["call"])(**job["arguments"])))
        else:
            sys.argv = ["ci2p-cache", *job["words"]]
            runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _serve(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a request in a child; returns its exit code (124: it took too long) and its cost."""
    child = os.fork()
    if child == 0:
        os._exit(_child(job))
    end, stop_at = time.monotonic() + job["limit"], job.get("stop_at", "")
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            cpu = used.ru_utime + used.ru_stime
            return {"code": os.waitstatus_to_exitcode(status), "cpu": cpu}
        if stop_at and stop_at in _text(job["err"]):
            os.kill(child, signal.SIGINT)
            stop_at = ""
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"code": 124, "cpu": job["limit"]}
        time.sleep(0.01)


def _text(path: str) -> str:
    return Path(path).read_text("utf-8", "replace") if Path(path).exists() else ""


def _threads() -> set[str]:
    """Names of the threads beside the main one; jemalloc's minds forks by itself."""
    tasks = Path("/proc/self/task")
    names = {(task / "comm").read_text().strip() for task in tasks.iterdir()
             if task.name != str(os.getpid())}  # fmt: skip
    return names - {"jemalloc_bg_thd"}


def main() -> None:
    """Serves requests until the input ends."""
    place = _imported()
    _start_decoders()
    # What the collector does not look at stays shared with the children.
    gc.collect()
    gc.freeze()
    print(json.dumps({"package": place, "threads": sorted(_threads())}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
