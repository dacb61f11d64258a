"""One call of `train`: the learner it begins with, the loop it runs, the summary it ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ci2p_cache.errors import InterruptedRunError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.machine import bf16_notice
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.runs.files import best_epoch
from ci2p_cache.training.checkpoint import Checkpoint, TrainState, checkpoint_path
from ci2p_cache.training.folder import RunWriter
from ci2p_cache.training.learner import Learner
from ci2p_cache.training.metrics import opened_statistics
from ci2p_cache.training.ranks import Ranks, StopSignal
from ci2p_cache.training.records import TrainObserver, TrainSummary
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.trainer import Trainer

__all__ = ["Session"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One call of `train`, as one of the ranks sees it."""

    path: Path
    """The run folder."""
    spec: TrainSpec
    """How it trains."""
    config: AnyModelConfig
    """Its model."""
    device: torch.device
    """Where this rank trains."""
    ranks: Ranks
    """Those that train together."""
    stop: StopSignal
    """Notes the signals that come to this rank."""
    observer: TrainObserver
    """Receives progress, epochs and notices; of rank 0 alone anybody listens."""

    def learner(self, checkpoint: Checkpoint | None) -> Learner:
        """Returns model, optimiser and averages, as they were saved or as the seed makes them.

        Raises:
            CheckpointError: the checkpoint does not fit the model.
        """
        if self.spec.precision == "bf16" and (text := bf16_notice(self.device)):
            self.observer.notice(text)
        learner = Learner.drawn(self.config, self.spec, self.device)
        if checkpoint is not None:
            state = checkpoint.state
            path = checkpoint_path(self.path, state.name)
            learner.restore(checkpoint, path)
            self.observer.notice(
                f"continuing from {path}: {state.epoch} of {self.spec.epochs} epochs and "
                f"{state.step} steps are done."
            )
        learner.share(self.ranks)
        return learner

    def train(
        self,
        state: TrainState,
        learner: Learner,
        loaders: tuple[BatchLoader, BatchLoader | None],
        writer: RunWriter | None,
        *,
        threads: int | None,
        save_every_steps: int | None,
    ) -> TrainState:
        """Trains from `state` to the end, and returns the state there.

        Args:
            state: Where training begins or continues.
            learner: Model, optimiser and averages as they are there.
            loaders: Of the train and the val split.
            writer: Saves what was trained; None on ranks other than 0.
            threads: Threads that read the samples of BatchNorm's statistics; None: one per core.
            save_every_steps: Steps between checkpoints inside an epoch; None: only at its end.

        Raises:
            InterruptedRunError: a signal came to any rank; everything is saved.
        """
        signal_number = 0

        def should_stop() -> bool:
            nonlocal signal_number
            signal_number = self.ranks.agreed_signal(self.stop)
            return signal_number > 0

        def save(state: TrainState) -> None:
            if writer is not None:
                writer.save(state, learner)

        try:
            if writer is not None:
                writer.open_board(state)
            with opened_statistics(
                learner.modules,
                loaders[0].split,
                self.spec,
                device=self.device,
                reads=self.config.reads,
                threads=threads,
                ranks=self.ranks,
            ) as statistics:
                state = Trainer(
                    spec=self.spec,
                    model=learner.model,
                    optimizer=learner.optimizer,
                    average=learner.average,
                    statistics=statistics,
                    train_loader=loaders[0],
                    val_loader=loaders[1],
                    save=save,
                    should_stop=should_stop,
                    ranks=self.ranks,
                    observer=self.observer,
                    save_every_steps=save_every_steps,
                ).run(state)
        finally:
            if writer is not None:
                writer.close()
        if state.epoch < self.spec.epochs:
            raise InterruptedRunError(
                f"training stopped after {state.epoch} of {self.spec.epochs} epochs and "
                f"{state.step} steps of the next; all of it is saved in {self.path}",
                signal_number=signal_number,
                hint="run the same command again to continue",
            )
        return state

    def summary(self, begun: TrainState, state: TrainState) -> TrainSummary:
        """Returns what the run that went from one state to the other ended with."""
        history, best_name = state.history, state.best_name
        assert best_name is not None
        return TrainSummary(
            name=self.path.name,
            path=str(self.path),
            model=self.spec.model,
            device=str(self.device),
            trained_epochs=len(history) - len(begun.history),
            last=history[-1],
            best=best_epoch(history),
            last_checkpoint=str(checkpoint_path(self.path, state.name)),
            best_checkpoint=str(checkpoint_path(self.path, best_name)),
        )
