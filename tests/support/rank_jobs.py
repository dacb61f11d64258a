"""What each rank does in the tests of several ranks, how they are started, and what they leave.

As a rank this module does a list of jobs: one list for 2 ranks and one for 4.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver, TrainPlan
from tests.support.commands import REPO
from tests.support.warm import WarmParent

__all__ = [
    "IMAGE_MODEL",
    "do",
    "job",
    "launch",
    "main",
    "numbers",
    "processes_with",
    "rank_of",
    "run_jobs",
]

CLOCK = {"images_per_second", "wait_share", "epoch_seconds"}
IMAGE_MODEL = "vit_nano16"


class Recording(cc.LatentLoader):
    """Notes its batches, and lets something happen to this rank at some of them."""

    rows: list[tuple[list[int], list[int]]]
    events: dict[str, str]

    def __iter__(self) -> Iterator[cc.Batch]:
        for batch in super().__iter__():
            self.rows.append((batch.rows.tolist(), batch.global_rows.tolist()))
            match self.events.get(f"epoch {self.epoch} step {self.step - 1} rank {self.rank}"):
                case "poison":
                    batch.latents.fill_(float("nan"))
                case "stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                case "damage":
                    raise errors.ShardError("shard 7 is damaged")
                case "bug":
                    raise ZeroDivisionError("a bug")
            yield batch


class Notes(TrainObserver):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.plans: list[dict[str, Any]] = []

    def planned(self, plan: TrainPlan) -> None:
        self.plans.append(dataclasses.asdict(plan))

    def notice(self, text: str) -> None:
        self.notices.append(text)


def job(label: str, spec: cc.TrainSpec, *, run: str = "", **options: Any) -> dict[str, Any]:
    """What `do` takes; options are `events`, "epoch 0 step 2 rank 1" -> what happens there, and
    `cache`, the folder to train from. Models on images take the loader that `train` makes.
    """
    return {"label": label, "name": run or label, "spec": spec.to_dict()} | options


def do(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trains as a job says, as this rank; returns what was seen of it."""
    ranks, notes = Ranks.from_environment(), Notes()
    spec = cc.TrainSpec.from_dict(job["spec"])
    result: dict[str, Any] = {"notices": notes.notices, "plans": notes.plans}
    cache = folder / job.get("cache", "cache")
    reads_images = spec.model == IMAGE_MODEL
    with Recording(
        cc.open_cache(cache)["train"], batch_size=spec.batch_size, seed=spec.seed,
        threads=1, recycle=True, rank=ranks.rank, world_size=ranks.world_size,
    ) as loader:  # fmt: skip
        loader.rows, loader.events = [], job.get("events", {})
        try:
            summary = cc.train(
                cache, spec=spec, runs_dir=folder / "runs", name=job["name"], device="cpu",
                threads=1, loader=None if reads_images else loader, observers=[notes],
            )  # fmt: skip
            result["summary"] = summary.to_dict()
        except Exception as error:
            told = {"type": type(error).__name__, "text": str(error)}
            result["error"] = told | {"code": getattr(error, "exit_code", None)}
        result["rows"] = loader.rows
    return result


def launch(world_size: int, *arguments: object) -> subprocess.Popen[str]:
    """Starts torchrun with a module and its arguments; both streams go to one pipe."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(world_size), "-m", *map(str, arguments)),
    ]
    return subprocess.Popen(
        command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def run_jobs(
    warm: WarmParent, folder: Path, world_size: int, jobs: list[dict[str, Any]]
) -> dict[str, list[Any]]:
    """Lets `world_size` ranks do all jobs; returns for each job what each rank saw."""
    plan = folder / f"jobs-{world_size}.json"
    plan.write_text(json.dumps(jobs))
    ranks = warm.ranks(world_size, plan, module="tests.support.rank_jobs")
    told = [rank.wait(300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(told)
    results = [
        json.loads((folder / f"{plan.name}.{rank}").read_text()) for rank in range(world_size)
    ]
    return {job["label"]: [result[i] for result in results] for i, job in enumerate(jobs)}


def numbers(run: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """summary.csv without what depends on the clock, and the last weights and moments."""
    with (run / "summary.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]
    last = run / "checkpoints" / json.loads((run / "checkpoints/last.json").read_text())["last"]
    return rows, {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def processes_with(text: object) -> list[int]:
    """Processes, our own apart, in whose command line a text stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if str(text).encode() in line and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


def rank_of(pid: int) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")]
    return found[0] if found else None


def main() -> None:
    plan = Path(sys.argv[1])
    torch.set_num_threads(1)
    results = [do(job, plan.parent) for job in json.loads(plan.read_text())]
    plan.with_name(f"{plan.name}.{os.environ['RANK']}").write_text(json.dumps(results))
