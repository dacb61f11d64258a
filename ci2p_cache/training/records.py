"""What training tells while it runs and when it has ended, and how it is written down."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.staging import disk_errors
from ci2p_cache.record import Record

__all__ = [
    "EpochRecord",
    "TensorBoard",
    "TrainObserver",
    "TrainProgress",
    "TrainSummary",
    "best_epoch",
    "summary_csv",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord(Record):
    """One epoch: a row of `summary.csv`. Without a validation split its fields are None."""

    epoch: int
    """Epochs done, from 1."""
    epochs: int
    """Epochs of the whole run."""
    loss: float
    """Mean training loss, label smoothing included; nan where every step was skipped."""
    train_top1: float
    """Share of training images classified right during the epoch, 0 to 1; of mixed ones, as the
    class that has the larger share of them."""
    val_loss: float | None
    """Mean cross-entropy over the validation split, without label smoothing. This and the next two
    are of the averaged weights where the run makes them (`ema`)."""
    top1: float | None
    """Share of validation images whose class came first, 0 to 1."""
    top5: float | None
    """Share whose class was among the first five (all, with fewer classes), 0 to 1."""
    lr: float
    """Learning rate of the epoch's last step."""
    grad_norm: float
    """Mean L2 norm of all gradients together, before clipping."""
    skipped_steps: int
    """Steps left out because loss or gradients were not finite."""
    images: int
    """Training images whose step counted."""
    images_per_second: float
    """Of training, waiting for data included, validation not."""
    wait_share: float
    """Share of the training time spent waiting for data, 0 to 1."""
    epoch_seconds: float
    """Wall time of training and validation, over all interrupted parts."""

    @property
    def eta_seconds(self) -> float:
        """Expected time to the end of the run, should the coming epochs last as long as this."""
        return self.epoch_seconds * (self.epochs - self.epoch)


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
    loss: float | None
    """Mean training loss of the epoch so far, at most 50 steps old, 10 at the start of a run; None
    before it is known."""
    train_top1: float | None
    """Share of the epoch's images classified right so far, 0 to 1, as old as the loss."""
    images_per_second: float
    """Of this epoch so far."""
    wait_share: float
    """Share of the time spent waiting for data, 0 to 1."""
    eta_seconds: float | None
    """Expected time to the end of the run, validation left out; None before the first step."""


class TrainObserver:
    """Receives what a run has to say; the base class ignores it. Called in the caller's thread."""

    def notice(self, text: str) -> None:
        """Takes one sentence that the user should read."""

    def progress(self, progress: TrainProgress) -> None:
        """Takes the state of the run, about once a second."""

    def epoch(self, record: EpochRecord) -> None:
        """Takes an epoch that has ended, after it is safe on disk."""


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


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord:
    """Returns the epoch of the highest top-1, or of the lowest training loss without validation.

    Args:
        history: The epochs in order, at least one; of equal ones the earlier wins.
    """

    def rank(record: EpochRecord) -> float:
        if record.top1 is not None:
            return -record.top1
        return record.loss if math.isfinite(record.loss) else math.inf

    return min(history, key=rank)


def summary_csv(history: Sequence[EpochRecord]) -> bytes:
    """Returns `summary.csv`: a header, then a row per epoch; floats read back exactly."""
    names = [field.name for field in dataclasses.fields(EpochRecord) if field.name != "epochs"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in history:
        writer.writerow(record.to_dict())
    return text.getvalue().encode()


class TensorBoard:
    """Writes epochs as TensorBoard events; what a resumed run trains again replaces the old.

    Args:
        folder: Where the event files go.
        next_epoch: First epoch that will be written, from 1; older events from there on are purged.
    """

    def __init__(self, folder: Path, *, next_epoch: int) -> None:
        # Takes seconds, and reading a finished run needs none of it.
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with disk_errors(folder):
            self._writer = SummaryWriter(str(folder), purge_step=next_epoch)

    def write(self, record: EpochRecord) -> None:
        """Writes one epoch and flushes it to the file.

        Raises:
            ResourceError: the file cannot be written.
        """
        with disk_errors(self._folder):
            self._add(record)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
            ResourceError: what was not written yet cannot be.
        """
        with disk_errors(self._folder):
            self._writer.close()

    def _add(self, record: EpochRecord) -> None:
        for tag, value in (
            ("loss/train", record.loss),
            ("loss/val", record.val_loss),
            ("top1/train", record.train_top1),
            ("top1/val", record.top1),
            ("top5/val", record.top5),
            ("optimizer/lr", record.lr),
            ("optimizer/grad_norm", record.grad_norm),
            ("optimizer/skipped_steps", record.skipped_steps),
            ("speed/images_per_second", record.images_per_second),
            ("speed/wait_share", record.wait_share),
        ):
            if value is not None:
                self._writer.add_scalar(tag, value, record.epoch)
