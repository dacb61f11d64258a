"""The launch files of pipelines/cluster, run as far as one machine allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ci2p_cache as cc
from tests.support.commands import REPO
from tests.support.encode_bench import tree
from tests.support.pictures import write_image_folder

SCRIPTS = sorted((REPO / "pipelines" / "cluster").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_say_what_was_tried(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text("utf-8")
    assert text.startswith("#!/bin/bash\n# ")
    assert "# Tried: " in text
    assert "ot tried: " in text
    assert os.access(script, os.X_OK)


def test_there_are_three() -> None:
    assert [path.name for path in SCRIPTS] == ["ray_encode.sh", "slurm_encode.sh", "slurm_train.sh"]


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_make_one_whole_cache(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "a b", {"ant": 9, "bee": 6})
    options = ("--encoder", "bundled", "--size", "32", "--shard-samples", "4", "--device", "cpu:1")
    cc.encode(source, tmp_path / "one", cc.EncodeOptions(
        encoder="bundled", size=32, shard_samples=4, devices="cpu:1"))  # fmt: skip
    # The command as the script finds it on its PATH, whatever is installed here.
    command = tmp_path / "bin" / "ci2p-cache"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ci2p_cache "$@"\n')
    command.chmod(0o755)
    for task in (1, 2):
        environment = os.environ | {
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPO),
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_COUNT": "2",
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_MAX": "2",
            "SLURM_ARRAY_TASK_STEP": "1",
        }
        script = REPO / "pipelines" / "cluster" / "slurm_encode.sh"
        ran = subprocess.run(
            [str(script), str(source), str(tmp_path / "out"), *options],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert ("is not complete" in ran.stdout) == (task == 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
