"""A run folder as the report reads it: settings, epochs, and its evaluations.

A run folder may come from a stranger: links are not followed, sizes and counts are capped, and what
is damaged or missing besides `args.yaml` and `summary.csv` becomes a remark instead of an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.errors import CacheError, InputDataError, ManifestError, UsageError, command
from ci2p_cache.fields import declared_options
from ci2p_cache.record import read_json
from ci2p_cache.remote import url_of
from ci2p_cache.runs.evaluations import (
    EVALUATIONS,
    OLD_EVALUATION,
    Evaluation,
    Predictions,
    predictions_path,
    read_evaluation,
    read_predictions,
)
from ci2p_cache.runs.files import (
    ARGS,
    MODEL_FILE,
    SUMMARY,
    has_epoch,
    num_parameters,
    read_args,
    read_summary,
)
from ci2p_cache.training.spec import TrainSpec

__all__ = ["RunData", "cache_of", "flattened", "is_encoded_again", "read_paths", "read_run"]

_MAX_EVALUATIONS = 64
_MAX_PATHS = 64

Remark = tuple[str, str]
"""What is missing from a report, a sentence, and the command that makes it, or nothing."""


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
    evaluations: dict[Path, Evaluation]
    """Everything that it was evaluated on, by file; that of an earlier version is the last one."""
    evaluation: Evaluation | None
    """The one of them that is shown in full; None where there is none."""
    predictions: Predictions | None
    """Predictions of `evaluation`; None if there are none."""
    parameters: int | None
    """Parameters of the model and of the frozen g_a; None if unknown."""
    trained: int | None
    """Trained parameters among them; None if unknown."""
    command: str
    """A `train` command of the recorded settings: what was typed is not recorded."""
    written: str
    """When `summary.csv` was last written, in UTC."""
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
    args = _checked_args(path)
    settings = args["settings"]
    remarks: list[Remark] = []
    titles: tuple[str, ...] = ()
    try:
        titles = tuple(map(str, read_json(path / MODEL_FILE).get("class_titles", ())))
    except (OSError, ManifestError, TypeError) as error:
        text = _damage_of(MODEL_FILE, error)
        remarks.append((f"{text} Classes have numbers instead of names.", ""))
    parameters = trained = None
    try:
        trained, frozen = num_parameters(path)
        parameters = None if frozen is None else trained + frozen
        if settings["spec"].get("freeze"):
            # How many of them are in the layers that were kept is not recorded.
            trained = None
    except CacheError as error:
        if titles:
            remarks.append((f"The number of parameters is not known: {error}.", ""))
    evaluate = command("evaluate", path)
    found, damages = _read_evaluations(path, evaluate)
    remarks += damages
    evaluation = predictions = None
    chosen = _chosen(found)
    if chosen is not None:
        evaluation, file = found[chosen], predictions_path(chosen)
        try:
            predictions = read_predictions(file)
        except FileNotFoundError:
            text = f"{file.name} is missing, so there are no intervals and no mistakes."
            remarks.append((text, evaluate))
        except (OSError, pa.ArrowException, ValueError) as error:
            remarks.append((_damage_of(file.name, error), evaluate))
    elif not damages:
        text = "This run was not evaluated, so classes, confusions and calibration are not known."
        remarks.append((text, evaluate))
    columns, written = read_summary(path), (path / SUMMARY).stat().st_mtime
    return RunData(
        path=path,
        name=path.resolve().name,
        cache=str(args.get("cache", "")),
        model=str(settings["spec"].get("model", "?")),
        fingerprint=settings.get("fingerprint") or {},
        settings={k.removeprefix("spec."): _written(v) for k, v in flattened(settings)},
        numerics={str(k): str(v) for k, v in dict(args.get("numerics") or {}).items()},
        class_titles=titles,
        columns=columns,
        evaluations=found,
        evaluation=evaluation,
        predictions=predictions,
        parameters=parameters,
        trained=trained,
        command=_train_command(path, args),
        written=f"{datetime.fromtimestamp(written, UTC):%Y-%m-%d %H:%M} UTC",
        remarks=tuple(remarks),
    )


def _train_command(path: Path, args: Mapping[str, Any]) -> str:
    """Returns the command that trains with a run's settings; it leaves out defaults."""
    name, settings = path.resolve().name, args["settings"]
    folder = path if path.name == name else path.resolve()
    words: list[object] = ["--name", name]
    if folder.parent != Path("runs"):
        words += ["--out", folder.parent]
    flags, unsaid = declared_options(TrainSpec), []
    for field in fields(TrainSpec):
        if field.name not in settings["spec"]:
            continue
        value = settings["spec"][field.name]
        is_default = (tuple(value) if isinstance(value, list) else value) == field.default
        if field.name == "version" or (is_default and field.name != "model"):
            continue
        if field.name in flags and flags[field.name][2].is_flag:
            words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [value])]
        else:
            unsaid.append(f"{field.name} {_written(value)}")
    if settings.get("loader") == "OnlineLoader":
        words.append("--from-images")
    note = f"no option sets {', '.join(unsaid)}" if unsaid else ""
    return command("train", args.get("cache", ""), *words, note=note)


def is_encoded_again(path: Path) -> bool:
    """Says whether an evaluation is of a model on latents that got them from the images."""
    return path.stem.endswith("-images")


def read_paths(given: Sequence[str | Path]) -> tuple[list[RunData], list[Cache], list[Path]]:
    """Returns the runs, the caches, and the folders of runs that have no epoch yet.

    Raises:
        UsageError: nothing is given, too much, or one thing twice.
        InputDataError: a path is neither a run folder nor a cache, or no run has an epoch yet and
            no cache is given.
        ManifestError: a cache is damaged.
    """
    if not 1 <= len(given) <= _MAX_PATHS:
        raise UsageError(f"{len(given)} paths are given; 1 to {_MAX_PATHS} fit a report")
    paths = [Path(path) if url_of(path) is None else str(path) for path in given]
    real = [path if isinstance(path, str) else path.resolve() for path in paths]
    twice = next((path for i, path in enumerate(real) if path in real[:i]), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice")
    runs, caches, skipped = [], [], []
    for path in paths:
        if isinstance(path, str) or (path / MANIFEST).exists():
            caches.append(open_cache(path, partial=True))
        elif (path / ARGS).exists() and not has_epoch(path):
            skipped.append(path)
        elif (path / ARGS).exists():
            runs.append(read_run(path))
        else:
            raise InputDataError(
                f"{path} is neither a run folder nor a cache: it has no {ARGS} and no {MANIFEST}",
                hint="name the folder of one run, such as runs/NAME, or of one cache",
            )
    if not runs and not caches:
        # Raises what is wrong with it.
        read_run(skipped[0])
    return runs, caches, skipped


def cache_of(run: RunData, given: Sequence[Cache]) -> Cache | None:
    """Returns the cache that a run was trained from: one of those given, or where it was."""
    evaluated = run.evaluation.cache if run.evaluation is not None else ""
    candidates: list[Cache | str] = [*given, evaluated, run.cache]
    for each in candidates:
        if isinstance(each, str) and (not each or url_of(each) is not None):
            # A report fetches nothing that it was not given.
            continue
        try:
            cache = each if isinstance(each, Cache) else open_cache(each, partial=True)
        except CacheError:
            continue
        if cache.fingerprint.to_dict() == run.fingerprint:
            return cache
    return None


def _read_evaluations(run: Path, evaluate: str) -> tuple[dict[Path, Evaluation], list[Remark]]:
    """Returns what can be read, by file, and a remark for each of the others."""
    folder = run / EVALUATIONS
    paths = [] if folder.is_symlink() else sorted(folder.glob("*.json"))
    remarks: list[Remark] = []
    if len(paths) > _MAX_EVALUATIONS:
        text = f"Of {len(paths)} evaluations the first {_MAX_EVALUATIONS} are shown."
        remarks.append((text, ""))
    found: dict[Path, Evaluation] = {}
    for path in (*paths[:_MAX_EVALUATIONS], run / OLD_EVALUATION):
        try:
            one = read_evaluation(path)
        except FileNotFoundError:
            continue
        except (OSError, ManifestError, OverflowError) as error:
            remarks.append((_damage_of(path.name, error), evaluate))
            continue
        # The file of an earlier version counts where there is no newer one of the same.
        known = [(each.split, each.checkpoint, each.is_own_data) for each in found.values()]
        if path.name != OLD_EVALUATION or (one.split, one.checkpoint, one.is_own_data) not in known:
            found[path] = one
    return found, remarks


def _chosen(found: Mapping[Path, Evaluation]) -> Path | None:
    """Returns the evaluation that says most about a run; None of none.

    Its own validation images come first, then images that training has not seen, then its training
    images; of equal ones the latest checkpoint.
    """

    def worth(path: Path) -> tuple[int, bool, str]:
        one = found[path]
        own = {"val": 2, "train": 0}.get(one.split, 1) if one.is_own_data else 1
        return own, not is_encoded_again(path), one.checkpoint

    return max(found, key=worth, default=None)


def _damage_of(name: str, error: Exception) -> str:
    """Returns a sentence about a file; our own errors name it already, and say what is wrong."""
    return f"{error}." if name in str(error) else f"{name} is damaged: {error}."


def _checked_args(path: Path) -> dict[str, Any]:
    file = path / ARGS
    try:
        args = read_args(path)
    except (OSError, ManifestError) as error:
        raise InputDataError(f"{file} cannot be read: {error}") from error
    settings = args.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("spec"), dict):
        raise InputDataError(f"{file} is damaged: it has no `settings` with a `spec`")
    if not isinstance(args.get("numerics") or {}, dict):
        raise InputDataError(f"{file} is damaged: `numerics` is no mapping")
    return args


def flattened(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted names and values, in the order of the file."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
