"""Loading a frozen encoder: from weights at hand to a model held to what they say of themselves."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from ci2p_cache.encoder.architecture import build_codec, check_choice, value_tensors
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.weights import (
    BUNDLED,
    Metric,
    Progress,
    WeightsCard,
    WeightsFile,
    bundled_weights,
    fetch_weights,
    official_url,
    read_weights,
    tensor_digest,
    weights_bytes,
    weights_folder,
)
from ci2p_cache.errors import DigestError, UsageError, WeightsError, command
from ci2p_cache.record import differing_fields, regular_file, write_synced
from ci2p_cache.specs import EncoderSpec, Precision

__all__ = ["load_encoder", "load_recorded_encoder", "load_saved_encoder", "save_half"]


def load_encoder(
    source: Literal["official", "bundled"] = "official",
    *,
    weights: Path | None = None,
    arch: str = "bmshj2018-factorized",
    quality: int = 5,
    metric: str = "mse",
    precision: Precision = "float32",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> FrozenEncoder:
    """Loads a frozen encoder from one of the three sources of weights; never falls back.

    Args:
        source: official: CompressAI's published weights, fetched once into the user's cache folder
            (CI2P_CACHE_WEIGHTS_URL names a mirror). bundled: the one that ships with this package.
        weights: A weights file to take instead: CompressAI's `.pth.tar`, or safetensors.
        arch: CompressAI zoo name. The factorized prior has symbols; the others give y alone.
        quality: CompressAI quality, 1-8 (cheng2020: 1-6); it fixes N and M.
        metric: mse or ms-ssim.
        precision: Arithmetic of g_a. tf32 makes a difference on CUDA only.
        device: cpu or cuda.
        progress: Called while official weights are downloaded.

    Raises:
        UsageError: an argument is unknown, or source and the others do not go together.
        MissingDependencyError: the architecture is compressai's, which cannot be imported.
        WeightsError: the file does not fit, is damaged, or says it is of another quality.
        WeightsUnavailableError: official weights cannot be fetched; names the three ways.
        DigestError: the official file is not the published one.
    """
    check_choice(arch, quality, metric)
    if source not in ("official", "bundled"):
        raise UsageError(f"encoder `source` is {source!r}; wanted official or bundled")
    asked = (arch, quality, cast("Metric", metric))
    if source == "bundled":
        if weights is not None:
            raise UsageError(
                f"both --encoder bundled and --weights {weights} are given; choose one"
            )
        if asked != BUNDLED:
            raise UsageError(
                f"the bundled encoder is {_named(*BUNDLED)}; {_named(*asked)} was asked for",
                hint="use --encoder official, or --weights FILE",
            )
        return _bundled(precision, str(device))
    elif weights is not None:
        file = read_weights(Path(weights))
    else:
        url = official_url(arch, quality, metric)
        file = read_weights(fetch_weights(url, weights_folder(), progress))
    return _frozen(file, asked, precision, device)


@functools.cache
def _bundled(precision: Precision, device: str) -> FrozenEncoder:
    """Loads the bundled encoder, once per process: it never changes, and a load takes 30 ms."""
    return _frozen(bundled_weights(), BUNDLED, precision, device)


def load_saved_encoder(
    path: Path, *, precision: Precision = "float32", device: str | torch.device = "cpu"
) -> FrozenEncoder:
    """Loads an encoder that `FrozenEncoder.save` wrote, such as a cache's encoder.safetensors.

    The file says itself which architecture it holds; it does not fix the precision.

    Raises:
        WeightsError: the file is missing, foreign or damaged, or its digest is another.
        MissingDependencyError: the architecture is compressai's, which cannot be imported.
        UsageError: precision or device is unknown.
    """
    file = read_weights(Path(path))
    if file.card is None:
        raise WeightsError(
            f"{path} is no encoder saved by ci2p-cache: it does not say which architecture it holds"
        )
    try:
        check_choice(*file.card.choice)
    except UsageError as error:
        raise WeightsError(f"weights file {path} is damaged: {error}") from error
    return _frozen(file, file.card.choice, precision, device)


def save_half(encoder: FrozenEncoder, path: Path) -> FrozenEncoder:
    """Writes an encoder's parameters as float16: how the bundled file was made.

    Constants are left out, because a pedestal of 2**-36 would become 0; loading takes them from
    CompressAI.

    Returns:
        The encoder that the file holds: other weights, another digest.

    Raises:
        WeightsError: a weight is too large for float16.
    """
    spec = encoder.spec
    constants = {name for name, _ in encoder._model.named_buffers()}
    tensors = {
        name: tensor.to("cpu", torch.float16)
        for name, tensor in value_tensors(encoder._model).items()
        if name not in constants
    }
    halved = _frozen(
        WeightsFile(path, tensors, None), (spec.arch, spec.quality, spec.metric), "float32", "cpu"
    )
    write_synced(path, weights_bytes(tensors, WeightsCard.of(halved.spec)))
    return halved


def _frozen(
    file: WeightsFile,
    asked: tuple[str, int, Metric],
    precision: Precision,
    device: str | torch.device,
) -> FrozenEncoder:
    """Builds the encoder and checks our own file against its metadata."""
    if precision not in get_args(Precision):
        raise UsageError(f"`precision` is {precision!r}; wanted {', '.join(get_args(Precision))}")
    arch, quality, metric = asked
    card = file.card
    if card is not None and card.choice != asked:
        raise WeightsError(
            f"weights file {file.path} is of {_named(*card.choice)}; {_named(*asked)} was asked "
            "for",
            hint=f"repeat the command with --arch {card.arch} --quality {card.quality}",
        )
    model = build_codec(file, arch, quality)
    digest = tensor_digest(value_tensors(model))
    if card is not None and card.weights_sha256 != digest:
        raise WeightsError(
            f"weights file {file.path} is damaged: its tensors have digest {digest}, and it says "
            f"{card.weights_sha256}"
        )
    spec = EncoderSpec(
        arch=arch, quality=quality, metric=metric, weights_sha256=digest, precision=precision
    )
    return FrozenEncoder(model, spec, device=device)


def _named(arch: str, quality: int, metric: str) -> str:
    return f"{arch} quality {quality} {metric}"


def load_recorded_encoder(path: Path, spec: EncoderSpec) -> FrozenEncoder:
    """Loads what `FrozenEncoder.save` wrote, which must be the encoder of a fingerprint.

    Raises:
        DigestError: the file holds another encoder, intact as it may be.
        ManifestError: it is a link or no regular file.
        WeightsError: it is missing, foreign or damaged.
        MissingDependencyError: the architecture is compressai's, which cannot be imported.
    """
    # Loading says it better where there is no file.
    with contextlib.suppress(OSError), regular_file(path):
        pass
    encoder = load_saved_encoder(path, precision=spec.precision)
    differences = differing_fields(spec, encoder.spec)
    if differences:
        shown = "; ".join(f"`{name}` {wanted!r}, got {got!r}" for name, wanted, got in differences)
        raise DigestError(
            f"{path} is not the encoder that made the latents of this cache: wanted {shown}",
            hint=command("verify", path.parent, "--repair"),
        )
    return encoder
