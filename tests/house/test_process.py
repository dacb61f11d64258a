"""What a library must leave alone: limits, signals, allocator, threads, filters, random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.warm import WarmParent


def test_the_whole_public_api_leaves_the_process_as_it_was(
    warm: WarmParent, image_folder: Path, tmp_path: Path
) -> None:
    ended = warm.start(image_folder, tmp_path, module="tests.support.whole_api").ended()
    assert ended.code == 0, ended.told
    assert ended.out == ""


@pytest.mark.slow
def test_a_process_that_is_forked_for_the_decoders_keeps_its_garbage_collector(
    image_folder: Path, tmp_path: Path
) -> None:
    code = (
        "import gc, sys, ci2p_cache as cc\n"
        "assert 'torch' not in sys.modules, 'then nothing is forked'\n"
        "before = gc.get_freeze_count(), gc.get_threshold(), gc.isenabled()\n"
        "cc.encode(*sys.argv[1:], cc.EncodeOptions(encoder='bundled', size=32))\n"
        "assert (gc.get_freeze_count(), gc.get_threshold(), gc.isenabled()) == before\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, str(image_folder), str(tmp_path / "out")]
    subprocess.run(words, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
