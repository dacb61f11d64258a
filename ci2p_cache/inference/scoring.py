"""`evaluate`: a checkpoint over a split, exactly as training validated it, image by image.

::

    cache (or its images) -> the loader that training validates with -> model -> sums as training's
                                                                           |-> one row per image
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ci2p_cache.cache.index import parquet_bytes
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.errors import (
    FingerprintMismatchError,
    InputDataError,
    NotACacheError,
    UsageError,
)
from ci2p_cache.inference.evaluation import EVALUATION, PREDICTIONS, Evaluation
from ci2p_cache.inference.run_folder import RunFolder, load_model, open_run
from ci2p_cache.inference.scores import (
    bootstrap_interval,
    calibration_bins,
    class_scores,
    confusion_triples,
    expected_calibration_error,
)
from ci2p_cache.loader.batches import Batch, BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.machine import checked_device, ieee_float32, raise_open_files, tune_allocator
from ci2p_cache.record import differing_fields
from ci2p_cache.training.inputs import data_digest, train_and_val
from ci2p_cache.training.metrics import Validation, validate
from ci2p_cache.training.ranks import Ranks

__all__ = ["evaluate"]

_TOP = 5

_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("predicted", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("top5", pa.list_(pa.int32()), nullable=False),
    ]
)


def evaluate(
    run: str | Path,
    *,
    cache: str | Path | None = None,
    from_images: bool = False,
    split: str = "val",
    checkpoint: str | Path = "best",
    device: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    source: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a checkpoint, and writes evaluation.json and predictions.parquet into its run.

    On the split that the run validated on, with its batch size and number of threads on CPU, top-1,
    top-5 and the mean negative log-likelihood are those that it recorded after the checkpoint's
    epoch, to the last bit. A run with folds is evaluated on its own fold.

    Args:
        run: A run folder, or a checkpoint folder inside one.
        cache: A cache with the run's fingerprint and classes; None: where the run's own lay. It may
            hold other images.
        from_images: Whether to read the images and encode them again instead of reading latents;
            models that read images always do.
        split: Name of the split.
        checkpoint: best, last, or a checkpoint folder or its name.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        batch_size: Images per batch; None: the run's.
        threads: Threads that read; None: one per core.
        source: Where the images are now; None: where they were when the cache was made.
        on_progress: Told how many of how many images are done.

    Returns:
        What evaluation.json holds.

    Raises:
        InputDataError: there is no run or checkpoint, no image in the split, or one has no label.
        FingerprintMismatchError: the cache has another fingerprint or other classes; names them.
        NotACacheError, IncompleteCacheError, ManifestError: the cache or run cannot be read.
        CheckpointError: the checkpoint is damaged or does not fit the model.
        SourceError: the images are not there any more.
        ShardError: the cache is damaged.
        UsageError: there is no such split or device.
        LockedError: another process evaluates this run.
        ResourceError: the results cannot be written.
    """
    opened = open_run(run, checkpoint=checkpoint)
    spec = opened.args.settings.spec
    data, is_own = _open_data(opened, cache)
    place = checked_device(device)
    chosen = _chosen_split(data, opened, split, is_own=is_own)
    raise_open_files()
    if place.type == "cpu":
        tune_allocator()
    with ExitStack() as stack:
        loader = _loader(
            opened, chosen, place, from_images=from_images, batch_size=batch_size,
            threads=threads, source=source,
        )  # fmt: skip
        stack.enter_context(loader)
        stack.enter_context(ieee_float32(place))
        rows = _Rows(len(chosen.valid_rows), on_progress)
        validation = validate(
            load_model(opened, place),
            loader,
            precision=spec.precision,
            should_stop=lambda: False,
            observe=rows.add,
        )
        assert validation is not None
        kind = "cache" if type(loader) is LatentLoader else "images"
    with (
        locked(opened.path / ".evaluate.lock", what="evaluate"),
        StagingArea(opened.path, name="evaluate") as staging,
    ):
        written = staging.put(PREDICTIONS, parquet_bytes(rows.table(_keys(chosen))))
        result = _evaluation(opened, rows, validation) | {
            "cache": str(cache or opened.args.cache),
            "split": split,
            "is_own_data": is_own,
            "source": kind,
            "device": str(place),
            "batch_size": loader.batch_size,
            "predictions": written,
        }
        if split != "val" or not is_own:
            result |= {"recorded_top1": None, "recorded_nll": None}
        evaluation = Evaluation(**result)
        staging.put_json(EVALUATION, evaluation.to_dict())
    return evaluation


def _open_data(run: RunFolder, cache: str | Path | None) -> tuple[Cache, bool]:
    """Opens the cache, and says whether it holds the run's own samples.

    Raises:
        FingerprintMismatchError: its fingerprint or classes are others.
    """
    settings = run.args.settings
    try:
        data = open_cache(cache or run.args.cache)
    except NotACacheError as error:
        if cache is not None:
            raise
        raise NotACacheError(
            f"the run's cache is not where it was: {error}", hint="say where it is: --cache DIR"
        ) from error
    lines = [
        f"  {name}: {ours!r} in the run, {theirs!r} in the cache"
        for name, ours, theirs in differing_fields(settings.fingerprint, data.fingerprint)
    ]
    if data.classes != run.file.classes:
        ours, theirs = set(run.file.classes), set(data.classes)
        lines.append(
            f"  classes: {len(run.file.classes)} in the run, {len(data.classes)} in the cache; "
            f"only in the run: {_few(ours - theirs)}; only in the cache: {_few(theirs - ours)}"
            + ("; in another order" if ours == theirs else "")
        )
    if lines:
        raise FingerprintMismatchError(
            f"{data.path} does not fit the run {run.path}:\n" + "\n".join(lines),
            hint="name a cache that was encoded with the run's options: --cache DIR",
        )
    return data, data_digest(data) == settings.data_sha256


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return (", ".join(shown) + (", ..." if len(names) > len(shown) else "")) or "none"


def _chosen_split(cache: Cache, run: RunFolder, name: str, *, is_own: bool) -> Split:
    """Returns the split, or the part of it that the run's fold is.

    Raises:
        UsageError: there is no such split.
        InputDataError: it holds no image, or one has no label.
    """
    spec = run.args.settings.spec
    found: Split | None = None
    if is_own and name in ("train", "val"):
        train, val = train_and_val(cache, spec, Ranks())
        found = train if name == "train" else val
    elif name in cache:
        found = cache[name]
    if found is None or not len(found.valid_rows):
        raise UsageError(
            f"{cache.path} has no image in split {name!r}; its splits are {list(cache.splits)}",
            hint="choose another: --split train",
        )
    labels = found.labels[found.valid_rows]
    unknown = int(((labels < 0) | (labels >= len(cache.classes))).sum())
    if unknown:
        raise InputDataError(
            f"{unknown} of {len(labels)} images of split {name!r} of {cache.path} have no label; "
            "evaluation needs them all",
            hint="`predict` takes pictures without labels",
        )
    return found


def _loader(
    run: RunFolder,
    split: Split,
    device: torch.device,
    *,
    from_images: bool,
    batch_size: int | None,
    threads: int | None,
    source: str | None,
) -> BatchLoader:
    """Returns what gives the model its batches, by row, the first view of each."""
    size = batch_size or run.args.settings.spec.batch_size
    if run.config.reads == "latents" and not from_images:
        if source is not None:
            raise UsageError(
                "`source` is given, but latents are read from the cache: --from-images"
            )
        return LatentLoader(
            split, batch_size=size, device=device, shuffle=False, views=0, threads=threads,
            recycle=True,
        )  # fmt: skip
    # Only here: they decode, and one of them encodes.
    if run.config.reads == "images":
        from ci2p_cache.loader.pixels import PixelLoader as Loader
    else:
        from ci2p_cache.loader.online import OnlineLoader as Loader  # type: ignore[assignment]
    return Loader(
        split, batch_size=size, device=device, shuffle=False, views=0, threads=threads,
        recycle=True, source=source,
    )  # fmt: skip


class _Rows:
    """One row per image, collected batch by batch.

    Args:
        total: Images that will come.
        on_progress: Told after each batch.
    """

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._parts: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, batch: Batch, logits_BK: Tensor) -> None:
        """Takes a batch and its logits."""
        labels_B = batch.labels
        # As training counts: the first of topk, not argmax, which may differ where two are equal.
        top_Bk = logits_BK.topk(min(_TOP, logits_BK.shape[1]), dim=1).indices
        shares_BK = logits_BK.softmax(dim=1)
        columns = {
            "row": batch.rows,
            "label": labels_B,
            "predicted": top_Bk[:, 0],
            "confidence": shares_BK.gather(1, top_Bk[:, :1])[:, 0],
            "loss": cross_entropy(logits_BK, labels_B, reduction="none"),
            "top5": top_Bk,
        }
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values.cpu().numpy().copy())
        self._done += len(labels_B)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Returns one column of all rows so far."""
        return np.concatenate(self._parts[name])

    def table(self, keys: dict[int, str]) -> pa.Table:
        """Returns the content of predictions.parquet."""
        label, predicted = self.column("label"), self.column("predicted")
        columns = {
            "row": self.column("row"),
            "key": [keys[row] for row in self.column("row").tolist()],
            "label": label,
            "predicted": predicted,
            "confidence": self.column("confidence"),
            "correct": label == predicted,
            "loss": self.column("loss"),
            "top5": list(self.column("top5")),
        }
        return pa.table(
            {
                name: pa.array(columns[name], type=_SCHEMA.field(name).type)
                for name in _SCHEMA.names
            },
            schema=_SCHEMA,
        )


def _keys(split: Split) -> dict[int, str]:
    """Returns the key of each valid row."""
    keys: dict[int, str] = {}
    wanted = set(split.valid_rows.tolist())
    for shard in np.unique(split.valid_rows // split.record.shard_rows).tolist():
        table = split.read_index(shard, ["row", "key"])
        pairs = zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True)
        keys |= {row: key for row, key in pairs if row in wanted}
    return keys


def _evaluation(run: RunFolder, rows: _Rows, validation: Validation) -> dict[str, Any]:
    """Returns the fields of an evaluation that follow from the run and its predictions."""
    spec, state = run.args.settings.spec, run.state
    label, predicted = rows.column("label"), rows.column("predicted")
    correct = label == predicted
    bins = calibration_bins(rows.column("confidence"), correct)
    low, high = bootstrap_interval(int(correct.sum()), len(label))
    ended = state.history[-1] if state.history and state.step == 0 else None
    return {
        "run": run.path.name,
        "model": run.config.name,
        "checkpoint": run.checkpoint.name,
        "epoch": state.epoch,
        "step": state.step,
        "folds": getattr(spec, "folds", 0),
        "fold": getattr(spec, "fold", 0),
        "samples": len(label),
        "top1": validation.top1,
        "top1_low": low,
        "top1_high": high,
        "top5": validation.top5,
        "nll": validation.loss,
        "ece": expected_calibration_error(bins),
        "bins": bins,
        "per_class": class_scores(label, predicted, run.file.classes),
        "confusion": confusion_triples(label, predicted),
        "recorded_top1": ended.top1 if ended else None,
        "recorded_nll": ended.val_loss if ended else None,
    }
