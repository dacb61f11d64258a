"""`train`: stage two, from a cache to a trained model in a run folder; run again, it goes on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from ci2p_cache.cache.commit import StagingArea
from ci2p_cache.cache.store import open_cache
from ci2p_cache.errors import CheckpointError, InterruptedRunError, UsageError
from ci2p_cache.loader.batches import BatchLoader, LatentLoader
from ci2p_cache.machine import checked_device, tune_allocator
from ci2p_cache.models.ci2p_vit import ModelConfig
from ci2p_cache.models.registry import build_model
from ci2p_cache.training.checkpoint import Checkpoint, CheckpointStore, TrainState
from ci2p_cache.training.folder import RunArgs, RunSettings, open_run_folder, run_path
from ci2p_cache.training.inputs import (
    data_digest,
    make_loaders,
    model_config_for,
    model_record,
    numerics,
    train_and_val,
)
from ci2p_cache.training.optim import load_optimizer_tensors, make_optimizer, optimizer_tensors
from ci2p_cache.training.records import (
    EpochRecord,
    TensorBoard,
    TrainObserver,
    TrainProgress,
    TrainSummary,
    best_epoch,
    summary_csv,
)
from ci2p_cache.training.signals import StopSignal
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.trainer import Trainer

__all__ = ["EpochRecord", "TrainObserver", "TrainProgress", "TrainSpec", "TrainSummary", "train"]


def train(
    cache_dir: str | Path,
    *,
    spec: TrainSpec | None = None,
    runs_dir: str | Path = "runs",
    name: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    save_every_steps: int | None = None,
    loader: BatchLoader | None = None,
    observer: TrainObserver | None = None,
) -> TrainSummary:
    """Trains a model from a cache of latents.

    Called again with the same arguments it goes on where it stopped, and a finished run returns at
    once. On CPU the numbers are the same to the last bit, interrupted or not, as long as the number
    of threads and the versions stay. SIGINT and SIGTERM end the step, save, and raise.

    Args:
        cache_dir: A complete cache.
        spec: What to train and how; None for the defaults.
        runs_dir: Where run folders are made.
        name: Name of the run folder; None: the model and 8 digits over all settings and the data.
        overwrite: Remove the run that lies in the folder; one that is no run is never touched.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        threads: Threads that read batches; None: one per core.
        save_every_steps: Steps between checkpoints inside an epoch; None: only at its end.
        loader: Gives the training batches instead of the cache, for the encoder in the loop: of the
            spec's seed and batch size, on the same device. The caller closes it.
        observer: Told of progress, epochs and notices.

    Returns:
        The last and the best epoch, and where their weights lie.

    Raises:
        UsageError: an argument or a setting cannot be used.
        UnknownModelError: no model has that name.
        NotACacheError, IncompleteCacheError, ManifestError: the cache cannot be opened.
        InputDataError: there is nothing to train from, or a label is missing.
        RunMismatchError: the folder holds a run with other settings, or something else.
        LockedError: another process trains in the folder.
        CheckpointError: every checkpoint of the run is damaged.
        ShardError: the cache turned out to be damaged.
        TrainingDivergedError: loss or gradients were not finite ten times in a row.
        ResourceError: writing failed; run it again later.
        InterruptedRunError: stopped by a signal; run it again to go on.
    """
    spec, observer = spec or TrainSpec(), observer or TrainObserver()
    if save_every_steps is not None and save_every_steps < 1:
        raise UsageError(f"`save_every_steps` is {save_every_steps}; it must be at least 1")
    cache, place = open_cache(cache_dir), checked_device(device)
    if place.type == "cpu":
        tune_allocator()
    config = model_config_for(cache, spec)
    splits = train_and_val(cache, spec)
    settings = RunSettings(
        spec=spec,
        fingerprint=cache.fingerprint,
        data_sha256=data_digest(cache),
        loader=LatentLoader.__name__ if loader is None else type(loader).__name__,
    )
    args = RunArgs(cache=str(cache_dir), numerics=numerics(place), settings=settings)
    path = run_path(Path(runs_dir), name, settings)
    with StopSignal() as stop, ExitStack() as stack:
        staging = stack.enter_context(
            open_run_folder(path, args, overwrite=overwrite, observer=observer)
        )
        if not (path / "model.json").exists():
            staging.put_json("model.json", model_record(cache, config))
        run = _Run(settings, staging, observer)
        if run.is_finished:
            observer.notice(
                f"{path} is a finished run; nothing was trained. Use --overwrite to train it "
                "again, or another --name."
            )
        else:
            loaders = make_loaders(splits, spec, place, threads=threads, given=loader)
            stack.callback(_close, [each for each in loaders if each not in (None, loader)])
            run.train(config, loaders, stop, save_every_steps=save_every_steps)
    return run.summary(path, place)


class _Run:
    """One run folder being trained in: what is on disk, and what is not yet."""

    def __init__(
        self, settings: RunSettings, staging: StagingArea, observer: TrainObserver
    ) -> None:
        self._spec = settings.spec
        self._staging = staging
        self._observer = observer
        self._store = CheckpointStore(staging, run=settings.digest)
        self._checkpoint = self._store.load(observer)
        self.state = TrainState(run=settings.digest, sums={})
        if self._checkpoint is not None:
            self.state = self._checkpoint.state
        self._trained_epochs = 0
        # Whatever a killed process left there beyond its last checkpoint is dropped.
        staging.put("summary.csv", summary_csv(self.state.history))

    @property
    def is_finished(self) -> bool:
        """Whether the last epoch is done."""
        return self.state.epoch == self._spec.epochs

    def train(
        self,
        config: ModelConfig,
        loaders: tuple[BatchLoader, BatchLoader | None],
        stop: StopSignal,
        *,
        save_every_steps: int | None,
    ) -> None:
        """Trains to the end.

        Raises:
            InterruptedRunError: a signal came; everything is saved.
        """
        device = loaders[0].device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._spec.seed)
            model = build_model(config).to(device)
        optimizer = make_optimizer(model, self._spec)
        if self._checkpoint is not None:
            self._restore(self._checkpoint, model, optimizer)
        board = TensorBoard(self._staging.root / "tensorboard", next_epoch=max(self.state.epoch, 1))
        if self.state.history:
            # A process killed between its checkpoint and this may not have written it.
            board.write(self.state.history[-1])

        def save(state: TrainState) -> None:
            tensors = (dict(model.state_dict()), optimizer_tensors(model, optimizer))
            self._store.save(Checkpoint(state, *tensors))
            new = state.history[len(self.state.history) :]
            self.state = state
            if new:
                self._staging.put("summary.csv", summary_csv(state.history))
                board.write(new[0])
                self._trained_epochs += 1
                self._observer.epoch(new[0])

        try:
            Trainer(
                spec=self._spec,
                model=model,
                optimizer=optimizer,
                train_loader=loaders[0],
                val_loader=loaders[1],
                save=save,
                should_stop=stop.is_set,
                observer=self._observer,
                save_every_steps=save_every_steps,
            ).run(self.state)
        finally:
            board.close()
        if stop.number is not None and not self.is_finished:
            raise InterruptedRunError(
                f"training stopped after {self.state.epoch} of {self._spec.epochs} epochs and "
                f"{self.state.step} steps of the next; all of it is saved in "
                f"{self._staging.root}",
                signal_number=stop.number,
                hint="run the same command again to go on",
            )

    def _restore(
        self, checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        path = self._store.path(checkpoint.state.name)
        try:
            model.load_state_dict(checkpoint.model)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the model: {error}") from error
        load_optimizer_tensors(model, optimizer, checkpoint.optimizer)
        self._checkpoint = None
        self._observer.notice(
            f"going on from {path}: {self.state.epoch} of {self._spec.epochs} epochs and "
            f"{self.state.step} steps are done."
        )

    def summary(self, path: Path, device: torch.device) -> TrainSummary:
        """Returns what the run ended with."""
        history, best_name = self.state.history, self.state.best_name
        assert best_name is not None
        return TrainSummary(
            name=path.name,
            path=str(path),
            model=self._spec.model,
            device=str(device),
            trained_epochs=self._trained_epochs,
            last=history[-1],
            best=best_epoch(history),
            last_checkpoint=str(self._store.path(self.state.name)),
            best_checkpoint=str(self._store.path(best_name)),
        )


def _close(loaders: list[BatchLoader]) -> None:
    for loader in loaders:
        loader.close()
