"""`train`: stage two, from a cache to a trained model in a run folder; run again, it goes on."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ci2p_cache.cache.store import open_cache
from ci2p_cache.errors import CheckpointError, InterruptedRunError, UsageError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.resident import Resident
from ci2p_cache.machine import bf16_notice, raise_open_files, tune_allocator
from ci2p_cache.models.registry import AnyModelConfig, build_model
from ci2p_cache.record import differing_fields
from ci2p_cache.training.checkpoint import Checkpoint, share_checkpoint
from ci2p_cache.training.checkpoint_folder import TrainState, checkpoint_path
from ci2p_cache.training.ema import WeightAverage
from ci2p_cache.training.encoder_copy import copy_encoder
from ci2p_cache.training.folder import RunArgs, RunSettings, open_run_folder, run_path
from ci2p_cache.training.inputs import (
    data_digest,
    loader_name,
    make_loaders,
    model_config_for,
    model_record,
    numerics,
    require_layers,
    train_and_val,
)
from ci2p_cache.training.optim import load_optimizer_tensors, make_optimizer
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.records import (
    EpochRecord,
    TrainObserver,
    TrainProgress,
    TrainSummary,
    best_epoch,
)
from ci2p_cache.training.signals import StopSignal
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.trainer import Trainer
from ci2p_cache.training.writer import RunWriter

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
    resident: Resident = "auto",
    compile_model: bool = False,
    save_every_steps: int | None = None,
    loader: BatchLoader | None = None,
    observer: TrainObserver | None = None,
    ranks: Ranks | None = None,
) -> TrainSummary:
    """Trains a model from a cache of latents, or a baseline on the images that it was made of.

    Called again with the same arguments it goes on where it stopped, and a finished run returns at
    once. On CPU the numbers are the same to the last bit, interrupted or not, as long as the number
    of threads and the versions stay. SIGINT and SIGTERM end the step, save, and raise.

    In processes that torchrun has started it trains on all of them together: each global batch is
    cut in as many slices as there are ranks, and gradients are means over the whole batch. Rank 0
    alone writes and tells; all return the same. What one rank raises ends all of them. The number
    of ranks may change when a run is resumed: the batches stay, the last bits may not.

    Args:
        cache_dir: A complete cache.
        spec: What to train and how; None for the defaults.
        runs_dir: Where run folders are made.
        name: Name of the run folder; None: the model and 8 digits over all settings and the data.
        overwrite: Remove the run that lies in the folder; one that is no run is never touched.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1; with several ranks on a
            machine, cuda gives each its own.
        threads: Threads that read batches; None: one per core, shared by a machine's ranks.
        resident: Whether the train split is kept in the device's memory: yes, no, or auto, which is
            where it takes at most 60 % of what a CUDA device has free. The batches are the same.
        compile_model: Compile the model with `torch.compile`, which changes the last bits; minutes
            at the start, worth it for long runs on a GPU.
        save_every_steps: Steps between checkpoints inside an epoch; None: only at its end.
        loader: Gives the training batches instead of the cache, for the encoder in the loop: of the
            spec's seed and batch size, on the same device and for this rank. The caller closes it.
        observer: Told of progress, epochs and notices; on rank 0.
        ranks: The ranks to train with, joined; None: as the environment says.

    Returns:
        The last and the best epoch, and where their weights lie.

    Raises:
        UsageError: an argument or a setting cannot be used.
        UnknownModelError: no model has that name.
        NotACacheError, IncompleteCacheError, ManifestError: the cache cannot be opened.
        InputDataError: there is nothing to train from, a label is missing, or, for a model on
            images, an image has changed since the cache was made.
        SourceError: the model reads images, and they are not there any more.
        RunMismatchError: the folder holds a run with other settings, or something else.
        LockedError: another process trains in the folder.
        CheckpointError: every checkpoint of the run is damaged.
        ShardError: the cache turned out to be damaged.
        DigestError: the cache's encoder.safetensors is damaged; a new run folder gets a copy.
        TrainingDivergedError: loss or gradients were not finite ten times in a row.
        ResourceError: writing failed, or another rank was killed; run it again.
        InterruptedRunError: stopped by a signal; run it again to go on.
    """
    spec, observer = spec or TrainSpec(), observer or TrainObserver()
    with ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks.from_environment().joined(device))
        if not ranks.is_writer:
            observer = TrainObserver()
        if save_every_steps is not None and save_every_steps < 1:
            raise UsageError(f"`save_every_steps` is {save_every_steps}; it must be at least 1")
        cache, place = open_cache(cache_dir), ranks.device(device)
        raise_open_files()
        if place.type == "cpu":
            tune_allocator()
        config = model_config_for(cache, spec)
        require_layers(config, spec)
        splits = train_and_val(cache, spec, ranks)
        settings = RunSettings(
            spec=spec,
            fingerprint=cache.fingerprint,
            data_sha256=data_digest(cache),
            loader=loader_name(config, loader),
        )
        _require_same_settings(settings, ranks)
        how = numerics(place, ranks, is_compiled=compile_model)
        args = RunArgs(cache=str(cache_dir), numerics=how, settings=settings)
        path = run_path(Path(runs_dir), name, settings)
        stop = stack.enter_context(ranks.stop_signal())
        writer = None
        if ranks.is_writer:
            folder = open_run_folder(path, args, overwrite=overwrite, observer=observer)
            staging = stack.enter_context(folder)
            if not (path / "model.json").exists():
                encoder = copy_encoder(cache, config, staging)
                staging.put_json("model.json", model_record(cache, config, encoder))
            writer = RunWriter(
                staging, run=settings.digest, has_average=spec.ema > 0, observer=observer
            )
        checkpoint = share_checkpoint(writer.load() if writer is not None else None, ranks)
        run = _Run(path, spec, ranks, writer, observer)
        begun = checkpoint.state if checkpoint else TrainState(run=settings.digest, sums={})
        state = begun
        if begun.epoch == spec.epochs:
            observer.notice(
                f"{path} is a finished run; nothing was trained. Use --overwrite to train it "
                "again, or another --name."
            )
        else:
            loaders = make_loaders(
                splits,
                spec,
                place,
                reads=config.reads,
                threads=threads,
                resident=resident,
                given=loader,
                ranks=ranks,
                observer=observer,
            )
            stack.callback(_close, [each for each in loaders if each not in (None, loader)])
            if spec.precision == "bf16" and (text := bf16_notice(place)):
                observer.notice(text)
            model, optimizer, average = run.start(config, place, checkpoint)
            # Its tensors are copied; nothing of the size of the model is kept twice.
            del checkpoint
            if compile_model:
                # In place: the names of the weights stay. Compiled at the first step.
                model.compile()
                if average is not None:
                    average.module.compile()
            state = run.train(
                begun, model, optimizer, average, loaders, stop, save_every_steps=save_every_steps
            )
    return run.summary(begun, state, place)


def _require_same_settings(settings: RunSettings, ranks: Ranks) -> None:
    """Raises UsageError on a rank that was asked for something else, or reads another cache."""
    if ranks.world_size == 1:
        return
    wanted = ranks.share(json.dumps(settings.to_dict()).encode())
    lines = [
        f"  {name}: {ours!r} on rank 0, {theirs!r} on rank {ranks.rank}"
        for name, ours, theirs in differing_fields(
            RunSettings.from_dict(json.loads(wanted)), settings
        )
    ]
    if lines:
        raise UsageError("the ranks were started with other settings:\n" + "\n".join(lines))
    # Nothing is written before all agree.
    ranks.wait()


@dataclass(frozen=True, slots=True)
class _Run:
    """One run, as one of its ranks sees it."""

    path: Path
    spec: TrainSpec
    ranks: Ranks
    writer: RunWriter | None
    observer: TrainObserver

    def start(
        self, config: AnyModelConfig, device: torch.device, checkpoint: Checkpoint | None
    ) -> tuple[nn.Module, Optimizer, WeightAverage | None]:
        """Returns model, optimiser and averages, as they were saved or as the seed makes them.

        Raises:
            CheckpointError: the checkpoint does not fit the model.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.spec.seed)
            model = build_model(config).to(device)
        optimizer = make_optimizer(model, self.spec)
        average = WeightAverage(model, self.spec.ema) if self.spec.ema else None
        if checkpoint is not None:
            self._restore(checkpoint, model, optimizer, average)
        for module in [model] if average is None else [model, average.module]:
            self.ranks.share_tensors(list(module.state_dict().values()))
        return model, optimizer, average

    def _restore(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizer: Optimizer,
        average: WeightAverage | None,
    ) -> None:
        state = checkpoint.state
        path = checkpoint_path(self.path, state.name)
        try:
            model.load_state_dict(checkpoint.model)
            if average is not None:
                average.load(checkpoint.average)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the model: {error}") from error
        load_optimizer_tensors(model, optimizer, checkpoint.optimizer)
        self.observer.notice(
            f"going on from {path}: {state.epoch} of {self.spec.epochs} epochs and "
            f"{state.step} steps are done."
        )

    def train(
        self,
        state: TrainState,
        model: nn.Module,
        optimizer: Optimizer,
        average: WeightAverage | None,
        loaders: tuple[BatchLoader, BatchLoader | None],
        stop: StopSignal,
        *,
        save_every_steps: int | None,
    ) -> TrainState:
        """Trains from `state` to the end, and returns the state there.

        Raises:
            InterruptedRunError: a signal came to any rank; everything is saved.
        """
        signal_number = 0

        def should_stop() -> bool:
            nonlocal signal_number
            signal_number = self.ranks.agreed_signal(stop)
            return signal_number > 0

        def save(state: TrainState) -> None:
            if self.writer is not None:
                self.writer.save(state, model, optimizer, average)

        try:
            if self.writer is not None:
                self.writer.open_board(state)
            state = Trainer(
                spec=self.spec,
                model=model,
                optimizer=optimizer,
                average=average,
                train_loader=loaders[0],
                val_loader=loaders[1],
                save=save,
                should_stop=should_stop,
                ranks=self.ranks,
                observer=self.observer,
                save_every_steps=save_every_steps,
            ).run(state)
        finally:
            if self.writer is not None:
                self.writer.close()
        if state.epoch < self.spec.epochs:
            raise InterruptedRunError(
                f"training stopped after {state.epoch} of {self.spec.epochs} epochs and "
                f"{state.step} steps of the next; all of it is saved in {self.path}",
                signal_number=signal_number,
                hint="run the same command again to go on",
            )
        return state

    def summary(self, begun: TrainState, state: TrainState, device: torch.device) -> TrainSummary:
        """Returns what the run that went from one state to the other ended with."""
        history, best_name = state.history, state.best_name
        assert best_name is not None
        return TrainSummary(
            name=self.path.name,
            path=str(self.path),
            model=self.spec.model,
            device=str(device),
            trained_epochs=len(history) - len(begun.history),
            last=history[-1],
            best=best_epoch(history),
            last_checkpoint=str(checkpoint_path(self.path, state.name)),
            best_checkpoint=str(checkpoint_path(self.path, best_name)),
        )


def _close(loaders: list[BatchLoader]) -> None:
    for loader in loaders:
        loader.close()
