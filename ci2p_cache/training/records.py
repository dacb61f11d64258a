"""What training reports while it runs and at its end, to whom, and what binds a run folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record, differing_fields
from ci2p_cache.runs.files import EpochRecord, best_epoch
from ci2p_cache.specs import Fingerprint
from ci2p_cache.training.spec import TrainSpec

if TYPE_CHECKING:
    from ci2p_cache.training.ranks import Ranks

__all__ = [
    "EpochRecord",
    "InitialWeights",
    "Observers",
    "RunArgs",
    "RunSettings",
    "TakenStep",
    "TrainObserver",
    "TrainPlan",
    "TrainProgress",
    "TrainSummary",
    "best_epoch",
    "require_same_settings",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeights(Record):
    """The weights that a run begins with instead of random ones."""

    sha256: str
    """Of the file that they are in."""
    taken: int
    """Tensors of the model that are in it: all but the new ones."""
    new: tuple[str, ...]
    """Names of the model's tensors that were drawn at random: those of another list of classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(Record):
    """What binds a run folder: everything that the numbers of a run depend on."""

    spec: TrainSpec
    """How it trains."""
    fingerprint: Fingerprint
    """How the cache's latents were made."""
    data_sha256: str
    """Digest of which samples the cache holds, their order, labels and validity."""
    loader: str
    """Kind of the loader: LatentLoader reads the cache, others may give other numbers."""
    init_from: InitialWeights | None = None
    """What the spec's `init_from` led to; None: random weights."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values; without `init_from`, as before there was any."""
        return _without(Record.to_dict(self), init_from=None)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuilds settings written by `to_dict`.

        Raises:
            ManifestError: a field is unknown, missing or of another type.
        """
        return super(RunSettings, cls).from_dict(_with(data, init_from=None))

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of all that binds, 64 hex digits."""
        fields = self.to_dict() | {"spec": self.spec.binding()}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, asked: RunSettings) -> list[tuple[str, Any, Any]]:
        """Returns (field, value here, value there) for each field that binds and differs."""
        found = differing_fields(self, asked)
        return [each for each in found if each[0] != "spec.init_from"]

    def with_epochs(self, epochs: int) -> RunSettings:
        """Returns the settings of a run that is as long, and otherwise the same."""
        return replace(self, spec=replace(self.spec, epochs=epochs))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunArgs(Record):
    """The content of `args.yaml`."""

    version: int = 1
    """Version of this record."""
    cache: str
    """Where the cache was; information only."""
    numerics: dict[str, str]
    """Device, threads and versions at the start; others may change the last bits."""
    settings: RunSettings
    """What binds the folder."""
    extended_from: tuple[int, ...] = ()
    """What `epochs` was before, each time that the run was given more of them."""

    def __post_init__(self) -> None:
        if self.version != 1:
            raise UsageError(f"`version` is {self.version}; this ci2p-cache reads 1")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values; `extended_from` only where it says something."""
        data = Record.to_dict(self) | {"settings": self.settings.to_dict()}
        return _without(data, extended_from=())

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuilds what `to_dict` wrote.

        Raises:
            ManifestError: a field is unknown, missing or of another type.
        """
        return super(RunArgs, cls).from_dict(_with(data, extended_from=()))

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests that checkpoints of the run may have: of its settings, now and before."""
        settings = self.settings
        earlier = (settings.with_epochs(each).digest for each in self.extended_from)
        return (settings.digest, *earlier)


def _without(data: dict[str, Any], **absent: Any) -> dict[str, Any]:
    """Leaves out the fields that have these values."""
    return {k: v for k, v in data.items() if k not in absent or v != absent[k]}


def _with(data: Any, **absent: Any) -> Any:
    """Puts back what `_without` left out; what is no mapping stays as it is."""
    return {**absent, **data} if isinstance(data, Mapping) else data


def require_same_settings(settings: RunSettings, ranks: Ranks) -> None:
    """Refuses ranks that were asked for other things, or read other caches; waits for all.

    Args:
        settings: This rank's.
        ranks: The ranks that train together.

    Raises:
        UsageError: this rank's differ from those of rank 0; the message lists them.
    """
    if ranks.world_size == 1:
        return
    wanted = ranks.share(json.dumps(settings.to_dict()).encode())
    lines = [
        f"  {name}: {ours!r} on rank 0, {theirs!r} on rank {ranks.rank}"
        for name, ours, theirs in RunSettings.from_dict(json.loads(wanted)).differences(settings)
    ]
    if lines:
        raise UsageError("the ranks were started with other settings:\n" + "\n".join(lines))
    # Nothing is written before all agree.
    ranks.wait()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """What a run will do, and from where it continues."""

    path: str
    """The run folder."""
    spec: TrainSpec
    """How it trains."""
    parameters: int
    """Numbers in the model that are trained."""
    train_images: int
    """Images of an epoch."""
    val_images: int
    """Images that validate after each epoch; 0: there are none."""
    classes: int
    """Outputs of the model."""
    views: int
    """Views of a training image, one of which an epoch takes: those stored, or one per epoch."""
    device: str
    """Name of the device; of several ranks also how many."""
    steps: int
    """Steps of an epoch."""
    epochs_done: int
    """Epochs done before; 0 in a new run."""
    steps_done: int
    """Steps of the next epoch done before."""
    last: EpochRecord | None
    """The last of the epochs done; a killed process may not have reported it."""
    initial: InitialWeights | None
    """The weights that it begins with; None: random ones."""

    @property
    def done(self) -> int:
        """Steps done before, of all epochs: what a tracker holds beyond them is repeated."""
        return self.epochs_done * self.steps + self.steps_done


@dataclass(slots=True)
class TakenStep:
    """A step that was taken or skipped; the last two fields are known once it is reported."""

    epoch: int
    """From 1."""
    step: int
    """Its place in the epoch, from 0."""
    rows: list[int]
    """Rows of its batch, in the train split."""
    lr: float
    """Its learning rate."""
    loss: float = math.nan
    """Mean over its batch, on all ranks."""
    is_skipped: bool = False
    """Whether it was left out because loss or gradients were not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """How far a run is within an epoch."""

    epoch: int
    """The epoch being trained, from 1."""
    epochs: int
    """Epochs of the whole run."""
    step: int
    """Steps of this epoch done."""
    steps: int
    """Steps of an epoch."""
    train_loss: float | None
    """Mean training loss of the epoch so far, at most 50 steps old, 10 at the start of a run; None
    before it is known."""
    train_top1: float | None
    """Share of the epoch's images classified right so far, 0 to 1, as old as the loss."""
    images_per_second: float
    """Speed in this epoch so far."""
    wait_share: float
    """Share of the time spent waiting for data, 0 to 1."""
    eta_seconds: float | None
    """Expected time to the end of the run, validation left out; None before the first step."""


class TrainObserver:
    """Receives what a run reports; this base class ignores it.

    Of several ranks, rank 0 alone reports. All methods are called in the thread that called
    `train`, one after another, so time spent in them is training time. What a method raises ends
    the run as an error in it does: the last checkpoint stays, and the same call continues from it.
    The exception gets a note that names observer and method.

    A resumed run begins at its last checkpoint. What a killed process reported beyond it is
    reported again: `plan.done` says from which step on.
    """

    def notice(self, text: str) -> None:
        """Takes one sentence that the user should read; the first may come before the plan."""

    def planned(self, plan: TrainPlan) -> None:
        """Takes what will be trained, before the first step; a finished run has none."""

    def steps(self, steps: Sequence[TakenStep]) -> None:
        """Takes the steps since the last call, in order; at most 50, before a checkpoint has them.

        In the first 50 steps of a run it comes every 10.
        """

    def progress(self, progress: TrainProgress) -> None:
        """Takes the state of the run, about once a second."""

    def epoch(self, record: EpochRecord) -> None:
        """Takes an epoch that has ended, after it is safe on disk."""

    def ended(self, error: BaseException | None) -> None:
        """Takes the end: None of a finished run, otherwise what stopped it.

        It comes once after `planned`, also where that failed, and to all observers.
        """


class Observers(TrainObserver):
    """Several observers as one, each called in their order."""

    def __init__(self, observers: Sequence[TrainObserver]) -> None:
        self._observers = observers
        for event in ("notice", "planned", "steps", "progress", "epoch"):
            setattr(self, event, partial(self._report, event))

    def _report(self, event: str, about: Any) -> None:
        for each in self._observers:
            self._call(each, event, about)

    def _call(self, observer: TrainObserver, event: str, about: Any) -> None:
        try:
            getattr(observer, event)(about)
        except Exception as error:
            error.add_note(f"raised by the observer {type(observer).__name__}, in `{event}`")
            raise

    def ended(self, error: BaseException | None) -> None:
        """Reports the end to all, also where one of them raises."""
        with ExitStack() as stack:
            for each in reversed(self._observers):
                stack.callback(self._call, each, "ended", error)

    @contextmanager
    def observed(self, plan: TrainPlan) -> Iterator[None]:
        """Reports the plan, and how the block ends."""
        try:
            self.planned(plan)
            yield
        except BaseException as error:
            self.ended(error)
            raise
        self.ended(None)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSummary(Record):
    """What a run ended with."""

    name: str
    """Name of the run."""
    path: str
    """The run folder."""
    model: str
    """Name of the model."""
    device: str
    """Where this call would train or trained."""
    trained_epochs: int
    """Epochs that this call trained, a part counted as one; 0 where the run was finished before."""
    last: EpochRecord
    """The last epoch."""
    best: EpochRecord
    """The epoch of the highest top-1, the earlier on a tie; without validation, lowest loss."""
    last_checkpoint: str
    """Folder of the last weights."""
    best_checkpoint: str
    """Folder of the best weights."""
