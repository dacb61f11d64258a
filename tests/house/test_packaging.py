"""The wheel and the sdist: what is in them, what they say of themselves, and that they work.

Both are built with hatchling from this clone, the wheel once more from the unpacked sdist; nothing
is fetched. What they hold is told by rule, so that a new module needs no line here, and a stray
file anywhere fails.
"""

from __future__ import annotations

import ast
import email
import email.message
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ci2p_cache as cc
from tests.support.commands import REPO
from tests.support.pictures import write_image_folder

PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
INFO = f"ci2p_cache-{PROJECT['version']}.dist-info"

BUILD = {"__pycache__", ".git"}
IN_PACKAGE = {".py", ".md", ".css", ".typed", ".safetensors"}
IN_SDIST = {*IN_PACKAGE, ".sh", ".c", ".toml", ".svg", ".cff"}


def files_below(*names: str) -> set[str]:
    """Files of the clone below some names, without what Python compiles beside them."""
    found = {path for name in names for path in (REPO / name, *(REPO / name).rglob("*"))}
    return {
        path.relative_to(REPO).as_posix()
        for path in found
        if path.is_file() and not BUILD & set(path.parts)
    }


def run(*command: object, cwd: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path, kind: str) -> Path:
    """Builds a wheel or an sdist as pip's front end would, in this environment."""
    # The paths of this process, so that hatchling is found wherever pytest found it.
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out, cwd=source,
        PYTHONPATH=os.pathsep.join(filter(None, sys.path)))  # fmt: skip
    (built,) = out.iterdir()
    return built


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPO, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    sdist = build(REPO, tmp_path_factory.mktemp("sdist"), "sdist")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    return email.message_from_bytes(content(wheel)[f"{INFO}/METADATA"])


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(content(wheel))
    of_package = {name for name in names if not name.startswith(f"{INFO}/")}
    assert of_package == files_below("ci2p_cache")
    assert {PurePosixPath(name).suffix for name in of_package} <= IN_PACKAGE
    assert not [name for name in names if any(p.startswith(".") for p in name.split("/"))]
    assert {
        *("ci2p_cache/py.typed", "ci2p_cache/cache/README.md", "ci2p_cache/report/style.css"),
        "ci2p_cache/encoder/bundled/bmshj2018-factorized-5-mse.safetensors",
    } <= of_package
    of_info = {name.removeprefix(f"{INFO}/") for name in names - of_package}
    assert of_info == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    # The bundled encoder is most of it; a data set or a run that slipped in would show.
    assert wheel.stat().st_size < 10e6


def test_the_sdist_holds_what_pyproject_names(unpacked: Path) -> None:
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    wanted = files_below(
        *("ci2p_cache", "pipelines", "tests", "docs", "findings"),
        *("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"),
    )
    # hatchling takes .gitignore along, so that a build from the sdist leaves out the same.
    assert names == wanted | {"pyproject.toml", "PKG-INFO", ".gitignore"}
    # The study's table and the bits behind it.
    results = {name for name in wanted if PurePosixPath(name).match("pipelines/results/*.*")}
    assert {PurePosixPath(name).suffix for name in results} == {".csv", ".json"}
    others = wanted - results - {"LICENSE"}
    strays = {name for name in others if Path(name).suffix not in IN_SDIST}
    assert not strays


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_the_wheel_of_the_clone(
    wheel: Path, unpacked: Path, tmp_path: Path
) -> None:
    again = build(unpacked, tmp_path / "again", "wheel")
    assert again.name == wheel.name
    assert content(again) == content(wheel)


def test_the_metadata_says_what_pyproject_says(
    wheel: Path, metadata: email.message.Message
) -> None:
    assert wheel.name == f"ci2p_cache-{cc.__version__}-py3-none-any.whl"
    assert metadata["Version"] == cc.__version__ == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras)
    told = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    plain = {str(r) for r in told if "extra" not in str(r.marker)}
    assert plain == {str(Requirement(line)) for line in PROJECT["dependencies"]}
    assert len(told) - len(plain) == sum(map(len, extras.values()))
    points = content(wheel)[f"{INFO}/entry_points.txt"].decode().split()
    assert points == ["[console_scripts]", "ci2p-cache", "=", "ci2p_cache.cli.start:main"]


@pytest.mark.slow
def test_the_installed_wheel_encodes_far_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the dependencies, and this package from the wheel alone."""
    home = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python, program = home / "bin" / "python", home / "bin" / "ci2p-cache"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    (site,) = (home / "lib").glob("python*/site-packages")
    # A path in a .pth brings packages; the .pth files in it, such as an editable clone's, do not
    # count.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run(program, "--version", cwd=tmp_path).strip() == f"ci2p-cache {cc.__version__}"
    assert "  ci2p-cache demo " in run(program, "--help", cwd=tmp_path)
    write_image_folder(tmp_path / "pictures", {"a": 2, "b": 2})
    options = ("--encoder", "bundled", "--size", "32", "--views", "none", "--json")
    told = run(program, "encode", "pictures", "--out", "shards", *options, cwd=tmp_path)
    assert json.loads(told)["images"] == 4
    where = "import ci2p_cache; print(ci2p_cache.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path).strip()).is_relative_to(home)


def imported(folder: str) -> set[str]:
    """Distributions that the files below a folder import, by canonical name."""
    modules: set[str] = set()
    for path in (REPO / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add((node.module or "").split(".")[0])
                if node.module == "torch.utils.tensorboard":
                    modules.add("tensorboard")
    homes = packages_distributions()
    foreign = modules - sys.stdlib_module_names - {"ci2p_cache", "pipelines", "tests"}
    return {canonicalize_name(homes.get(module, [module])[0]) for module in foreign}


def test_every_dependency_is_imported_and_every_import_is_a_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    extras = {
        canonicalize_name(Requirement(line).name)
        for name in ("remote", "ray", "export", "track")
        for line in PROJECT["optional-dependencies"][name]
    }
    # What type checkers bring themselves is imported by nothing that runs.
    used = imported("ci2p_cache") - {"-typeshed"}
    # Nothing of ours imports webdataset: it is there for readers of the tars, as the README shows.
    assert declared - used == {"webdataset"}
    assert used <= declared | extras
    systems = PROJECT["optional-dependencies"]["systems"]
    assert imported("pipelines") <= declared | {Requirement(line).name for line in systems}
