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

import torch

from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.staging import StagingArea, disk_errors, refuse_link
from ci2p_cache.errors import RefusedError, UsageError
from ci2p_cache.inference.evaluation import EVALUATIONS, Evaluation, evaluation_name
from ci2p_cache.inference.evaluation_data import chosen_split, open_data
from ci2p_cache.inference.prediction_rows import PredictionRows
from ci2p_cache.inference.run_folder import RunFolder, load_model, open_run
from ci2p_cache.inference.scores import (
    calibration_bins,
    class_scores,
    confusion_triples,
    expected_calibration_error,
)
from ci2p_cache.intervals import wilson_interval
from ci2p_cache.loader.batches import BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.machine import checked_device, ieee_float32, raise_open_files, tune_allocator
from ci2p_cache.outputs import check_folder, refuse_unwritable
from ci2p_cache.parquet import parquet_bytes
from ci2p_cache.training.metrics import Validation, validate

__all__ = ["evaluate"]


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
    out: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates a checkpoint, and writes the result and a row per image into its run.

    Each split and checkpoint has files of its own, see `inference.evaluation`; the same one
    evaluated again replaces them.

    On the split that the run validated on, with its batch size and number of threads on CPU, top-1,
    top-5 and the mean negative log-likelihood are those that it recorded after the checkpoint's
    epoch, to the last bit. A run with folds is evaluated on its own fold.

    Args:
        run: A run folder, or a checkpoint folder inside one.
        cache: A cache with the run's fingerprint and classes; None: that of the run. It may
            hold other images.
        from_images: Whether to read the images and encode them again instead of reading latents;
            models that read images always do.
        split: Name of the split.
        checkpoint: best, last, or a checkpoint folder or its name.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        batch_size: Images per batch; None: the run's.
        threads: Threads that read; None: one per core.
        source: Where the images are now; None: where they were when the cache was made.
        out: Folder for the two files instead of `evaluations` in the run, which is then only read.
            Files of the same name there are not replaced.
        on_progress: Called with how many of how many images are done.

    Returns:
        What the JSON file holds.

    Raises:
        InputDataError: there is no run or checkpoint, no image in the split, or one has no label.
        FingerprintMismatchError: the cache has another fingerprint or other classes; names them.
        NotACacheError, IncompleteCacheError, ManifestError: the cache or run cannot be read.
        CheckpointError: the checkpoint is damaged or does not fit the model.
        SourceError: the images are not there any more.
        ShardError: the cache is damaged.
        UsageError: there is no such split or device, or `out` is in a cache.
        RefusedError: `out` holds a file of that name already.
        LockedError: another process evaluates this run.
        ResourceError: the results cannot be written.
    """
    opened = open_run(run, checkpoint=checkpoint)
    spec = opened.args.settings.spec
    data, content = open_data(opened, cache)
    is_own = content is None
    place = checked_device(device)
    chosen = chosen_split(data, opened, split, is_own=is_own)
    name = evaluation_name(
        split,
        opened.checkpoint.name,
        cache_sha256=content,
        from_images=from_images and opened.config.reads == "latents",
    )
    folder = _folder(opened, out, name)
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
        rows = PredictionRows(len(chosen.valid_rows), on_progress)
        validation = validate(
            load_model(opened, place),
            loader,
            precision=spec.precision,
            should_stop=lambda: False,
            observe=rows.add,
        )
        assert validation is not None
        kind = "cache" if type(loader) is LatentLoader else "images"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder / ".evaluate.lock", what="evaluate"),
        StagingArea(folder, name="evaluate") as staging,
    ):
        written = staging.put(f"{name}.parquet", parquet_bytes(rows.table(chosen)))
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
        staging.put_json(f"{name}.json", evaluation.to_dict())
    return evaluation


def _folder(run: RunFolder, out: str | Path | None, name: str) -> Path:
    """Returns where the two files go; refuses a place that must not or cannot be written."""
    if out is None:
        folder = run.path / EVALUATIONS
        refuse_link(folder, run.path)
        refuse_unwritable(folder, what="evaluation")
        return folder
    folder = Path(out)
    check_folder(folder, what="evaluation")
    if folder.suffix in (".json", ".parquet"):
        raise UsageError(
            f"`out` is {folder}; wanted a folder, for a .json and a .parquet file",
            hint=f"--out {folder.with_suffix('')}",
        )
    for path in (folder / f"{name}.json", folder / f"{name}.parquet"):
        if path.exists() or path.is_symlink():
            raise RefusedError(
                f"{path} is there already; nothing was changed",
                hint="choose another --out folder, or remove the file first",
            )
    return folder


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


def _evaluation(run: RunFolder, rows: PredictionRows, validation: Validation) -> dict[str, Any]:
    """Returns the fields of an evaluation that follow from the run and its predictions."""
    spec, state = run.args.settings.spec, run.state
    label, predicted = rows.column("label"), rows.column("predicted")
    correct = label == predicted
    bins = calibration_bins(rows.column("confidence"), correct)
    low, high = wilson_interval(int(correct.sum()), len(label))
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
