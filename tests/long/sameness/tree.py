"""A tree of the project in a folder of its own, and the warm process that runs its commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["REPO", "Ended", "Tree", "check_out", "copy_here"]

REPO = Path(__file__).resolve().parents[3]

_PARTS = ("ci2p_cache", "pipelines", "pyproject.toml")
"""What of a tree is run; the tests stay those of this one."""


def check_out(commit: str, folder: Path) -> None:
    """Writes the package of a commit below a folder.

    Raises:
        ValueError: git does not know the commit.
    """
    folder.mkdir()
    archive = folder / "tree.tar"
    made = subprocess.run(
        ["git", "-C", REPO, "archive", "--format=tar", "-o", archive, commit, *_PARTS],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if made.returncode:
        raise ValueError(f"git has no tree of {commit!r} here: {made.stderr.strip()}")
    subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)
    archive.unlink()


def copy_here(folder: Path) -> None:
    """Copies this tree's package below a folder, so that edits meanwhile change nothing."""
    folder.mkdir()
    for name in _PARTS:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    """Exit code; the negative number of the signal that ended it, 124 where it took too long."""
    out: str
    """What it wrote to stdout."""
    err: str
    """What it wrote to stderr."""


class Tree:
    """The warm process of a tree; a context manager. Threads may share it: they take turns.

    Args:
        root: The folder that holds the package.
        scratch: Where caches of libraries and what children write are put.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root
        self._scratch = scratch
        self._turn = threading.Lock()
        self.cpu_seconds = 0.0
        """What all commands took of processors, without the process that decodes images."""

    def __enter__(self) -> Self:
        self._scratch.mkdir()
        kept = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("CI2P_CACHE_", "AWS_", "SLURM_", "PYTHON"))
        }  # fmt: skip
        environment = kept | {
            # This tree's package comes before any that is installed.
            "PYTHONPATH": os.pathsep.join((str(self.root), str(REPO))),
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
            **dict.fromkeys(
                ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
            ),
            "TMPDIR": str(self._scratch), "XDG_CACHE_HOME": str(self._scratch / "downloads"),
            "MPLCONFIGDIR": str(self._scratch / "matplotlib"), "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1",
            # As all commits before it draw; those do not look at this.
            "CI2P_CACHE_ENCODE_SPLIT": "hashed",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.long.sameness.serve"],
            cwd=self.root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def wait_until_warm(self) -> None:
        """Waits until everything is imported, and makes sure that it is this tree's.

        Raises:
            RuntimeError: another package was imported, or a thread runs that forks would lose.
        """
        hello = self._answer()
        if not Path(hello["package"]).is_relative_to(self.root):
            raise RuntimeError(f"{hello['package']} was imported, not the package of {self.root}")
        if hello["threads"]:
            raise RuntimeError(f"forks of {self.root} would lose the threads {hello['threads']}")

    def run(
        self,
        words: Sequence[object],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        stop_at: str = "",
        limit: float = 900.0,
    ) -> Ended:
        """Runs a command.

        Args:
            words: What follows `ci2p-cache`.
            folder: Where it runs.
            environment: What is added to the environment.
            stop_at: A text of stderr at which it gets a SIGINT; empty for none.
            limit: Seconds after which it is killed.
        """
        job = {"words": [str(word) for word in words], "stop_at": stop_at, "limit": limit}
        return self._ended(job, folder, environment)

    def call(self, function: str, folder: Path, arguments: Mapping[str, Any]) -> Ended:
        """Calls a function of `api.py` in this tree; stdout holds what it returns, as JSON."""
        job = {"call": function, "arguments": dict(arguments), "limit": 900.0}
        return self._ended(job, folder, None)

    def _ended(
        self, job: dict[str, Any], folder: Path, environment: Mapping[str, str] | None
    ) -> Ended:
        with self._turn:
            out, err = self._scratch / "out", self._scratch / "err"
            for path in (out, err):
                path.unlink(missing_ok=True)
            job |= {"folder": str(folder), "environment": dict(environment or {})}
            job |= {"out": str(out), "err": str(err)}
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
            self.cpu_seconds += answer["cpu"]
            told = (out.read_text("utf-8", "replace"), err.read_text("utf-8", "replace"))
        return Ended(answer["code"], *(text.replace(str(self.root), "TREE") for text in told))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm process of {self.root} died")
        return dict(json.loads(line))
