"""Where the numbers of a run go beside `summary.csv`: TensorBoard, `steps.csv`, Weights & Biases.

Each is a `TrainObserver` that finds its place in the run folder by the plan. Whatever a killed
process wrote beyond its last checkpoint is cut off, or never sent twice, so all show a resumed run
as if it had never stopped. The x axis counts steps: a step is at the number of steps done before
it, an epoch behind its steps.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from ci2p_cache.cache.staging import disk_errors
from ci2p_cache.errors import ManifestError, MissingDependencyError, ResourceError, UsageError
from ci2p_cache.outputs import write_whole
from ci2p_cache.record import json_bytes, read_json
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.records import TakenStep, TrainObserver, TrainPlan

__all__ = ["DEFAULT_TRACKERS", "Tracker", "make_trackers"]

Tracker = Literal["tensorboard", "csv", "wandb"]

DEFAULT_TRACKERS: tuple[Tracker, ...] = ("tensorboard",)

_EPOCH_TAGS = {
    "epoch": "epoch",
    "train/loss": "train_loss",
    "train/top1": "train_top1",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/skipped_steps": "skipped_steps",
    "val/loss": "val_loss",
    "val/top1": "val_top1",
    "val/top5": "val_top5",
    "speed/images_per_second": "images_per_second",
    "speed/wait_share": "wait_share",
}
"""Tag of a chart -> field of `EpochRecord`."""
_STEP_TAGS = {"train/loss_step": "loss", "train/lr_step": "lr"}
"""Tag of a chart -> field of `TakenStep`."""

_STEPS_FILE, _WANDB_FILE = "steps.csv", "wandb.json"
_STEPS_HEADER = b"step,epoch,loss,lr,is_skipped\n"


def make_trackers(names: Sequence[str]) -> list[TrainObserver]:
    """Returns the trackers of these names, each once.

    Raises:
        UsageError: a name is unknown.
        MissingDependencyError: wandb is not installed.
    """
    known = get_args(Tracker)
    unknown = [name for name in names if name not in known]
    if unknown or isinstance(names, str):
        raise UsageError(
            f"`track` (--track) is {names!r}; wanted some of {', '.join(known)}, or none of them"
        )
    return [_TRACKERS[name]() for name in dict.fromkeys(names)]


class _Charts(TrainObserver, ABC):
    """Puts scalars on the x axis of steps; subclasses send them somewhere."""

    _per_epoch = 0

    def planned(self, plan: TrainPlan) -> None:
        self._per_epoch = plan.steps
        self._open(plan)
        if plan.last is not None and not plan.steps_done:
            # A process killed between its checkpoint and this may not have reported it.
            self.epoch(plan.last)

    def steps(self, steps: Sequence[TakenStep]) -> None:
        self._add(
            [
                ((each.epoch - 1) * self._per_epoch + each.step, _scalars(_STEP_TAGS, each))
                for each in steps
            ]
        )

    def epoch(self, record: EpochRecord) -> None:
        self._add([(record.epoch * self._per_epoch, _scalars(_EPOCH_TAGS, record))])

    @abstractmethod
    def _open(self, plan: TrainPlan) -> None:
        """Makes ready for what follows."""

    @abstractmethod
    def _add(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        """Takes values by tag, each with its place on the x axis, in order."""


class _TensorBoard(_Charts):
    """Events in the run folder; what a resumed run repeats is purged."""

    _board: Any = None

    def _open(self, plan: TrainPlan) -> None:
        # Takes seconds, and reading a finished run needs none of it.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._events = Path(plan.path, "tensorboard")
        with disk_errors(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=plan.done)
            if not plan.done:
                # `add_hparams` would open a second run beside this one.
                made = hparams(  # type: ignore[no-untyped-call]  # torch stub
                    _settings(plan), dict.fromkeys(_EPOCH_TAGS)
                )
                # The third says that the run has ended.
                for part in made[:2]:
                    self._board.file_writer.add_summary(part)

    def _add(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        with disk_errors(self._events):
            for place, scalars in rows:
                for tag, value in scalars.items():
                    self._board.add_scalar(tag, value, place)
            self._board.flush()

    def ended(self, error: BaseException | None) -> None:
        if self._board is not None:
            with disk_errors(self._events):
                self._board.close()


class _StepsCsv(TrainObserver):
    """A row per step in `steps.csv`, in order and without gaps where it was always asked for."""

    _file: Any = None

    def planned(self, plan: TrainPlan) -> None:
        self._path, self._per_epoch = Path(plan.path, _STEPS_FILE), plan.steps
        with disk_errors(self._path):
            self._file = self._path.open("a+b")
            self._file.seek(0)
            end = len(_STEPS_HEADER) if self._file.readline() == _STEPS_HEADER else 0
            for line in self._file if end else ():
                number = line.partition(b",")[0]
                if not (line.endswith(b"\n") and number.isdigit() and int(number) < plan.done):
                    break
                end += len(line)
            self._file.truncate(end)
            self._write(b"" if end else _STEPS_HEADER)

    def steps(self, steps: Sequence[TakenStep]) -> None:
        rows = (
            f"{(each.epoch - 1) * self._per_epoch + each.step},{each.epoch},{each.loss!r},"
            f"{each.lr!r},{int(each.is_skipped)}\n"
            for each in steps
        )
        self._write("".join(rows).encode())

    def _write(self, content: bytes) -> None:
        with disk_errors(self._path):
            self._file.write(content)
            self._file.flush()
            # The checkpoint that comes next is as safe, and no row before it is written again.
            os.fsync(self._file.fileno())

    def ended(self, error: BaseException | None) -> None:
        if self._file is not None:
            with disk_errors(self._path):
                self._file.close()


class _Wandb(_Charts):
    """A run of Weights & Biases that every call of `train` for this folder continues.

    A run in offline mode meets no server that knows which steps it has, so `wandb.json` says what
    was handed over, before it is. After a kill nothing is there twice, but what wandb had not
    written yet is missing: 0.31 writes every 15 seconds. Where all of it goes, wandb's own
    variables say: WANDB_PROJECT, WANDB_MODE and so on.
    """

    _run: Any = None

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError(
                "`track` (--track) names wandb, which is not installed",
                hint="pip install 'ci2p-cache[track]'",
            ) from error
        self._wandb: Any = wandb

    def _open(self, plan: TrainPlan) -> None:
        folder = Path(plan.path)
        self._record = folder / _WANDB_FILE
        try:
            sent = read_json(self._record)
            self._id, self._next = str(sent["id"]), int(sent["next"])
        except FileNotFoundError:
            self._id, self._next = uuid4().hex[:8], 0
            self._remember()
        except (ManifestError, KeyError, ValueError, TypeError) as error:
            raise ManifestError(
                f"{self._record} is damaged: {error}",
                hint=f"rm {self._record} begins a new run of Weights & Biases for the rest",
            ) from error
        try:
            self._run = self._wandb.init(
                id=self._id,
                resume="allow",
                name=folder.name,
                dir=plan.path,
                config=_settings(plan),
                # This process's output stays as it is.
                settings=self._wandb.Settings(console="off"),
            )
        except self._wandb.Error as error:
            raise ResourceError(
                f"Weights & Biases does not take the run: {error}",
                hint="`wandb login` first, or set WANDB_MODE=offline and send it later",
            ) from error

    def _remember(self) -> None:
        content = json_bytes({"version": 1, "id": self._id, "next": self._next})
        write_whole(self._record, content, what="record of what W&B has")

    def _add(self, rows: Sequence[tuple[int, dict[str, float]]]) -> None:
        new = [row for row in rows if self._key(row) >= self._next]
        if new:
            self._next = self._key(new[-1]) + 1
            self._remember()
        for place, scalars in new:
            self._run.log(scalars, step=place)

    @staticmethod
    def _key(row: tuple[int, dict[str, float]]) -> int:
        """Returns where a row is in the order of sending: an epoch, then the step at its place."""
        place, scalars = row
        return 2 * place + ("epoch" not in scalars)

    def ended(self, error: BaseException | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(error is not None))


_TRACKERS: dict[str, Callable[[], TrainObserver]] = {
    "tensorboard": _TensorBoard,
    "csv": _StepsCsv,
    "wandb": _Wandb,
}


def _scalars(tags: dict[str, str], record: EpochRecord | TakenStep) -> dict[str, float]:
    """Returns the values of a record by tag, those that it has."""
    found = {tag: getattr(record, name) for tag, name in tags.items()}
    return {tag: value for tag, value in found.items() if value is not None}


def _settings(plan: TrainPlan) -> dict[str, int | float | str]:
    """Returns the spec as tables of runs take it, defaults filled in."""
    spec = plan.spec
    fields = spec.to_dict() | {"weight_decay": spec.decay, "warmup_epochs": spec.num_warmup_epochs}
    return {
        name: value if type(value) in (int, float, str) else str(value)
        for name, value in fields.items()
        if name != "version"
    }
