"""`ci2p-cache doctor`: what it finds here, and in environments that were broken on purpose."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ci2p_cache.doctor import diagnose

FIT = {"python", "torch", "numpy", "processor", "decoder", "bundled encoder", "open files"}


def examined(shadow: Path, *folder: str) -> tuple[int, dict[str, dict[str, str]], str]:
    """Runs the command where `shadow` comes first among the installed packages."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "ci2p_cache", "doctor", *folder, "--json"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{shadow}:{Path(__file__).parents[2]}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ran.returncode, {each["subject"]: each for each in json.loads(ran.stdout)}, ran.stderr


def test_this_machine_is_fit_and_told_of(tmp_path: Path, run) -> None:
    ran = run("doctor", tmp_path / "not there yet")
    assert ran.code == 0, ran.err
    assert "ready; " in ran.out
    found = {each.subject: each for each in diagnose(tmp_path)}
    assert set(found) >= FIT
    assert all(found[subject].state == "ok" for subject in FIT - {"open files"})
    assert all(bool(each.advice) == (each.state != "ok") for each in found.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_versions_that_pip_lets_pass_and_broken_packages_are_named(tmp_path: Path) -> None:
    wrong = {"pyarrow": ("19.0.0", ">=2"), "zarr": ("3.0.10", ">=3.1"), "numpy": ("1.25.0", ">=")}
    for name, (installed, _) in wrong.items():
        record = tmp_path / f"{name}-{installed}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {installed}\n"
        )
    (tmp_path / "compressai.py").write_text("raise ImportError('torchvision::nms does not exist')")
    code, found, told = examined(tmp_path)
    assert code == 6
    for name, (installed, wanted) in wrong.items():
        assert found[name]["state"] == "problem"
        assert installed in found[name]["found"]
        assert wanted in found[name]["advice"]
        assert name in told
    assert "torchvision::nms does not exist" in found["import compressai"]["found"]
    assert "fresh environment" in found["import compressai"]["advice"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "code", "state"),
    [("< '3'", 0, "note"), (">= '3'", 6, "problem")],
)
def test_without_compressai_only_a_python_that_it_installs_with_is_unfit(
    marker: str, code: int, state: str, tmp_path: Path
) -> None:
    record = tmp_path / "ci2p_cache-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ci2p-cache\nVersion: 0.1.0\n"
        f"Requires-Dist: compressai>=99; python_version {marker}\n"
    )
    (tmp_path / "compressai.py").write_text("raise ModuleNotFoundError(name='compressai')")
    ended, found, _ = examined(tmp_path)
    assert (ended, found["compressai"]["state"]) == (code, state)
    if state == "note":
        assert f"this is {platform.python_version()}" in found["compressai"]["found"]
        assert "Python 3.11 or 3.12" in found["compressai"]["advice"]
    assert "import compressai" not in found


def test_a_disk_that_cannot_be_written_is_named(run) -> None:
    ran = run("doctor", "/proc", "--json")
    assert ran.code == 6
    found = {each["subject"]: each for each in json.loads(ran.out)}
    assert "cannot be written" in found["disk of /proc"]["found"]
