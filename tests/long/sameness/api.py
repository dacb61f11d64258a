"""What the public Python names give, as JSON; called in the warm process of a tree.

Only names of `ci2p_cache/__init__.py` are used. Tensors become digests of their bytes with shape
and dtype, so every bit counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ci2p_cache as cc

__all__ = [
    "build_models", "classify", "encode_pictures", "load_batches", "public_names", "read_cache",
    "refusals", "run_exported", "scalars", "source_batches",
]  # fmt: skip


def _digest(value: Any) -> str:
    array = np.ascontiguousarray(value.detach().numpy() if torch.is_tensor(value) else value)
    shape = "x".join(map(str, array.shape))
    return f"{hashlib.sha256(array.tobytes()).hexdigest()} {array.dtype} {shape}"


def read_cache(path: str) -> dict[str, Any]:
    """Every value of a cache, row by row."""
    cache = cc.open_cache(path)
    found: dict[str, Any] = {"classes": list(cache.classes), "splits": list(cache.splits)}
    for name, split in cache.items():
        rows = hashlib.sha256()
        for row in split.valid_rows.tolist():
            y, label = split[row]
            rows.update(f"{row} {label} {_digest(y)}\n".encode())
        found[name] = {
            "shape": list(split.shape), "rows": rows.hexdigest(),
            "labels": split.labels.tolist(), "valid": split.valid.tolist(),
        }  # fmt: skip
    return found


def load_batches(path: str) -> dict[str, Any]:
    """Batches of the loaders from a cache, in two epochs of several orders."""
    cache = cc.open_cache(path)
    split = cache["train"]
    found: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {
        "random": {},
        "seed 7": {"seed": 7, "drop_last": True},
        "blocks": {"shuffle": "blocks"},
        "in order": {"shuffle": False, "views": 0},
        "rank 1 of 2": {"rank": 1, "world_size": 2},
        "raw": {"recycle": True},
    }
    for name, changes in ways.items():
        settings = {"batch_size": 4, "threads": 1, **changes}
        for kind in (cc.LatentLoader, cc.ResidentLoader):
            with kind(split, **settings) as loader:
                found[f"{kind.__name__}, {name}"] = _epochs(loader)
    with cc.LatentLoader(split, batch_size=4, threads=1) as loader:
        batches = iter(loader)
        next(batches)
        found["state"] = loader.state_dict()
    return found


def source_batches(path: str) -> dict[str, Any]:
    """Batches made from the images of a cache: with the encoder in the loop, and of pixels."""
    split = cc.open_cache(path)["train"]
    found = {}
    for kind in (cc.OnlineLoader, cc.PixelLoader):
        with kind(split, batch_size=4, threads=1, seed=3) as loader:
            found[kind.__name__] = _epochs(loader)
    return found


def _epochs(loader: Any) -> list[str]:
    digests = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            rows = " ".join(map(str, np.asarray(batch.rows).tolist()))
            labels = " ".join(map(str, np.asarray(batch.labels).tolist()))
            digests.append(f"{_digest(batch.latents)} rows {rows} labels {labels}")
    return digests


def build_models(names: list[str]) -> dict[str, Any]:
    """Initial weights and outputs of models."""
    found: dict[str, Any] = {"names": list(cc.list_models())}
    for name in names:
        torch.manual_seed(5)
        model: Any = cc.create_model(name, num_classes=7, latent_size=4).eval()
        weights = hashlib.sha256()
        for key, value in sorted(model.state_dict().items()):
            weights.update(f"{key} {_digest(value)}\n".encode())
        generator = torch.Generator().manual_seed(1)
        reads = str(model.config.reads)
        shape = (2, 3, 64, 64) if "image" in reads or "pixel" in reads else (2, 192, 4, 4)
        with torch.inference_mode():
            logits = model(torch.rand(shape, generator=generator))
        found[name] = {"weights": weights.hexdigest(), "reads": reads, "logits": _digest(logits)}
    return found


def encode_pictures(images: str) -> dict[str, Any]:
    """What the bundled encoder makes of pictures, and back."""
    found = {}
    for precision in ("float32", "bf16"):
        encoder = cc.load_encoder("bundled", precision=precision)
        for path in sorted(Path(images).rglob("*.jpg"))[:3]:
            pixels = np.asarray(Image.open(path).convert("RGB").crop((0, 0, 80, 64)))
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
            y = encoder(image)
            symbols = encoder.quantize(y)
            y_hat = encoder.dequantize(symbols)
            x_hat = encoder.decode(y_hat)
            parts = {"y": y, "symbols": symbols, "y_hat": y_hat, "x_hat": x_hat}
            found[f"{precision} {path.name}"] = {name: _digest(v) for name, v in parts.items()}
    return found


def classify(run: str, images: list[str]) -> dict[str, Any]:
    """Predictions of a run through the Python interface."""
    classifier = cc.load_classifier(run, checkpoint="best", device="cpu")
    predictions = classifier.predict(images, top=2)
    return {"classes": list(classifier.classes), "found": [each.to_dict() for each in predictions]}


def run_exported(path: str, shape: list[int]) -> dict[str, Any]:
    """What an exported file gives for fixed inputs: logits, to the last bit; the graph of ONNX."""
    given = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    if path.endswith(".onnx"):
        import onnx
        import onnxruntime

        model = onnx.load(path)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        for node in [*model.graph.node, *(n for each in model.functions for n in each.node)]:
            # Stack traces name the files that the graph was traced from.
            del node.metadata_props[:]
        graph = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        outputs = session.run(None, {name: given.numpy()})
        digests = [_digest(each) for each in outputs]
        return {"inputs": [name], "outputs": digests, "graph": graph, "metadata": metadata}
    program = torch.export.load(path)
    with torch.inference_mode():
        return {"outputs": [_digest(program.module()(given))]}


def scalars(folder: str) -> dict[str, Any]:
    """Curves that TensorBoard shows; of those that a clock gives, steps only."""
    # By name: it has no type stubs.
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(folder)
    events.Reload()
    found: dict[str, Any] = {}
    for tag in sorted(events.Tags()["scalars"]):
        is_clock = any(word in tag for word in ("second", "wait", "speed", "rate/"))
        found[tag] = [
            [each.step, "clock" if is_clock else each.value] for each in events.Scalars(tag)
        ]
    return found


def public_names() -> dict[str, Any]:
    """The public names, what their calls take, and the public members of classes."""
    return {name: _described(getattr(cc, name)) for name in cc.__all__}


def _described(value: Any) -> Any:
    if inspect.isclass(value):
        members = sorted(name for name in dir(value) if not name.startswith("_"))
        fields = []
        if dataclasses.is_dataclass(value):
            fields = [each.name for each in dataclasses.fields(value)]
        return {"call": _signature(value), "members": members, "fields": fields}
    return _signature(value) if callable(value) else repr(value)


def _signature(value: Callable[..., Any]) -> list[str]:
    """Names, kinds and defaults; annotations are left out."""
    shown = []
    for each in inspect.signature(value).parameters.values():
        default = "" if each.default is each.empty else f" = {each.default!r}"
        shown.append(f"{each.kind.description} {each.name}{default}")
    return shown


def refusals(cache: str, run: str) -> dict[str, Any]:
    """Errors of the Python interface: exit code, whether it is a builtin's too, message."""
    # Values of wrong types are what some of these are about.
    loose: Any = cc
    opened = loose.open_cache(cache)
    split = opened["train"]
    calls: dict[str, Callable[[], Any]] = {
        "no such split": lambda: opened["nosuch"],
        "no such row": lambda: split[10**6],
        "batches of 0": lambda: loose.LatentLoader(split, batch_size=0),
        "a negative seed": lambda: loose.LatentLoader(split, batch_size=2, seed=-1),
        "no such view": lambda: loose.LatentLoader(split, batch_size=2, views=9),
        "no such order": lambda: loose.LatentLoader(split, batch_size=2, shuffle="sorted"),
        "no such rank": lambda: loose.LatentLoader(split, batch_size=2, rank=2, world_size=2),
        "no such model": lambda: loose.create_model("vitts"),
        "no such timm model": lambda: loose.create_model("timm:nosuch"),
        "no such width": lambda: loose.create_model("vit_tiny", latent_channels=0),
        "no such encoder": lambda: loose.load_encoder("nosuch"),
        "no such device": lambda: loose.load_encoder("bundled", device="tpu"),
        "no such run": lambda: loose.load_classifier("nowhere"),
        "no such checkpoint": lambda: loose.load_classifier(run, checkpoint="third"),
        "no such cache": lambda: loose.open_cache("nowhere"),
        "a wrong dtype": lambda: loose.EncodeOptions(dtype="int4"),
        "a wrong size": lambda: loose.EncodeOptions(size=65),
        "no epochs": lambda: loose.TrainSpec(epochs=0),
        "a subset of no rows": lambda: split.subset(np.array([10**6])),
        "no recipe": lambda: loose.load_experiment("nowhere.py:nothing"),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        ended: Any = "no error"
        try:
            with contextlib.ExitStack():
                call()
        except Exception as error:
            kinds = (cc.CacheError, ValueError, OSError, ImportError, LookupError)
            ended = {
                "code": getattr(error, "exit_code", None), "text": str(error),
                "hint": getattr(error, "hint", None),
                "is": [kind.__name__ for kind in kinds if isinstance(error, kind)],
            }  # fmt: skip
        found[name] = ended
    return found
