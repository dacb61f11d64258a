"""A process that has imported everything forks one child per command and says what it cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

REPO = Path(__file__).resolve().parents[2]

_SERVER = """
import json, os, resource, signal, sys, traceback, warnings
warnings.simplefilter("ignore")
import ci2p_cache.previews, ci2p_cache.cache.verify, ci2p_cache.cache.sample_card
import ci2p_cache.training.run, ci2p_cache.encoding.whole, ci2p_cache.report.plots, zarr
from ci2p_cache.cli.app import run_command
from ci2p_cache.images.decoders import start_decoder_server
start_decoder_server()

def peak(name="VmHWM"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

def child(job):
    signal.alarm(90)
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    limit = peak("VmSize") + 6 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, code = peak(), 0
    sys.argv = ["ci2p-cache", *job["argv"]]
    try:
        run_command()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    with open(job["cost"], "w") as file:
        file.write(str(peak() - before))
    os._exit(code)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ran:
    """What a command ended with."""

    code: int
    out: str
    err: str
    grown_bytes: int
    """Peak memory above that of the process that had only imported."""


class Arena:
    """Runs `ci2p-cache` commands in forked children; importing torch 100 times would take long."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, *argv: Any) -> Ran:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        files = {name: self._folder / name for name in ("out", "err", "cost")}
        for path in files.values():
            path.unlink(missing_ok=True)
        job = {"argv": [str(arg) for arg in argv]} | {n: str(p) for n, p in files.items()}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        cost = int(files["cost"].read_text()) if files["cost"].exists() else 2**62
        out, err = (files[name].read_text("utf-8", "replace") for name in ("out", "err"))
        return Ran(code, out, err, cost)
