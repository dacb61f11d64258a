"""Run folders that deceive."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.attacks import (
    MAX_GROWTH,
    TRAIN,
    Harmful,
    attacked,
    outside_of,
    refused,
    replace,
    snapshot,
)
from tests.support.seals import digest
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

NEWEST = "checkpoints/epoch-0001-step-000000"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def link_out(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside_of(path))


def set_digests(run: Path, files: list[dict[str, Any]]) -> None:
    (run / NEWEST / "digests.json").write_text(json.dumps({"version": 1, "files": files}))


def unsafe_model(run: Path) -> None:
    folder = run / NEWEST
    (folder / "model.safetensors").write_bytes(pickle.dumps(Harmful(run.parent.parent / "canary")))
    listing = json.loads((folder / "digests.json").read_text())
    for entry in listing["files"]:
        data = (folder / entry["path"]).read_bytes()
        entry["bytes"], entry["sha256"] = len(data), digest(data)
    set_digests(run, listing["files"])


def evil_tag(run: Path) -> None:
    text = f"!!python/object/apply:os.mkdir [{run.parent.parent / 'canary'}]\n"
    (run / "args.yaml").write_text(text)


RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "args: aliases": (lambda r: (r / "args.yaml").write_text(BOMB), "args.yaml"),
    "args: merged aliases": (lambda r: (r / "args.yaml").write_text(MERGE), "args.yaml"),
    "args: a python call": (evil_tag, "args.yaml"),
    "args: oversized": (lambda r: (r / "args.yaml").write_text("[]," * 10**6), "args.yaml"),
    "args: deep": (lambda r: (r / "args.yaml").write_text("[" * 60_000), "args.yaml"),
    "args: a pipe": (lambda r: replace(r / "args.yaml", "pipe"), "args.yaml"),
    "args: a device": (lambda r: replace(r / "args.yaml", "device"), "args.yaml"),
    "checkpoints lead out": (lambda r: link_out(r / "checkpoints"), "checkpoints"),
    "curves lead out": (lambda r: link_out(r / "tensorboard"), "tensorboard"),
    "lock leads out": (lambda r: (r / ".lock").symlink_to(outside_of(r) / "secret.json"), ".lock"),
    "staging leads out": (lambda r: link_out(r / ".staging"), ".staging"),
    "checkpoint leads out": (lambda r: link_out(r / NEWEST), "epoch-0001"),
    "checkpoint: foreign paths": (
        lambda r: set_digests(r, [{"path": "../../../outside/secret.json", "bytes": 1,
                                   "sha256": "0" * 64}]), "epoch-0001"),
    "checkpoint: absolute path": (
        lambda r: set_digests(r, [{"path": "/dev/zero", "bytes": 0, "sha256": "0" * 64}]),
        "epoch-0001"),
    "checkpoint: a pickle": (unsafe_model, "epoch-0001"),
    "checkpoint: a pipe": (lambda r: replace(r / NEWEST / "state.json", "pipe"), "epoch-0001"),
}  # fmt: skip


@pytest.mark.parametrize("case", thinned(RUNS, step=4))
def test_a_hostile_run_folder_is_refused(warm: WarmParent, place: Path, case: str) -> None:
    attack, named = RUNS[case]
    before = snapshot(place.parent / "outside")
    attack(place / "runs" / "run")
    argv = ("train", place / "shards", *TRAIN, "--out", place / "runs", "--name", "run")
    refused(attacked(warm, *argv), {4, 5}, named)
    assert snapshot(place.parent / "outside") == before
    assert not (place / "canary").exists()


@pytest.mark.parametrize(
    ("path", "text"),
    thinned(
        [
            ("checkpoints/last.json", '{"last": "../../../outside/epoch-0009-step-000000"}'),
            ("checkpoints/last.json", '{"last": {"a": ["epoch-0001"]}}'),
            ("checkpoints/last.json", "[" * 10**6),
            ("model.json", '{"model": "!!python/object"}'),
            ("model.json", "[" * 10**6),
            ("summary.csv", "=cmd|' /C calc'!A0\n"),
        ]
    ),
)
def test_what_a_run_folder_only_tells_others_is_not_believed(
    warm: WarmParent, place: Path, path: str, text: str
) -> None:
    before = snapshot(place.parent / "outside")
    (place / "runs/run" / path).write_text(text)
    argv = ("train", place / "shards", *TRAIN, "--out", place / "runs", "--name", "run")
    ran = attacked(warm, *argv)
    assert ran.code == 0, ran.err[-2000:]
    assert "Traceback" not in ran.err
    assert ran.grown_bytes < MAX_GROWTH
    assert snapshot(place.parent / "outside") == before
