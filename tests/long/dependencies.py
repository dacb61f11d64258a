"""The lowest, or the newest, versions that pyproject.toml allows, installed and tried out.

::

    pyproject.toml -> uv resolves -> requirements -> a fresh environment -> commands, tests

uv comes from pip. What is resolved is the project with its extras `test`, `remote`, `ray` and
`export`; a floor that no release satisfies, or that another package rules out, is named, for it
promises what nobody can install. The extra `bench` is left out: it is for people who measure.

python tests/long/dependencies.py [--newest] [--keep FOLDER] [--only-resolve] [TESTS ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

EXTRAS = ("test", "remote", "ray", "export")

SELECTION = (
    *("test_completion.py", "test_doctor.py", "test_decode.py", "test_tars.py", "test_models.py"),
    *("test_zarr_shards.py", "test_convert.py", "test_report.py"),
    # The extras: s3fs and aiohttp, onnx, ray.
    *("test_remote_sources.py", "test_export.py", "test_cluster.py"),
)
"""Tests that, with the walk, call every direct dependency; those marked slow are left out."""

WALK = (
    "encode {0}/pictures --out {0}/shards --encoder bundled --size 64 --format both",
    "verify {0}/shards",
    "train {0}/shards --model vitds_tiny --epochs 1 --runs {0}/runs --name a",
    "evaluate {0}/runs/a",
    "inspect {0}/shards --picture {0}/look.png",
    "report {0}/runs/a {0}/shards --out {0}/report.html",
    "export {0}/runs/a --out {0}/model.onnx",
)
"""Both stages and what looks at them; `demo` does the same, and takes minutes."""

FREE_BYTES = 20e9
"""An environment with torch for CUDA takes 6 GB, and as much while its archives are unpacked."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", default=SELECTION, help="files in tests/")
    parser.add_argument("--newest", action="store_true", help="not the lowest versions")
    parser.add_argument("--only-resolve", action="store_true", help="print the versions only")
    parser.add_argument("--keep", type=Path, help="build the environment here, and keep it")
    parser.add_argument("--walk", type=Path, help="only run the commands, here, in this folder")
    arguments = parser.parse_args()
    if arguments.walk:
        return walk(arguments.walk)
    with tempfile.TemporaryDirectory(prefix="dependencies-") as temporary:
        folder = arguments.keep or Path(temporary)
        found = os.statvfs(folder.parent)
        if found.f_bavail * found.f_frsize < FREE_BYTES:
            print(f"{folder.parent} has less than {FREE_BYTES / 1e9:.0f} GB free")
            return 1
        trial = Trial(folder)
        started = time.monotonic()
        versions = trial.resolve(newest=arguments.newest)
        missed = print_versions(versions, newest=arguments.newest)
        if arguments.only_resolve:
            return int(bool(missed))
        trial.install()
        print(f"installed in {time.monotonic() - started:.0f} s", flush=True)
        ends = {
            "pip check": trial.run("uv", "pip", "check"),
            "walk": trial.run("python", __file__, "--walk", str(folder / "walk")),
            "tests": trial.run(
                *("python", "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "not slow"),
                *("--durations=0", "--durations-min=20"),
                *(f"tests/{name}" for name in arguments.tests),
            ),
        }
    failed = [name for name, code in ends.items() if code]
    kind = "newest" if arguments.newest else "lowest"
    told = f"FAILED: {', '.join(failed)}" if failed else "all passed: " + ", ".join(ends)
    print(f"{kind} versions, Python {sys.version.split()[0]}: {told}")
    if missed:
        print(f"floors that cannot be had: {', '.join(missed)}")
    return int(bool(failed or missed))


class Trial:
    """An environment of its own, with uv in it.

    Args:
        folder: Where everything goes: environment, uv's cache, the resolved list.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
            # One file system, so that uv links what it unpacked.
            "UV_CACHE_DIR": str(folder / "uv"),
            "UV_HTTP_TIMEOUT": "300",
            "VIRTUAL_ENV": str(folder / "venv"),
            "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        # A proxy's certificate that pip was told of.
        if "PIP_CERT" in os.environ:
            self.environment.setdefault("SSL_CERT_FILE", os.environ["PIP_CERT"])
        venv.create(folder / "venv", with_pip=True)
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

    def resolve(self, *, newest: bool) -> dict[str, Version]:
        """Returns every package's version, the indirect ones' too, by canonical name."""
        self.check(
            *("uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header"),
            *("--resolution", "highest" if newest else "lowest-direct"),
            *(word for extra in EXTRAS for word in ("--extra", extra)),
            *("--output-file", str(self.folder / "resolved.txt"), "pyproject.toml"),
        )
        lines = (self.folder / "resolved.txt").read_text("utf-8").split()
        return {name: Version(version) for name, _, version in (x.partition("==") for x in lines)}

    def install(self) -> None:
        """Installs what was resolved, and the project as pip would from a clone."""
        resolved = str(self.folder / "resolved.txt")
        self.check("uv", "pip", "install", "--quiet", "-r", resolved)
        self.check("uv", "pip", "install", "--quiet", "--no-deps", "-e", ".")


def walk(folder: Path) -> int:
    """Runs both stages with the packages of this environment, and reads the cache as others do."""
    sys.path.insert(0, str(ROOT))
    import webdataset
    import zarr

    from ci2p_cache.cli.app import run_command
    from ci2p_cache.demo_pictures import write_pictures

    list(write_pictures(folder / "pictures", per_class=8))
    for line in WALK:
        command = line.format(folder).split()
        print("$ ci2p-cache", *command, flush=True)
        sys.argv = ["ci2p-cache", *command]
        try:
            run_command()
        except SystemExit as ended:
            if ended.code:
                return int(ended.code)
    latents = zarr.open_array(folder / "shards/latents.zarr/train/latents", mode="r")
    tars = sorted(map(str, (folder / "shards" / "tar").glob("train-*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    print(f"zarr reads {latents.shape}, webdataset {len(samples)} samples")
    return int(latents.shape[0] != len(samples))


def print_versions(versions: dict[str, Version], *, newest: bool) -> list[str]:
    """Prints the direct dependencies with their versions; returns the floors that were not met."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    missed = []
    for wanted in sorted({line: Requirement(line) for line in lines}.values(), key=str):
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
