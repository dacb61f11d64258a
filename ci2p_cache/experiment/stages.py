"""The last two stages of an experiment: where evaluation and report are called, one place each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci2p_cache.errors import ManifestError
from ci2p_cache.inference.evaluation import EVALUATION
from ci2p_cache.inference.scoring import evaluate
from ci2p_cache.record import Record, read_json

__all__ = ["Scores", "evaluate_run", "read_scores", "report_path", "write_report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores(Record):
    """What an evaluation comes to; evaluation.json in the run folder has all of it."""

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
        run: The run folder; evaluation.json and predictions.parquet are written into it.
        cache: The cache.
        checkpoint: best or last.
        device: As for `train`.
        is_new: Whether the run was trained since; else a whole evaluation of the same checkpoint
            is read again.
    """
    if not is_new:
        scores = read_scores(run)
        if scores is not None and scores.checkpoint == _folder_of(run, checkpoint):
            return scores
    evaluate(run, cache=cache, checkpoint=checkpoint, device=device)
    scores = read_scores(run)
    assert scores is not None
    return scores


def read_scores(run: Path) -> Scores | None:
    """Returns the evaluation of a run, None where there is none or it is damaged."""
    try:
        found = read_json(run / EVALUATION)
        names = ("checkpoint", "samples", "top1", "top5", "nll", "ece")
        return Scores.from_dict({name: found[name] for name in names})
    except (FileNotFoundError, ManifestError, KeyError):
        return None


def _folder_of(run: Path, checkpoint: str) -> Any:
    return read_json(run / "checkpoints" / "last.json").get(checkpoint)


def report_path(out: Path) -> Path:
    """Returns where an experiment's report lies."""
    return out / "report.html"


def write_report(path: Path, *, runs: list[Path], cache: Path) -> None:
    """Writes the report of an experiment's runs and cache."""
    # Here, because drawing takes long to import and a finished experiment draws nothing.
    from ci2p_cache.illustrations import LatentIllustrator
    from ci2p_cache.report.html import write_report as write

    write([*runs, cache], path, illustrator=LatentIllustrator())
