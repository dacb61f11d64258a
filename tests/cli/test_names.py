"""One name for one thing over all commands; earlier names of options still work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ci2p_cache.cli.app import command_tree
from tests.support.caches import make_cache
from tests.support.commands import Ran

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("names") / "c", {"train": {"ant": 2, "bee": 2}})


# The command, the earlier name, the name, a value that is refused, and the refusal.
EARLIER = [
    ("encode IMAGES --out NEW --encoder bundled --dry-run", "devices", "device", "tpu", "is 'tpu'"),
    ("bench encode IMAGES --encoder bundled", "devices", "device", "tpu", "is 'tpu'"),
    ("train CACHE --model vit_nano", "runs", "out", "s3://a/b", "s3://a/b is a URL"),
    ("train CACHE --model vit_nano", "online", "from-images", None, "/nowhere does not exist"),
    ("train NEW --model vit_nano", "compile_model", "compile", None, "new is no latent cache"),
    ("run pipelines/smoke.py:smoke", "changes", "set", "a=1", "no field is named 'a'"),
    ("demo", "folder", "out", "s3://a/b", "s3://a/b is a URL"),
    ("export NEW --out a.onnx", "to", "format", "torch", "a.onnx is named as an export to onnx"),
    ("report CACHE", "samples", "count", "0", "`num_samples` is 0"),
]


@pytest.mark.parametrize("how", ["option", "variable"])
@pytest.mark.parametrize(("words", "old", "new", "value", "refusal"), EARLIER)
def test_an_earlier_name_does_the_same_with_one_line_that_says_the_new_one(
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    image_folder: Path,
    tmp_path: Path,
    words: str,
    old: str,
    new: str,
    value: str | None,
    refusal: str,
    how: str,
) -> None:
    paths = {"CACHE": cache, "IMAGES": image_folder, "NEW": tmp_path / "new"}
    command = [str(paths.get(word, word)) for word in words.split()]
    path = command[: 1 + (command[0] == "bench")]
    prefix = "_".join(["CI2P_CACHE", *path]).upper()

    def ran(name: str) -> Ran:
        if how == "option":
            return run(*command, f"--{name}", *filter(None, [value]))
        with monkeypatch.context() as patched:
            patched.setenv(f"{prefix}_{name.upper().replace('-', '_')}", value or "1")
            return run(*command)

    before, now = ran(old), ran(new)
    assert refusal in " ".join(now.err.split())
    if how == "option":
        notice = f"note: --{old} is now --{new}"
    else:
        notice = f"note: {prefix}_{old.upper()} is now {prefix}_{new.upper().replace('-', '_')}"
    first, *rest = before.err.splitlines(keepends=True)
    assert first.startswith(notice)
    assert (before.code, before.out, "".join(rest)) == (now.code, now.out, now.err)
    assert f"--{old} " not in run(*path, "--help").out
    assert list(tmp_path.iterdir()) == []


def test_the_new_name_wins(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, image_folder: Path, tmp_path: Path
) -> None:
    words = ("encode", image_folder, "--out", tmp_path / "out", "--encoder", "bundled")
    monkeypatch.setenv("CI2P_CACHE_ENCODE_DEVICES", "old")
    assert "`device` is 'old'" in run(*words).err
    monkeypatch.setenv("CI2P_CACHE_ENCODE_DEVICE", "variable")
    assert "`device` is 'variable'" in run(*words).err
    assert "`device` is 'flag'" in run(*words, "--device=flag").err


def test_the_variable_of_an_option_is_its_flag() -> None:
    def options(part: Any) -> Iterator[Any]:
        yield from (each for each in part.params if each.param_type_name == "option")
        for inner in getattr(part, "commands", {}).values():
            yield from options(inner)

    flags = {option.opts[0]: option.name for option in options(command_tree())}
    assert len(flags) > 80
    assert {flag: flag.strip("-").replace("-", "_") for flag in flags} == flags


def test_an_earlier_name_is_none_of_another_command_and_none_behind_two_dashes(
    run: Callable[..., Ran], cache: Path
) -> None:
    for words in (("verify", "--devices", "cpu"), ("bench", "train", "--runs", "x")):
        refused = run(*words, cache)
        assert (refused.code, "is now" in refused.err) == (2, False)
    refused = run("encode", "--out", "x", "--", "--devices")
    assert "--devices does not exist" in " ".join(refused.err.split())
