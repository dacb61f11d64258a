"""`export_model`: a trained run as a file or folder for others, checked before it counts.

::

    model:  latents (B, M, h, w), or images (B, 3, size, size) ----------------------> logits (B, K)
    full:   images -> g_a -> stored as the cache did -> dequantised -> the model ----> logits (B, K)

    run --graph_of--> module --write_exported--> file --open_exported--> check_export --> in place

Two programs that add in another order differ in the last bits. That is nothing after a float, but
where y is rounded a value at a tie may fall to either side, and one other symbol changes logits by
far more. So the graph is checked on both sides of the rounding: stored values may differ at ties
only, and are counted; and the logits must be those that eager gives from the file's own stored
values.

Shape suffixes: B batch, M latent channels, h w latent rows and columns, K classes.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import torch
from torch import Tensor, fx, nn

from ci2p_cache import __version__
from ci2p_cache.cache.staging import disk_errors, remove_path
from ci2p_cache.errors import (
    ImageDecodeError,
    InputDataError,
    IntegrityError,
    MissingDependencyError,
    UsageError,
)
from ci2p_cache.inference.classifier import Classifier, find_pictures, load_classifier
from ci2p_cache.inference.run_folder import encoder_file
from ci2p_cache.inference.share import check_share, put_in_place, write_share
from ci2p_cache.outputs import check_output
from ci2p_cache.record import Record
from ci2p_cache.runs.files import EXPORT_FACTS

__all__ = [
    "ExportCheck",
    "ExportSummary",
    "Exported",
    "check_export",
    "export_model",
    "graph_of",
    "open_exported",
    "write_exported",
]

Format = Literal["onnx", "torch"]

_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "huggingface": ""}

_MAX_BATCH = 2**16

_TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit."""

_TIE = 1e-3
"""How near to halfway between two symbols a value has to be to fall to either side."""

_FLOAT_NOISE = 1e-5
"""How far y may be apart between two programs, as a share of its largest value."""

_CHECKED_BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportCheck(Record):
    """What was compared, and how far apart it was."""

    inputs: int
    """Images, or latents, that were run through both."""
    scale: float
    """Largest absolute logit that eager gave."""
    max_difference: float
    """Largest difference of a logit, given the same stored values; refused above 1e-4 of scale."""
    end_to_end_difference: float
    """Largest difference of a logit from input to output, ties included."""
    stored_values: int
    """Symbols, or float16 values, that were compared; 0 where nothing is rounded on the way."""
    differing_values: int
    """Values among them that fell on the other side of a tie."""
    differing_inputs: int
    """Inputs in which that happened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary(Record):
    """What was exported, and how it was checked."""

    path: str
    """The file or folder."""
    format: Literal["onnx", "torch", "huggingface"]
    """onnx, torch for a `.pt2` that `torch.export.load` reads, huggingface for a folder."""
    what: Literal["full", "model"]
    """full: from images. model: from what the model reads."""
    bytes: int
    """Size of the file, or of all files."""
    input_shape: tuple[int, ...]
    """Shape of one input; the batch may be of any size."""
    checkpoint: str
    """The checkpoint folder."""
    check: ExportCheck
    """How far apart what was written and eager are."""


def export_model(
    run: str | Path,
    out: str | Path,
    *,
    to: Literal["onnx", "torch", "huggingface"] = "onnx",
    what: Literal["full", "model"] = "full",
    checkpoint: str | Path = "last",
    cache: str | Path | None = None,
    images: Iterable[str | os.PathLike[str]] | None = None,
    count: int = 16,
    overwrite: bool = False,
    model: str | Path | None = None,
) -> ExportSummary:
    """Exports a trained model, with its encoder, and holds what it wrote against eager.

    A file computes in float32, whatever the run was trained in. It is run in onnxruntime or torch
    on the CPU before it is renamed into place, see `check_export`. A folder to share is one that
    `load_classifier`, `evaluate` and `TrainSpec.init_from` take in the place of the run.

    Args:
        run: A run folder, or a checkpoint folder inside one.
        out: The file, .onnx or .pt2, or the folder; folders above it are made.
        to: onnx, torch for a `.pt2` of `torch.export.save`, or huggingface for a folder with
            `config.json`, `model.safetensors` and a model card.
        what: full: images float32 (B, 3, size, size) in [0, 1] to logits. model: dequantised
            latents (B, M, h, w) to logits; of models that read images both are the same. A folder
            is always full.
        checkpoint: last, best, or a checkpoint folder or its name.
        cache: Where to take the encoder from instead of the run folder.
        images: Pictures to check with, as `predict` takes them; None: random inputs.
        count: Number of inputs to check with; of pictures the first ones.
        overwrite: Whether a file at `out` is replaced, as a whole; of a folder, an earlier export.
        model: The file of the run's own model, `FILE.py`, if it has one; its code runs.

    Raises:
        UsageError: an argument cannot be used, or the encoder computes in bfloat16.
        RefusedError: `out` is there already, or the run has a model of its own and no file is
            named.
        RunMismatchError: that file has changed since the run was started.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        InputDataError: there is no run, checkpoint or encoder, or a picture cannot be read.
        ManifestError, CheckpointError, DigestError: something of the run is damaged; names it.
        IntegrityError: the file does not give what eager gives; it was not written.
        ResourceError: the file cannot be written.
    """
    out = Path(out)
    if to not in _SUFFIXES or what not in ("full", "model") or count < 1:
        raise UsageError(
            f"`to` is {to!r}, `what` {what!r}, `count` {count}; wanted onnx, torch or huggingface, "
            "full or model, and at least 1"
        )
    if to == "huggingface" and what != "full":
        raise UsageError("`what` is model; a huggingface folder holds the encoder too: full")
    other = next((kind for kind, end in _SUFFIXES.items() if end == out.suffix.lower()), to)
    if other != to and other != "huggingface":
        raise UsageError(
            f"{out} is named as an export to {other}, and the format is {to}",
            hint=f"repeat the command with --format {other}, or give the file another suffix",
        )
    if to == "huggingface":
        check_share(out, overwrite=overwrite)
    else:
        check_output(out, what=f"{to} export", suffixes=(_SUFFIXES[to],), overwrite=overwrite)
    classifier = load_classifier(run, checkpoint=checkpoint, cache=cache, device="cpu", model=model)
    is_full = what == "full"
    graph = None if to == "huggingface" else graph_of(classifier, what)
    inputs = _inputs(classifier, images, count, is_full=is_full)
    staged = out.with_name(f".{out.stem}.{uuid4().hex[:8]}{_SUFFIXES[to]}")
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            opened: Exported
            if to == "huggingface" or graph is None:
                encoder = (
                    None if classifier.reads == "images" else encoder_file(classifier.run, cache)
                )
                write_share(classifier, encoder, staged)
                opened = _Shared(load_classifier(staged, device="cpu", model=model))
            else:
                # A .pt2 stores it, and no picture of the user may leave with the model.
                example = torch.zeros((2, *inputs.shape[1:]))
                write_exported(graph, example, staged, to, _metadata(classifier, what))
                opened = open_exported(staged, to)
            check = check_export(opened, classifier, inputs, is_full=is_full)
            files = [staged] if staged.is_file() else list(staged.iterdir())
            size = sum(each.stat().st_size for each in files)
            put_in_place(staged, out)
    finally:
        remove_path(staged)
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
        "checkpoint": run.state.name,
        "input": about[reads],
        "input_size": str(image.size),
        "resize": f"shorter side to {image.resize_side}, {image.interpolation}, antialiased on "
        f"uint8; then the centre square of {image.size}",
        "output": "logits: float32 (batch, classes)",
        "classes": json.dumps(list(classifier.classes), ensure_ascii=False),
        "class_titles": json.dumps(list(classifier.class_titles), ensure_ascii=False),
        "fingerprint": classifier.fingerprint.digest,
    }


class FullGraph(nn.Module):
    """Images (B, 3, size, size) in [0, 1] to logits, the arithmetic of `Classifier` in floats.

    Symbols are whole numbers in float32, exact up to 2**24; the stored dtypes end at 32,767.
    """

    offset: Tensor

    def __init__(self, classifier: Classifier, g_a: nn.Module) -> None:
        super().__init__()
        self.g_a = g_a
        self.model = copy.deepcopy(classifier.model)
        file, latent = classifier.run.file, classifier.fingerprint.latent
        self.register_buffer("offset", torch.tensor(file.offset)[:, None, None])
        self._step = file.scale
        self._limit = latent.symbol_limit if latent.is_symbols else None
        self._is_half = latent.dtype == "float16"

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        y_BMhw = self.g_a(images)
        if self._limit is not None:
            symbols_BMhw = torch.round((y_BMhw - self.offset) / self._step)
            stored_BMhw = symbols_BMhw.clamp(-self._limit, self._limit)
            y_BMhw = stored_BMhw * self._step + self.offset
        elif self._is_half:
            y_BMhw = y_BMhw.to(torch.float16).to(torch.float32)
        logits_BK: Tensor = self.model(y_BMhw)
        return logits_BK


class ModelGraph(nn.Module):
    """What the model reads, to logits."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.model = copy.deepcopy(classifier.model)

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns logits (B, K)."""
        logits_BK: Tensor = self.model(inputs)
        return logits_BK


def graph_of(classifier: Classifier, what: Literal["full", "model"]) -> nn.Module:
    """Returns the module that is exported: from images, or from what the model reads, to logits.

    Raises:
        UsageError: the encoder computes in bfloat16.
        InputDataError, DigestError: the run's encoder is not there or another.
    """
    if what == "model" or classifier.reads == "images":
        return ModelGraph(classifier).eval()
    from ci2p_cache.encoder.frozen import analysis_transform

    return FullGraph(classifier, analysis_transform(classifier.encoder)).eval()


class Exported(Protocol):
    """An exported file, opened for running on the CPU."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Returns the logits (B, K) of a batch."""

    def stored(self, inputs: Tensor) -> Tensor | None:
        """Returns the rounded values (B, M, h, w) on the way; None where nothing is rounded."""


def write_exported(
    graph: nn.Module, example: Tensor, path: Path, to: Format, metadata: Mapping[str, str]
) -> None:
    """Exports a module, in eval mode on the CPU, for batches of any size; `example` has two inputs.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    if to == "onnx":
        _require_onnx()
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    # torch's exporters give warnings that our users cannot act on.
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
        if to == "torch":
            extra = {EXPORT_FACTS: json.dumps(dict(metadata))}
            torch.export.save(program, path, extra_files=extra)
            return
        name = next(spec.arg.name for spec in program.graph_signature.input_specs
                    if spec.kind.name == "USER_INPUT")  # fmt: skip
        onnx = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=[name], output_names=["logits"]
        )
        assert onnx is not None
        # The free dimension of input and output is called what it is.
        model: Any = onnx.model
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])
        onnx.model.metadata_props.update(metadata)
        onnx.save(path, external_data=False)


def open_exported(path: Path, to: Format) -> Exported:
    """Opens an exported file as others will: ONNX in onnxruntime, `.pt2` in torch.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    if to == "onnx":
        _require_onnx()
        return _Onnx(path)
    return _Program(path)


class _Onnx:
    """An ONNX file in onnxruntime, as it is; and once more with its rounded values as an output."""

    def __init__(self, path: Path) -> None:
        import onnx

        self._session = _session(path.read_bytes())
        self._input = self._session.get_inputs()[0].name
        model = onnx.load(path)
        half = onnx.TensorProto.FLOAT16
        rounded = [
            (node.output[0], half if node.op_type == "Cast" else onnx.TensorProto.FLOAT)
            for node in model.graph.node
            if node.op_type == "Round"
            or (node.op_type == "Cast" and any(a.i == half for a in node.attribute))
        ]
        self._tapped: Any = None
        if len(rounded) == 1:
            output = onnx.helper.make_tensor_value_info(*rounded[0], None)
            model.graph.output.append(output)
            self._tapped = _session(model.SerializeToString())
            self._name = rounded[0][0]

    def logits(self, inputs: Tensor) -> Tensor:
        return self._run(self._session, "logits", inputs)

    def stored(self, inputs: Tensor) -> Tensor | None:
        return None if self._tapped is None else self._run(self._tapped, self._name, inputs)

    def _run(self, session: Any, output: str, inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run([output], {self._input: inputs.numpy()})[0])


class _Shared:
    """A folder to share, opened as a run."""

    def __init__(self, classifier: Classifier) -> None:
        self.logits = classifier.__call__
        self._classifier = classifier

    def stored(self, inputs: Tensor) -> Tensor | None:
        return self._classifier.stored(self._classifier.latents(inputs))


class _Program:
    """A `.pt2` in torch."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings(action="ignore"):
            self._module = torch.export.load(path).module()

    def logits(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self._module(inputs)
        return found

    def stored(self, inputs: Tensor) -> Tensor | None:
        tap = _Tap(self._module)
        with torch.no_grad():
            tap.run(inputs)
        return tap.rounded


class _Tap(fx.Interpreter):
    """Runs a program and keeps what it rounds, to whole numbers or to float16."""

    rounded: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operation."""
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            rounds = n.target is torch.ops.aten.round.default
            if rounds or value.dtype == torch.float16:
                self.rounded = value
        return value


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting to ONNX needs {error.name}, which is not installed",
            hint="pip install 'ci2p-cache[export]'",
        ) from error


def check_export(
    file: Exported, classifier: Classifier, inputs: Tensor, *, is_full: bool
) -> ExportCheck:
    """Runs an exported file and eager over the same inputs, what the file reads, (N, ...).

    Raises:
        IntegrityError: they differ by more than rounding explains; says where.
    """
    is_full = is_full and classifier.reads == "latents"
    scale, gaps, end_to_end_gaps = 0.0, [0.0], [0.0]
    stored_values = differing = differing_inputs = 0
    # A single input first: the batch may be of any size.
    for part in (inputs[:1], *torch.split(inputs[1:], _CHECKED_BATCH)):
        if not len(part):
            continue
        found_BK, read = file.logits(part), part
        if is_full:
            y_BMhw = classifier.latents(part)
            wanted_BMhw = classifier.stored(y_BMhw)
            found_BMhw = file.stored(part)
            read = classifier.dequantise(wanted_BMhw)
            if found_BMhw is not None:
                differs_BMhw = _differing(classifier, y_BMhw, wanted_BMhw, found_BMhw)
                stored_values += differs_BMhw.numel()
                differing += int(differs_BMhw.sum())
                differing_inputs += int(differs_BMhw.flatten(1).any(dim=1).sum())
        eager_BK = classifier.logits(read)
        scale = max(scale, float(eager_BK.abs().max()))
        end_to_end_gaps.append(float((found_BK - eager_BK).abs().max()))
        if is_full and found_BMhw is not None:
            limit = classifier.fingerprint.latent
            if limit.is_symbols:
                found_BMhw = found_BMhw.clamp(-limit.symbol_limit, limit.symbol_limit)
            eager_BK = classifier.logits(classifier.dequantise(found_BMhw))
        gaps.append(float((found_BK - eager_BK).abs().max()))
    # torch's max, unlike Python's, is not a number where one of them is not; neither passes `<=`.
    difference, end_to_end = (float(torch.tensor(each).max()) for each in (gaps, end_to_end_gaps))
    if not difference <= _TOLERANCE * scale:
        raise IntegrityError(
            f"the exported graph gives other logits than eager: they differ by {difference:.3g}, "
            f"{_TOLERANCE:g} of the largest logit {scale:.3g} is allowed; the file was not written",
            hint="report it, with the versions of torch, onnx and onnxruntime; "
            "--format torch may do",
        )
    return ExportCheck(
        inputs=len(inputs),
        scale=scale,
        max_difference=difference,
        end_to_end_difference=end_to_end,
        stored_values=stored_values,
        differing_values=differing,
        differing_inputs=differing_inputs,
    )


def _differing(
    classifier: Classifier, y_BMhw: Tensor, wanted_BMhw: Tensor, found_BMhw: Tensor
) -> Tensor:
    """Returns where stored values differ, bool (B, M, h, w).

    Raises:
        IntegrityError: one differs that is not at a tie, or by more than one step.
    """
    latent = classifier.fingerprint.latent
    if latent.is_symbols:
        found_BMhw = found_BMhw.clamp(-latent.symbol_limit, latent.symbol_limit)
        offset_M11 = torch.tensor(classifier.run.file.offset)[:, None, None]
        scaled = (y_BMhw - offset_M11) / classifier.run.file.scale
        from_tie = (scaled - scaled.floor() - 0.5).abs()
        step = torch.ones_like(y_BMhw)
    else:
        # Neighbours in float16 are at most 2**-10 of the value apart; among the smallest values
        # that is less than what y itself differs by.
        from_tie = torch.zeros_like(y_BMhw)
        step = wanted_BMhw.float().abs() * 2**-10 + _FLOAT_NOISE * float(y_BMhw.abs().max())
    gap = (found_BMhw.float() - wanted_BMhw.float()).abs()
    differs = gap > 0
    wrong = differs & ((from_tie > _TIE) | (gap > step))
    if bool(wrong.any()):
        raise IntegrityError(
            f"the exported graph stores other values than the cache does: {int(wrong.sum())} of "
            f"{wrong.numel()} differ that are at no tie; the file was not written",
            hint="report it, with the versions of torch, onnx and onnxruntime",
        )
    return differs
