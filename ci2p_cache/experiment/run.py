"""`run_experiment`: encode, train, evaluate, report, in one folder; run again, it continues.

::

    out/experiment.json   the resolved experiment, written before anything else
        pictures/         only where the experiment draws its own
        shards/           stage one's cache
        runs/NAME/        stage two's run folder, with evaluations/
        report.html       both, to look at
        .lock             only while somebody runs it

With a folder of caches, experiments with the same images and encode settings share one of them::

    caches/int8-256px-1a2b3c4d5e6f/   named after its fingerprint and what it is of
           pictures-120-0/            drawn ones

Each stage continues where it stopped, so the experiment itself stores no state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.paths import MANIFEST
from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path
from ci2p_cache.encoding.intent import fingerprint_of, load_chosen
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary
from ci2p_cache.encoding.run import encode
from ci2p_cache.errors import ManifestError, RunMismatchError, UsageError, command
from ci2p_cache.experiment.spec import EXPERIMENT, Experiment, read_experiment, refuse_other
from ci2p_cache.imported import pinned_location
from ci2p_cache.inference.scoring import evaluate
from ci2p_cache.outputs import refuse_url
from ci2p_cache.pictures.drawn import write_pictures
from ci2p_cache.record import Record, read_json
from ci2p_cache.runs.evaluations import (
    EVALUATIONS,
    OLD_EVALUATION,
    Evaluation,
    evaluation_name,
    read_evaluation,
)
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver, TrainSummary
from ci2p_cache.training.run import train
from ci2p_cache.training.trackers import DEFAULT_TRACKERS, Tracker

__all__ = [
    "ExperimentSummary",
    "Scores",
    "Stage",
    "StageClock",
    "StageEvent",
    "run_experiment",
    "write_experiment_report",
]

Stage = Literal["pictures", "encode", "train", "evaluate", "report"]
DemoStage = Literal["verify"]
"""What the demo does beside these."""

_STAGES: tuple[Stage, ...] = ("encode", "train", "evaluate", "report")
"""What `until` may name, in order."""

_OWN = {".lock", ".staging"}
"""What a folder holds before its experiment is recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEvent:
    """A stage that starts or has ended."""

    stage: Stage | DemoStage
    """Which one."""
    text: str
    """One line: what it will do, or what came of it."""
    seconds: float | None
    """How long it took; None when it starts."""


class StageClock:
    """Times stages by name.

    Args:
        on_event: Called when a stage starts and ends; None: nothing is.
    """

    def __init__(self, on_event: Callable[[StageEvent], None] | None) -> None:
        self._on_event = on_event or (lambda _: None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: Stage | DemoStage, plan: str) -> Iterator[list[str]]:
        """Reports that a stage starts and, if it succeeds, what the caller put into the list."""
        self._on_event(StageEvent(stage=name, text=plan, seconds=None))
        started = time.perf_counter()
        outcome: list[str] = []
        yield outcome
        self.seconds[name] = seconds = time.perf_counter() - started
        self._on_event(StageEvent(stage=name, text="; ".join(outcome), seconds=seconds))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores(Record):
    """The main numbers of an evaluation; `evaluations` in the run folder has all of them."""

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
    source: str | Path | None = None,
    device: str = "auto",
    until: Stage = "report",
    cache_dir: str | Path | None = None,
    on_event: Callable[[StageEvent], None] | None = None,
    encode_observer: EncodeObserver | None = None,
    train_observer: TrainObserver | None = None,
    track: Sequence[Tracker] = DEFAULT_TRACKERS,
    ranks: Ranks | None = None,
) -> ExperimentSummary:
    """Runs a whole experiment in one folder.

    Called again with the same arguments it continues in the stage where it stopped; a finished one
    returns at once. In processes that torchrun has started it trains on all of them together, from
    a cache that has to be complete by then; rank 0 alone evaluates and reports.

    Args:
        experiment: What to run.
        out: Its folder; None: experiments/NAME.
        source: The images, as `encode` takes them; None: those that the experiment names or draws.
        device: auto, cpu, cuda or cuda:1, of all stages; auto leaves stage one to
            `experiment.encode.devices`.
        until: The last stage to run.
        cache_dir: Folder of caches that experiments share; None: the cache is in `out`.
        on_event: Called when a stage starts and ends; on rank 0.
        encode_observer: Receives stage one's progress.
        train_observer: Receives stage two's progress and epochs.
        track: As for `train`.
        ranks: The ranks to train with, joined; None: as the environment says.

    Raises:
        UsageError: no images are named, or two sources; `out` is a URL, `until` is no stage, or
            several ranks find no cache.
        RunMismatchError: the folder holds another experiment, or something else.
        ManifestError: the folder's record is damaged.
        LockedError: another process runs an experiment there.
        InterruptedRunError: a signal stopped it; run it again to continue.
        CacheError: whatever `encode`, `train` and the evaluation raise.
    """
    if source is not None:
        experiment = dataclasses.replace(experiment, source=str(source))
    if until not in _STAGES:
        raise UsageError(f"`until` is {until!r}; wanted one of {', '.join(_STAGES)}")
    root = Path("experiments", experiment.name) if out is None else Path(out)
    refuse_url(root, what="experiment")
    with ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks.from_environment().joined(device))
        clock = StageClock(on_event if ranks.is_writer else None)
        encoded: EncodeSummary | None = None
        _require_images(experiment)
        observer = encode_observer or EncodeObserver()
        source, shards = _places(experiment, root, cache_dir, observer)
        if ranks.world_size > 1:
            _require_cache(experiment, root, shards)
        if ranks.is_writer:
            stack.enter_context(_folder(experiment, root))
        if ranks.world_size == 1:
            encoded = _encode(experiment, source, shards, device, clock, observer)
        trained: TrainSummary | None = None
        if until != "encode":
            with clock.stage("train", f"training {experiment.train.model}") as outcome:
                trained = train(
                    shards,
                    spec=experiment.train,
                    runs_dir=root / "runs",
                    name=experiment.name,
                    device=device,
                    observers=[] if train_observer is None else [train_observer],
                    track=track,
                    ranks=ranks,
                )
                last, best = trained.last, trained.best
                text = f"training loss {last.train_loss:.3f} after {last.epoch} epochs"
                if last.val_top1 is not None and best.val_top1 is not None:
                    text = f"top-1 {last.val_top1:.2%} after {last.epoch} epochs, "
                    text += f"best {best.val_top1:.2%} in epoch {best.epoch}"
                outcome.append(text)
        scores = report = None
        if trained is not None and ranks.is_writer:
            if until in ("evaluate", "report"):
                scores = _evaluate(experiment, shards, trained, device, clock)
            if until == "report":
                report = write_experiment_report(root, [trained], shards, clock)
    return ExperimentSummary(
        name=experiment.name,
        claim=experiment.claim,
        path=str(root),
        cache=str(shards),
        encoded=encoded,
        trained=trained,
        scores=scores,
        report=report,
        seconds=clock.seconds,
    )


def _require_images(experiment: Experiment) -> None:
    if experiment.source is None and experiment.generate is None:
        raise UsageError(
            f"experiment {experiment.name} does not say where its images are",
            hint=command("run", "FILE.py:NAME", "IMAGES"),
        )


def _places(
    experiment: Experiment, root: Path, cache_dir: str | Path | None, observer: EncodeObserver
) -> tuple[str, Path]:
    """Returns where the images of an experiment are or will be drawn, and where its cache is.

    In a folder of caches it has a name that follows from everything that its latents, their places
    and their labels depend on: the fingerprint above all.
    """
    options, drawn = experiment.encode, f"pictures-{experiment.generate}-{experiment.encode.seed}"
    place = root / "pictures" if cache_dir is None else Path(cache_dir, drawn)
    source = str(place) if experiment.source is None else experiment.source
    if cache_dir is None:
        return source, root / "shards"
    refuse_url(cache_dir, what="cache")
    fingerprint = fingerprint_of(options, load_chosen(options, observer))
    is_here = experiment.source is None or Path(source).exists()
    bound = {
        "source": str(Path(source).resolve()) if is_here else source,
        "fingerprint": fingerprint.digest,
        "layout": options.layout_spec().to_dict(),
        "options": dataclasses.asdict(options.source_options()),
    }
    digest = hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()
    return source, Path(cache_dir, f"{options.dtype}-{options.size}px-{digest[:12]}")


def _require_cache(experiment: Experiment, root: Path, shards: Path) -> None:
    if read_experiment(root) is None or not (shards / MANIFEST).exists():
        raise UsageError(
            f"{root} has no cache to train from yet; several ranks only train",
            hint=command(
                "run", "FILE.py:NAME", *["IMAGES"] * (experiment.generate is None),
                "--until", "encode", "--out", root,
                note=f"once, without torchrun, for {experiment.name}",
            ),
        )  # fmt: skip


@contextmanager
def _folder(experiment: Experiment, root: Path) -> Iterator[None]:
    """Makes the experiment's folder or continues one; holds its lock while the block runs."""
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
    source: str,
    shards: Path,
    device: str,
    clock: StageClock,
    observer: EncodeObserver,
) -> EncodeSummary:
    if experiment.generate is not None:
        _draw(Path(source), experiment.generate, experiment.encode.seed, clock)
    options = experiment.encode
    if device != "auto":
        options = dataclasses.replace(options, devices=device)
    with clock.stage("encode", f"encoding {source} into {shards}") as outcome:
        summary = encode(source, shards, options, observer=observer)
        splits = ", ".join(f"{name} {count:,}" for name, count in summary.splits.items())
        outcome.append(
            f"{summary.images:,} images ({splits}), {summary.bytes_per_image / 1000:.1f} kB each, "
            f"{summary.encoded_now:,} of them encoded now"
        )
    return summary


def _draw(pictures: Path, per_class: int, seed: int, clock: StageClock) -> None:
    """Draws the demo's pictures; a folder that stands is whole, because it was renamed."""
    if pictures.exists():
        return
    with clock.stage("pictures", f"drawing pictures into {pictures}") as outcome:
        drawn = pictures.with_name(f".{pictures.name}")
        remove_path(drawn)
        with disk_errors(drawn):
            count = sum(1 for _ in write_pictures(drawn, per_class=per_class, seed=seed))
            drawn.replace(pictures)
        outcome.append(f"{count} pictures, drawn by this program: no photographs")


def _evaluate(
    experiment: Experiment, shards: Path, trained: TrainSummary, device: str, clock: StageClock
) -> Scores | None:
    """Evaluates the run on its validation split; reads what a finished one was evaluated to."""
    if trained.last.val_top1 is None:
        return None
    run, checkpoint = Path(trained.path), experiment.checkpoint
    with clock.stage("evaluate", f"evaluating the {checkpoint} weights") as outcome:
        found = None
        if not trained.trained_epochs:
            found = _evaluated(
                run, str(read_json(run / "checkpoints" / "last.json").get(checkpoint))
            )
        if found is None:
            own = pinned_location(experiment.train.model)
            found = evaluate(
                run, cache=shards, checkpoint=checkpoint, device=device,
                model=own[0] if own else None,
            )  # fmt: skip
        scores = Scores(**{each.name: getattr(found, each.name) for each in fields(Scores)})
        outcome.append(f"top-1 {scores.top1:.2%} of {scores.samples:,} images")
        if found.top1_low <= 1 / len(found.per_class):
            outcome.append("these images do not show that it is better than guessing")
    return scores


def _evaluated(run: Path, checkpoint: str) -> Evaluation | None:
    """Returns what a checkpoint reached on the run's own validation split; None: not known."""
    name = evaluation_name("val", checkpoint)
    for path in (run / EVALUATIONS / f"{name}.json", run / OLD_EVALUATION):
        try:
            found = read_evaluation(path)
        except (FileNotFoundError, ManifestError):
            continue
        if (found.checkpoint, found.split, found.is_own_data) == (checkpoint, "val", True):
            return found
    return None


def write_experiment_report(
    root: Path, trained: Sequence[TrainSummary], shards: Path, clock: StageClock
) -> str:
    """Writes the report on an experiment's runs and cache, unless it is there and still true.

    Raises:
        CacheError: whatever `write_report` raises.
    """
    path = root / "report.html"
    if path.exists() and not any(each.trained_epochs for each in trained):
        return str(path)
    # Only here: drawing takes long to import, and a finished experiment draws nothing.
    from ci2p_cache.pictures.reconstructions import LatentIllustrator
    from ci2p_cache.report.html import write_report

    with clock.stage("report", f"writing {path}") as outcome:
        write_report([*(t.path for t in trained), shards], path, illustrator=LatentIllustrator())
        outcome.append(f"{path.stat().st_size / 1e6:.1f} MB")
    return str(path)
