"""The loop: steps, epochs, and when to save. Everything else it is given."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ci2p_cache.loader.batches import Batch, BatchLoader
from ci2p_cache.loader.order import rank_slice
from ci2p_cache.machine import ieee_float32
from ci2p_cache.training.checkpoint_folder import TrainState
from ci2p_cache.training.early import early_notice
from ci2p_cache.training.ema import WeightAverage
from ci2p_cache.training.flipping import flipped
from ci2p_cache.training.guard import BadStep, StepGuard
from ci2p_cache.training.metrics import TrainTotals, autocast, validate
from ci2p_cache.training.mixing import Targets, draw_mix, mixed
from ci2p_cache.training.optim import lr_at, set_lr
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import EpochRecord, TrainObserver, TrainProgress
from ci2p_cache.training.spec import TrainSpec

__all__ = ["Trainer"]

_READ_EVERY_STEPS = 50
"""How often the loop waits for the device to look for bad steps: rare enough to cost nothing."""
_READ_EVERY_FIRST_STEPS = 10
"""The same in the first epoch up to there, where the loss is what shows that something learns."""

_PROGRESS_SECONDS = 1.0


@dataclass(kw_only=True, slots=True)
class Trainer:
    """Trains a model to the end of its run, or to where it is asked to stop.

    All randomness of a step comes from (seed, epoch, step, rank), so a run that was stopped
    anywhere goes on to the same last bit on CPU, with the same ranks, threads and versions.

    Of several ranks each runs this loop over its slices of the same batches. After each step all
    hold the same weights, moments, BatchNorm statistics and sums, so what rank 0 saves is all.
    """

    spec: TrainSpec
    """What to do."""
    model: nn.Module
    """On its device, with the weights to go on from."""
    optimizer: Optimizer
    """From `make_optimizer`, with the moments to go on from."""
    train_loader: BatchLoader
    """Shuffled by the spec's seed; its batches may be recycled."""
    val_loader: BatchLoader | None
    """Unshuffled, the first view; None where the cache has no validation split."""
    save: Callable[[TrainState], None]
    """Saves a checkpoint of model, optimiser and average with this state; on rank 0."""
    should_stop: Callable[[], bool]
    """Asked after each step and before each validation batch; gives all ranks the same answer."""
    ranks: Ranks
    """Those that train together."""
    observer: TrainObserver
    """Told of progress and skipped steps; epochs are the caller's to tell, in `save`."""
    save_every_steps: int | None = None
    """Steps between checkpoints inside an epoch; None saves at the end of epochs only."""
    average: WeightAverage | None = None
    """Follows the weights and is validated in their place; None where the spec has no `ema`."""
    _guard: StepGuard = field(init=False)
    _parameters: list[nn.Parameter] = field(init=False)
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
        self._guard = StepGuard(self.model, self.optimizer, in_a_row=state.bad_in_a_row)
        self._parameters = list(self.model.parameters())
        if self.average is not None:
            # Now, for the guard has just put other tensors in place.
            self.average.follow(self.model)
        device = self.train_loader.device
        with ieee_float32(device), _own_randomness(device):
            while state.epoch < self.spec.epochs and not self.should_stop():
                state = self._train_epoch(state)
                if state.step == len(self.train_loader) and not self.should_stop():
                    state = self._end_epoch(state)
                self.save(state)
        return state

    def _train_epoch(self, state: TrainState) -> TrainState:
        """Takes the steps that are left of an epoch, or those until it is stopped."""
        loader, steps = self.train_loader, len(self.train_loader)
        if state.step == steps:
            return state
        totals = TrainTotals(loader.device, state.sums)
        clock = _Clock(loader, state)
        loader.load_state_dict({"seed": self.spec.seed, "epoch": state.epoch, "step": state.step})
        self.model.train()
        loss = top1 = None
        for step, batch in enumerate(loader, start=state.step):
            self._step(batch, totals, epoch=state.epoch, step=step)
            done = step + 1
            stop = done == steps or self.should_stop()
            due = self.save_every_steps is not None and done % self.save_every_steps == 0
            if stop or due or _is_read(state.epoch, done):
                self._tell_bad_steps()
                sums = totals.read()
                loss, top1 = (sums[name] / max(sums["images"], 1) for name in ("loss", "top1"))
            if stop or due:
                state = clock.stamp(state, step=done, sums=sums, in_a_row=self._guard.in_a_row)
            if stop:
                break
            if due:
                self.save(state)
            self._tell_progress(state.epoch, done, (loss, top1), clock)
        return state

    def _step(self, batch: Batch, totals: TrainTotals, *, epoch: int, step: int) -> None:
        """Takes one optimiser step; waits for nothing."""
        spec, images = self.spec, len(batch.global_rows)
        set_lr(self.optimizer, self._lr(epoch, step))
        torch.manual_seed(_step_seed(spec.seed, epoch, step, self.ranks.rank))
        self._guard.before()
        inputs_BCHW, targets = self._augmented(batch, epoch=epoch, step=step)
        loss = correct = torch.zeros((), device=inputs_BCHW.device)
        for part_BCHW, wanted in zip(
            inputs_BCHW.chunk(spec.accumulate), targets.chunk(spec.accumulate), strict=True
        ):
            if not len(part_BCHW):
                continue
            share = len(part_BCHW) / images
            part_loss, part_correct = self._backward(part_BCHW, wanted, share=share)
            loss, correct = loss + part_loss, correct + part_correct
        if self.ranks.world_size > 1:
            loss, correct = self._combine(loss, correct, share=len(batch.rows) / images)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._parameters, spec.clip_grad_norm or float("inf"), foreach=True
        )
        is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        rows = batch.global_rows.tolist()
        self._guard.step(is_finite, BadStep(epoch=epoch + 1, step=step, rows=rows))
        if self.average is not None:
            self.average.update(epoch * len(self.train_loader) + step, is_finite)
        self.optimizer.zero_grad(set_to_none=True)
        totals.add(
            loss=loss, correct=correct, grad_norm=grad_norm, images=images, is_finite=is_finite
        )

    def _augmented(self, batch: Batch, *, epoch: int, step: int) -> tuple[Tensor, Targets]:
        """Returns what the model reads of a batch, (B, C, H, W) channels_last, and its targets."""
        spec, inputs_BCHW, ranks = self.spec, batch.latents, self.ranks
        num_samples = len(batch.global_rows)
        # None of these seeds knows the rank: all draw alike, for the whole batch.
        inputs_BCHW = flipped(
            inputs_BCHW,
            spec.latent_flip,
            num_samples=num_samples,
            own=rank_slice(num_samples, rank=ranks.rank, world_size=ranks.world_size),
            seed=_step_seed(spec.seed, epoch, step, "flip"),
        )
        mix = draw_mix(
            spec,
            size=(inputs_BCHW.shape[2], inputs_BCHW.shape[3]),
            seed=_step_seed(spec.seed, epoch, step, "mix"),
        )
        inputs_BCHW, targets = mixed(inputs_BCHW, batch.labels, mix)
        return inputs_BCHW.contiguous(memory_format=torch.channels_last), targets

    def _backward(
        self, inputs_BCHW: Tensor, targets: Targets, *, share: float
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of a part of a batch; returns its share of the loss, and its hits."""
        with autocast(inputs_BCHW.device, self.spec.precision):
            logits = self.model(inputs_BCHW)
        logits = logits.float()
        loss = targets.loss(logits, label_smoothing=self.spec.label_smoothing) * share
        loss.backward()  # type: ignore[no-untyped-call]  # torch stub
        return loss.detach(), targets.hits(logits.detach())

    def _combine(self, loss: Tensor, correct: Tensor, *, share: float) -> tuple[Tensor, Tensor]:
        """Makes the sums over a slice those over the whole batch, on all ranks alike.

        Gradients and loss are weighted by their images already. BatchNorm normalises by its slice;
        its running statistics become the ranks' mean, weighted by images, in each step rather than
        before each evaluation: they are linear in the batches, so that is the same but for
        rounding, and a run may be saved and taken up anywhere without a change. What is not finite
        on one rank is so on all, which therefore skip the same steps.

        Args:
            loss: This rank's share of the loss, a scalar.
            correct: Its hits, a scalar.
            share: Its share of the batch's images, 0 to 1.
        """
        scores = torch.stack([loss, correct.to(loss.dtype)])
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        averages = self._guard.averages
        for average in averages:
            average.mul_(share)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self.ranks.add_up([*gradients, *averages, scores])
        return scores[0], scores[1]

    def _end_epoch(self, state: TrainState) -> TrainState:
        """Validates and starts the next epoch; returns `state` where validation was stopped."""
        started = time.perf_counter()
        validation = None
        if self.val_loader is not None:
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
            loss=sums["loss"] / images if images else float("nan"),
            train_top1=sums["top1"] / max(images, 1),
            val_loss=validation.loss if validation else None,
            top1=validation.top1 if validation else None,
            top5=validation.top5 if validation else None,
            lr=self._lr(state.epoch, steps - 1),
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

    def _lr(self, epoch: int, step: int) -> float:
        steps = len(self.train_loader)
        return lr_at(epoch * steps + step, spec=self.spec, steps_per_epoch=steps)

    def _tell_bad_steps(self) -> None:
        for bad in self._guard.read():
            self.observer.notice(
                f"step {bad.step} of epoch {bad.epoch} was skipped: loss or gradients were not "
                f"finite on rows {bad.rows} of the train split"
            )

    def _tell_progress(
        self, epoch: int, done: int, scores: tuple[float | None, float | None], clock: _Clock
    ) -> None:
        now = time.perf_counter()
        if now - self._last_tick < _PROGRESS_SECONDS:
            return
        self._last_tick = now
        epochs, steps = self.spec.epochs, len(self.train_loader)
        seconds = clock.seconds_per_step(done)
        self.observer.progress(
            TrainProgress(
                epoch=epoch + 1,
                epochs=epochs,
                step=done,
                steps=steps,
                loss=scores[0],
                train_top1=scores[1],
                images_per_second=self.spec.batch_size / seconds,
                wait_share=clock.wait_share,
                eta_seconds=seconds * (epochs * steps - epoch * steps - done),
            )
        )


class _Clock:
    """Measures the steps of an epoch and the waiting in them, earlier parts included."""

    def __init__(self, loader: BatchLoader, state: TrainState) -> None:
        self._loader = loader
        self._first_step = state.step
        self._earlier = (state.train_seconds, state.waited_seconds)
        self._waited_before = loader.waited_seconds
        self._started = time.perf_counter()

    def seconds_per_step(self, done: int) -> float:
        """Returns the mean of the steps taken since this clock was made, the `done`th the last."""
        return (time.perf_counter() - self._started) / max(done - self._first_step, 1)

    @property
    def wait_share(self) -> float:
        """Share of the time since this clock was made that was spent waiting for data."""
        waited = self._loader.waited_seconds - self._waited_before
        return waited / max(time.perf_counter() - self._started, 1e-9)

    def stamp(
        self, state: TrainState, *, step: int, sums: dict[str, float], in_a_row: int
    ) -> TrainState:
        """Returns the state after `step` steps of the epoch."""
        trained, waited = self._earlier
        return dataclasses.replace(
            state,
            step=step,
            sums=sums,
            train_seconds=trained + time.perf_counter() - self._started,
            waited_seconds=waited + self._loader.waited_seconds - self._waited_before,
            bad_in_a_row=in_a_row,
        )


def _is_read(epoch: int, done: int) -> bool:
    """Says whether the loop reads its sums after so many steps of an epoch."""
    often = epoch == 0 and done < _READ_EVERY_STEPS
    return done % (_READ_EVERY_FIRST_STEPS if often else _READ_EVERY_STEPS) == 0


def _step_seed(seed: int, epoch: int, step: int, drawer: int | str) -> int:
    """Mixes a step and who draws in it to a seed below 2**63; rank 0 draws as a process alone."""
    words = [seed, epoch, step] + ([drawer] if drawer else [])
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leaves torch's global generators as they were found."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
