"""A run folder as the report reads it: settings, epochs, and the evaluation where there is one.

A run folder may come from a stranger: links are not followed, sizes are capped, and what is damaged
or missing besides `args.yaml` and `summary.csv` becomes a remark instead of an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ci2p_cache.cache.index import read_parquet
from ci2p_cache.errors import InputDataError, ManifestError, command
from ci2p_cache.record import read_json, read_yaml
from ci2p_cache.report.summary import read_summary

__all__ = ["ARGS", "CalibrationBin", "Evaluation", "Predictions", "Remark", "RunData", "read_run"]

ARGS = "args.yaml"
_MAX_ARGS_BYTES = 2**16
"""Ours have a few thousand."""
_MAX_CONFUSIONS = 10**6
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
    """`evaluation.json`."""

    checkpoint: str
    """Which weights."""
    split: str
    """Which split."""
    cache: str
    """Where the cache lay that was evaluated on."""
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
    """(label, predicted, count) of wrong predictions, the most frequent first."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """`predictions.parquet`, a row per image; arrays of one length."""

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunData:
    """What a run folder says."""

    path: Path
    """The folder."""
    name: str
    """Its name."""
    cache: str
    """Where the cache lay."""
    model: str
    """Name of the model."""
    fingerprint: Mapping[str, Any]
    """The cache's fingerprint."""
    settings: dict[str, str]
    """Everything that binds the run, dotted names to written values."""
    numerics: dict[str, str]
    """Device, threads and versions."""
    class_titles: tuple[str, ...]
    """Names of the classes; empty where `model.json` is missing."""
    columns: dict[str, list[float]]
    """The columns of `summary.csv`."""
    evaluation: Evaluation | None
    """None where there is none."""
    predictions: Predictions | None
    """None where there are none."""
    remarks: tuple[Remark, ...]
    """What is missing or damaged."""

    def title_of(self, label: int) -> str:
        """Returns the name of a class, or its number where it has none."""
        if 0 <= label < len(self.class_titles):
            return self.class_titles[label]
        return f"class {label}"


def read_run(path: Path) -> RunData:
    """Reads a run folder.

    Raises:
        InputDataError: `args.yaml` or `summary.csv` is missing or damaged, or no epoch has ended.
    """
    args = _read_args(path / ARGS)
    settings = args["settings"]
    remarks: list[Remark] = []
    titles: tuple[str, ...] = ()
    try:
        model = read_json(path / "model.json")
        titles = tuple(str(title) for title in model.get("class_titles", ()))
    except (OSError, ManifestError, TypeError) as error:
        text = _damaged("model.json", error)
        remarks.append(Remark(f"{text} Classes have numbers instead of names."))
    evaluation = predictions = None
    evaluate = command("evaluate", path)
    try:
        evaluation = _evaluation(read_json(path / "evaluation.json"))
    except FileNotFoundError:
        text = "This run was not evaluated, so classes, confusions and calibration are not known."
        remarks.append(Remark(text, evaluate))
    except (OSError, ManifestError, KeyError, TypeError, ValueError) as error:
        remarks.append(Remark(_damaged("evaluation.json", error), evaluate))
    try:
        predictions = _predictions(path / "predictions.parquet")
    except FileNotFoundError:
        if evaluation is not None:
            text = "predictions.parquet is missing, so there are no intervals and no mistakes."
            remarks.append(Remark(text, evaluate))
    except (OSError, pa.ArrowException, ValueError) as error:
        remarks.append(Remark(_damaged("predictions.parquet", error), evaluate))
    return RunData(
        path=path,
        name=path.resolve().name,
        cache=str(args.get("cache", "")),
        model=str(settings["spec"].get("model", "?")),
        fingerprint=settings.get("fingerprint") or {},
        settings=dict(_flattened(settings)),
        numerics={str(k): str(v) for k, v in dict(args.get("numerics") or {}).items()},
        class_titles=titles,
        columns=read_summary(path),
        evaluation=evaluation,
        predictions=predictions,
        remarks=tuple(remarks),
    )


def _read_args(path: Path) -> dict[str, Any]:
    try:
        args = read_yaml(path, max_bytes=_MAX_ARGS_BYTES)
    except (OSError, ManifestError) as error:
        raise InputDataError(f"{path} cannot be read: {error}") from error
    settings = args.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("spec"), dict):
        raise InputDataError(f"{path} is damaged: it has no `settings` with a `spec`")
    if not isinstance(args.get("numerics") or {}, dict):
        raise InputDataError(f"{path} is damaged: `numerics` is no mapping")
    return args


def _flattened(data: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns dotted names and written values, in the order of the file."""
    found: list[tuple[str, str]] = []
    for name, value in data.items():
        place = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found += _flattened(value, f"{place}.")
        else:
            found.append((place.removeprefix("spec."), _written(value)))
    return found


def _written(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(_written(item) for item in value[:16])
    return str(value)


def _evaluation(data: Mapping[str, Any]) -> Evaluation:
    """Takes what the report shows from `evaluation.json`; other fields are left alone."""
    triples = [_triple(triple) for triple in data["confusion"][:_MAX_CONFUSIONS]]
    wrong = [triple for triple in triples if triple[0] != triple[1]]
    bins = [
        CalibrationBin(
            samples=int(one["samples"]),
            confidence=float(one["confidence"]),
            accuracy=float(one["accuracy"]),
        )
        for one in data["bins"][:1000]
        if int(one["samples"]) > 0
    ]
    return Evaluation(
        checkpoint=str(data["checkpoint"]),
        split=str(data["split"]),
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
        confusions=tuple(sorted(wrong, key=lambda one: (-one[2], one[0], one[1]))),
    )


def _triple(values: Any) -> tuple[int, int, int]:
    first, second, third = values
    return int(first), int(second), int(third)


def _predictions(path: Path) -> Predictions:
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


def _damaged(name: str, error: Exception) -> str:
    """Returns a sentence about a file; errors of ours name it already, and say what is wrong."""
    if name in str(error):
        return f"{error}."
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return f"{name} is damaged: {reason}."
