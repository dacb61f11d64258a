"""`export_model`: a trained run as one file for other programs, checked before it counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

import torch
from torch import Tensor

from ci2p_cache import __version__
from ci2p_cache.cache.staging import disk_errors, sync_folder
from ci2p_cache.errors import ImageDecodeError, InputDataError, UsageError
from ci2p_cache.inference.classifier import Classifier, load_classifier
from ci2p_cache.inference.export_check import ExportCheck, check_export
from ci2p_cache.inference.exported import open_exported, write_exported
from ci2p_cache.inference.graph import full_graph, model_graph
from ci2p_cache.inference.pictures import find_pictures
from ci2p_cache.outputs import check_output
from ci2p_cache.record import Record

__all__ = ["ExportSummary", "export_model"]

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary(Record):
    """What was exported, and how it was checked."""

    path: str
    """The file."""
    format: Literal["onnx", "torch"]
    """onnx, or torch for a `.pt2` that `torch.export.load` reads."""
    what: Literal["full", "model"]
    """full: from images. model: from what the model reads."""
    bytes: int
    """Size of the file."""
    input_shape: tuple[int, ...]
    """Shape of one input; the batch may be of any size."""
    checkpoint: str
    """The checkpoint folder."""
    check: ExportCheck
    """How far apart the file and eager are."""


def export_model(
    run: str | Path,
    out: str | Path,
    *,
    to: Literal["onnx", "torch"] = "onnx",
    what: Literal["full", "model"] = "full",
    checkpoint: str | Path = "best",
    cache: str | Path | None = None,
    images: Iterable[str | os.PathLike[str]] | None = None,
    count: int = 16,
    overwrite: bool = False,
) -> ExportSummary:
    """Exports a trained model, with its encoder, to one file, and holds the file against eager.

    The file computes in float32, whatever the run was trained in. It is run in onnxruntime or torch
    on the CPU before it is renamed into place, see `export_check`.

    Args:
        run: A run folder, or a checkpoint folder inside one.
        out: The file, .onnx or .pt2; folders above it are made.
        to: onnx, or torch for a `.pt2` of `torch.export.save`.
        what: full: images float32 (B, 3, size, size) in [0, 1] to logits. model: dequantised
            latents (B, M, h, w) to logits; of models that read images both are the same.
        checkpoint: best, last, or a checkpoint folder or its name.
        cache: Where to take the encoder from instead of the run folder.
        images: Pictures to check with, as `predict` takes them; None: random inputs.
        count: Number of inputs to check with; of pictures the first ones.
        overwrite: Whether a file at `out` is replaced, as a whole.

    Raises:
        UsageError: an argument cannot be used, or the encoder computes in bfloat16.
        RefusedError: `out` is there already.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        InputDataError: there is no run, checkpoint or encoder, or a picture cannot be read.
        ManifestError, CheckpointError, DigestError: something of the run is damaged; names it.
        IntegrityError: the file does not give what eager gives; it was not written.
        ResourceError: the file cannot be written.
    """
    out = Path(out)
    if to not in ("onnx", "torch") or what not in ("full", "model") or count < 1:
        raise UsageError(
            f"`to` is {to!r}, `what` {what!r}, `count` {count}; wanted onnx or torch, full or "
            "model, and at least 1"
        )
    other = next((kind for kind, end in _SUFFIXES.items() if end == out.suffix.lower()), to)
    if other != to:
        raise UsageError(
            f"{out} is named as an export --to {other}, and --to is {to}", hint=f"--to {other}"
        )
    check_output(out, what=f"{to} export", suffixes=(_SUFFIXES[to],), overwrite=overwrite)
    classifier = load_classifier(run, checkpoint=checkpoint, cache=cache, device="cpu")
    is_full = what == "full"
    graph = full_graph(classifier) if is_full else model_graph(classifier)
    inputs = _inputs(classifier, images, count, is_full=is_full)
    staged = out.with_name(f".{out.stem}.{uuid4().hex[:8]}{_SUFFIXES[to]}")
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            # A .pt2 keeps it: no picture of the user's goes out with the model.
            example = torch.zeros((2, *inputs.shape[1:]))
            write_exported(graph, example, staged, to, _metadata(classifier, what))
            check = check_export(open_exported(staged, to), classifier, inputs, is_full=is_full)
            size = staged.stat().st_size
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(out)
            sync_folder(out.parent)
    finally:
        staged.unlink(missing_ok=True)
    return ExportSummary(
        path=str(out),
        format=to,
        what=what,
        bytes=size,
        input_shape=tuple(inputs.shape[1:]),
        checkpoint=str(classifier.run.checkpoint),
        check=check,
    )


def _inputs(
    classifier: Classifier,
    names: Iterable[str | os.PathLike[str]] | None,
    count: int,
    *,
    is_full: bool,
) -> Tensor:
    """Returns what the check runs, float32 (N, ...), N at most `count`."""
    size, latent = classifier.fingerprint.image.size, classifier.fingerprint.latent
    generator = torch.Generator().manual_seed(0)
    reads_images = is_full or classifier.reads == "images"
    if names is None and not reads_images:
        shape = (count, *latent.shape)
        if not latent.is_symbols:
            return torch.randn(shape, generator=generator)
        symbols = torch.randint(-3, 4, shape, generator=generator)
        return classifier.dequantise(symbols)
    if names is None:
        return torch.rand((count, 3, size, size), generator=generator)
    views = []
    for path, reason in find_pictures(names)[:count]:
        try:
            if reason is not None:
                raise ImageDecodeError(reason)  # noqa: TRY301
            views.append(classifier.read(path))
        except ImageDecodeError as error:
            raise InputDataError(f"{path} cannot be read: {error}") from error
    images_B3HW = classifier.checked(torch.stack(views))
    return images_B3HW if reads_images else classifier.inputs(images_B3HW)


def _metadata(classifier: Classifier, what: str) -> dict[str, str]:
    """Returns what a program that runs the file has to know, as strings."""
    run, image = classifier.run, classifier.fingerprint.image
    reads = "images" if what == "full" else classifier.reads
    about = {
        "images": f"images: float32 (batch, 3, {image.size}, {image.size}), RGB in [0, 1]",
        "latents": "inputs: float32 (batch, M, h, w), dequantised latents",
    }
    return {
        "software": f"ci2p-cache {__version__}",
        "model": run.config.name,
        "run": run.path.name,
        "checkpoint": run.checkpoint.name,
        "input": about[reads],
        "input_size": str(image.size),
        "resize": f"shorter side to {image.resize_side}, {image.interpolation}, antialiased on "
        f"uint8; then the centre square of {image.size}",
        "output": "logits: float32 (batch, classes)",
        "classes": json.dumps(list(classifier.classes), ensure_ascii=False),
        "class_titles": json.dumps(list(classifier.class_titles), ensure_ascii=False),
        "fingerprint": classifier.fingerprint.digest,
    }
