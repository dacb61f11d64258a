"""The weights that a run begins with: those of another run or export, and a cache's encoder.

::

    RUN, RUN/checkpoints/epoch-...  --RunFolder.weights---+
    FILE.pt2                        --zip and JSON--------+--> tensors of the model by name
    the cache's encoder             --encoder_tensors-----+

All tensors must fit, name by name and shape by shape, but for the head: that of another list of
classes is drawn anew. Which tensors are the head's the model itself shows: those whose shape
changes with the number of classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ci2p_cache.cache.store import Cache
from ci2p_cache.errors import InputDataError, ManifestError, UsageError
from ci2p_cache.models.registry import AnyModelConfig
from ci2p_cache.record import read_regular
from ci2p_cache.runs.files import EXPORT_FACTS
from ci2p_cache.training.inputs import encoder_tensors, model_config_for
from ci2p_cache.training.opened import open_run
from ci2p_cache.training.records import InitialWeights, TrainObserver
from ci2p_cache.training.spec import TrainSpec

__all__ = ["initial_weights"]

_WEIGHTS = "/data/weights/"
_DTYPES = {5: torch.int64, 7: torch.float32}
"""By their number in a `.pt2`; our exports have no others."""

_MAX_EXPORT_BYTES = 2**34

_DAMAGES = (
    *(zipfile.BadZipFile, KeyError, TypeError, ValueError, AttributeError, RuntimeError),
    *(StopIteration, RecursionError, NotImplementedError),
)
"""What reading a damaged or foreign `.pt2` raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Weights that were trained before."""

    tensors: dict[str, Tensor]
    """On CPU."""
    sha256: str
    """Of their file."""
    classes: tuple[str, ...]
    """What the head's outputs mean."""
    encoder_sha256: str | None
    """Of the encoder whose latents they were trained on; None: not known."""


def initial_weights(
    cache: Cache, spec: TrainSpec, config: AnyModelConfig, observer: TrainObserver
) -> tuple[InitialWeights | None, dict[str, Tensor]]:
    """Returns what the spec's `init_from` leads to, and the tensors that are not drawn at random.

    The observer gets a notice where the weights were trained on latents of another encoder.

    Raises:
        UsageError: the weights do not fit the model; the message names `init_from` and tensors.
        InputDataError: there is no run, checkpoint or export, or the export is damaged.
        ManifestError, CheckpointError: the run is damaged.
    """
    tensors = encoder_tensors(cache) if spec.train_encoder else {}
    if spec.init_from is None:
        return None, tensors
    # Only here, as in `encoder_tensors`.
    from ci2p_cache.models.complexity import tensor_shapes

    path = Path(spec.init_from)
    source = _exported(path) if path.suffix in (".pt2", ".onnx") else _of_run(path)
    wanted = tensor_shapes(config)
    other = tensor_shapes(model_config_for(cache, spec, num_classes=len(cache.classes) + 1))
    head = {name for name, shape in wanted.items() if other[name] != shape}
    found = source.tensors
    if spec.train_encoder and not found.keys() & tensors.keys():
        # Of a run on the cache: what it trained is behind the encoder here.
        found = {f"vit.{name}": tensor for name, tensor in found.items()}
    if source.classes != cache.classes:
        found = {name: tensor for name, tensor in found.items() if name not in head}
    else:
        head = set()
    _require_fit(spec, found, {n: s for n, s in wanted.items() if n not in head | tensors.keys()})
    trained_on = cache.fingerprint.encoder.weights_sha256
    if config.reads == "latents" and source.encoder_sha256 not in (None, trained_on):
        observer.notice(
            f"the weights of {spec.init_from} were trained on latents of another encoder than that "
            f"of {cache.path}"
        )
    tensors |= found
    taken = InitialWeights(sha256=source.sha256, taken=len(found), new=tuple(sorted(head)))
    return taken, tensors


def _require_fit(
    spec: TrainSpec, found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    odd = sorted(name for name in wanted.keys() | shapes if wanted.get(name) != shapes.get(name))
    # An encoder's own tensors take the place of the cache's.
    odd = [name for name in odd if name in wanted or not spec.train_encoder]
    if odd:
        name = odd[0]
        raise UsageError(
            f"`init_from` (--init-from) is {spec.init_from!r}, which does not fit `model` "
            f"(--model) {spec.model}: {name} is {shapes.get(name, 'missing')}, wanted "
            f"{wanted.get(name, 'none')}; {len(odd)} of {len(wanted)} tensors differ"
        )


def _of_run(path: Path) -> _Source:
    try:
        run = open_run(path)
    except InputDataError as error:
        raise InputDataError(f"`init_from` (--init-from): {error}", hint=error.hint) from error
    tensors, digest = run.weights()
    encoder = run.file.fingerprint.encoder.weights_sha256
    reads = run.config.reads
    return _Source(
        tensors=tensors,
        sha256=digest,
        classes=run.file.classes,
        encoder_sha256=encoder if reads == "latents" else None,
    )


def _exported(path: Path) -> _Source:
    """Reads the weights of a `.pt2`, which may come from a stranger; nothing is unpickled."""
    where = f"`init_from` (--init-from) is {str(path)!r}"
    if path.suffix == ".onnx":
        raise UsageError(
            f"{where}: ONNX files do not keep a model's tensors as they were",
            hint="name the run, or a file of `export --format torch`",
        )
    try:
        content = read_regular(path, max_bytes=_MAX_EXPORT_BYTES)
    except (OSError, ManifestError) as error:
        raise InputDataError(f"{where}, which cannot be read: {error}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {"/" + name.partition("/")[2]: name for name in archive.namelist()}
            if any(each.file_size > len(content) for each in archive.infolist()):
                raise ValueError("a member is larger than the file")
            entries = json.loads(archive.read(names[f"{_WEIGHTS}model_weights_config.json"]))
            facts = json.loads(archive.read(names[f"/extra/{EXPORT_FACTS}"]))
            tensors = {
                name.removeprefix("model."): _tensor(entry, archive, names)
                for name, entry in entries["config"].items()
                if name.startswith("model.")
            }
            classes = tuple(map(str, json.loads(facts["classes"])))
    except _DAMAGES as error:
        raise InputDataError(
            f"{where}; that is not a whole file of `export --format torch`: {error!r}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    return _Source(tensors=tensors, sha256=digest, classes=classes, encoder_sha256=None)


def _tensor(entry: dict[str, Any], archive: zipfile.ZipFile, names: dict[str, str]) -> Tensor:
    """Returns a tensor of a `.pt2`: raw values beside their dtype, sizes and strides."""
    if entry["use_pickle"]:
        raise ValueError("it holds pickled tensors")
    about = entry["tensor_meta"]
    sizes, strides = ([each["as_int"] for each in about[name]] for name in ("sizes", "strides"))
    raw = bytearray(archive.read(names[_WEIGHTS + entry["path_name"]]))
    flat = torch.frombuffer(raw, dtype=_DTYPES[about["dtype"]])
    if math.prod(sizes) > len(flat):
        raise ValueError("a tensor repeats its values")
    start = about["storage_offset"]["as_int"]
    return flat.as_strided(sizes, strides, start).contiguous()
