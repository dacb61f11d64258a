"""How a running stage is shown: observers that feed a progress line."""

from __future__ import annotations

from ci2p_cache.cli import render
from ci2p_cache.encoding.progress import EncodeObserver, EncodeProgress
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.records import TrainObserver, TrainPlan, TrainProgress

__all__ = ["EncodeWatch", "TrainWatch"]


class _Watch:
    """What both have: notices are printed.

    Args:
        line: Shows the progress.
    """

    def __init__(self, line: render.ProgressLine) -> None:
        self._line = line

    def notice(self, text: str) -> None:
        """Prints the notice."""
        render.notice(text)


class EncodeWatch(_Watch, EncodeObserver):
    """Shows stage one on a progress line."""

    def planned(self, text: str) -> None:
        """Prints splits, classes and counts."""
        render.status(f"plan: {text}")

    def progress(self, progress: EncodeProgress) -> None:
        """Moves the line."""
        detail = f"{progress.bad} bad"
        if progress.eta_seconds is not None:
            # Rates of the first two seconds are those of a start.
            detail += f", {progress.images_per_second:.1f} images/s"
            detail += f", encoder waiting {progress.waiting_share:.0%}"
        self._line.update(progress.done, progress.total, detail=detail, eta=progress.eta_seconds)

    def download(self, done_bytes: int, total_bytes: int) -> None:
        """Moves the line while official weights are fetched."""
        self._line.update(done_bytes, total_bytes, detail="bytes of official weights")


class TrainWatch(_Watch, TrainObserver):
    """Shows stage two: its plan, a progress line within an epoch, and a printed line per epoch."""

    _classes = 0

    def planned(self, plan: TrainPlan) -> None:
        """Prints model, data, steps and run folder."""
        self._classes = plan.classes
        views = f", {plan.views} views each" if plan.views > 1 else ""
        spec = plan.spec
        parts = f" (in {spec.accumulate} parts)" if spec.accumulate > 1 else ""
        render.status(
            f"plan: {spec.model}, {plan.parameters:,} trainable parameters, {spec.precision} on "
            f"{plan.device}"
        )
        render.status(
            f"  {plan.train_images:,} training images{views}, {plan.val_images:,} validation "
            f"images, {plan.classes} classes"
        )
        render.status(
            f"  {spec.epochs} epochs of {plan.steps} steps of {spec.batch_size} images{parts}, "
            f"into {plan.path}"
        )
        if plan.initial is not None:
            new = f", new are {', '.join(plan.initial.new)}" if plan.initial.new else ""
            render.status(
                f"  {plan.initial.taken} tensors begin as in file {plan.initial.sha256[:12]}{new}"
            )
        if plan.epochs_done or plan.steps_done:
            render.status(
                f"  continuing after {plan.epochs_done} of {spec.epochs} epochs and "
                f"{plan.steps_done} of {plan.steps} steps"
            )

    def progress(self, progress: TrainProgress) -> None:
        """Moves the line."""
        loss = ""
        if progress.train_loss is not None and progress.train_top1 is not None:
            loss = f"loss {progress.train_loss:.3f}, top-1 {progress.train_top1:.1%} (train), "
        self._line.update(
            progress.step,
            progress.steps,
            detail=f"epoch {progress.epoch}/{progress.epochs}, {loss}"
            f"{progress.images_per_second:.0f} images/s",
            eta=progress.eta_seconds,
        )

    def epoch(self, record: EpochRecord) -> None:
        """Prints the epoch's line."""
        scores = f"top-1 {record.train_top1:.1%} (train)"
        if record.val_top1 is not None and record.val_top5 is not None:
            scores = f"val loss {record.val_loss:.3f}  top-1 {record.val_top1:.1%}"
            # Of five classes or fewer, the five likeliest are all.
            scores += f"  top-5 {record.val_top5:.1%}" if self._classes > 5 else ""
        skipped = f"  {record.skipped_steps} steps skipped" if record.skipped_steps else ""
        render.status(
            f"epoch {record.epoch:>{len(str(record.epochs))}}/{record.epochs}  "
            f"loss {record.train_loss:.3f}  {scores}  {record.images_per_second:.0f} images/s  "
            f"waiting {record.wait_share:.1%}  {render.duration(record.eta_seconds)} left{skipped}"
        )
