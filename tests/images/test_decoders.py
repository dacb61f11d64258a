"""Decoders that take their process with them: real signals, in the processes that really decode.

The files are whole JPEGs with a mark behind them; a preloaded library (tests/support/crash.c) does
what the mark says in whichever process holds such a file to decode it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from tests.support.pictures import picture, write_image_folder
from tests.support.trained import make_run
from tests.support.warm import WarmParent, build_shim

SETTINGS = (
    *("--encoder", "bundled", "--size", "32", "--views", "flip", "--val-fraction", "0"),
    *("--shard-samples", "8", "--device", "cpu:1", "--max-errors", "100%"),
)


def marked(path: Path, mark: str) -> Path:
    """Writes a JPEG that does `mark` to its decoder; without the library it is a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(len(path.name), width=77, height=61).save(path, "JPEG")
    with path.open("ab") as file:
        file.write(b"CI2P-CRASH-" + mark.encode())
    return path


@pytest.fixture
def crashing(warm: WarmParent) -> WarmParent:
    if not warm.has_shim:
        pytest.skip("the library needs Linux and a C compiler called cc")
    return warm


def encode(crashing: WarmParent, source: Path, out: Path) -> tuple[int, str]:
    ended = crashing.run("encode", source, "--out", out, *SETTINGS)
    return ended.code, ended.told


def test_a_decoder_that_dies_is_traced_to_its_file_and_the_run_goes_on(
    crashing: WarmParent, tmp_path: Path
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 9, "bee": 8})
    reasons = {
        "SEGV": "the decoder crashed on it (SIGSEGV)",
        "ABRT": "the decoder crashed on it (SIGABRT)",
        "XCPU": "the decoder computed for minutes without coming to an end",
        "EXIT": "the decoder ended its process (exit code 1)",
    }
    for mark in reasons:
        marked(source / "ant" / f"{mark}.jpg", mark)
    out = tmp_path / "out"
    code, told = encode(crashing, source, out)
    assert code == 0, told
    errors = pq.read_table(out / "errors.parquet").to_pylist()
    found = {row["key"]: row["error"] for row in errors}
    assert found == {f"ant/{mark}.jpg": reason for mark, reason in reasons.items()}

    # Every other row is what it is where nothing crashes.
    options = cc.EncodeOptions(
        encoder="bundled", size=32, views="flip", val_fraction=0.0, shard_samples=8
    )
    cc.encode(source, tmp_path / "calm", options)
    split, calm = cc.open_cache(out)["train"], cc.open_cache(tmp_path / "calm")["train"]
    assert split.valid.sum() == 17
    assert calm.valid.all()
    for row in np.flatnonzero(split.valid).tolist():
        assert split[row][1] == calm[row][1]
        assert np.array_equal(split[row][0], calm[row][0])


def test_a_decoder_that_takes_all_memory_makes_its_file_bad_and_no_other(
    crashing: WarmParent, tmp_path: Path
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 8, "bee": 1})
    marked(source / "ant" / "greedy.jpg", "MEMORY")
    code, told = encode(crashing, source, tmp_path / "out")
    assert code == 0, told
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [row["key"] for row in errors] == ["ant/greedy.jpg"]


def test_a_decoder_that_dies_once_is_no_bad_image(crashing: WarmParent, tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 4, "bee": 1})
    marked(source / "ant" / "moody.jpg", f"ONCE {tmp_path / 'done'}")
    code, told = encode(crashing, source, tmp_path / "out")
    assert code == 0, told
    assert (tmp_path / "done").exists()
    assert cc.open_cache(tmp_path / "out")["train"].valid.all()


def test_a_decoder_killed_from_outside_ends_the_run_resumable(
    crashing: WarmParent, tmp_path: Path
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 8, "bee": 1})
    marked(source / "ant" / "unlucky.jpg", "KILL")
    code, told = encode(crashing, source, tmp_path / "out")
    assert code == 6, told
    assert "SIGKILL" in told
    assert "--workers" in told
    # The image is not to blame: with enough memory the same command ends well.
    options = cc.EncodeOptions(
        encoder="bundled", size=32, val_fraction=0.0, shard_samples=8, max_errors="100%"
    )
    assert cc.encode(source, tmp_path / "out", options).bad == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_decoder_without_end_holds_up_no_ctrl_c_and_outlives_nobody(
    crashing: WarmParent, number: signal.Signals, tmp_path: Path
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 1, "bee": 1})
    marked(source / "ant" / "endless.jpg", "SPIN")
    before = set(crashing.decoders())
    process = crashing.start("encode", source, "--out", tmp_path / "out", *SETTINGS)

    def spinning() -> set[int]:
        return {pid for pid in crashing.decoders() if pid not in before and cpu_seconds(pid) > 0.3}

    assert _wait_for(spinning, seconds=60), f"no decoder began: {process.told()}"
    endless = spinning()
    sent = time.monotonic()
    process.send_signal(number)
    told = process.wait(30)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "ci2p-cache encode" in told
        assert time.monotonic() - sent < 5
    assert _wait_for(lambda: not endless & set(crashing.decoders()), seconds=30), "one is left"


def cpu_seconds(pid: int) -> float:
    """Processor time of a process; 0 where it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return int(stat[11]) / os.sysconf("SC_CLK_TCK")


def _wait_for(holds: Callable[[], object], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_decoders_of_a_cold_command_are_its_forks_and_end_with_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    shim = build_shim(tmp_path, "crash")
    if shim is None:
        pytest.skip("the library needs Linux and a C compiler called cc")
    source = write_image_folder(tmp_path / "src", {"ant": 1, "bee": 1})
    marked(source / "ant" / "crashing.jpg", "SEGV")
    marked(source / "bee" / "endless.jpg", "SPIN")
    words = [sys.executable, "-m", "ci2p_cache", "encode", source, "--out", tmp_path / "out"]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    command = [*map(str, words), *SETTINGS]
    # A group of its own: Ctrl-C comes to all of it.
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as run:

        def group() -> dict[int, bytes]:
            """Command line of each process, by its id; a zombie has none."""
            found = {}
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError, ValueError):
                    if os.getpgid(int(folder.name)) == run.pid:
                        found[int(folder.name)] = (folder / "cmdline").read_bytes()
            return {pid: words for pid, words in found.items() if words}

        def endless() -> bool:
            return any(cpu_seconds(pid) > 3 for pid in group() if pid != run.pid)

        assert _wait_for(endless, seconds=120)
        assert len(set(group().values())) == 1, "the server is a fork, and its workers are"
        os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
        said = run.communicate(timeout=60)[1]
        assert _wait_for(lambda: not group(), seconds=30), "one is left"
    if number != signal.SIGKILL:
        assert run.returncode == 128 + number
        assert b"ci2p-cache encode" in said


CRASHED = "the decoder crashed on it (SIGSEGV)"
ENDLESS = "the decoder computed for minutes without coming to an end"


@pytest.fixture(scope="module")
def marked_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a picture whose decoder will crash; it did not when the cache was made."""
    root = tmp_path_factory.mktemp("marked")
    write_image_folder(root / "src", {"ant": 5, "bee": 4})
    marked(root / "src" / "ant" / "bad.jpg", "SEGV")
    options = cc.EncodeOptions(encoder="bundled", size=32, val_fraction=0.0, shard_samples=4)
    assert cc.encode(root / "src", root / "shards", options).bad == 0
    return root


def done(crashing: WarmParent, *words: object) -> Any:
    child = crashing.start(*words, module="tests.support.decoding")
    ended = child.ended()
    assert ended.code == 0, ended.told
    return json.loads(ended.out.splitlines()[-1])


@pytest.mark.parametrize("loader", ["pixels", "online"])
def test_a_decoder_that_crashes_is_an_error_of_its_image_in_loaders(
    crashing: WarmParent, marked_cache: Path, loader: str
) -> None:
    row = cc.open_cache(marked_cache / "shards")["train"].read_index(0, ["key"])["key"].to_pylist()
    told = done(crashing, loader, marked_cache / "shards")
    assert told == f"ant/bad.jpg (row {row.index('ant/bad.jpg')} of split 'train'): {CRASHED}"


def test_a_decoder_that_crashes_is_one_image_that_cannot_be_compared(
    crashing: WarmParent, marked_cache: Path
) -> None:
    assert done(crashing, "reencode", marked_cache / "shards") == [f"ant/bad.jpg ({CRASHED})"]


def test_a_decoder_that_crashes_is_a_missing_original_in_a_preview(
    crashing: WarmParent, marked_cache: Path, tmp_path: Path
) -> None:
    states = done(crashing, "preview", marked_cache / "shards", tmp_path / "look.png")
    assert states.pop("ant/bad.jpg") == "missing"
    assert set(states.values()) == {"unchanged"}
    assert (tmp_path / "look.png").stat().st_size > 0


def test_decoders_that_crash_or_spin_are_bad_pictures_where_a_codec_is_trained(
    crashing: WarmParent, tmp_path: Path
) -> None:
    write_image_folder(tmp_path, {"ant": 3})
    marked(tmp_path / "ant" / "bad.jpg", "SEGV")
    marked(tmp_path / "ant" / "endless.jpg", "XCPU")
    found = done(crashing, "pictures", tmp_path)
    assert found == [f"ant/bad.jpg: {CRASHED}", f"ant/endless.jpg: {ENDLESS}"]


def test_decoders_that_crash_or_spin_are_bad_pictures_to_predict(
    crashing: WarmParent, tmp_path: Path
) -> None:
    root = make_run(tmp_path)
    write_image_folder(tmp_path / "new", {"ant": 2})
    marked(tmp_path / "new" / "ant" / "bad.jpg", "SEGV")
    marked(tmp_path / "new" / "ant" / "endless.jpg", "XCPU")
    found = done(crashing, "predict", root / "runs" / "run", tmp_path / "new")
    assert found == {"000.jpg": None, "001.jpg": None, "bad.jpg": CRASHED, "endless.jpg": ENDLESS}


def test_a_source_of_ones_own_is_decoded_apart_too(
    crashing: WarmParent, marked_cache: Path, tmp_path: Path
) -> None:
    found = done(crashing, "own", marked_cache / "src", tmp_path / "out")
    assert found == [f"ant/bad.jpg: {CRASHED}"]


@pytest.mark.parametrize("first", ["pass", pytest.param("import torch", marks=pytest.mark.slow)])
def test_the_compiler_stays_out_until_something_compiles(first: str) -> None:
    code = (
        f"{first}\n"
        "import sys; from ci2p_cache.process import put_off_compiler; put_off_compiler()\n"
        "import torch, torchvision.io, torchvision.transforms.v2.functional\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "weight.sum().backward(); torch.optim.AdamW([weight]).step()\n"
        "heavy = sorted({'torch._dynamo.convert_frame', 'sympy'} & set(sys.modules))\n"
        "print(heavy, torch.compile(torch.square, backend='eager')(torch.full((1,), 3.0)).item())\n"
        "import torch._dynamo.convert_frame\n"
        "print(torch._dynamo.convert_frame.__name__)"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == ["[]", "9.0", "torch._dynamo.convert_frame"]
