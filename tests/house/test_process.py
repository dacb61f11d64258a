"""What a library must leave alone: limits, signals, allocator, threads, filters, random numbers."""

from __future__ import annotations

from pathlib import Path

from tests.support.warm import WarmParent


def test_the_whole_public_api_leaves_the_process_as_it_was(
    warm: WarmParent, image_folder: Path, tmp_path: Path
) -> None:
    ended = warm.start(image_folder, tmp_path, module="tests.support.whole_api").ended()
    assert ended.code == 0, ended.told
    assert ended.out == ""
