"""What rank 0 does for all ranks: it alone reads and writes the run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.store import Cache
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.training.checkpoint import Checkpoint, CheckpointStore, TrainState
from ci2p_cache.training.encoder_copy import copy_encoder
from ci2p_cache.training.folder import open_run_folder
from ci2p_cache.training.inputs import model_record
from ci2p_cache.training.learner import Learner
from ci2p_cache.training.records import TensorBoard, TrainObserver, summary_csv
from ci2p_cache.training.settings import RunArgs

__all__ = ["RunWriter", "open_writer"]


class RunWriter:
    """The run folder as it is written: checkpoints, `summary.csv` and TensorBoard events.

    Args:
        staging: The open staging area of the run folder.
        run: Digest of the run's settings and data.
        has_average: Whether the run averages its weights.
        observer: Receives epochs that are safe on disk.
    """

    def __init__(
        self, staging: StagingArea, *, run: str, has_average: bool, observer: TrainObserver
    ) -> None:
        self._staging = staging
        self._observer = observer
        self._store = CheckpointStore(staging, run=run, has_average=has_average)
        self._board: TensorBoard | None = None
        self._num_epochs = 0

    def load(self) -> Checkpoint | None:
        """Reads the newest whole checkpoint; what was written beyond it is dropped.

        Returns:
            None where the run has not saved one yet.

        Raises:
            CheckpointError: there are checkpoints, and none of them is whole.
            ResourceError: the folder cannot be written.
        """
        checkpoint = self._store.load(self._observer)
        history = checkpoint.state.history if checkpoint is not None else ()
        # Whatever a killed process left there beyond its last checkpoint.
        self._staging.put("summary.csv", summary_csv(history))
        self._num_epochs = len(history)
        return checkpoint

    def open_board(self, state: TrainState) -> None:
        """Opens the TensorBoard events for the epochs that follow `state`.

        Raises:
            ResourceError: the file cannot be written.
        """
        folder = self._staging.root / "tensorboard"
        self._board = TensorBoard(folder, next_epoch=max(state.epoch, 1))
        if state.history:
            # A process killed between its checkpoint and this may not have written it.
            self._board.write(state.history[-1])

    def save(self, state: TrainState, learner: Learner) -> None:
        """Writes a checkpoint, and the epoch that has ended with it, if one has.

        Raises:
            ResourceError: it cannot be written; earlier checkpoints are safe.
        """
        self._store.save(learner.checkpoint(state))
        new = state.history[self._num_epochs :]
        if new:
            assert self._board is not None
            self._num_epochs = len(state.history)
            self._staging.put("summary.csv", summary_csv(state.history))
            self._board.write(new[0])
            self._observer.epoch(new[0])

    def close(self) -> None:
        """Closes the files.

        Raises:
            ResourceError: what was not written yet cannot be.
        """
        if self._board is not None:
            self._board.close()


@contextmanager
def open_writer(
    path: Path,
    args: RunArgs,
    *,
    cache: Cache,
    config: AnyModelConfig,
    overwrite: bool,
    observer: TrainObserver,
) -> Iterator[RunWriter]:
    """Makes or takes up a run folder and holds its lock while the block runs.

    Args:
        path: The folder.
        args: What is asked for.
        cache: The cache that is trained from.
        config: The model.
        overwrite: Whether to remove the run that is there first.
        observer: Receives what has changed since the start, and of epochs.

    Yields:
        What writes there; `args.yaml`, `model.json` and the encoder's copy stand.

    Raises:
        RunMismatchError: a run with other settings is there, or something else than a run.
        LockedError: another process trains there.
        DigestError: the cache's encoder is missing or is not the one that was committed.
        ResourceError: the folder cannot be written.
    """
    with open_run_folder(path, args, overwrite=overwrite, observer=observer) as staging:
        if not (path / "model.json").exists():
            encoder = copy_encoder(cache, config, staging)
            staging.put_json("model.json", model_record(cache, config, encoder))
        settings = args.settings
        yield RunWriter(
            staging, run=settings.digest, has_average=settings.spec.ema > 0, observer=observer
        )
