"""A run folder as the report reads it: settings, epochs, and its evaluations.

A run folder may come from a stranger: links are not followed, sizes are capped, and what is damaged
or missing besides `args.yaml` and `summary.csv` becomes a remark instead of an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ci2p_cache.errors import InputDataError, ManifestError, command
from ci2p_cache.record import read_json, read_yaml
from ci2p_cache.report.evaluations import (
    Evaluation,
    Predictions,
    Remark,
    chosen_evaluation,
    damage_of,
    read_evaluations,
    read_predictions,
)
from ci2p_cache.report.summary import read_summary

__all__ = ["ARGS", "RunData", "read_run"]

ARGS = "args.yaml"
_MAX_ARGS_BYTES = 2**16
"""Ours have a few thousand."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunData:
    """What a run folder says."""

    path: Path
    """The folder."""
    name: str
    """Its name."""
    cache: str
    """Where the cache was."""
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
    evaluations: tuple[Evaluation, ...]
    """Everything that it was evaluated on, by file name."""
    evaluation: Evaluation | None
    """The one of them that is shown in full; None where there is none."""
    predictions: Predictions | None
    """Those of `evaluation`; None where there are none."""
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
        text = damage_of("model.json", error)
        remarks.append(Remark(f"{text} Classes have numbers instead of names."))
    found, damages = read_evaluations(path)
    remarks += damages
    evaluation = chosen_evaluation(found, best=_best_checkpoint(path))
    predictions = None
    evaluate = command("evaluate", path)
    if evaluation is not None:
        try:
            predictions = read_predictions(evaluation.predictions)
        except FileNotFoundError:
            name = evaluation.predictions.name
            text = f"{name} is missing, so there are no intervals and no mistakes."
            remarks.append(Remark(text, evaluate))
        except (OSError, pa.ArrowException, ValueError) as error:
            remarks.append(Remark(damage_of(evaluation.predictions.name, error), evaluate))
    elif not damages:
        text = "This run was not evaluated, so classes, confusions and calibration are not known."
        remarks.append(Remark(text, evaluate))
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
        evaluations=found,
        evaluation=evaluation,
        predictions=predictions,
        remarks=tuple(remarks),
    )


def _best_checkpoint(path: Path) -> str:
    """Returns the name of the best checkpoint; "" where it is not known."""
    try:
        return str(read_json(path / "checkpoints" / "last.json").get("best", ""))
    except (OSError, ManifestError):
        return ""


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
