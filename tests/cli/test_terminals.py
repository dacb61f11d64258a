"""What the command shows on terminals of every kind; no error leaves one without a way on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import ci2p_cache as cc
from ci2p_cache.cli.app import app
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.warm import WarmParent

COMMAND = (sys.executable, "-W", "ignore", "-m", "ci2p_cache")
ENCODE = ("--encoder", "bundled", "--size", "32")
SPOKEN = ("LANG", "LANGUAGE", "PYTHONUTF8", "PYTHONIOENCODING", "NO_COLOR", "COLUMNS", "LINES")
"""What this machine says of languages and terminals."""
ODD = "b\N{LATIN SMALL LETTER A WITH DIAERESIS}h"
MOUNTAIN = "\N{CJK UNIFIED IDEOGRAPH-5C71}"


@pytest.fixture(scope="module")
def odd_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose folder and class names are not ASCII."""
    root = tmp_path_factory.mktemp("terminals") / ODD
    write_image_folder(root / "src", {ODD: 3, MOUNTAIN: 3})
    options = cc.EncodeOptions(encoder="bundled", size=32, val_fraction=0.0)
    cc.encode(root / "src", root / "shards", options)
    return root / "shards"


def environment(**changes: str) -> dict[str, str]:
    """The environment without what this machine says of languages, and with `changes`."""
    kept = {k: v for k, v in os.environ.items() if k not in SPOKEN and not k.startswith("LC_")}
    return kept | changes


def on_a_terminal(
    warm: WarmParent, columns: int, *words: object, **changes: str
) -> tuple[int, str]:
    """Runs the command on a terminal of that width; returns exit code and all that was shown."""
    spoken: dict[str, str | None] = dict.fromkeys(SPOKEN)
    spoken |= {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **changes}
    ended = warm.run(*words, columns=columns, environment=spoken)
    return ended.code, ended.out


def drawn_lines(shown: str) -> list[str]:
    """Everything that stood in a line at some time, without colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoken",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        # Some of the letters.
        {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"},
    ],
    ids=["no locale", "latin-1"],
)
def test_names_that_a_terminal_has_no_letters_for_end_no_command(
    odd_cache: Path, tmp_path: Path, spoken: dict[str, str]
) -> None:
    out = tmp_path / ODD
    for words in (
        ("encode", odd_cache.parent / "src", "--out", out, *ENCODE),
        ("inspect", odd_cache, "--row", "0"),
    ):
        ran = subprocess.run(
            [*COMMAND, *words], capture_output=True, env=environment(**spoken), check=False
        )
        assert ran.returncode == 0, ran.stderr.decode("latin-1")
        assert b"Traceback" not in ran.stderr
    shown = subprocess.run(
        [*COMMAND, "inspect", odd_cache], capture_output=True, env=environment(**spoken), check=True
    ).stdout
    assert rb"\u5c71" in shown


@pytest.mark.parametrize("columns", [40, 80])
def test_progress_stays_in_one_line_of_the_terminal(
    warm: WarmParent, image_folder: Path, tmp_path: Path, columns: int
) -> None:
    code, shown = on_a_terminal(
        warm, columns, "encode", image_folder, "--out", tmp_path / "shards", *ENCODE
    )
    assert code == 0, shown
    progress = [line for line in drawn_lines(shown) if "/21 images" in line]
    assert progress
    assert max(map(len, progress)) <= columns
    # What is left is told on a narrow one too.
    assert any(re.search(r"\d+ s left", line) for line in progress), progress


def test_no_color_is_heeded(warm: WarmParent, tmp_path: Path) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*3[1-7]m")
    words = ("encode", tmp_path / "nowhere", "--out", tmp_path / "out", *ENCODE)
    code, shown = on_a_terminal(warm, 80, *words)
    assert code == 3
    assert coloured.search(shown)
    code, shown = on_a_terminal(warm, 80, *words, NO_COLOR="1")
    assert code == 3
    assert not coloured.search(shown)


def test_every_command_prints_json_for_programs() -> None:
    root = typer.main.get_command(app)
    parts = [*root.commands.values()]  # type: ignore[attr-defined]  # a group
    parts += [inner for part in parts for inner in getattr(part, "commands", {}).values()]
    commands = [part for part in parts if not hasattr(part, "commands")]
    assert len(commands) >= 17
    for command in commands:
        assert any("--json" in option.opts for option in command.params), command.name


def shell_words(hint: str) -> list[str]:
    """The command of a hint, without the remark behind it."""
    return shlex.split(re.sub(r" {3}\(.*\)$", "", hint))


class TestEveryErrorSaysHowToGoOn:
    @pytest.fixture
    def cache(self, odd_cache: Path, tmp_path: Path) -> Path:
        shutil.copytree(odd_cache, tmp_path / "shards")
        return tmp_path / "shards"

    def hint(self, ran: Ran, code: int) -> list[str]:
        assert ran.code == code, ran.err
        found = re.findall(r"^try: +(ci2p-cache .*)$", ran.err, re.MULTILINE)
        assert found, ran.err
        assert re.search(r"^error: \S", ran.err, re.MULTILINE)
        return shell_words(found[-1])

    def test_usage(self, run: Callable[..., Ran], image_folder: Path, tmp_path: Path) -> None:
        wrong = run("encode", image_folder, "--out", tmp_path / "o", *ENCODE, "--size", "65")
        assert self.hint(wrong, 2) == ["ci2p-cache", "encode", "--help"]
        assert self.hint(run("complexity", "--sizes", "x"), 2)[1] == "complexity"

    def test_sources(self, run: Callable[..., Ran], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        empty = run("encode", tmp_path / "empty", "--out", tmp_path / "o", *ENCODE)
        assert self.hint(empty, 3) == ["ci2p-cache", "encode", "--help"]

        write_image_folder(tmp_path / "src", {"ant": 1, "bee": 1})
        one_class = run("encode", tmp_path / "src" / "ant", "--out", tmp_path / "o", *ENCODE)
        assert one_class.code == 3
        assert "name the folder above it" in one_class.err

    def test_images_where_a_cache_is_wanted_are_not_offered_as_its_place(
        self, run: Callable[..., Ran], image_folder: Path, tmp_path: Path
    ) -> None:
        hint = self.hint(run("inspect", image_folder), 4)
        assert hint[:3] == ["ci2p-cache", "encode", str(image_folder)]
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / ".lock").touch()
        hint = self.hint(run("status", tmp_path / "begun"), 4)
        assert hint[-2:] == ["--out", str(tmp_path / "begun")]

    def test_a_cache_where_a_run_is_wanted_has_the_newest_run_beside_it(
        self, run: Callable[..., Ran], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert "ci2p-cache train" in run("evaluate", cache).err
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        (tmp_path / "runs" / "mine" / "args.yaml").write_text("a: 1")
        assert "did you mean runs/mine?" in run("evaluate", cache).err

    def test_a_complete_cache_says_that_another_source_was_not_listed(
        self, run: Callable[..., Ran], cache: Path, image_folder: Path
    ) -> None:
        words = ("--out", cache, *ENCODE, "--val-fraction", "0")
        same = run("encode", cache.parent / "nowhere", *words)
        assert same.code == 3
        source = cc.open_cache(cache).manifest.source
        assert "planned from" not in run("encode", source, *words).err
        other = run("encode", image_folder, *words)
        assert other.code == 0
        assert f"was planned from {source}" in other.err
        assert "--rescan" in other.err

    def test_weights(self, run: Callable[..., Ran], image_folder: Path, tmp_path: Path) -> None:
        (tmp_path / "w.safetensors").write_bytes(b"x" * 100)
        words = ("encode", image_folder, "--out", tmp_path / "o")
        assert self.hint(run(*words, "--weights", tmp_path / "w.safetensors"), 3)

    def test_damaged_caches(self, run: Callable[..., Ran], cache: Path) -> None:
        (cache / "index/train-000000.parquet").write_bytes(b"x")
        assert self.hint(run("inspect", cache, "--row", "0"), 5)[:2] == ["ci2p-cache", "verify"]

    def test_a_bug_asks_for_a_report(
        self, run: Callable[..., Ran], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ci2p_cache.cli.caches.render.heading", lambda _: 1 / 0)
        ran = run("inspect", cache)
        assert self.hint(ran, 1) == ["ci2p-cache", "doctor", "--json"]
        assert "ZeroDivisionError" in ran.err

    def test_memory_that_is_used_up_is_no_bug(
        self, run: Callable[..., Ran], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def allocate(_: str) -> None:
            raise MemoryError

        monkeypatch.setattr("ci2p_cache.cli.caches.render.heading", allocate)
        ran = run("inspect", cache)
        assert ran.code == 6
        assert "--batch-size" in ran.err
        assert "Traceback" not in ran.err
