"""The evaluations of a run folder as the report reads them, and which of them it shows in full.

What is damaged becomes a remark. Files may come from a stranger: links are not followed, sizes and
counts are capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ci2p_cache.errors import ManifestError, command
from ci2p_cache.parquet import read_parquet
from ci2p_cache.record import read_json

__all__ = [
    "CalibrationBin",
    "Evaluation",
    "Predictions",
    "Remark",
    "chosen_evaluation",
    "damage_of",
    "read_evaluations",
    "read_predictions",
]

_FOLDER = "evaluations"
_OLD, _OLD_PREDICTIONS = "evaluation.json", "predictions.parquet"
"""Of runs that were evaluated before each split and checkpoint had files of its own."""
_MAX_EVALUATIONS = 64
_MAX_CONFUSIONS, _KEPT_CONFUSIONS = 10**6, 100
_PREDICTION_TYPES = {
    "row": pa.int64(),
    "key": pa.string(),
    "label": pa.int64(),
    "predicted": pa.int64(),
    "confidence": pa.float64(),
    "correct": pa.bool_(),
}


@dataclass(frozen=True, slots=True)
class Remark:
    """What is missing from a report, and what makes it."""

    text: str
    """A sentence."""
    command: str = ""
    """A command to paste, or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin:
    """Predictions of like confidence."""

    samples: int
    """How many."""
    confidence: float
    """Their mean confidence, 0 to 1."""
    accuracy: float
    """Share of them that is right, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one file says of one checkpoint on one split."""

    predictions: Path
    """The file of its predictions, which need not be there."""
    checkpoint: str
    """Which weights."""
    split: str
    """Which split."""
    is_own_data: bool
    """Whether its images are those that the run was trained from and validated on."""
    is_encoded_again: bool
    """Whether a model that reads latents got them from the images."""
    cache: str
    """Where the cache was that was evaluated on."""
    samples: int
    """Images in it."""
    top1: float
    """Share classified right, 0 to 1."""
    top5: float
    """Share whose class was among the first five, 0 to 1."""
    nll: float
    """Mean negative log-likelihood of the right class, in nats."""
    ece: float
    """Expected calibration error, 0 to 1 (Guo et al. 2017, arXiv 1706.04599)."""
    bins: tuple[CalibrationBin, ...]
    """Those that hold a prediction, by confidence."""
    per_class: tuple[tuple[int, int, int], ...]
    """(class, samples, right ones)."""
    confusions: tuple[tuple[int, int, int], ...]
    """(label, predicted, count) of the most frequent wrong predictions, in that order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """A row per image; arrays of one length."""

    row: npt.NDArray[np.int64]
    """Row in the split."""
    key: list[str]
    """Name within the split."""
    label: npt.NDArray[np.int64]
    """The right class."""
    predicted: npt.NDArray[np.int64]
    """The class that came first."""
    confidence: npt.NDArray[np.float64]
    """The probability that it was given, 0 to 1."""
    correct: npt.NDArray[np.bool_]
    """Whether it is right."""


def read_evaluations(run: Path) -> tuple[tuple[Evaluation, ...], list[Remark]]:
    """Reads all evaluations of a run folder.

    Returns:
        Those that can be read, by file name, and a remark for each of the others. The file of an
        earlier version comes last, unless there is a newer one of the same split and checkpoint.
    """
    folder = run / _FOLDER
    paths = [] if folder.is_symlink() else sorted(folder.glob("*.json"))
    remarks: list[Remark] = []
    if len(paths) > _MAX_EVALUATIONS:
        text = f"Of {len(paths)} evaluations the first {_MAX_EVALUATIONS} are shown."
        remarks.append(Remark(text))
    found: list[Evaluation] = []
    for path in (*paths[:_MAX_EVALUATIONS], run / _OLD):
        try:
            one = _evaluation(path)
        except FileNotFoundError:
            continue
        except (OSError, ManifestError, KeyError, TypeError, ValueError) as error:
            remarks.append(Remark(damage_of(path.name, error), command("evaluate", run)))
            continue
        if path.name != _OLD or not any(_same_subject(one, other) for other in found):
            found.append(one)
    return tuple(found), remarks


def chosen_evaluation(found: Sequence[Evaluation], *, best: str) -> Evaluation | None:
    """Returns the evaluation that says most about a run; None of none.

    Its own validation images come first, then images that training has not seen, then its training
    images; of equal ones the best checkpoint, then the latest.

    Args:
        found: Evaluations of one run.
        best: Name of the best checkpoint.
    """

    def worth(one: Evaluation) -> tuple[int, bool, bool, str]:
        is_val, is_train = one.split == "val", one.split == "train"
        subject = 2 if one.is_own_data and is_val else 0 if one.is_own_data and is_train else 1
        return subject, not one.is_encoded_again, one.checkpoint == best, one.checkpoint

    return max(found, key=worth, default=None)


def _same_subject(one: Evaluation, other: Evaluation) -> bool:
    return (one.split, one.checkpoint, one.is_own_data) == (
        other.split,
        other.checkpoint,
        other.is_own_data,
    )


def _evaluation(path: Path) -> Evaluation:
    """Takes what the report shows from a file; other fields are left alone."""
    data = read_json(path)
    triples = [_triple(triple) for triple in data["confusion"][:_MAX_CONFUSIONS]]
    wrong = [triple for triple in triples if triple[0] != triple[1]]
    wrong.sort(key=lambda one: (-one[2], one[0], one[1]))
    bins = [
        CalibrationBin(
            samples=int(one["samples"]),
            confidence=float(one["confidence"]),
            accuracy=float(one["accuracy"]),
        )
        for one in data["bins"][:1000]
        if int(one["samples"]) > 0
    ]
    is_old = path.name == _OLD
    return Evaluation(
        predictions=path.with_name(_OLD_PREDICTIONS) if is_old else path.with_suffix(".parquet"),
        checkpoint=str(data["checkpoint"]),
        split=str(data["split"]),
        is_own_data=bool(data.get("is_own_data", True)),
        is_encoded_again=path.stem.endswith("-images"),
        cache=str(data["cache"]),
        samples=int(data["samples"]),
        top1=float(data["top1"]),
        top5=float(data["top5"]),
        nll=float(data["nll"]),
        ece=float(data["ece"]),
        bins=tuple(sorted(bins, key=lambda one: one.confidence)),
        per_class=tuple(
            _triple([one["label"], one["samples"], one["correct"]]) for one in data["per_class"]
        ),
        confusions=tuple(wrong[:_KEPT_CONFUSIONS]),
    )


def _triple(values: Any) -> tuple[int, int, int]:
    first, second, third = values
    return int(first), int(second), int(third)


def read_predictions(path: Path) -> Predictions:
    """Reads the predictions of an evaluation.

    Raises:
        FileNotFoundError: they are not there.
        OSError, ValueError, pyarrow.ArrowException: they cannot be read, or are damaged.
    """
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(path)
    names = list(_PREDICTION_TYPES)
    table = read_parquet(path, names)
    if table.column_names != names:
        raise ValueError(f"it has columns {table.column_names}; wanted {names}")
    columns = {
        name: table[name].combine_chunks().cast(kind) for name, kind in _PREDICTION_TYPES.items()
    }
    if not table.num_rows or any(column.null_count for column in columns.values()):
        raise ValueError("it has no rows, or rows with missing values")
    arrays = {
        name: column.to_numpy(zero_copy_only=False)
        for name, column in columns.items()
        if name != "key"
    }
    return Predictions(key=columns["key"].to_pylist(), **arrays)


def damage_of(name: str, error: Exception) -> str:
    """Returns a sentence about a file; errors of ours name it already, and say what is wrong."""
    if name in str(error):
        return f"{error}."
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return f"{name} is damaged: {reason}."
