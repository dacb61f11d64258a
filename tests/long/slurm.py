"""The launch files of pipelines/cluster under a real Slurm: a node drained, a node lost, resumed.

Slurm's own daemons, as Debian packages them: munged and slurmctld on `head`, and a slurmd on each
of four machines made of namespaces (tests/support/machines.py). Each machine has its own mount of
the folder that they share, so flock does not reach from one to another, as on an NFS without locks.

- `slurm_encode.sh` as an array of eight tasks, each with its range of the shards, and no plan made
  beforehand. One node is drained and its task requeued; another is lost with all its processes.
- `slurm_train.sh` on two nodes, one of which is lost in mid-run.

In the end the cache has the bytes of one `encode`, each shard was committed once, and training gave
the numbers of two ranks on one machine, to the last bit. Needs root and, of Debian, slurmctld,
slurmd, slurm-client, munge, bindfs and iproute2.

python tests/long/slurm.py
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ci2p_cache as cc
from tests.support.commands import REPO
from tests.support.encode_bench import tree
from tests.support.machines import Machine, machines, run_apart
from tests.support.pictures import write_image_folder
from tests.support.rank_jobs import launch, numbers

LOST_SECONDS = 75
"""After so long without a word Slurm takes a node for lost; by default 300."""
LIMIT_SECONDS = 900
TASKS = 8
_CONFIG = """\
ClusterName=ci2p
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdTimeout={lost_seconds}
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=15
NodeName=node[1-4] CPUs=16 Gres=gpu:4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def main() -> int:
    run_apart(["munged", "slurmctld", "slurmd", "sbatch", "bindfs"])
    print(_told("slurmctld", "-V").strip(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = cc.EncodeOptions(
            encoder="bundled", size=64, shard_samples=2, devices="cpu:1", workers=1
        )
        source = write_image_folder(folder / "src", {"ant": 480, "bee": 480})
        cc.encode(source, folder / "one", options)
        nodes = _cluster(folder)
        problems = [*_encode(folder, source, nodes), *_train(folder, nodes)]
        subprocess.run(["umount", "--lazy", folder / "mnt"], check=True)
    for problem in problems:
        print(f"  {problem}")
    print("0 problems" if not problems else f"{len(problems)} problems")
    return int(bool(problems))


def _cluster(folder: Path) -> dict[str, Machine]:
    """Starts Slurm on `head` and four nodes, each with its mount of the folder `shared`."""
    nodes = machines(folder, 4)
    shared, at = folder / "shared", folder / "mnt"
    for path in (shared, at, folder / "state", folder / "bin"):
        path.mkdir()
    config, key = folder / "slurm.conf", folder / "munge.key"
    config.write_text(_CONFIG.format(folder=folder, lost_seconds=LOST_SECONDS))
    # What nodes take for their GPUs; torch sees none.
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
    for number in range(4):
        os.mknod(folder / f"gpu{number}", 0o020666, os.makedev(1, 3))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    command = folder / "bin" / "ci2p-cache"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore -m ci2p_cache "$@"\n')
    command.chmod(0o755)
    torchrun = folder / "bin" / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    os.environ |= {
        "SLURM_CONF": str(config), "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    munge = ("--force", "--socket", folder / "munge.socket", "--key-file", key)
    files = ("--pid-file", folder / "munge.pid", "--log-file", folder / "munge.log",
             "--seed-file", folder / "munge.seed")  # fmt: skip
    subprocess.run(["munged", *munge, *files], check=True)
    _daemon(folder, "slurmctld", "slurmctld", "-D")
    subprocess.run(["bindfs", shared, at], check=True)
    for node in nodes:
        (folder / f"spool-{node.name}").mkdir()
        node.run("bindfs", shared, at)
        _daemon(folder, node.name, *node.command("slurmd", "-D"))
    _wait(lambda: _told("sinfo", "--noheader", "--format=%T %D") == "idle 4\n", "four idle nodes")
    _show("sinfo")
    return {node.name: node for node in nodes}


def _daemon(folder: Path, name: str, *command: str) -> None:
    log = (folder / f"{name}.log").open("w")
    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _encode(folder: Path, source: Path, nodes: dict[str, Machine]) -> Iterator[str]:
    out = folder / "mnt" / "out"
    script = REPO / "pipelines" / "cluster" / "slurm_encode.sh"
    options = ("--encoder", "bundled", "--size", 64, "--shard-samples", 2, "--device", "cpu:1",
               "--workers", 1)  # fmt: skip
    array = ("--array", f"1-{TASKS}", "--output", folder / "encode-%a.txt")
    with _watched(folder / "shared" / "out" / "commits") as commits:
        print(_told("sbatch", *array, script, source, out, *options).strip(), flush=True)
        drained = _busy_node(out, nodes)
        task = _told("squeue", "--noheader", "--format=%i", "--nodelist", drained).split()[0]
        _show("scontrol", "update", f"nodename={drained}", "state=drain", "reason=maintenance")
        _show("scontrol", "requeue", task)
        _show("ci2p-cache", "status", out)
        lost = _busy_node(out, {name: node for name, node in nodes.items() if name != drained})
        nodes.pop(lost).lose()
        print(f"{lost} is lost", flush=True)
        _show("ci2p-cache", "status", out)
        _show("squeue", "--array")
        _wait(lambda: "down" in _told("sinfo", "--noheader", "--format=%T"), f"{lost} down")
        _show("sinfo")
        _show("scontrol", "update", f"nodename={drained}", "state=resume")
        _wait(lambda: not _told("squeue", "--noheader"), "the end of the array")
    _show("ci2p-cache", "status", out)
    output = [path.read_text() for path in sorted(folder.glob("encode-*.txt"))]
    ends = Counter("interrupted" if "interrupted" in text else "whole" for text in output)
    whole, found = tree(folder / "one"), tree(folder / "shared" / "out")
    shards = sum(
        name.startswith("commits/") and digest != "folder" for name, digest in whole.items()
    )
    print(
        f"encode: {shards} shards by {TASKS} tasks, {len(commits)} commit records written; "
        f"{ends['interrupted']} task ended by SIGTERM at first; "
        f"{'same' if whole == found else 'other'} bytes as one process",
        flush=True,
    )
    if whole != found:
        names = whole.keys() | found.keys()
        others = sorted(name for name in names if whole.get(name) != found.get(name))
        yield f"other bytes: {others[:5]} {output}"
    if len(commits) != shards:
        yield f"{len(commits)} commit records were written for {shards} shards"
    if ends["interrupted"] != 1:
        yield f"SIGTERM did not reach the requeued task: {output}"


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[set[tuple[str, int]]]:
    """Gives (name, inode) of every file that is in a folder while the block runs."""
    seen: set[tuple[str, int]] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            with contextlib.suppress(OSError):
                seen.update((entry.name, entry.inode()) for entry in os.scandir(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
        time.sleep(0.1)
    finally:
        ended.set()
        thread.join()


def _busy_node(out: Path, nodes: dict[str, Machine]) -> str:
    """Waits until a node has committed some of its range, and not the last."""
    found: list[str] = []

    def look() -> bool:
        with contextlib.suppress(cc.errors.CacheError):
            found.extend(
                each.host
                for each in cc.status(out).working
                if each.host in nodes and 0 < each.committed < each.shards - 4
            )
        return bool(found)

    _wait(look, "a node in the middle of its range")
    return found[0]


def _train(folder: Path, nodes: dict[str, Machine]) -> Iterator[str]:
    runs = folder / "mnt" / "runs"
    words = ("--model", "vitds_tiny", "--epochs", 3, "--batch-size", 32, "--save-every", 1,
             "--device", "cpu", "--workers", 1, "--name", "run", "--out")  # fmt: skip
    alone = launch(2, "ci2p_cache", "train", folder / "one", *words, folder / "alone")
    output, _ = alone.communicate(timeout=LIMIT_SECONDS)
    assert alone.returncode == 0, output
    script, log = REPO / "pipelines" / "cluster" / "slurm_train.sh", folder / "train.txt"
    fewer = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={log}")
    cache = folder / "mnt" / "out"
    print(_told("sbatch", *fewer, script, cache, *words, runs).strip(), flush=True)
    run = folder / "shared" / "runs" / "run"
    _wait(lambda: bool(list(run.glob("checkpoints/epoch-0000-step*"))), "a checkpoint", log)
    _show("squeue")
    used = _told("squeue", "--noheader", "--format=%N").strip()
    names = _told("scontrol", "show", "hostnames", used).split()
    nodes.pop(names[-1]).lose()
    print(f"{names[-1]} is lost", flush=True)
    _wait(lambda: not _told("squeue", "--noheader"), "the end of the training", log)
    text = log.read_text(errors="replace")
    same = (run / "summary.csv").exists() and numbers(run) == numbers(folder / "alone" / "run")
    resumed = text.count("continuing after")
    print(f"train: resumed {resumed} time; {'same' if same else 'other'} numbers as on one machine")
    if not same or resumed != 1:
        yield f"train: {text[-3000:]}"


def _told(*words: object) -> str:
    ran = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{words}: {ran.stdout} {ran.stderr}"
    return ran.stdout


def _show(*words: object) -> None:
    """Runs a command and prints it as in a terminal."""
    print(f"$ {' '.join(map(str, words))}\n{_told(*words)}", end="", flush=True)


def _wait(is_so: Callable[[], bool], what: str, log: Path | None = None) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while not is_so():
        if time.monotonic() > end:
            output = log.read_text() if log is not None and log.exists() else ""
            raise AssertionError(f"no {what} after {LIMIT_SECONDS} s: {output[-3000:]}")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
