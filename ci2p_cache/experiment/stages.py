"""The last two stages of an experiment: where evaluation and report are called, one place each."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ci2p_cache.errors import ManifestError
from ci2p_cache.inference.evaluation import EVALUATIONS, Evaluation, evaluation_name
from ci2p_cache.inference.scoring import evaluate
from ci2p_cache.record import Record, read_json

__all__ = ["Scores", "evaluate_run", "report_path", "write_report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores(Record):
    """What an evaluation comes to; `evaluations` in the run folder has all of it."""

    checkpoint: str
    """Name of the checkpoint folder whose weights were evaluated."""
    samples: int
    """Images of the validation split."""
    top1: float
    """Share of them whose class came first, 0 to 1."""
    top5: float
    """Share whose class was among the first five, 0 to 1."""
    nll: float
    """Mean negative log-likelihood of the right class, in nats."""
    ece: float
    """Expected calibration error, 0 to 1 (Guo et al. 2017, arXiv 1706.04599)."""


def evaluate_run(run: Path, *, cache: Path, checkpoint: str, device: str, is_new: bool) -> Scores:
    """Evaluates a run on its validation split, or reads what was evaluated before.

    Args:
        run: The run folder; the evaluation is written into it.
        cache: The cache.
        checkpoint: best or last.
        device: As for `train`.
        is_new: Whether the run was trained since; else a whole evaluation of the same checkpoint
            is read again.
    """
    if not is_new:
        folder = read_json(run / "checkpoints" / "last.json").get(checkpoint)
        scores = _read_scores(run, str(folder))
        if scores is not None:
            return scores
    return _scores(evaluate(run, cache=cache, checkpoint=checkpoint, device=device).to_dict())


def _read_scores(run: Path, checkpoint: str) -> Scores | None:
    """Returns what a checkpoint reached on the run's own validation split; None: not known."""
    name = evaluation_name("val", checkpoint)
    # The second is of runs that were evaluated before there were several.
    for path in (run / EVALUATIONS / f"{name}.json", run / "evaluation.json"):
        try:
            found = Evaluation.from_dict(read_json(path))
        except (FileNotFoundError, ManifestError):
            continue
        if (found.checkpoint, found.split, found.is_own_data) == (checkpoint, "val", True):
            return _scores(found.to_dict())
    return None


def _scores(evaluation: dict[str, Any]) -> Scores:
    return Scores.from_dict({field.name: evaluation[field.name] for field in fields(Scores)})


def report_path(out: Path) -> Path:
    """Returns where an experiment's report is."""
    return out / "report.html"


def write_report(path: Path, *, runs: list[Path], cache: Path) -> None:
    """Writes the report of an experiment's runs and cache."""
    # Here, because drawing takes long to import and a finished experiment draws nothing.
    from ci2p_cache.illustrations import LatentIllustrator
    from ci2p_cache.report.html import write_report as write

    write([*runs, cache], path, illustrator=LatentIllustrator())
