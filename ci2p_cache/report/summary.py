"""`summary.csv` of a run folder, read back."""

from __future__ import annotations

import csv
import io
import itertools
import math
from pathlib import Path

from ci2p_cache.errors import InputDataError, ManifestError
from ci2p_cache.record import read_regular

__all__ = ["best_epoch_of", "has_epoch", "mean_wait_share", "read_summary", "training_seconds"]

_COLUMNS = (
    "epoch",
    "loss",
    "train_top1",
    "val_loss",
    "top1",
    "top5",
    "images",
    "images_per_second",
    "wait_share",
    "epoch_seconds",
)

_NAME = "summary.csv"

_MAX_BYTES = 2**24
"""About 100,000 epochs."""


def has_epoch(run_dir: Path) -> bool:
    """Says whether an epoch of a run has ended; True where its `summary.csv` cannot be read."""
    try:
        text = read_regular(run_dir / _NAME, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return False
    except (OSError, ManifestError):
        return True
    return len(text.splitlines()) > 1


def read_summary(run_dir: Path) -> dict[str, list[float]]:
    """Returns the columns of a run's `summary.csv`, a value per epoch; an empty cell is nan.

    Raises:
        InputDataError: there is no `summary.csv`, it is damaged or lacks a column, or no epoch has
            ended yet.
    """
    path = run_dir / _NAME
    try:
        text = read_regular(path, max_bytes=_MAX_BYTES).decode("utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        columns = {name: [float(row[name] or "nan") for row in rows] for name in _COLUMNS}
    except FileNotFoundError as error:
        raise InputDataError(
            f"{run_dir} has no {path.name}: it is no run folder, or no epoch of it has ended"
        ) from error
    except (KeyError, TypeError, ValueError, OSError, csv.Error, ManifestError) as error:
        raise InputDataError(f"{path} is damaged: {error}") from error
    if not rows:
        raise InputDataError(f"{path} has no epoch yet; there is nothing to draw")
    epochs = columns["epoch"]
    if not all(a < b for a, b in itertools.pairwise(epochs)) or math.isnan(epochs[-1]):
        raise InputDataError(f"{path} is damaged: its epochs do not ascend")
    return columns


def best_epoch_of(columns: dict[str, list[float]]) -> tuple[float, float] | None:
    """Returns epoch and value of the highest validation top-1, the earlier on a tie.

    None where the run had no validation split.
    """
    known = [
        (top1, -epoch)
        for epoch, top1 in zip(columns["epoch"], columns["top1"], strict=True)
        if not math.isnan(top1)
    ]
    if not known:
        return None
    top1, minus_epoch = max(known)
    return -minus_epoch, top1


def training_seconds(columns: dict[str, list[float]]) -> list[float]:
    """Returns the seconds that each epoch trained, without validation; never more than it took."""
    return [
        min(images / rate, whole) if rate > 0 else math.nan
        for images, rate, whole in zip(
            columns["images"], columns["images_per_second"], columns["epoch_seconds"], strict=True
        )
    ]


def mean_wait_share(columns: dict[str, list[float]]) -> float:
    """Returns the share of all epochs' training time spent waiting for data; nan: not known."""
    wait = train = 0.0
    for seconds, share in zip(training_seconds(columns), columns["wait_share"], strict=True):
        if math.isfinite(seconds) and math.isfinite(share):
            wait, train = wait + seconds * share, train + seconds
    return wait / train if train else math.nan
