"""Where an encoder's weights come from: CompressAI's server, a file, or this package.

::

    official   URL of CompressAI's table --> user cache folder --+
    file       .pth.tar, .pth, .pt, .safetensors ----------------+--> WeightsFile (names, tensors)
    bundled    float16 safetensors inside the package -----------+

Nothing here runs code from a file: torch reads with weights_only, and safetensors holds none.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import mmap
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ci2p_cache.encoder.download import (
    MAX_WEIGHTS_BYTES,
    fetch_weights,
    official_url,
    weights_folder,
)
from ci2p_cache.errors import ManifestError, UsageError, WeightsError
from ci2p_cache.record import Record
from ci2p_cache.specs import EncoderSpec

__all__ = [
    "BUNDLED",
    "Metric",
    "WeightsCard",
    "WeightsFile",
    "bundled_weights",
    "fetch_weights",
    "official_url",
    "read_weights",
    "tensor_digest",
    "weights_bytes",
    "weights_folder",
]

Metric = Literal["mse", "ms-ssim"]
"""What the zoo's encoders were trained for."""

BUNDLED: tuple[str, int, Metric] = ("bmshj2018-factorized", 5, "mse")
"""Arch, quality and metric of the one bundled encoder."""

_CARD_KEY = "ci2p_cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsCard(Record):
    """What a weights file of ours says of itself, in its safetensors metadata."""

    format_version: int = 1
    """Version of this record."""
    arch: str
    """CompressAI zoo name."""
    quality: int
    """CompressAI quality."""
    metric: Metric
    """What the encoder was trained for."""
    weights_sha256: str
    """`tensor_digest` of the encoder that the file gives, in float32."""

    def __post_init__(self) -> None:
        if self.format_version != 1:
            raise UsageError(f"weights format {self.format_version} is not 1, the one known here")

    @classmethod
    def of(cls, spec: EncoderSpec) -> Self:
        """Returns what a file says that holds this encoder."""
        return cls(
            arch=spec.arch,
            quality=spec.quality,
            metric=spec.metric,
            weights_sha256=spec.weights_sha256,
        )

    @property
    def choice(self) -> tuple[str, int, Metric]:
        """Arch, quality and metric."""
        return self.arch, self.quality, self.metric


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The tensors of a weights file, not yet fitted to an architecture."""

    path: Path
    """The file."""
    tensors: Mapping[str, Any]
    """State dict as the file has it; values of foreign files may be anything."""
    card: WeightsCard | None
    """What a file of ours says of itself; None for all others."""


def bundled_weights() -> WeightsFile:
    """Gives the weights that ship with this package; card in encoder/bundled/README.md."""
    name = "{}-{}-{}.safetensors".format(*BUNDLED)
    folder = importlib.resources.files("ci2p_cache.encoder")
    with importlib.resources.as_file(folder.joinpath("bundled", name)) as path:
        return read_weights(path)


def read_weights(path: Path) -> WeightsFile:
    """Reads a weights file without running anything in it.

    Args:
        path: `.safetensors`, or else what torch.save wrote (`.pth.tar`, `.pth`, `.pt`): a state
            dict, or a training checkpoint with one under `state_dict`.

    Returns:
        The file's tensors under its own names, on the CPU.

    Raises:
        WeightsError: the file is missing, too large, damaged, or no weights file.
    """
    try:
        found = path.stat()
        size = found.st_size
        if stat.S_ISREG(found.st_mode):
            with path.open("rb"):
                pass
    except OSError as error:
        raise WeightsError(f"weights file {path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        # Opening a pipe would wait for a writer for ever.
        raise WeightsError(f"weights file {path} cannot be read: it is no regular file")
    if size > MAX_WEIGHTS_BYTES:
        raise WeightsError(
            f"weights file {path} has {size} bytes; at most {MAX_WEIGHTS_BYTES} are plausible"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return WeightsFile(path, _read_torch(path, size), None)


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_CARD_KEY)
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        card = None if text is None else WeightsCard.from_dict(json.loads(text))
    except (safetensors.SafetensorError, ManifestError, ValueError, RecursionError) as error:
        raise WeightsError(f"weights file {path} is damaged or no safetensors: {error}") from error
    return WeightsFile(path, tensors, card)


def _read_torch(path: Path, size: int) -> Mapping[str, Any]:
    """Returns the state dict of a file that torch.save wrote."""
    try:
        unpacked = _unpacked_bytes(path)
        _refuse_allocation(path)
        # Entries that torch.save writes are uncompressed, and each is there once.
        payload = (
            torch.load(path, map_location="cpu", weights_only=True) if unpacked <= size else None
        )
    except Exception as error:
        # A foreign stream can fail in any way inside the unpickler.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {found[1]}" if found else f"{type(error).__name__} while reading"
        raise WeightsError(
            f"weights file {path} is damaged or holds more than tensors ({reason}); nothing in it "
            "was run. Wanted: a state dict saved by torch.save, or a .safetensors file"
        ) from error
    if unpacked > size:
        raise WeightsError(
            f"weights file {path} would unpack from {size} to {unpacked} bytes; torch.save "
            "writes no such file"
        )
    if isinstance(payload, Mapping) and isinstance(payload.get("state_dict"), Mapping):
        payload = payload["state_dict"]
    if not isinstance(payload, Mapping) or not all(isinstance(key, str) for key in payload):
        raise WeightsError(
            f"weights file {path} holds a {type(payload).__name__}; wanted a state dict, or a "
            "checkpoint with one under 'state_dict'"
        )
    return payload


def _refuse_allocation(path: Path) -> None:
    """Refuses a file that names `bytearray`: torch calls it, with any size that the file gives."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # torch.save never names it, and 9 given bytes do not turn up among weights by chance.
        if content.find(b"bytearray") >= 0:
            raise ValueError("GLOBAL bytearray")


def _unpacked_bytes(path: Path) -> int:
    """Returns how many bytes a zip file says it holds; 0 for any other file."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def weights_bytes(tensors: Mapping[str, Tensor], card: WeightsCard) -> bytes:
    """Gives a safetensors file with `card` as metadata; same input, same bytes.

    Args:
        tensors: Floating-point tensors on any device.
        card: Goes in as one JSON string: safetensors keeps no order between metadata entries.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_CARD_KEY: json.dumps(card.to_dict(), sort_keys=True)}
    return bytes(safetensors.torch.save(plain, metadata))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Gives the sha256 over (name, dtype, shape, float32 bytes) of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update((json.dumps([name, "float32", list(tensor.shape)]) + "\n").encode())
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(array.astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
