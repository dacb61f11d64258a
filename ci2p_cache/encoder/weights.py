"""Where an encoder's weights come from: CompressAI's server, a file, or this package.

::

    official   URL of CompressAI's table --> user cache folder --+
    file       .pth.tar, .pth, .pt, .safetensors ----------------+--> WeightsFile (names, tensors)
    bundled    float16 safetensors inside the package -----------+

Nothing here runs code from a file: torch reads with weights_only, and safetensors holds none. The
digest of an official file is checked on every use.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import importlib.resources
import json
import logging
import mmap
import os
import re
import shlex
import stat
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ci2p_cache.encoder.zoo import published_url
from ci2p_cache.errors import (
    DigestError,
    DiskFullError,
    ManifestError,
    ResourceError,
    UsageError,
    WeightsError,
    WeightsUnavailableError,
)
from ci2p_cache.record import Record, read_json, write_synced
from ci2p_cache.specs import EncoderSpec

__all__ = [
    "BUNDLED",
    "Metric",
    "Progress",
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

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called as (bytes done, bytes in all), the latter 0 where the server does not say."""

MAX_WEIGHTS_BYTES = 512 * 2**20
"""The zoo's largest training checkpoint, Adam state included, stays below; more is refused."""

_BLOCK_BYTES = 2**18


@dataclass(frozen=True, kw_only=True, slots=True)
class _DownloadRecord(Record):
    """The sidecar of a downloaded file: what its digest was at first use."""

    format_version: Literal[1] = 1
    url: str
    bytes: int
    sha256: str
    """Digest of the whole file, checked from then on."""


def official_url(arch: str, quality: int, metric: str) -> str:
    """Returns the published URL of an official checkpoint.

    The environment variable CI2P_CACHE_WEIGHTS_URL names a mirror: it replaces everything before
    the published file name, and the file is held to the same digest.

    Raises:
        UsageError: no weights are published for that combination.
        MissingDependencyError: the architecture is compressai's, which cannot be imported.
    """
    published = published_url(arch, quality, metric)
    mirror = os.environ.get("CI2P_CACHE_WEIGHTS_URL")
    return f"{mirror.rstrip('/')}/{published.rpartition('/')[2]}" if mirror else published


def weights_folder() -> Path:
    """Returns the user's folder for downloaded weights: $XDG_CACHE_HOME or ~/.cache, ci2p-cache.

    Raises:
        WeightsUnavailableError: the user has no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    if Path(cache).is_absolute():
        return Path(cache) / "ci2p-cache"
    try:
        return Path.home() / ".cache" / "ci2p-cache"
    except RuntimeError as error:
        raise WeightsUnavailableError(
            "there is no folder for downloaded weights, because the user has no home folder",
            hint="set XDG_CACHE_HOME to a folder that can be written",
        ) from error


def fetch_weights(
    url: str, folder: Path, progress: Progress | None = None, *, timeout_seconds: float = 30.0
) -> Path:
    """Returns the file of `url` from `folder`, downloading it there on first use.

    The published name (`name-1a2b3c4d.pth.tar`) carries the first 8 hex digits of the file's
    sha256. They are checked, the whole digest is written beside the file as NAME.json, and from
    then on that digest is held. A failed download leaves nothing behind. Processes may do this at
    the same time. The server may stay silent for `timeout_seconds`.

    Returns:
        Path of the complete, checked file.

    Raises:
        UsageError: the URL is not http(s) or its name carries no digest.
        WeightsUnavailableError: the file cannot be had; the message names the three ways.
        DigestError: the bytes are not those published, or not those of the first use.
        ManifestError: the digest record beside the file is damaged.
        DiskFullError: no space is left for the file.
    """
    name, prefix = _published_name(url)
    target, record = folder / name, folder / f"{name}.json"
    held = _held_digest(record)
    if target.is_file():
        with _disk_errors(target), target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _check_digest(str(target), digest, prefix, held, hint=f"rm {shlex.quote(str(target))}")
    else:
        hint = (
            "try again later or from another network; a proxy may have answered in the server's "
            "place"
        )
        with _staged(target) as staging:
            digest = _download(url, staging, target, progress, timeout_seconds)
            _check_digest(url, digest, prefix, held, hint=hint)
        logger.info("fetched %s, sha256 %s", target, digest)
    if held is None:
        entry = _DownloadRecord(url=url, bytes=target.stat().st_size, sha256=digest)
        with _staged(record) as staging:
            write_synced(staging, (json.dumps(entry.to_dict(), indent=1) + "\n").encode())
    return target


def _published_name(url: str) -> tuple[str, str]:
    """Returns the file name of a URL and the 8 hex digits of sha256 that it carries."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise UsageError(f"weights URL {url!r} cannot be read: {error}") from error
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"weights URL {url!r} has scheme {parts.scheme!r}; wanted http or https")
    name = parts.path.rpartition("/")[2]
    found = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*-([0-9a-f]{8})\.[a-z.]+", name)
    if found is None:
        raise UsageError(
            f"weights URL {url!r} ends in {name!r}; wanted a name that carries the first 8 hex "
            "digits of the file's sha256, like name-1a2b3c4d.pth.tar"
        )
    return name, found[1]


def _held_digest(record: Path) -> str | None:
    """Returns the digest recorded at first use, or None before it."""
    try:
        return _DownloadRecord.from_dict(read_json(record)).sha256
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ManifestError, OSError) as error:
        raise ManifestError(
            f"the digest record {record} cannot be used: {error}",
            hint=f"rm {shlex.quote(str(record))}",
        ) from error


def _check_digest(what: str, digest: str, prefix: str, held: str | None, *, hint: str) -> None:
    if not digest.startswith(prefix):
        raise DigestError(
            f"{what} has sha256 {digest}, but its published name promises {prefix}...", hint=hint
        )
    if held not in (None, digest):
        raise DigestError(
            f"{what} has sha256 {digest}, but {held} was recorded at first use", hint=hint
        )


def _download(
    url: str, staging: Path, target: Path, progress: Progress | None, timeout_seconds: float
) -> str:
    """Writes the body of `url` to `staging`, synced, and returns its sha256."""
    digest, done = hashlib.sha256(), 0
    with staging.open("wb") as file:
        for block, total in _blocks(url, target, timeout_seconds):
            done += len(block)
            file.write(block)
            digest.update(block)
            if progress is not None:
                progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _blocks(url: str, target: Path, timeout_seconds: float) -> Iterator[tuple[bytes, int]]:
    """Yields the body of `url`, each block with the size of the whole, 0 where it is unknown."""
    # No handler for ftp, file or data, so that a redirect cannot lead there.
    opener = urllib.request.OpenerDirector()
    for name in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):
        opener.add_handler(getattr(urllib.request, f"{name}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    done = 0
    cause: Exception | None = None
    try:
        with opener.open(url, timeout=timeout_seconds) as response:
            total: int = response.length or 0
            while block := response.read(_BLOCK_BYTES):
                done += len(block)
                if max(done, total) > MAX_WEIGHTS_BYTES:
                    break
                yield block, total
    except urllib.error.HTTPError as error:
        error.close()
        reason, cause = f"the server answers {error.code} {error.reason}", error
    except (OSError, http.client.HTTPException) as error:
        reason, cause = str(getattr(error, "reason", error)), error
    else:
        if max(done, total) > MAX_WEIGHTS_BYTES:
            reason = f"it is larger than {MAX_WEIGHTS_BYTES} bytes, so it holds no weights"
        elif total not in (0, done):
            reason = f"it ended after {done} of {total} bytes"
        else:
            return
    raise WeightsUnavailableError(
        f"cannot fetch {url}: {reason}. Copy that file to {target} by other means, or use "
        "--weights FILE, or --encoder bundled",
        hint="the same command with --encoder bundled, if it need not be the official encoder",
    ) from cause


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yields a file beside `target` that is renamed to it at the end, or removed on any error."""
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".part", dir=target.parent
        )
        os.close(descriptor)
        staging = Path(name)
        try:
            yield staging
            staging.replace(target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ResourceError:
        raise
    except OSError as error:
        hint = "set XDG_CACHE_HOME to a folder that can be written and has space"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"no space is left for {path}", hint=hint) from error
        raise WeightsUnavailableError(f"cannot use {path}: {error.strerror}", hint=hint) from error


Metric = Literal["mse", "ms-ssim"]
"""What the zoo's encoders were trained for."""

BUNDLED: tuple[str, int, Metric] = ("bmshj2018-factorized", 5, "mse")
"""Arch, quality and metric of the one bundled encoder."""

_CARD_KEY = "ci2p_cache"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsCard(Record):
    """The metadata that our weights files have in their safetensors header."""

    format_version: Literal[1] = 1
    arch: str
    quality: int
    metric: Metric
    weights_sha256: str
    """`tensor_digest` of the encoder that the file gives, in float32."""

    @classmethod
    def of(cls, spec: EncoderSpec) -> Self:
        """Returns what a file says that holds this encoder."""
        fields = ("arch", "quality", "metric", "weights_sha256")
        return cls(**{name: getattr(spec, name) for name in fields})

    @property
    def choice(self) -> tuple[str, int, Metric]:
        """Arch, quality and metric."""
        return self.arch, self.quality, self.metric


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The tensors of a weights file, not yet fitted to an architecture."""

    path: Path
    tensors: Mapping[str, Any]
    """State dict as the file has it; values of foreign files may be anything."""
    card: WeightsCard | None
    """The metadata of our own weights file; None for all others."""


def bundled_weights() -> WeightsFile:
    """Returns the weights that ship with this package; card in encoder/bundled/README.md."""
    name = "{}-{}-{}.safetensors".format(*BUNDLED)
    folder = importlib.resources.files("ci2p_cache.encoder")
    with importlib.resources.as_file(folder.joinpath("bundled", name)) as path:
        return read_weights(path)


def read_weights(path: Path) -> WeightsFile:
    """Reads a weights file without running anything in it.

    Args:
        path: `.safetensors`, or else what torch.save wrote (`.pth.tar`, `.pth`, `.pt`): a state
            dict, or a training checkpoint with one under `state_dict`.

    Raises:
        WeightsError: the file is missing, too large, damaged, or no weights file.
    """
    try:
        found = path.stat()
        # Opening a pipe would wait for a writer for ever.
        reason = None if stat.S_ISREG(found.st_mode) else "it is no regular file"
        if reason is None:
            path.open("rb").close()
    except OSError as error:
        raise WeightsError(f"weights file {path} cannot be read: {error.strerror}") from error
    if reason is not None:
        raise WeightsError(f"weights file {path} cannot be read: {reason}")
    size = found.st_size
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
        unpacked = 0
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        _refuse_allocation(path)
        # Entries that torch.save writes are uncompressed, and each is there once.
        payload = (
            torch.load(path, map_location="cpu", weights_only=True) if unpacked <= size else None
        )
    except Exception as error:
        # A foreign stream can fail in any way inside the unpickler.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {name[1]}" if name else f"{type(error).__name__} while reading"
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


def weights_bytes(tensors: Mapping[str, Tensor], card: WeightsCard) -> bytes:
    """Returns a safetensors file with `card` as metadata; same input, same bytes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One JSON string: safetensors keeps no order between metadata entries.
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
