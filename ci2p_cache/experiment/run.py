"""`run_experiment`: encode, train, evaluate, report, in one folder; run again, it continues.

::

    out/experiment.json   the resolved experiment, written before anything else
        pictures/         only where the experiment draws its own
        shards/           stage one's cache
        runs/NAME/        stage two's run folder, with evaluations/
        report.html       both, to look at
        .lock             only while somebody runs it

Each stage continues where it stopped, so this keeps no state of its own: what is finished says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path
from ci2p_cache.demo_pictures import write_pictures
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary
from ci2p_cache.encoding.run import encode
from ci2p_cache.errors import RunMismatchError, UsageError, command
from ci2p_cache.experiment.clock import StageClock
from ci2p_cache.experiment.spec import EXPERIMENT, Experiment, read_experiment, refuse_other
from ci2p_cache.experiment.stages import Scores, evaluate_run, report_path, write_report
from ci2p_cache.outputs import refuse_url
from ci2p_cache.record import Record
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver, TrainSummary
from ci2p_cache.training.run import train

__all__ = ["STAGES", "ExperimentSummary", "Stage", "StageEvent", "run_experiment"]

Stage = Literal["pictures", "encode", "train", "evaluate", "report"]

_Clock = StageClock[Stage]

STAGES: tuple[Stage, ...] = ("encode", "train", "evaluate", "report")
"""What `until` may name, in order."""

_OWN = {".lock", ".staging"}
"""What a folder holds before its experiment is recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEvent:
    """A stage that starts or has ended."""

    stage: Stage
    """Which one."""
    text: str
    """One line: what it will do, or what came of it."""
    seconds: float | None
    """How long it took; None when it starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentSummary(Record):
    """What an experiment ended with; stages that were not asked for are None."""

    name: str
    """Name of the experiment."""
    claim: str
    """What it was to show."""
    path: str
    """Its folder."""
    cache: str
    """The cache."""
    encoded: EncodeSummary | None
    """Stage one; None on several ranks, which find it done."""
    trained: TrainSummary | None
    """Stage two."""
    scores: Scores | None
    """Evaluation of the experiment's checkpoint."""
    report: str | None
    """The report."""
    seconds: dict[str, float] = field(hash=False)
    """Wall time of each stage in this call."""


def run_experiment(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    until: Stage = "report",
    on_event: Callable[[StageEvent], None] | None = None,
    encode_observer: EncodeObserver | None = None,
    train_observer: TrainObserver | None = None,
    ranks: Ranks | None = None,
) -> ExperimentSummary:
    """Runs a whole experiment in one folder.

    Called again with the same arguments it continues in the stage where it stopped; a finished one
    returns at once. In processes that torchrun has started it trains on all of them together, from
    a cache that has to be complete by then; rank 0 alone evaluates and reports.

    Args:
        experiment: What to run, with its `source` or `generate` filled in.
        out: Its folder; None: experiments/NAME.
        device: auto, cpu, cuda or cuda:1, of all stages; auto leaves stage one to
            `experiment.encode.devices`.
        until: The last stage to run.
        on_event: Called when a stage starts and ends; on rank 0.
        encode_observer: Receives stage one's progress.
        train_observer: Receives stage two's progress and epochs.
        ranks: The ranks to train with, joined; None: as the environment says.

    Raises:
        UsageError: no images are named, `out` is a URL, `until` is no stage, or several ranks find
            no cache.
        RunMismatchError: the folder holds another experiment, or something else.
        ManifestError: the folder's record is damaged.
        LockedError: another process runs an experiment there.
        InterruptedRunError: a signal stopped it; run it again to continue.
        CacheError: whatever `encode`, `train` and the evaluation raise.
    """
    if until not in STAGES:
        raise UsageError(f"`until` is {until!r}; wanted one of {', '.join(STAGES)}")
    root = Path("experiments", experiment.name) if out is None else Path(out)
    refuse_url(root, what="experiment")
    with ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks.from_environment().joined(device))
        tell = on_event if on_event is not None and ranks.is_writer else lambda _: None
        clock = _Clock(lambda stage, text, s: tell(StageEvent(stage=stage, text=text, seconds=s)))
        encoded: EncodeSummary | None = None
        if ranks.world_size > 1:
            _require_cache(experiment, root)
        if ranks.is_writer:
            stack.enter_context(_folder(experiment, root))
        if ranks.world_size == 1:
            encoded = _encode(experiment, root, device, clock, encode_observer)
        trained: TrainSummary | None = None
        if until != "encode":
            with clock.stage("train", f"training {experiment.train.model}") as outcome:
                trained = train(
                    root / "shards",
                    spec=experiment.train,
                    runs_dir=root / "runs",
                    name=experiment.name,
                    device=device,
                    observer=train_observer,
                    ranks=ranks,
                )
                outcome.append(_trained_text(trained))
        scores = report = None
        if trained is not None and ranks.is_writer:
            if until in ("evaluate", "report"):
                scores = _evaluate(experiment, root, trained, device, clock)
            if until == "report":
                report = _report(root, trained, clock)
    return ExperimentSummary(
        name=experiment.name,
        claim=experiment.claim,
        path=str(root),
        cache=str(root / "shards"),
        encoded=encoded,
        trained=trained,
        scores=scores,
        report=report,
        seconds=clock.seconds,
    )


def _require_cache(experiment: Experiment, root: Path) -> None:
    if read_experiment(root) is None or not (root / "shards" / MANIFEST).exists():
        raise UsageError(
            f"{root} has no cache to train from yet; several ranks only train",
            hint=command(
                "run", "FILE.py:NAME", "SOURCE", "--until", "encode", "--out", root,
                note=f"once, without torchrun, for {experiment.name}",
            ),
        )  # fmt: skip


@contextmanager
def _folder(experiment: Experiment, root: Path) -> Iterator[None]:
    """Makes or takes up the experiment's folder, and holds its lock while the block runs."""
    if experiment.source is None and experiment.generate is None:
        raise UsageError(
            f"experiment {experiment.name} does not say where its images are",
            hint=command("run", "FILE.py:NAME", "SOURCE"),
        )
    if root.exists() and not root.is_dir():
        raise RunMismatchError(f"{root} is a file; wanted a folder", hint="choose another --out")
    made = read_experiment(root) if root.is_dir() else None
    if made is None and root.is_dir():
        foreign = sorted({path.name for path in root.iterdir()} - _OWN)
        if foreign:
            raise RunMismatchError(
                f"{root} holds {foreign[0]!r} and no {EXPERIMENT}; nothing was changed",
                hint="choose a new or empty --out folder",
            )
    if made is not None:
        refuse_other(root, made, experiment)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock", what="run"):
        if made != experiment:
            with StagingArea(root, name="run") as staging:
                staging.put_json(EXPERIMENT, experiment.to_dict())
        yield


def _encode(
    experiment: Experiment,
    root: Path,
    device: str,
    clock: _Clock,
    observer: EncodeObserver | None,
) -> EncodeSummary:
    source = experiment.source
    if source is None:
        assert experiment.generate is not None
        source = str(root / "pictures")
        _draw(root / "pictures", experiment.generate, experiment.encode.seed, clock)
    options = experiment.encode
    if device != "auto":
        options = dataclasses.replace(options, devices=device)
    with clock.stage("encode", f"encoding {source} into {root / 'shards'}") as outcome:
        summary = encode(source, root / "shards", options, observer=observer)
        splits = ", ".join(f"{name} {count:,}" for name, count in summary.splits.items())
        outcome.append(
            f"{summary.images:,} images ({splits}), {summary.bytes_per_image / 1000:.1f} kB each, "
            f"{summary.encoded_now:,} of them encoded now"
        )
    return summary


def _draw(pictures: Path, per_class: int, seed: int, clock: _Clock) -> None:
    """Draws the demo's pictures; a folder that stands is whole, because it was renamed."""
    if pictures.exists():
        return
    with clock.stage("pictures", f"drawing pictures into {pictures}") as outcome:
        drawn = pictures.with_name(".pictures")
        remove_path(drawn)
        with disk_errors(drawn):
            count = sum(1 for _ in write_pictures(drawn, per_class=per_class, seed=seed))
            drawn.replace(pictures)
        outcome.append(f"{count} pictures, drawn by this program: no photographs")


def _trained_text(trained: TrainSummary) -> str:
    last, best = trained.last, trained.best
    if last.top1 is None or best.top1 is None:
        return f"training loss {last.loss:.3f} after {last.epoch} epochs"
    return (
        f"top-1 {last.top1:.2%} after {last.epoch} epochs, best {best.top1:.2%} in epoch "
        f"{best.epoch}"
    )


def _evaluate(
    experiment: Experiment, root: Path, trained: TrainSummary, device: str, clock: _Clock
) -> Scores | None:
    if trained.last.top1 is None:
        return None
    with clock.stage("evaluate", f"evaluating the {experiment.checkpoint} weights") as outcome:
        scores = evaluate_run(
            Path(trained.path),
            cache=root / "shards",
            checkpoint=experiment.checkpoint,
            device=device,
            is_new=trained.trained_epochs > 0,
        )
        outcome.append(f"top-1 {scores.top1:.2%} of {scores.samples:,} images")
    return scores


def _report(root: Path, trained: TrainSummary, clock: _Clock) -> str:
    path = report_path(root)
    if path.exists() and not trained.trained_epochs:
        return str(path)
    with clock.stage("report", f"writing {path}") as outcome:
        write_report(path, runs=[Path(trained.path)], cache=root / "shards")
        outcome.append(f"{path.stat().st_size / 1e6:.1f} MB")
    return str(path)
