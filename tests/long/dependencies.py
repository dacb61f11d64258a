"""The lowest and the newest versions that pyproject.toml allows, tried on each Python.

::

    pyproject.toml -> uv resolves -> requirements -> an environment per Python and end of the range
        -> doctor, demo, both stages, tests
        -> every environment reads, and trains on, the cache of every other

All environments have to read equal batches from each cache. Those with the same torch, torchvision
and Pillow have to write the same bytes and to lose the same in training.

uv comes from pip, and installs wheels alone. What is resolved is the project with its extras
`test`, `remote`, `ray` and `export`; a floor that no release satisfies, or that another package
rules out, is named, for it promises what no one can install. The extras `bench` and `systems` are
for people who measure: they are not installed, but all extras together have to resolve.

python tests/long/dependencies.py [--python PYTHON ...] [--versions {lowest,newest} ...]
    [--keep FOLDER] [--only-resolve] [--tests TESTS ...]
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

EXTRAS = ("test", "remote", "ray", "export")

SELECTION = (
    *("cli/test_completion.py", "cli/test_doctor.py", "images/test_decode.py"),
    *("images/test_tars.py", "models/test_models.py", "cache/test_zarr_shards.py"),
    *("cache/test_format.py", "encoding/test_convert.py", "report/test_report.py"),
    # The extras: s3fs and aiohttp, onnx, ray.
    *("images/test_remote_sources.py", "inference/test_export.py", "encoding/test_cluster.py"),
)
"""Tests that, with the walk, call every direct dependency; those marked slow are left out."""

WALK = (
    "doctor {0}",
    "demo --folder {0}/demo",
    "encode {1} --out {0}/shards --encoder bundled --size 64 --format both",
    "verify {0}/shards",
    "train {0}/shards --model vitds_tiny --epochs 1 --runs {0}/runs --name a",
    "evaluate {0}/runs/a",
    "inspect {0}/shards --picture {0}/look.png",
    "report {0}/runs/a {0}/shards --out {0}/report.html",
    "export {0}/runs/a --out {0}/model.onnx",
)
"""Both stages and what looks at them; {0} is the environment's folder, {1} the pictures."""

OF_VERSIONS = {"cache.json", "checksums.sha256", "commits"}
"""What of a cache says which versions made it, or holds the digest of what does."""

FREE_BYTES = 20e9
"""An environment with torch for CUDA takes 6 GB, and as much while its archives are unpacked."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    kinds = ("lowest", "newest")
    parser.add_argument("--versions", nargs="+", default=kinds, choices=kinds, help="one or both")
    parser.add_argument("--tests", nargs="*", default=SELECTION, help="in tests/; `.` for all")
    parser.add_argument("--only-resolve", action="store_true", help="print the versions only")
    parser.add_argument("--keep", type=Path, help="build the environments here, and keep them")
    parser.add_argument("--inside", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return inside(*arguments.inside)
    with tempfile.TemporaryDirectory(prefix="dependencies-") as temporary:
        folder = (arguments.keep or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        pairs = [(python, kind) for kind in arguments.versions for python in arguments.python]
        trials, failed = [], []
        for python, kind in pairs:
            trial = Trial(folder, python, kind)
            failed += trial.resolve()
            if arguments.only_resolve:
                continue
            trial.install()
            failed += trial.try_out(arguments.tests)
            if (trial.folder / "shards" / "cache.json").is_file():
                trials.append(trial)
        found = {trial.name: trial.look(trials) for trial in trials}
        failed += differences(found)
        print(f"held against each other: {', '.join(found) or 'none'}")
    print("\n".join(f"FAILED: {each}" for each in failed) or "all passed")
    return int(bool(failed))


class Trial:
    """An environment of its own, with uv in it.

    Args:
        root: Where everything goes: environments, uv's archives, pictures, caches.
        python: The interpreter, by path or name.
        kind: lowest or newest.
    """

    def __init__(self, root: Path, python: str, kind: str) -> None:
        said = subprocess.run(
            [python, "-c", "import platform; print(platform.python_version())"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        found = os.statvfs(root)
        if found.f_bavail * found.f_frsize < FREE_BYTES:
            raise SystemExit(f"{root} has less than {FREE_BYTES / 1e9:.0f} GB free")
        self.name = f"Python {said}, {kind}"
        self.kind = kind
        self.pictures = root / "pictures"
        self.folder = root / f"{said}-{kind}"
        self._markers = {**default_environment(), "python_version": said.rpartition(".")[0]}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
            # One file system, so that uv links what it unpacked.
            "UV_CACHE_DIR": str(root / "uv"),
            "UV_HTTP_TIMEOUT": "300",
            "VIRTUAL_ENV": str(self.folder / "venv"),
            "PATH": f"{self.folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        # A proxy's certificate that pip was told of.
        if "PIP_CERT" in os.environ:
            self.environment.setdefault("SSL_CERT_FILE", os.environ["PIP_CERT"])
        print(f"== {self.name}", flush=True)
        subprocess.run([python, "-m", "venv", str(self.folder / "venv")], check=True)
        self.check("python", "-m", "pip", "install", "--quiet", "uv")

    def run(self, *command: str) -> int:
        """Runs a program of the environment in the repository; returns its exit status."""
        print("$", *command, flush=True)
        done = subprocess.run(
            [str(self.folder / "venv" / "bin" / command[0]), *command[1:]],
            cwd=ROOT,
            env=self.environment,
            check=False,
        )
        return done.returncode

    def check(self, *command: str) -> None:
        """Runs a program as `run` does, and ends all where it fails."""
        if self.run(*command):
            raise SystemExit(f"failed: {' '.join(command)}")

    def resolve(self) -> list[str]:
        """Finds every package's version, the indirect ones' too; returns what cannot be had."""
        command = (
            *("uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header"),
            *("--only-binary", ":all:"),
            *("--resolution", "highest" if self.kind == "newest" else "lowest-direct"),
            *("pyproject.toml", "--output-file"),
        )
        extras = (word for extra in EXTRAS for word in ("--extra", extra))
        self.check(*command, str(self.folder / "resolved.txt"), *extras)
        lines = (self.folder / "resolved.txt").read_text("utf-8").split()
        pairs = (line.partition("==") for line in lines)
        self.versions = {name: Version(version) for name, _, version in pairs}
        missed = print_versions(self.versions, self._markers, newest=self.kind == "newest")
        failed = [f"{self.name}: floor that cannot be had: {each}" for each in missed]
        if self.run(*command, str(self.folder / "together.txt"), "--all-extras"):
            failed.append(f"{self.name}: all extras together")
        return failed

    def install(self) -> None:
        """Installs what was resolved, and the project as pip would from a clone."""
        started = time.monotonic()
        resolved = str(self.folder / "resolved.txt")
        self.check("uv", "pip", "install", "--quiet", "--only-binary", ":all:", "-r", resolved)
        self.check("uv", "pip", "install", "--quiet", "--no-deps", "-e", ".")
        print(f"installed in {time.monotonic() - started:.0f} s", flush=True)

    def try_out(self, tests: list[str]) -> list[str]:
        """Runs commands and tests; returns what failed."""
        ends = {
            "pip check": self.run("uv", "pip", "check"),
            "walk": self.inside(self.pictures),
            "tests": self.run(
                *("python", "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "not slow"),
                *("--durations=0", "--durations-min=20"),
                *(f"tests/{name}" for name in tests),
            ),
        }
        return [f"{self.name}: {name}" for name, code in ends.items() if code]

    def look(self, trials: list[Trial]) -> dict[str, Any]:
        """Reads and trains on every trial's cache; returns what came of it, to be compared."""
        if self.inside(self.pictures, *(trial.folder for trial in trials)):
            raise SystemExit(f"{self.name} cannot read or train on the others' caches")
        found: dict[str, Any] = json.loads((self.folder / "found.json").read_text("utf-8"))
        names = ("torch", "torchvision", "pillow")
        return {**found, "like": [str(self.versions[name]) for name in names]}

    def inside(self, *folders: Path) -> int:
        words = ("python", __file__, "--inside", str(self.folder), *map(str, folders))
        return self.run(*words)


def inside(folder: Path, pictures: Path, *others: Path) -> int:
    """What runs within an environment: the walk; with other environments' folders, their caches."""
    sys.path.insert(0, str(ROOT))
    return look(folder, others) if others else walk(folder, pictures)


def command(line: str) -> None:
    """Runs a command in this process; SystemExit where it fails."""
    from ci2p_cache.cli.app import run_command

    print("$ ci2p-cache", line, flush=True)
    sys.argv = ["ci2p-cache", *line.split()]
    try:
        run_command()
    except SystemExit as ended:
        if ended.code:
            raise


def walk(folder: Path, pictures: Path) -> int:
    """Runs both stages with the packages of this environment, and reads the cache as others do."""
    import webdataset
    import zarr

    from ci2p_cache.pictures.drawn import write_pictures

    if not pictures.exists():
        list(write_pictures(pictures, per_class=8))
    for line in WALK:
        command(line.format(folder, pictures))
    latents = zarr.open_array(folder / "shards/latents.zarr/train/latents", mode="r")
    tars = sorted(map(str, (folder / "shards" / "tar").glob("train-*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    print(f"zarr reads {latents.shape}, webdataset {len(samples)} samples")
    return int(latents.shape[0] != len(samples))


def look(folder: Path, others: tuple[Path, ...]) -> int:
    """Writes found.json: files of the own cache, and batches and losses from every one."""
    import ci2p_cache as cc

    found: dict[str, Any] = {
        "files": {
            path.relative_to(folder / "shards").as_posix(): sha256(path.read_bytes())
            for path in sorted((folder / "shards").rglob("*"))
            if path.is_file() and path.relative_to(folder / "shards").parts[0] not in OF_VERSIONS
        },
        "losses": {"demo": losses(folder / "demo/runs/demo")},
        "batches": {},
    }
    for other in others:
        loader = cc.LatentLoader(
            cc.open_cache(other / "shards")["train"], batch_size=7, seed=1, device="cpu"
        )
        found["batches"][other.name] = [
            [sha256(part.numpy().tobytes()) for part in (batch.latents, batch.labels, batch.rows)]
            for _ in range(2)
            for batch in loader
        ]
        command(
            f"train {other}/shards --model vitds_tiny --epochs 1 --runs {folder}/others "
            f"--name {other.name}"
        )
        found["losses"][other.name] = losses(folder / "others" / other.name)
    (folder / "found.json").write_text(json.dumps(found))
    return 0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def losses(run: Path) -> list[list[str]]:
    """Both losses of each epoch of a run, with all their digits."""
    with (run / "summary.csv").open(newline="") as file:
        return [[row["train_loss"], row["val_loss"]] for row in csv.DictReader(file)]


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """Says in what environments differ that have to be alike."""
    told = []
    for (name, one), (other_name, other) in combinations(found.items(), 2):
        for part in ("batches", "files", "losses")[: 3 if one["like"] == other["like"] else 1]:
            pairs = {key: (one[part].get(key), other[part].get(key)) for key in one[part]}
            keys = [key for key, (ours, theirs) in pairs.items() if ours != theirs]
            told += [f"{part} of {key}: {name} and {other_name} differ" for key in keys]
    return told


def print_versions(
    versions: dict[str, Version], markers: dict[str, Any], *, newest: bool
) -> list[str]:
    """Prints the direct dependencies with their versions; returns the floors that were not met."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    missed = []
    for wanted in sorted({line: Requirement(line) for line in lines}.values(), key=str):
        if wanted.marker is not None and not wanted.marker.evaluate(markers):
            continue
        version = versions[canonicalize_name(wanted.name)]
        floors = [Version(each.version) for each in wanted.specifier if each.operator == ">="]
        word = ""
        if not newest and any(version != floor for floor in floors):
            word = "  <- not its floor"
            missed.append(str(wanted))
        print(f"  {wanted!s:32} {version}{word}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
