"""The frozen encoder: g_a, the codec's quantiser and g_s, with CompressAI's own arithmetic.

::

    images [0,1] --g_a--> y --quantize--> symbols --dequantize--> y_hat --g_s--> x_hat
    (B,3,H,W)         (B,M,H/16,W/16)                          (B,M,h,w)      (B,3,H,W)

The reference setting, in which every value equals CompressAI's bit for bit: float32, CPU, one
torch thread (the caller's `torch.set_num_threads(1)`), eager, and a model in channels_last, that
is `model.to(memory_format=torch.channels_last)`; a channels_last image alone is not enough, as
torch runs one whose batch stride is arbitrary as NCHW. Batch size changes nothing there.

Shape suffixes: B batch, M latent channels, H W pixels, h w latent rows and columns.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from compressai.models import CompressionModel
from torch import Tensor

from ci2p_cache.encoder import quantize as quantizer
from ci2p_cache.encoder.architecture import (
    build_model,
    check_choice,
    has_factorized_prior,
    value_tensors,
)
from ci2p_cache.encoder.arithmetic import fixed_arithmetic
from ci2p_cache.encoder.download import Progress
from ci2p_cache.encoder.weights import (
    BUNDLED,
    Metric,
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
from ci2p_cache.errors import UsageError, WeightsError
from ci2p_cache.machine import checked_device
from ci2p_cache.specs import DOWNSAMPLING, EncoderSpec, Precision

__all__ = ["FrozenEncoder", "load_encoder", "load_saved_encoder", "save_half"]

logger = logging.getLogger(__name__)


class FrozenEncoder:
    """A codec whose weights never change; made by `load_encoder` and `load_saved_encoder`.

    Calls take tensors on any device and return ordinary tensors on `device`, contiguous, without
    gradients. On CPU, threads may share one encoder. On CUDA, calls are serialised, and while
    their kernels are launched cuDNN's process-wide switches are set to the encoder's. It can be
    deep-copied.

    Args:
        model: CompressAI's model with its weights; belongs to the encoder from then on.
        spec: What it is.
        device: Where it runs; cpu or cuda.

    Raises:
        UsageError: there is no such device.
    """

    downsampling = DOWNSAMPLING
    """Pixels of a side per latent row or column."""

    def __init__(
        self, model: CompressionModel, spec: EncoderSpec, *, device: str | torch.device
    ) -> None:
        self.spec = spec
        self.device = checked_device(device)
        self.num_channels = int(model.M)
        self.has_symbols = has_factorized_prior(model)
        self._model = model.eval().requires_grad_(False)
        self._model.to(device=self.device, memory_format=torch.channels_last)
        self._g_a = self._model.g_a
        self._dtype = torch.float32
        if spec.precision == "bf16":
            self._dtype = torch.bfloat16
            self._g_a = copy.deepcopy(self._g_a).to(torch.bfloat16)
        elif spec.precision == "tf32" and self.device.type == "cpu":
            logger.warning("precision tf32 exists on CUDA only; on cpu g_a runs in float32")

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"FrozenEncoder({spec.arch}, quality {spec.quality}, {spec.metric}, {spec.precision}, "
            f"weights {spec.weights_sha256[:12]}, {self.device})"
        )

    def to(self, device: str | torch.device) -> FrozenEncoder:
        """Gives the same encoder on another device; this one stays as it is.

        Raises:
            UsageError: there is no such device.
        """
        return FrozenEncoder(copy.deepcopy(self._model), self.spec, device=device)

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        """Runs g_a.

        Args:
            images_B3HW: RGB in [0, 1], floating point, not mean/std normalised. Sides that are no
                multiples of 16 are padded with zeros by g_a's convolutions.

        Returns:
            y, float32 (B, M, h, w), in the arithmetic of `spec.precision`.

        Raises:
            UsageError: the images have another shape or an integer dtype.
        """
        if (
            images_B3HW.ndim != 4
            or images_B3HW.shape[1] != 3
            or not images_B3HW.is_floating_point()
        ):
            raise UsageError(
                f"images have shape {tuple(images_B3HW.shape)} and dtype {images_B3HW.dtype}; "
                "wanted (B, 3, H, W) floats in [0, 1]: divide uint8 pixels by 255"
            )
        x = images_B3HW.to(self.device, torch.float32)
        with (
            torch.inference_mode(),
            fixed_arithmetic(self.device, tf32=self.spec.precision == "tf32"),
        ):
            y = self._g_a(x.to(self._dtype).contiguous(memory_format=torch.channels_last))
        return _ordinary(y)

    @property
    def medians(self) -> Tensor:
        """Median of each channel, float32 (M,): what rounding is centred on.

        Raises:
            UsageError: the encoder has no symbols.
        """
        medians: Tensor = self._bottleneck().quantiles[:, 0, 1].detach().clone()
        return medians

    def quantize(self, y_BMhw: Tensor, *, step: float = 1.0) -> Tensor:
        """Gives the codec's symbols round((y - median) / step), int32, of the shape of y.

        At step 1 they equal CompressAI's `entropy_bottleneck.quantize(y, "symbols", medians)`.

        Args:
            y_BMhw: float32 latents as this encoder gives them, on any device; taken to its own.
            step: Width of a symbol, positive; 1 is the codec's.

        Raises:
            UsageError: the encoder has no symbols, or `step` is not positive.
        """
        return quantizer.quantize(y_BMhw.to(self.device), self.medians, step)

    def dequantize(self, symbols_BMhw: Tensor, *, step: float = 1.0) -> Tensor:
        """Gives y_hat = symbols * step + median, float32, of the shape of the symbols.

        Args:
            symbols_BMhw: Whole numbers of any dtype, on any device; taken to the encoder's.
            step: The step that `quantize` was given.

        Raises:
            UsageError: the encoder has no symbols, or `step` is not positive.
        """
        return quantizer.dequantize(symbols_BMhw.to(self.device), self.medians, step)

    def decode(self, y_hat_BMhw: Tensor) -> Tensor:
        """Runs g_s, in float32 whatever `spec.precision` is.

        Args:
            y_hat_BMhw: Latents, quantised or not.

        Returns:
            x_hat, float32 (B, 3, 16 h, 16 w), not clamped to [0, 1]: CompressAI's
            `model(x)["x_hat"]` in eval.
        """
        y_hat = y_hat_BMhw.to(self.device, torch.float32).contiguous()
        with torch.inference_mode(), fixed_arithmetic(self.device, tf32=False):
            x_hat = self._model.g_s(y_hat)
        return _ordinary(x_hat)

    def bits(self, y_hat_BMhw: Tensor, *, step: float = 1.0) -> Tensor:
        """Gives what coding each sample would cost by the entropy model.

        The likelihood of a symbol is the mass of its bin, y_hat - step/2 to y_hat + step/2, under
        the model's cumulative, with CompressAI's lower bound of 1e-9; at step 1 it is CompressAI's
        `model(x)["likelihoods"]["y"]`. Real entropy coding comes within 1 % of it.

        Args:
            y_hat_BMhw: Dequantised latents.
            step: The step they were quantised with.

        Returns:
            Bits, float64 (B,).

        Raises:
            UsageError: the encoder has no symbols, or `step` is not positive.
        """
        quantizer.check_step(step)
        bottleneck = self._bottleneck()
        y_hat = y_hat_BMhw.to(self.device, torch.float32)
        values_M1K = y_hat.transpose(0, 1).reshape(self.num_channels, 1, -1)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            lower = bottleneck._logits_cumulative(values_M1K - step / 2, stop_gradient=True)
            upper = bottleneck._logits_cumulative(values_M1K + step / 2, stop_gradient=True)
            mass = bottleneck.likelihood_lower_bound(torch.sigmoid(upper) - torch.sigmoid(lower))
            bits_MBK = -torch.log2(mass.double()).reshape(self.num_channels, len(y_hat), -1)
            bits: Tensor = bits_MBK.sum(dim=(0, 2))
        return bits.clone()

    def to_bytes(self) -> bytes:
        """Gives the encoder as a float32 safetensors file; same weights, same bytes.

        `load_saved_encoder` needs nothing else. The precision is not part of it.
        """
        return weights_bytes(value_tensors(self._model), _card(self.spec))

    def save(self, path: Path) -> None:
        """Writes `to_bytes` to `path`, synced; renaming into place is the caller's business."""
        _write_synced(path, self.to_bytes())

    def _bottleneck(self) -> Any:
        if not self.has_symbols:
            raise UsageError(
                f"encoder {self.spec.arch} has no symbols: the means of its latents depend on a "
                "hyperprior. Such encoders are cached as float16 or float32",
                hint="--dtype float16",
            )
        return self._model.entropy_bottleneck


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
        file = bundled_weights()
    elif weights is not None:
        file = read_weights(Path(weights))
    else:
        url = official_url(arch, quality, metric)
        file = read_weights(fetch_weights(url, weights_folder(), progress))
    return _frozen(file, asked, precision, device)


def load_saved_encoder(
    path: Path, *, precision: Precision = "float32", device: str | torch.device = "cpu"
) -> FrozenEncoder:
    """Loads an encoder that `FrozenEncoder.save` wrote, such as a cache's encoder.safetensors.

    Args:
        path: The file; it says itself which architecture it holds.
        precision: Arithmetic of g_a; the file does not fix it.
        device: cpu or cuda.

    Raises:
        WeightsError: the file is missing, foreign or damaged, or its digest is another.
        UsageError: precision or device is unknown.
    """
    file = read_weights(Path(path))
    if file.card is None:
        raise WeightsError(
            f"{path} is no encoder saved by ci2p-cache: it does not say which architecture it holds"
        )
    try:
        check_choice(*_choice(file.card))
    except UsageError as error:
        raise WeightsError(f"weights file {path} is damaged: {error}") from error
    return _frozen(file, _choice(file.card), precision, device)


def save_half(encoder: FrozenEncoder, path: Path) -> FrozenEncoder:
    """Writes an encoder's parameters as float16: how the bundled file was made.

    Constants are left out, because a pedestal of 2**-36 would become 0; loading takes them from
    CompressAI.

    Args:
        encoder: A float32 encoder; stays as it is.
        path: The safetensors file, written as `FrozenEncoder.save` does.

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
    _write_synced(path, weights_bytes(tensors, _card(halved.spec)))
    return halved


def _frozen(
    file: WeightsFile,
    asked: tuple[str, int, Metric],
    precision: Precision,
    device: str | torch.device,
) -> FrozenEncoder:
    """Builds the encoder and holds a file of ours to what it says of itself."""
    if precision not in get_args(Precision):
        raise UsageError(f"`precision` is {precision!r}; wanted {', '.join(get_args(Precision))}")
    arch, quality, metric = asked
    card = file.card
    if card is not None and _choice(card) != asked:
        raise WeightsError(
            f"weights file {file.path} is of {_named(*_choice(card))}; {_named(*asked)} was asked "
            "for",
            hint=f"--arch {card.arch} --quality {card.quality}",
        )
    model = build_model(file, arch, quality)
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


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _choice(card: WeightsCard) -> tuple[str, int, Metric]:
    return card.arch, card.quality, card.metric


def _named(arch: str, quality: int, metric: str) -> str:
    return f"{arch} quality {quality} {metric}"


def _card(spec: EncoderSpec) -> WeightsCard:
    return WeightsCard(
        arch=spec.arch,
        quality=spec.quality,
        metric=spec.metric,
        weights_sha256=spec.weights_sha256,
    )


def _ordinary(values: Tensor) -> Tensor:
    """Copies an inference tensor, whatever its layout, to a contiguous one that autograd takes."""
    return values.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
