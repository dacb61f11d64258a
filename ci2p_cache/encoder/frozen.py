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

import contextlib
import copy
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ci2p_cache.encoder.architecture import Codec, EntropyBottleneck, FactorizedPrior, value_tensors
from ci2p_cache.encoder.weights import WeightsCard, weights_bytes
from ci2p_cache.errors import UsageError
from ci2p_cache.gdn import GDN, AnalysisTransform, FrozenGDN
from ci2p_cache.machine import checked_device
from ci2p_cache.record import write_synced
from ci2p_cache.specs import DOWNSAMPLING, EncoderSpec, LatentSpec

__all__ = [
    "FrozenEncoder",
    "analysis_transform",
    "dequantize",
    "fixed_arithmetic",
    "quantize",
    "saturate",
]


def quantize(y_BMhw: Tensor, medians_M: Tensor, step: float = 1.0) -> Tensor:
    """Returns the symbols round((y - median) / step), int32, halves to even.

    At step 1 they equal CompressAI's `EntropyBottleneck.quantize(y, "symbols", medians)` bit for
    bit (Balle et al. 2018, arXiv 1802.01436), because dividing by 1.0 changes no float.

    Raises:
        UsageError: `step`, the width of a bin in units of y, is not positive and finite.
    """
    _check_step(step)
    scaled = y_BMhw.to(torch.float32) - medians_M[:, None, None]
    return scaled.div_(step).round_().to(torch.int32)


def dequantize(symbols_BMhw: Tensor, medians_M: Tensor, step: float = 1.0) -> Tensor:
    """Returns y_hat = symbols * step + median, float32; the reverse of `quantize`.

    At step 1 it equals CompressAI's `EntropyBottleneck.dequantize` bit for bit, as long as the
    absolute value of a symbol is below 2**24.
    """
    _check_step(step)
    # Two roundings, product then sum, as numpy's float32(symbols) * step + median does it.
    return symbols_BMhw.to(torch.float32).mul_(step).add_(medians_M[:, None, None])


def saturate(symbols_BMhw: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Clamps symbols to what the stored dtype holds, and counts what was lost.

    Args:
        symbols_BMhw: int32 symbols with at least the dimensions (M, h, w).
        limit: The largest absolute symbol stored, `LatentSpec.symbol_limit`: 127 or 32767. The
            dtype's own minimum stays free, it is the fill value of a hole.

    Returns:
        The clamped symbols, int8 where `limit` is at most 127, else int16; and the number of
        clamped symbols per channel, int64: (M,) for one latent, (B, M) for a batch.
    """
    if not 0 < limit <= 32767:
        raise UsageError(f"`limit` is {limit}; 1 to 32767 are possible (127 for int8)")
    if symbols_BMhw.ndim < 3:
        raise UsageError(
            f"symbols have shape {tuple(symbols_BMhw.shape)}; at least (M, h, w) is wanted"
        )
    # Not abs(): the smallest int32 has no positive twin.
    clipped = (symbols_BMhw > limit) | (symbols_BMhw < -limit)
    dtype = torch.int8 if limit <= 127 else torch.int16
    return symbols_BMhw.clamp(-limit, limit).to(dtype), clipped.sum(dim=(-2, -1))


def _check_step(step: float) -> None:
    """Refuses a quantisation step that is not a positive number."""
    if not (math.isfinite(step) and step > 0):
        raise UsageError(f"`step` is {step}; it must be positive and finite")


# cuDNN's switches belong to the process: two threads must not set them at the same time.
_CUDNN_LOCK = threading.Lock()


@contextlib.contextmanager
def fixed_arithmetic(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Holds convolutions to one arithmetic for a while, whatever the process has switched on.

    float32 means IEEE products and sums; an autocast region around the call does not reach in. On
    CUDA cuDNN chooses among deterministic algorithms, and not by timing them; `tf32` says whether
    it may round products to TF32 there.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type == "cpu":
            # oneDNN computes in bfloat16 or tf32 only if a caller asks for it ("none": none did).
            onednn: Any = cast("Any", torch.backends.mkldnn).conv
            before = onednn.fp32_precision
            onednn.fp32_precision = "none" if before == "none" else "ieee"
            try:
                yield
            finally:
                onednn.fp32_precision = before
            return
        cudnn: Any = torch.backends.cudnn
        with _CUDNN_LOCK:
            before = (cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark)
            cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
            cudnn.deterministic, cudnn.benchmark = True, False
            try:
                yield
            finally:
                cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


logger = logging.getLogger(__name__)

_AT_ONCE = {torch.float32: 1, torch.bfloat16: 2}
"""Images that a CPU runs through g_a at a time, however large the batch: as fast as eight, in an
eighth of the memory (25 MB of activations at 256 px) and, where the process is not tuned, without
page faults (float32, AMD EPYC with AVX-512: 28 ms of processor time an image against 38)."""


class FrozenEncoder:
    """A codec whose weights never change; made by `load_encoder` and `load_saved_encoder`.

    Calls take tensors on any device and return ordinary tensors on `device`, contiguous, without
    gradients. On CPU, threads may share one encoder. On CUDA, calls are serialised, and while
    their kernels are launched cuDNN's process-wide switches are set to the encoder's. It can be
    deep-copied.

    Args:
        model: Our own model or compressai's, with its weights; belongs to the encoder from then on.
        spec: What it is.
        device: Where it runs; cpu or cuda.

    Raises:
        UsageError: there is no such device.
    """

    downsampling = DOWNSAMPLING
    """Pixels of a side per latent row or column."""

    def __init__(self, model: Codec, spec: EncoderSpec, *, device: str | torch.device) -> None:
        self.spec = spec
        self.device = checked_device(device)
        self.num_channels = int(model.M)
        self.has_symbols = isinstance(model, FactorizedPrior)
        self._model = model.eval().requires_grad_(False)
        self._model.to(self.device).to(memory_format=torch.channels_last)
        g_a, self._dtype = self._model.g_a, torch.float32
        if spec.precision == "bf16":
            self._dtype = torch.bfloat16
            g_a = copy.deepcopy(g_a).to(torch.bfloat16)
        self._at_once: int | None = None
        if isinstance(g_a, AnalysisTransform):
            g_a = nn.Sequential(*(FrozenGDN(m) if isinstance(m, GDN) else m for m in g_a))
            self._at_once = _AT_ONCE[self._dtype] if self.device.type == "cpu" else None
        self._g_a = g_a
        if spec.precision == "tf32" and self.device.type == "cpu":
            logger.warning("precision tf32 exists on CUDA only; on cpu g_a runs in float32")

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"FrozenEncoder({spec.arch}, quality {spec.quality}, {spec.metric}, {spec.precision}, "
            f"weights {spec.weights_sha256[:12]}, {self.device})"
        )

    def to(self, device: str | torch.device) -> FrozenEncoder:
        """Returns the same encoder on another device; this one stays as it is.

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
            parts = torch.split(x.to(self._dtype), self._at_once or max(len(x), 1))
            y = torch.cat(
                [self._g_a(part.contiguous(memory_format=torch.channels_last)) for part in parts]
            )
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
        """Returns the codec's symbols round((y - median) / step), int32, of the shape of y.

        At step 1 they equal CompressAI's `entropy_bottleneck.quantize(y, "symbols", medians)`.

        Args:
            y_BMhw: float32 latents as this encoder gives them, on any device; taken to its own.
            step: Width of a symbol, positive; 1 is the codec's.

        Raises:
            UsageError: the encoder has no symbols, or `step` is not positive.
        """
        return quantize(y_BMhw.to(self.device), self.medians, step)

    def dequantize(self, symbols_BMhw: Tensor, *, step: float = 1.0) -> Tensor:
        """Returns y_hat = symbols * step + median, float32, of the shape of the symbols.

        Args:
            symbols_BMhw: Whole numbers of any dtype, on any device; taken to the encoder's.
            step: The step that `quantize` was given.

        Raises:
            UsageError: the encoder has no symbols, or `step` is not positive.
        """
        return dequantize(symbols_BMhw.to(self.device), self.medians, step)

    def stored(self, y_BMhw: Tensor, latent: LatentSpec) -> tuple[Tensor, Tensor]:
        """Returns what a cache stores of y: saturated symbols, or y itself, of the cache's dtype.

        Args:
            y_BMhw: float32 latents as this encoder gives them, on any device.
            latent: What the cache stores.

        Returns:
            The stored values, and the number of saturated symbols per channel, int64 (B, M).

        Raises:
            UsageError: symbols are stored, and the encoder has none.
        """
        if latent.is_symbols:
            return saturate(self.quantize(y_BMhw, step=latent.step), latent.symbol_limit)
        clipped = torch.zeros(y_BMhw.shape[:2], dtype=torch.int64)
        return y_BMhw.to(getattr(torch, latent.dtype)), clipped

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
        """Returns what coding each sample would cost by the entropy model.

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
        _check_step(step)
        bottleneck = self._bottleneck()
        y_hat = y_hat_BMhw.to(self.device, torch.float32)
        values_M1K = y_hat.transpose(0, 1).reshape(self.num_channels, 1, -1)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            mass = bottleneck.bin_mass(values_M1K, step)
            bits_MBK = -torch.log2(mass.double()).reshape(self.num_channels, len(y_hat), -1)
            bits: Tensor = bits_MBK.sum(dim=(0, 2))
        return bits.clone()

    def to_bytes(self) -> bytes:
        """Returns the encoder as a float32 safetensors file; same weights, same bytes.

        `load_saved_encoder` needs nothing else. The precision is not part of it.
        """
        return weights_bytes(value_tensors(self._model), WeightsCard.of(self.spec))

    def save(self, path: Path) -> None:
        """Writes `to_bytes` to `path`, synced; renaming into place is the caller's business."""
        write_synced(path, self.to_bytes())

    def _bottleneck(self) -> EntropyBottleneck:
        if not isinstance(self._model, FactorizedPrior):
            raise UsageError(
                f"encoder {self.spec.arch} has no symbols: the means of its latents depend on a "
                "hyperprior. Such encoders are cached as float16 or float32",
                hint="repeat the command with --dtype float16",
            )
        return self._model.entropy_bottleneck


def _ordinary(values: Tensor) -> Tensor:
    """Copies an inference tensor to a contiguous one that autograd takes."""
    return values.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def analysis_transform(encoder: FrozenEncoder) -> nn.Module:
    """Copies g_a: images (B, 3, H, W) in [0, 1] to y (B, M, h, w), in float32 on the CPU.

    Raises:
        UsageError: the encoder computes in bfloat16: a float32 graph would give other latents.
    """
    if encoder.spec.precision == "bf16":
        raise UsageError(
            "the encoder's `precision` is bf16, which a float32 graph does not repeat",
            hint="export the model alone: --what model",
        )
    g_a: nn.Module = copy.deepcopy(encoder._model.g_a)
    return g_a.to("cpu", torch.float32)
