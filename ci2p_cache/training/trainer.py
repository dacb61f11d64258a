"""What training changes (`Learner`), and the loop over epochs that changes it (`Trainer`)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ci2p_cache.errors import CheckpointError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.machine import ieee_float32
from ci2p_cache.models.registry import AnyModelConfig, build_model
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.checkpoint import Checkpoint, TrainState
from ci2p_cache.training.metrics import BatchNormStatistics, TrainTotals, validate
from ci2p_cache.training.optim import (
    WeightAverage,
    freeze_layers,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
)
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import TrainObserver, TrainProgress
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.step import OptimizerStep

__all__ = ["Learner", "Trainer", "early_notice"]


@dataclass(frozen=True, slots=True)
class Learner:
    """What training changes, on its device."""

    model: nn.Module
    """The weights that are trained."""
    optimizer: Optimizer
    """Moves them; from `make_optimizer`."""
    average: WeightAverage | None
    """Follows them; None where the spec has no `ema`."""

    @classmethod
    def drawn(
        cls,
        config: AnyModelConfig,
        spec: TrainSpec,
        device: torch.device,
        weights: Mapping[str, Tensor],
    ) -> Learner:
        """Returns what a run begins with, moments at zero.

        A pure function of the spec's seed and of the `weights`, which take the place of those drawn
        under the same names. torch's own random numbers stay as they were.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(spec.seed)
            model = build_model(config)
        if weights:
            model.load_state_dict({**model.state_dict(), **weights})
        model.to(device)
        freeze_layers(model, spec.freeze)
        average = WeightAverage(model, spec.ema) if spec.ema else None
        return cls(model, make_optimizer(model, spec), average)

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the average of its weights where there is one."""
        return [self.model] if self.average is None else [self.model, self.average.module]

    def restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Puts back what `checkpoint` gave.

        Args:
            checkpoint: Of this model, in memory.
            path: Where it was read from, for the message.

        Raises:
            CheckpointError: it does not fit the model.
        """
        try:
            self.model.load_state_dict(checkpoint.model)
            if self.average is not None:
                self.average.load(checkpoint.average)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the model: {error}") from error
        load_optimizer_tensors(self.model, self.optimizer, checkpoint.optimizer)

    def share(self, ranks: Ranks) -> None:
        """Sends the weights and averages of rank 0 to all ranks."""
        for module in self.modules:
            ranks.share_tensors(list(module.state_dict().values()))

    def compile(self) -> None:
        """Compiles the modules in place, so the names of the weights stay; at the first step."""
        for module in self.modules:
            module.compile()

    def checkpoint(self, state: TrainState) -> Checkpoint:
        """Returns the tensors as they are now, with the place that they belong to."""
        return Checkpoint(
            state,
            dict(self.model.state_dict()),
            optimizer_tensors(self.model, self.optimizer),
            self.average.tensors() if self.average is not None else {},
        )


_WARM_STEPS = 100
"""Steps after which a run that has learned nothing is worth a word; before, it is warm-up."""
_SIGMAS = 3
"""Standard deviations of guessing within which an accuracy counts as that of guessing."""


def early_notice(record: EpochRecord, *, steps: int, num_classes: int, num_val: int) -> str | None:
    """Returns a sentence for the user where an early epoch has learned nothing, None otherwise.

    Args:
        record: The epoch that has ended.
        steps: Steps of all epochs so far, this one included.
        num_classes: K.
        num_val: Validation images, 0 for none.
    """
    if num_classes < 2 or not record.images:
        return None
    guessing = math.log(num_classes)
    is_warm_now = steps - steps // record.epoch < _WARM_STEPS <= steps
    if is_warm_now and record.train_loss >= guessing:
        return (
            f"nothing was learned in {steps} steps: the training loss of epoch {record.epoch} is "
            f"{record.train_loss:.3f}, guessing among {num_classes} classes gives {guessing:.3f}. "
            "Try a lower `lr` or a longer warm-up; check the labels."
        )
    if record.val_top1 is None or not num_val or not is_warm_now:
        return None
    # A few validation images show nothing: even what training reaches may be luck there.
    learns = record.train_top1 > _highest_guess(num_classes, min(record.images, num_val))
    if not learns or record.val_top1 > _highest_guess(num_classes, num_val):
        return None
    return (
        f"validation ({record.val_top1:.1%} of {num_val:,}) is no better than guessing while "
        f"training is ahead of it ({record.train_top1:.1%}), after {steps} steps. "
        "See whether both splits have the same classes and kind of images."
    )


def _highest_guess(num_classes: int, images: int) -> float:
    """Returns the share of hits that guessing stays below nearly always, 0 to 1."""
    chance = 1 / num_classes
    return chance + _SIGMAS * math.sqrt(chance * (1 - chance) / images)


_READ_EVERY_STEPS = 50
"""How often the loop waits for the device to look for bad steps: rare enough to cost nothing."""
_READ_EVERY_FIRST_STEPS = 10
"""The same in the first epoch up to there, where the loss is what shows that something learns."""

_PROGRESS_SECONDS = 1.0


@dataclass(kw_only=True, slots=True)
class Trainer:
    """Trains a model to the end of its run, or to where it is asked to stop.

    All randomness of a step comes from (seed, epoch, step, rank), so a run that was stopped
    anywhere continues to the same last bit on CPU, with the same ranks, threads and versions.

    Of several ranks each runs this loop over its slices of the same batches. After each step all
    hold the same weights, moments and sums, and when a checkpoint is saved the same BatchNorm
    statistics, so what rank 0 saves is all.
    """

    spec: TrainSpec
    model: nn.Module
    """On its device, with the weights to continue from."""
    optimizer: Optimizer
    """From `make_optimizer`, with the moments to continue from."""
    train_loader: BatchLoader
    """Shuffled by the spec's seed; its batches may be recycled."""
    val_loader: BatchLoader | None
    """Unshuffled, the first view; None where the cache has no validation split."""
    save: Callable[[TrainState], None]
    """Saves a checkpoint of model, optimiser and average with this state; on rank 0."""
    should_stop: Callable[[], bool]
    """Asked after each step and before each validation batch; gives all ranks the same answer."""
    ranks: Ranks
    observer: TrainObserver
    """Receives steps, progress and notices; the caller reports epochs, in `save`."""
    save_every_steps: int | None = None
    """Steps between checkpoints inside an epoch; None saves at the end of epochs only."""
    average: WeightAverage | None = None
    """Follows the weights and is validated in their place; None where the spec has no `ema`."""
    statistics: BatchNormStatistics | None = None
    """Estimated before each validation and save, of model and average; None: no BatchNorm."""
    _step: OptimizerStep = field(init=False)
    _estimated_at: int | None = field(init=False, default=None)
    _last_tick: float = field(init=False, default=0.0)

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state` on.

        Returns:
            The state at the end, or where it was stopped; saved in both cases.

        Raises:
            TrainingDivergedError: ten steps in a row were not finite; nothing was saved since.
            ShardError: the cache is damaged; nothing was saved since.
            ResourceError: a checkpoint could not be written.
            CacheError: another rank has ended.
        """
        self._step = OptimizerStep(
            spec=self.spec,
            model=self.model,
            optimizer=self.optimizer,
            average=self.average,
            ranks=self.ranks,
            steps_per_epoch=len(self.train_loader),
            bad_in_a_row=state.bad_in_a_row,
        )
        device = self.train_loader.device
        cuda = [device] if device.type == "cuda" else []
        # The caller's random numbers stay as they were.
        with ieee_float32(device), torch.random.fork_rng(devices=cuda):
            while state.epoch < self.spec.epochs and not self.should_stop():
                state = self._train_epoch(state)
                if state.step == len(self.train_loader) and not self.should_stop():
                    state = self._end_epoch(state)
                self._save(state)
        return state

    def _train_epoch(self, state: TrainState) -> TrainState:
        """Takes the steps that are left of an epoch, or those until it is stopped."""
        loader, steps = self.train_loader, len(self.train_loader)
        if state.step == steps:
            return state
        totals = TrainTotals(loader.device, state.sums)
        begun, started, waited_before = state, time.perf_counter(), loader.waited_seconds
        loader.load_state_dict({"seed": self.spec.seed, "epoch": state.epoch, "step": state.step})
        self.model.train()
        loss = top1 = None
        for step, batch in enumerate(loader, start=state.step):
            self._step.take(batch, totals, epoch=state.epoch, step=step)
            done = step + 1
            stop = done == steps or self.should_stop()
            due = self.save_every_steps is not None and done % self.save_every_steps == 0
            often = state.epoch == 0 and done < _READ_EVERY_STEPS
            every = _READ_EVERY_FIRST_STEPS if often else _READ_EVERY_STEPS
            if stop or due or done % every == 0:
                taken = self._step.read()
                for bad in (each for each in taken if each.is_skipped):
                    self.observer.notice(
                        f"step {bad.step} of epoch {bad.epoch} was skipped: loss or gradients were "
                        f"not finite on rows {bad.rows} of the train split"
                    )
                self.observer.steps(taken)
                sums = totals.read()
                loss, top1 = (sums[name] / max(sums["images"], 1) for name in ("loss", "top1"))
            seconds = time.perf_counter() - started
            waited = loader.waited_seconds - waited_before
            if stop or due:
                state = dataclasses.replace(
                    state,
                    step=done,
                    sums=sums,
                    train_seconds=begun.train_seconds + seconds,
                    waited_seconds=begun.waited_seconds + waited,
                    bad_in_a_row=self._step.bad_in_a_row,
                )
            if stop:
                break
            if due:
                self._save(state)
            if time.perf_counter() - self._last_tick >= _PROGRESS_SECONDS:
                self._last_tick = time.perf_counter()
                epochs, per_step = self.spec.epochs, seconds / max(done - begun.step, 1)
                self.observer.progress(
                    TrainProgress(
                        epoch=state.epoch + 1,
                        epochs=epochs,
                        step=done,
                        steps=steps,
                        train_loss=loss,
                        train_top1=top1,
                        images_per_second=self.spec.batch_size / per_step,
                        wait_share=waited / max(seconds, 1e-9),
                        eta_seconds=per_step * (epochs * steps - state.epoch * steps - done),
                    )
                )
        return state

    def _end_epoch(self, state: TrainState) -> TrainState:
        """Validates and starts the next epoch; returns `state` where validation was stopped."""
        started = time.perf_counter()
        validation = None
        if self.val_loader is not None:
            self._estimate_statistics(state)
            validation = validate(
                self.model if self.average is None else self.average.module,
                self.val_loader,
                precision=self.spec.precision,
                should_stop=self.should_stop,
                ranks=self.ranks,
            )
            if validation is None:
                return state
        sums, steps = state.sums, len(self.train_loader)
        images = sums["images"]
        record = EpochRecord(
            epoch=state.epoch + 1,
            epochs=self.spec.epochs,
            train_loss=sums["loss"] / images if images else float("nan"),
            train_top1=sums["top1"] / max(images, 1),
            val_loss=validation.loss if validation else None,
            val_top1=validation.top1 if validation else None,
            val_top5=validation.top5 if validation else None,
            lr=self._step.lr(state.epoch, steps - 1),
            grad_norm=sums["grad_norm"] / max(sums["steps"], 1),
            skipped_steps=int(sums["skipped"]),
            images=int(images),
            images_per_second=images / max(state.train_seconds, 1e-9),
            wait_share=state.waited_seconds / max(state.train_seconds, 1e-9),
            epoch_seconds=state.train_seconds + time.perf_counter() - started,
        )
        notice = early_notice(
            record,
            steps=(state.epoch + 1) * steps,
            num_classes=len(self.train_loader.split.cache.classes),
            num_val=0 if self.val_loader is None else self.val_loader.num_samples,
        )
        if notice is not None:
            self.observer.notice(notice)
        return dataclasses.replace(
            state,
            epoch=state.epoch + 1,
            step=0,
            sums={},
            train_seconds=0.0,
            waited_seconds=0.0,
            history=(*state.history, record),
        )

    def _save(self, state: TrainState) -> None:
        self._estimate_statistics(state)
        self.save(state)

    def _estimate_statistics(self, state: TrainState) -> None:
        """Estimates the BatchNorm statistics of the weights at `state`, unless that was done."""
        step = state.epoch * len(self.train_loader) + state.step
        if self.statistics is not None and step != self._estimated_at:
            self.statistics.estimate(final=step == self.spec.epochs * len(self.train_loader))
            self._estimated_at = step
