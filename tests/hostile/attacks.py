"""What the attacks are made of, and what every refusal must look like."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.seals import reseal, write_json
from tests.support.warm import Ended, WarmParent

MAX_GROWTH = 300 * 2**20
TRAIN = ("--model", "vitds_nano", "--epochs", "1", "--batch-size", "8", "--device", "cpu")
SHARD = "latents.zarr/train/latents/c.0.0.0.0.0"
INDEX = "index/train-000000.parquet"
COMMIT = "commits/train-000000.json"


def attacked(warm: WarmParent, *arguments: object) -> Ended:
    """Runs a command in a child of limited memory."""
    return warm.run(*arguments, limited=True, limit=90)


def snapshot(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(ran: Ended, codes: set[int], name: str) -> None:
    """One error with its exit code that names the file; no traceback, no escapes, little memory."""
    text = ran.out + ran.err
    assert "Traceback" not in text, text[-3000:]
    assert ran.code in codes, text[-3000:]
    assert name in text, text[-3000:]
    assert len(text) < 50_000
    assert "\x1b" not in text
    assert ran.grown_bytes < MAX_GROWTH, f"{ran.grown_bytes / 2**20:.0f} MiB"


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields by dotted names, numbers being places in a list: `a__b__0=1`."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        target = data
        for step in way:
            target = target[int(step) if step.isdigit() else step]
        target[int(last) if last.isdigit() else last] = value
    write_json(path, data)


def pad(path: Path, size: int) -> None:
    text = path.read_text()
    path.write_text(text + " " * (size - len(text)))


def replace(path: Path, kind: str) -> None:
    """Puts something that is no file in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def set_manifest(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        edit_json(root / "cache.json", **changes)
        reseal(root)

    return change


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def lead_out(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(outside_of(folder))


def commands(place: Path, name: str) -> tuple[Any, ...]:
    shards = place / "shards"
    return {
        "inspect": ("inspect", shards),
        "sample": ("inspect", shards, "--row", "0", "--split", "train"),
        "picture": ("inspect", shards, "--picture", place / "look.png"),
        "verify": ("verify", shards),
        "train": ("train", shards, *TRAIN, "--out", place / "new"),
    }[name]


def outside_of(run: Path) -> Path:
    return next(p for p in run.parents if p.name == "place").parent / "outside"
