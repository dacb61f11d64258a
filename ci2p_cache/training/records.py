"""What training reports while it runs and when it has ended."""

from __future__ import annotations

from dataclasses import dataclass

from ci2p_cache.record import Record
from ci2p_cache.runs.files import EpochRecord, best_epoch

__all__ = ["EpochRecord", "TrainObserver", "TrainProgress", "TrainSummary", "best_epoch"]


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
