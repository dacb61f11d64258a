"""`run_seeds`: one experiment from several seeds and one cache, and what they come to together.

::

    out/caches/            one cache for all, unless they share a folder of caches with others
        seed-0/ seed-1/    an experiment folder for each seed, see run.py
        report.html        all of them: mean, standard deviation, paired intervals

The seeds are those of training. Images, split and latents are the same for all.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.errors import UsageError
from ci2p_cache.experiment.run import (
    ExperimentSummary,
    Stage,
    StageClock,
    StageEvent,
    run_experiment,
    write_experiment_report,
)
from ci2p_cache.experiment.spec import Experiment
from ci2p_cache.record import Record
from ci2p_cache.runs.statistics import mean_and_deviation
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver, TrainSummary
from ci2p_cache.training.trackers import DEFAULT_TRACKERS, Tracker

__all__ = ["SeedsSummary", "run_seeds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsSummary(Record):
    """What an experiment ended with from several seeds; what was not asked for is None or empty."""

    name: str
    """Name of the experiment."""
    claim: str
    """What it was to show."""
    path: str
    """The folder of all seeds."""
    cache: str
    """The cache that they share."""
    encoded_now: int
    """Images that were encoded in this call."""
    seeds: tuple[int, ...]
    """The seeds, in order."""
    runs: tuple[str, ...]
    """The run folder of each."""
    top1: tuple[float, ...]
    """Validation top-1 of each, 0 to 1: evaluated, or as training recorded it last."""
    mean: float | None
    """Mean of these."""
    deviation: float | None
    """Their sample standard deviation; None of one seed."""
    report: str | None
    """The report on all of them."""
    seconds: dict[str, float] = field(hash=False)
    """Wall time of each stage in this call, over all seeds."""


def run_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    out: str | Path | None = None,
    *,
    source: str | Path | None = None,
    device: str = "auto",
    until: Stage = "report",
    cache_dir: str | Path | None = None,
    on_event: Callable[[StageEvent], None] | None = None,
    encode_observer: EncodeObserver | None = None,
    train_observer: TrainObserver | None = None,
    track: Sequence[Tracker] = DEFAULT_TRACKERS,
    ranks: Ranks | None = None,
) -> SeedsSummary:
    """Runs an experiment once per seed, all from one cache, and reports on them together.

    Called again with the same arguments it continues where it stopped. More seeds can be added: the
    others are found finished.

    Args:
        experiment: What to run; its `train.seed` is replaced.
        seeds: The seeds of training, no two alike.
        out: Folder of all; None: experiments/NAME.
        source: As for `run_experiment`.
        device: As for `run_experiment`, as all that follow.
        until: The last stage to run.
        cache_dir: Folder of caches that experiments share; None: `caches` in `out`.
        on_event: Called when a stage starts and ends; on rank 0.
        encode_observer: Receives stage one's progress.
        train_observer: Receives stage two's progress and epochs.
        track: As for `train`.
        ranks: The ranks to train with, joined; None: as the environment says.

    Raises:
        UsageError: no seed is given, or one twice; or as `run_experiment`.
        CacheError: whatever `run_experiment` raises.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"`seeds` (--seeds) is {tuple(seeds)}; wanted one or more, none twice")
    root = Path("experiments", experiment.name) if out is None else Path(out)
    # Refuses a seed that is none before anything is run.
    specs = [dataclasses.replace(experiment.train, seed=seed) for seed in seeds]
    found: list[ExperimentSummary] = []
    report = None
    with ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks.from_environment().joined(device))
        clock = StageClock(on_event if ranks.is_writer else None)
        for spec in specs:
            name = f"{experiment.name}-seed-{spec.seed}"
            found.append(
                run_experiment(
                    dataclasses.replace(experiment, name=name, train=spec),
                    root / f"seed-{spec.seed}",
                    source=source,
                    device=device,
                    until="evaluate" if until == "report" else until,
                    cache_dir=root / "caches" if cache_dir is None else cache_dir,
                    on_event=on_event,
                    encode_observer=encode_observer,
                    train_observer=train_observer,
                    track=track,
                    ranks=ranks,
                )
            )
        trained = [each.trained for each in found if each.trained is not None]
        if until == "report" and ranks.is_writer:
            report = write_experiment_report(root, trained, Path(found[0].cache), clock)
    return _summary(experiment, seeds, root, found, trained, report, clock)


def _summary(
    experiment: Experiment,
    seeds: Sequence[int],
    root: Path,
    found: Sequence[ExperimentSummary],
    trained: Sequence[TrainSummary],
    report: str | None,
    clock: StageClock,
) -> SeedsSummary:
    scores = [each.scores for each in found if each.scores is not None]
    recorded = (each.last.val_top1 for each in trained)
    top1 = [each.top1 for each in scores] or [each for each in recorded if each is not None]
    mean, deviation = mean_and_deviation(top1) if top1 else (None, None)
    seconds: Counter[str] = Counter(clock.seconds)
    for each in found:
        seconds.update(each.seconds)
    return SeedsSummary(
        name=experiment.name,
        claim=experiment.claim,
        path=str(root),
        cache=found[0].cache,
        encoded_now=sum(each.encoded.encoded_now for each in found if each.encoded is not None),
        seeds=tuple(seeds),
        runs=tuple(each.path for each in trained),
        top1=tuple(top1),
        mean=mean,
        deviation=deviation,
        report=report,
        seconds=dict(seconds),
    )
