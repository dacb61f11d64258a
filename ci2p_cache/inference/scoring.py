"""`evaluate`: a checkpoint over a split, exactly as training validated it, image by image.

::

    cache (or its images) -> the loader that training validates with -> model -> sums as training's
                                                                           |-> one row per image

Shape suffixes: B batch, K classes, k the first few of them.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.split import Split
from ci2p_cache.cache.staging import StagingArea, disk_errors, refuse_link
from ci2p_cache.cache.store import Cache, open_cache
from ci2p_cache.errors import (
    CacheError,
    FingerprintMismatchError,
    InputDataError,
    NotACacheError,
    RefusedError,
    UsageError,
)
from ci2p_cache.inference.run_folder import load_model, open_model
from ci2p_cache.loader.batches import Batch, BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.machine import checked_device, ieee_float32
from ci2p_cache.outputs import check_folder, refuse_unwritable
from ci2p_cache.record import differing_fields
from ci2p_cache.runs.evaluations import (
    EVALUATIONS,
    CalibrationBin,
    ClassScore,
    Evaluation,
    evaluation_name,
    prediction_bytes,
)
from ci2p_cache.runs.statistics import wilson_interval
from ci2p_cache.training.inputs import data_digest, train_and_val
from ci2p_cache.training.metrics import Validation, validate
from ci2p_cache.training.opened import RunFolder
from ci2p_cache.training.ranks import Ranks

__all__ = [
    "calibration_bins",
    "confusion_triples",
    "evaluate",
    "expected_calibration_error",
    "keys_of",
]

_NUM_BINS = 15
"""As in Guo et al. 2017."""

_MAX_TRIPLES = 100_000
"""What keeps an evaluation below the size that is read again."""

_TOP = 5

_STATISTICS = "stats/channels.parquet"
"""Follows from the latents alone, not from how they are stored."""

_Array = npt.NDArray[np.generic]


def evaluate(
    run: str | Path,
    *,
    cache: str | Path | None = None,
    from_images: bool = False,
    split: str = "val",
    checkpoint: str | Path = "last",
    device: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    source: str | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    model: str | Path | None = None,
) -> Evaluation:
    """Evaluates a checkpoint, and writes the result and a row per image into its run.

    Each split and checkpoint has its own files, see `runs.evaluations`; the same one
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
        checkpoint: last, best, or a checkpoint folder or its name.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        batch_size: Images per batch; None: the run's.
        threads: Threads that read; None: one per core.
        source: Where the images are now; None: where they were when the cache was made.
        out: Folder for the two files instead of `evaluations` in the run, which is then only read.
            Files of the same name there are not replaced.
        on_progress: Called with how many of how many images are done.
        model: The file of the run's own model, `FILE.py`, if it has one; its code runs.

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
        RefusedError: `out` holds a file of that name already, or the run has a model of its own
            and no file is named.
        RunMismatchError: that file has changed since the run was started.
        LockedError: another process evaluates this run.
        ResourceError: the results cannot be written.
    """
    opened = open_model(run, checkpoint=checkpoint, named=model)
    spec = opened.args.settings.spec
    data, content = _open_data(opened, cache)
    is_own = content is None
    target = checked_device(device)
    chosen = _chosen_split(data, opened, split, is_own=is_own)
    name = evaluation_name(
        split,
        opened.state.name,
        cache_sha256=content,
        from_images=from_images and opened.config.reads == "latents",
    )
    folder = _folder(opened, out, name)
    with ExitStack() as stack:
        loader = _loader(
            opened, chosen, target, from_images=from_images, batch_size=batch_size,
            threads=threads, source=source,
        )  # fmt: skip
        stack.enter_context(loader)
        stack.enter_context(ieee_float32(target))
        rows = _Rows(len(chosen.valid_rows), on_progress)
        validation = validate(
            load_model(opened, target),
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
        keys, columns = keys_of(chosen), rows.columns()
        columns["key"] = [keys[row] for row in columns["row"].tolist()]
        columns["correct"] = columns["label"] == columns["predicted"]
        columns["top5"] = list(columns["top5"])
        written = staging.put(f"{name}.parquet", prediction_bytes(columns))
        result = _evaluation(opened, columns, validation) | {
            "cache": str(cache or opened.args.cache),
            "split": split,
            "is_own_data": is_own,
            "source": kind,
            "device": str(target),
            "batch_size": loader.batch_size,
            "predictions": written,
        }
        if split != "val" or not is_own:
            result |= {"recorded_top1": None, "recorded_nll": None}
        evaluation = Evaluation(**result)
        staging.put_json(f"{name}.json", evaluation.to_dict())
    return evaluation


def _folder(run: RunFolder, out: str | Path | None, name: str) -> Path:
    """Returns where the two files go; refuses what must not or cannot be written."""
    if out is None and run.shared is not None:
        raise UsageError(
            f"{run.path} is a folder to share; no evaluation is written into it",
            hint="say where to write the two files: --out DIR",
        )
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
            hint=f"repeat the command with --out {shlex.quote(str(folder.with_suffix('')))}",
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
    options: dict[str, Any] = {
        "batch_size": batch_size or run.args.settings.spec.batch_size, "device": device,
        "shuffle": False, "views": 0, "threads": threads, "recycle": True,
    }  # fmt: skip
    if run.config.reads == "latents" and not from_images:
        if source is not None:
            raise UsageError(
                "`source` is given, but latents are read from the cache: --from-images"
            )
        return LatentLoader(split, **options)
    # Only here: they decode, and one of them encodes.
    if run.config.reads == "images":
        from ci2p_cache.loader.pixels import PixelLoader as Loader
    else:
        from ci2p_cache.loader.pixels import OnlineLoader as Loader  # type: ignore[assignment]
    return Loader(split, source=source, **options)


def _evaluation(run: RunFolder, columns: dict[str, Any], validation: Validation) -> dict[str, Any]:
    """Returns the fields of an evaluation that follow from the run and its predictions."""
    spec, state = run.args.settings.spec, run.state
    label, predicted, correct = (columns[name] for name in ("label", "predicted", "correct"))
    bins = calibration_bins(columns["confidence"], correct)
    low, high = wilson_interval(int(correct.sum()), len(label))
    ended = state.history[-1] if state.history and state.step == 0 else None
    classes = run.file.classes
    samples = np.bincount(label, minlength=len(classes)).tolist()
    right = np.bincount(label[correct], minlength=len(classes)).tolist()
    return {
        "run": run.path.name,
        "model": run.config.name,
        "checkpoint": run.state.name,
        "epoch": state.epoch,
        "step": state.step,
        "folds": spec.folds,
        "fold": spec.fold,
        "samples": len(label),
        "top1": validation.top1,
        "top1_low": low,
        "top1_high": high,
        "top5": validation.top5,
        "nll": validation.loss,
        "ece": expected_calibration_error(bins),
        "bins": bins,
        "per_class": tuple(
            ClassScore(label=number, name=name, samples=samples[number], correct=right[number])
            for number, name in enumerate(classes)
        ),
        "confusion": confusion_triples(label, predicted),
        "recorded_top1": ended.val_top1 if ended else None,
        "recorded_nll": ended.val_loss if ended else None,
    }


class _Rows:
    """What a model says of each image, collected batch by batch; it reports progress after each."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._parts: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, batch: Batch, logits_BK: Tensor) -> None:
        """Takes a batch and its logits, float32 (B, K); keeps neither."""
        labels_B = batch.labels
        # As training counts: the first of topk, not argmax, which may differ where two are equal.
        top_Bk = logits_BK.topk(min(_TOP, logits_BK.shape[1]), dim=1).indices
        columns = {
            "row": batch.rows,
            "label": labels_B,
            "predicted": top_Bk[:, 0],
            "confidence": logits_BK.softmax(dim=1).gather(1, top_Bk[:, :1])[:, 0],
            "loss": cross_entropy(logits_BK, labels_B, reduction="none"),
            "top5": top_Bk,
        }
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values.cpu().numpy().copy())
        self._done += len(labels_B)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def columns(self) -> dict[str, Any]:
        """Returns the columns of all rows, each (N, ...), in the order in which they came."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


def keys_of(split: Split) -> dict[int, str]:
    """Returns the key of each valid row of a split.

    Raises:
        ShardError: a part of the index is damaged.
    """
    keys: dict[int, str] = {}
    wanted = set(split.valid_rows.tolist())
    for shard in np.unique(split.valid_rows // split.record.shard_rows).tolist():
        table = split.read_index(shard, ["row", "key"])
        pairs = zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True)
        keys |= {row: key for row, key in pairs if row in wanted}
    return keys


def _open_data(run: RunFolder, cache: str | Path | None) -> tuple[Cache, str | None]:
    """Opens the cache; returns it, and a sha256 over what it holds, None for the run's own samples.

    Other images may have the same names and labels: a data set and its corrupted versions do. Where
    the run's cache is still where it was, their latents differ.
    """
    settings = run.args.settings
    if cache is None and run.shared is not None:
        raise UsageError(f"{run.path} does not say where its cache is: --cache DIR")
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
    if _is_own(run, data, is_named=cache is not None):
        return data, None
    content = f"{data_digest(data)} {_statistics(data)}"
    return data, hashlib.sha256(content.encode()).hexdigest()


def _is_own(run: RunFolder, data: Cache, *, is_named: bool) -> bool:
    """Says whether a cache holds the run's own samples; `is_named`: it may be elsewhere."""
    wanted = run.args.settings.data_sha256
    if data_digest(data) != wanted or not is_named:
        return data_digest(data) == wanted
    try:
        own = open_cache(run.args.cache)
    except CacheError:
        # It has moved, to where `data` was found for all that is known.
        return True
    return data_digest(own) != wanted or _statistics(own) == _statistics(data)


def _statistics(cache: Cache) -> str | None:
    """Returns the sha256 of a cache's statistics; None where it has none."""
    return next((each.sha256 for each in cache.manifest.files if each.path == _STATISTICS), None)


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return (", ".join(shown) + (", ..." if len(names) > len(shown) else "")) or "none"


def _chosen_split(cache: Cache, run: RunFolder, name: str, *, is_own: bool) -> Split:
    """Returns the split, or the part that the run's fold is; all its images have labels."""
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


def calibration_bins(confidence: _Array, correct: _Array) -> tuple[CalibrationBin, ...]:
    """Sorts images by the confidence of their predicted class into fifteen bins of equal width.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 2: bin m
    of M holds (m - 1) / M < confidence <= m / M.
    """
    edges = np.arange(_NUM_BINS + 1) / _NUM_BINS
    numbers = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, _NUM_BINS - 1)
    samples = np.bincount(numbers, minlength=_NUM_BINS)
    sums = [np.bincount(numbers, np.asarray(values, np.float64), _NUM_BINS)
            for values in (confidence, correct)]  # fmt: skip
    return tuple(
        CalibrationBin(
            low=float(edges[m]),
            high=float(edges[m + 1]),
            samples=int(samples[m]),
            confidence=float(sums[0][m] / samples[m]) if samples[m] else None,
            accuracy=float(sums[1][m] / samples[m]) if samples[m] else None,
        )
        for m in range(_NUM_BINS)
    )


def expected_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Returns the mean of |accuracy - confidence| over the bins, weighted by their images."""
    total = sum(each.samples for each in bins)
    gaps = (
        each.samples * abs(each.accuracy - each.confidence)
        for each in bins
        if each.accuracy is not None and each.confidence is not None
    )
    return float(sum(gaps) / total)


def confusion_triples(labels: _Array, predicted: _Array) -> tuple[tuple[int, ...], ...]:
    """Returns (label, predicted label, count) of the pairs that occur, sorted.

    Of more than 100,000 pairs it returns the most frequent.
    """
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    chosen = np.sort(np.argsort(-counts, kind="stable")[:_MAX_TRIPLES])
    return tuple((int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in chosen)
