"""`train`: stage two, from a cache to a trained model in a run folder; run again, it continues."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ci2p_cache.cache.split import Split
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.errors import InterruptedRunError, UsageError
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.resident import Resident
from ci2p_cache.machine import bf16_notice
from ci2p_cache.models.own_models import OwnConfig
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.outputs import refuse_url
from ci2p_cache.runs.files import EpochRecord, best_epoch
from ci2p_cache.training.checkpoint import Checkpoint, TrainState, checkpoint_path, share_checkpoint
from ci2p_cache.training.folder import RunWriter, open_writer, run_path
from ci2p_cache.training.initial import initial_weights
from ci2p_cache.training.inputs import (
    data_digest,
    model_config_for,
    require_layers,
    run_numerics,
    train_and_val,
)
from ci2p_cache.training.loaders import loader_name, make_loaders
from ci2p_cache.training.metrics import opened_statistics
from ci2p_cache.training.ranks import Ranks, StopSignal
from ci2p_cache.training.records import (
    InitialWeights,
    Observers,
    RunArgs,
    RunSettings,
    TrainObserver,
    TrainPlan,
    TrainProgress,
    TrainSummary,
    require_same_settings,
)
from ci2p_cache.training.spec import TrainSpec
from ci2p_cache.training.trackers import DEFAULT_TRACKERS, Tracker, make_trackers
from ci2p_cache.training.trainer import Learner, Trainer

__all__ = [
    "EpochRecord",
    "Session",
    "TrainObserver",
    "TrainPlan",
    "TrainProgress",
    "TrainSpec",
    "TrainSummary",
    "train",
]


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
    """The ranks that train together."""
    stop: StopSignal
    """Notes the signals that come to this rank."""
    observer: Observers
    """Receives what there is to report; on ranks other than 0 there is none in it."""

    def learner(self, checkpoint: Checkpoint | None, weights: Mapping[str, Tensor]) -> Learner:
        """Returns model, optimiser and averages, as they were saved, or as the run begins.

        It begins with the `weights`, and where they have none as the seed draws it.

        Raises:
            CheckpointError: the checkpoint does not fit the model.
        """
        if self.spec.precision == "bf16" and (text := bf16_notice(self.device)):
            self.observer.notice(text)
        learner = Learner.drawn(
            self.config, self.spec, self.device, {} if checkpoint is not None else weights
        )
        if checkpoint is not None:
            learner.restore(checkpoint, checkpoint_path(self.path, checkpoint.state.name))
        learner.share(self.ranks)
        return learner

    def plan(
        self,
        state: TrainState,
        learner: Learner,
        loaders: tuple[BatchLoader, BatchLoader | None],
        *,
        device: str,
        initial: InitialWeights | None,
    ) -> TrainPlan:
        """Returns what `train` will do with the same arguments; `device` is the device's name."""
        loader, val = loaders
        trained = (each for each in learner.model.parameters() if each.requires_grad)
        return TrainPlan(
            path=str(self.path),
            spec=self.spec,
            parameters=sum(each.numel() for each in trained),
            train_images=loader.num_samples,
            val_images=0 if val is None else val.num_samples,
            classes=self.config.num_classes,
            views=self.spec.epochs if self.spec.fresh_views else loader.split.num_views,
            device=device,
            steps=len(loader),
            epochs_done=state.epoch,
            steps_done=state.step,
            last=state.history[-1] if state.history else None,
            initial=initial,
        )

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
    observers: Sequence[TrainObserver] = (),
    track: Sequence[Tracker] = DEFAULT_TRACKERS,
    ranks: Ranks | None = None,
) -> TrainSummary:
    """Trains a model from a cache of latents, or a baseline on the images that it was made of.

    Called again with the same arguments it continues where it stopped, and a finished run returns
    at once. On CPU the numbers are the same to the last bit, interrupted or not, as long as the
    number of threads and the versions stay. SIGINT, SIGTERM and SIGHUP end the step, save, and
    raise.

    In processes that torchrun has started it trains on all of them together: each global batch is
    cut in as many slices as there are ranks, and gradients are means over the whole batch. Rank 0
    alone writes and reports; all return the same. What one rank raises ends all of them. The number
    of ranks may change when a run is resumed: the batches stay, the last bits may not.

    Args:
        cache_dir: A complete cache.
        spec: What to train and how; None for the defaults.
        runs_dir: Where run folders are made.
        name: Name of the run folder; None: the model and 8 digits over all settings and the data.
        overwrite: Remove the run that is in the folder; any other folder is left alone.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1; with several ranks on a
            machine, cuda gives each its own.
        threads: Threads that read batches; None: one per core, shared by a machine's ranks.
        resident: Whether the train split stays in the device's memory: yes, no, or auto, which is
            where it takes at most 60 % of what a CUDA device has free. The batches are the same.
        compile_model: Compile the model with `torch.compile`, which changes the last bits; minutes
            at the start, worth it for long runs on a GPU.
        save_every_steps: Steps between checkpoints inside an epoch; None: only at its end.
        loader: Gives the training batches instead of the cache, for the encoder in the loop: of the
            spec's seed and batch size, on the same device and for this rank. The caller closes it.
        observers: Receive plan, steps, progress, epochs, notices and the end; on rank 0.
        track: Where the numbers of steps and epochs go beside `summary.csv`: tensorboard and csv
            into the run folder, wandb to Weights & Biases. It may change when a run is resumed.
        ranks: The ranks to train with, joined; None: as the environment says.

    Returns:
        The last and the best epoch, and where their weights are.

    Raises:
        UsageError: an argument or a setting cannot be used.
        MissingDependencyError: `track` names wandb, which is not installed.
        UnknownModelError: no model has that name.
        NotACacheError, IncompleteCacheError, ManifestError: the cache cannot be opened.
        InputDataError: the cache holds no latent to train from, a label is missing, or, for a model
            on images, an image has changed since the cache was made.
        SourceError: the model reads images, and they are not there any more.
        RunMismatchError: the folder holds a run with other settings, or something else; a longer
            run of the same settings is continued where the schedule allows it.
        LockedError: another process trains in the folder.
        CheckpointError: every checkpoint of the run is damaged.
        ShardError: the cache turned out to be damaged.
        DigestError: the cache's encoder.safetensors is damaged; a new run folder gets a copy.
        TrainingDivergedError: loss or gradients were not finite ten times in a row.
        ResourceError: writing failed, or another rank was killed; run it again.
        InterruptedRunError: stopped by a signal; run it again to continue.
    """
    spec, reporting = spec or TrainSpec(), [*make_trackers(track), *observers]
    with ExitStack() as stack:
        if ranks is None:
            ranks = stack.enter_context(Ranks.from_environment().joined(device))
        observer = Observers(reporting if ranks.is_writer else ())
        if save_every_steps is not None and save_every_steps < 1:
            raise UsageError(f"`save_every_steps` is {save_every_steps}; it must be at least 1")
        cache, place = open_cache(cache_dir), ranks.device(device)
        config, splits, settings, weights = _checked(cache, spec, loader, resident, ranks, observer)
        refuse_url(runs_dir, what="run")
        path = run_path(Path(runs_dir), name, settings)
        stop = stack.enter_context(ranks.stop_signal())
        run = Session(
            path=path, spec=spec, config=config, device=place, ranks=ranks, stop=stop,
            observer=observer,
        )  # fmt: skip
        how = run_numerics(place, ranks, is_compiled=compile_model)
        args = RunArgs(cache=str(cache_dir), numerics=how, settings=settings)
        writer = None
        if ranks.is_writer:
            opened = open_writer(
                path, args, cache=cache, config=config, overwrite=overwrite, observer=observer
            )
            writer = stack.enter_context(opened)
        checkpoint = share_checkpoint(writer.load() if writer is not None else None, ranks)
        begun = checkpoint.state if checkpoint else TrainState(run=settings.digest, sums={})
        if begun.epoch == spec.epochs:
            quoted = shlex.quote(path.name)
            observer.notice(
                f"{path} is finished; nothing was trained. To train it again, add "
                f"--name {quoted} --overwrite {quoted}"
            )
            return run.summary(begun, begun)
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
        learner = run.learner(checkpoint, weights)
        # Their tensors are copied; no copy of the model's size stays in memory.
        del checkpoint, weights
        if compile_model:
            learner.compile()
        plan = run.plan(begun, learner, loaders, device=how["device"], initial=settings.init_from)
        with observer.observed(plan):
            ended = run.train(
                begun, learner, loaders, writer, threads=threads, save_every_steps=save_every_steps
            )
    return run.summary(begun, ended)


def _checked(
    cache: Cache,
    spec: TrainSpec,
    loader: BatchLoader | None,
    resident: Resident,
    ranks: Ranks,
    observer: TrainObserver,
) -> tuple[AnyModelConfig, tuple[Split, Split | None], RunSettings, dict[str, Tensor]]:
    """Returns model, splits, what binds the run, and the weights that it begins with.

    Refuses before anything is written.
    """
    config = model_config_for(cache, spec)
    require_layers(config, spec)
    splits = train_and_val(cache, spec, ranks)
    initial, weights = initial_weights(cache, spec, config, observer)
    settings = RunSettings(
        spec=replace(spec, model=config.bound_name) if isinstance(config, OwnConfig) else spec,
        fingerprint=cache.fingerprint,
        data_sha256=data_digest(cache),
        loader=loader_name(config, spec, splits[0], given=loader, resident=resident),
        init_from=initial,
    )
    require_same_settings(settings, ranks)
    return config, splits, settings, weights


def _close(loaders: list[BatchLoader]) -> None:
    for loader in loaders:
        loader.close()
