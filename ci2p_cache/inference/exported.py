"""Exported files: written by torch's exporters, and run again by what others will run them with.

Both kinds answer the same two questions: what are the logits, and what was stored on the way, where
the graph rounds. `export_check.py` asks them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx, nn

from ci2p_cache.errors import MissingDependencyError

__all__ = ["EXTRA_FILE", "Exported", "open_exported", "write_exported"]

Format = Literal["onnx", "torch"]

EXTRA_FILE = "ci2p_cache.json"
"""Where a `.pt2` keeps what ONNX has as `metadata_props`."""

_MAX_BATCH = 2**16


class Exported(Protocol):
    """An exported file, opened for running on the CPU."""

    def logits(self, inputs: Tensor) -> Tensor:
        """Returns the logits (B, K) of a batch."""

    def stored(self, inputs: Tensor) -> Tensor | None:
        """Returns the rounded values (B, M, h, w) on the way; None where nothing is rounded."""


def write_exported(
    graph: nn.Module, example: Tensor, path: Path, to: Format, metadata: Mapping[str, str]
) -> None:
    """Exports a module with a batch of any size.

    Args:
        graph: In eval mode, on the CPU.
        example: A batch of at least two inputs.
        path: The file to write; whole only when this returns.
        to: onnx, or torch for a `.pt2` of `torch.export.save`.
        metadata: Goes into the file.

    Raises:
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    if to == "onnx":
        _require_onnx()
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    with _quiet(), torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
        if to == "torch":
            extra = {EXTRA_FILE: json.dumps(dict(metadata))}
            torch.export.save(program, path, extra_files=extra)
            return
        name = next(spec.arg.name for spec in program.graph_signature.input_specs
                    if spec.kind.name == "USER_INPUT")  # fmt: skip
        onnx = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=[name], output_names=["logits"]
        )
        assert onnx is not None
        _name_batch(onnx.model)
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
        found = self._session.run(["logits"], {self._input: inputs.numpy()})
        return torch.from_numpy(found[0])

    def stored(self, inputs: Tensor) -> Tensor | None:
        if self._tapped is None:
            return None
        found = self._tapped.run([self._name], {self._input: inputs.numpy()})
        return torch.from_numpy(found[0])


class _Program:
    """A `.pt2` in torch."""

    def __init__(self, path: Path) -> None:
        with _quiet():
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


def _name_batch(model: Any) -> None:
    """Calls the free dimension of input and output what it is."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporters from warning of what no one here can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
