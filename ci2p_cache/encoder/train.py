"""Training a codec for one's own domain: CompressAI's factorized model on CompressAI's loss.

Balle, Minnen, Singh, Hwang, Johnston, "Variational image compression with a scale hyperprior",
2018, arXiv 1802.01436: the factorized-prior model of their comparison. ::

    images --crops--> x --g_a--> y --+ noise--> y_hat --g_s--> x_hat
                      |              +--entropy model--> bpp    |
                      +---------------- MSE --------------------+
    loss = lmbda * 255^2 * MSE + bpp        aux loss: the quantiles, hence the medians

The draws of a step are a pure function of (seed, step), so a run that was interrupted and resumed
gives the numbers of one that was not: to the last bit on a CPU with the same number of threads.

Shape suffixes: B batch, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim import Optimizer

from ci2p_cache.encoder.architecture import own_model, value_tensors
from ci2p_cache.encoder.codec_checkpoint import CodecPlace, CodecSpec, CodecStore
from ci2p_cache.encoder.frozen import FrozenEncoder, fixed_arithmetic
from ci2p_cache.encoder.weights import tensor_digest
from ci2p_cache.encoder.zoo import ARCH, compressai_model, require_compressai
from ci2p_cache.errors import CheckpointError, RunMismatchError, TrainingDivergedError, UsageError
from ci2p_cache.machine import checked_device
from ci2p_cache.record import Record, differing_fields
from ci2p_cache.specs import EncoderSpec

__all__ = [
    "CodecSpec",
    "CodecStep",
    "CodecSummary",
    "Muon",
    "TrainingImages",
    "evaluate_rate_distortion",
    "train_codec",
]


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """What is trained on."""

    images: Sequence[Tensor]
    """uint8 (3, H, W), 0-255, RGB, each side at least `crop_px`; items may be made when asked for,
    as long as they are the same every time."""
    draws: Sequence[float]
    """How often each image is drawn, in proportion; positive, as many as images."""
    digest: str
    """What images these are, in the caller's words; a run is resumed with the same ones only."""


def _batch(data: TrainingImages, spec: CodecSpec, step: int) -> Tensor:
    """Returns the batch of a step, random crops in [0, 1]: float32 (B, 3, crop_px, crop_px)."""
    cumulative = np.cumsum(np.asarray(data.draws, dtype=np.float64))
    rng = np.random.default_rng([spec.seed, step])
    crops = []
    for _ in range(spec.batch_size):
        # A draw that rounds up to the whole sum would be behind the last image.
        drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        index = min(int(drawn), len(data.images) - 1)
        crops.append(_crop(data.images[index], rng, spec, index))
    return torch.stack(crops).float().div_(255)


def _crop(image: Tensor, rng: np.random.Generator, spec: CodecSpec, index: int) -> Tensor:
    """Cuts out a random square, shrinks it in half of the cases, and mirrors half of them."""
    size = spec.crop_px
    if (
        image.ndim != 3
        or image.shape[0] != 3
        or image.dtype != torch.uint8
        or min(image.shape[1:]) < size
    ):
        raise UsageError(
            f"image {index} is {tuple(image.shape)} {image.dtype}; wanted (3, H, W) uint8 with "
            f"sides of at least `crop_px` {size}"
        )
    height, width = image.shape[1:]
    scale, shrinks, mirrors, down, right = rng.random(5)
    side = size
    if shrinks < 0.5:
        side = min(round(size / (spec.min_scale + (1 - spec.min_scale) * scale)), height, width)
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    crop = image[:, top : top + side, left : left + side]
    if side != size:
        crop = interpolate(crop[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if mirrors < 0.5 else crop


_QUANTILES = ".quantiles"
"""How their parameter's name ends."""
_MOMENTUM = 0.95
"""The authors'."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The authors' quintic; five rounds bring singular values to about 0.7-1.2."""
_ROUNDS = 5
_ADAM_RMS = 0.2
"""Root mean square of an update at learning rate 1; Liu et al."""


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made nearly orthogonal before it is applied, for convolutions.

    Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer for hidden layers in
    neural networks", 2024, kellerjordan.github.io/posts/muon: all directions of a layer move
    equally fast. Updates have the size of Adam's, so that both take the same learning rate: Liu et
    al., "Muon is scalable for LLM training", 2025, arXiv 2502.16982. torch.optim.Muon takes
    matrices only; a kernel (A, B, k, k) is one of A rows here.

    Args:
        parameters: Kernels of convolutions; `exp_avg`, the averaged gradient of each, is the state.
        lr: Learning rate, on Adam's scale.
        dtype: Arithmetic of the orthogonalisation, float32 or bfloat16. The authors' bfloat16 is
            enough; a CPU without such instructions takes 20 times as long for it as for float32.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is run
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - _MOMENTUM)
                # Nesterov's: the mean as it would be if the same gradient came once more.
                ahead = parameter.grad.lerp(mean, _MOMENTUM).flatten(1)
                scale = _ADAM_RMS * max(ahead.shape) ** 0.5
                update = _orthogonal(ahead, self._dtype).view(parameter.shape)
                parameter.add_(update, alpha=-group["lr"] * scale)


def _orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a matrix of the same singular vectors and singular values near 1, float32."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-12)).to(dtype)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x if wide is matrix else x.T).to(matrix.dtype)
    return result.contiguous()


def _optimizers(parameters: Mapping[str, nn.Parameter], spec: CodecSpec) -> list[Optimizer]:
    """Gives the quantiles' own Adam, and behind it what moves the others: Adam and perhaps Muon."""
    quantiles = [name for name in parameters if name.endswith(_QUANTILES)]
    # Kernels with a side of 3 colours are no mixing of features; Adam suits them better.
    kernels = {n for n, p in parameters.items() if p.ndim == 4 and 3 not in p.shape[:2]}
    by_muon = sorted(kernels) if spec.optimizer == "muon" else []
    rest = sorted(set(parameters) - {*by_muon, *quantiles})
    entropy = [parameters[n] for n in rest if n.startswith("entropy_bottleneck.")]
    others = [parameters[n] for n in rest if not n.startswith("entropy_bottleneck.")]
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": spec.lr},
        {"params": entropy, "lr": spec.entropy_lr},
    ]
    made: list[Optimizer] = [
        torch.optim.Adam([parameters[n] for n in quantiles], lr=spec.aux_lr),
        torch.optim.Adam(groups),
    ]
    if by_muon:
        dtype = getattr(torch, spec.precision)
        made.append(Muon([parameters[n] for n in by_muon], lr=spec.lr, dtype=dtype))
    return made


def _moments(optimizers: Sequence[Optimizer], parameter: Tensor) -> dict[str, Tensor]:
    """Returns an optimiser's state of a parameter, made as its first step would if missing."""
    for optimizer in optimizers:
        if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
            moments: dict[str, Tensor] = optimizer.state[parameter]
            if not moments:
                moments["exp_avg"] = torch.zeros_like(parameter)
                if isinstance(optimizer, torch.optim.Adam):
                    moments["step"] = torch.tensor(0.0)
                    moments["exp_avg_sq"] = torch.zeros_like(parameter)
            return moments
    raise AssertionError("every parameter has an optimiser")


@dataclass(frozen=True, slots=True)
class CodecStep:
    """One optimiser step, as an observer receives it."""

    step: int
    """Steps done, this one included."""
    bpp: float
    """Bits per pixel of the batch by the entropy model, with noise in place of rounding."""
    mse: float
    """Mean squared error of the batch on the scale 0-255."""
    loss: float
    """lmbda * mse + bpp."""
    lr: float
    """Learning rate of this step."""


@dataclass(frozen=True, slots=True)
class CodecSummary:
    """How a call of `train_codec` ended."""

    steps_done: int
    """Steps of the whole run; `spec.steps` unless it was stopped."""
    resumed_at: int
    """Steps that had been done before this call."""
    encoder: FrozenEncoder
    """The averaged weights as they are now, on the CPU, in float32."""


def train_codec(
    data: TrainingImages,
    spec: CodecSpec,
    out: Path,
    *,
    start: FrozenEncoder | None = None,
    device: str | torch.device = "cpu",
    control: Callable[[CodecStep], Literal["go", "save", "stop"]] = lambda _: "go",
) -> CodecSummary:
    """Trains a bmshj2018-factorized codec; continues where `out` holds an unfinished run.

    At the end, and whenever it saves, `out` holds checkpoint.json with the tensors file that it
    names. One process at a time may write there; holding a lock is the caller's business. With
    bfloat16 on a CPU, `tune_process()` beforehand halves the time.

    Args:
        data: The images.
        spec: The settings.
        out: Folder of the run; made where it is missing.
        start: Where the weights come from; None: random ones of `spec.seed`.
        device: cpu or cuda.
        control: Called after each step: continue, save a checkpoint and continue, or save and stop.

    Returns:
        The codec with averaged weights; `encoder.save(path)` writes what `load_encoder` reads.

    Raises:
        UsageError: an image is smaller than the crop or not uint8 (3, H, W), the draws do not
            belong to the images, `start` is another architecture, or there is no such device.
        MissingDependencyError: compressai cannot be imported.
        RunMismatchError: `out` holds a run with other settings, images or start.
        CheckpointError: its checkpoint is damaged.
        TrainingDivergedError: the loss is not finite; the last checkpoint stays.
        ResourceError: a checkpoint cannot be written.
    """
    require_compressai(
        "training a codec", instead="train on Python 3.11 or 3.12; encoding works on any"
    )
    if len(data.images) == 0 or len(data.draws) != len(data.images) or min(data.draws) <= 0:
        raise UsageError(
            f"{len(data.images)} images and {len(data.draws)} draws; wanted at least one image and "
            "a positive number for each"
        )
    run = _Run(spec, start, checked_device(device))
    store = CodecStore(out)
    state = store.load()
    if state is not None:
        _check_same_run(out, state[0], run.state(data.digest)[0])
        run.load(*state)
    resumed_at = saved_at = run.step
    while run.step < spec.steps:
        done = run.advance(_batch(data, spec, run.step))
        wish = control(done)
        if wish != "go" or run.step == spec.steps:
            store.save(*run.state(data.digest))
            saved_at = run.step
        if wish == "stop":
            break
    assert saved_at == run.step
    return CodecSummary(run.step, resumed_at, run.encoder())


class _Run:
    """Weights, their average and the optimisers, at some step."""

    def __init__(self, spec: CodecSpec, start: FrozenEncoder | None, device: torch.device) -> None:
        self.spec = spec
        self.step = 0
        self._device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model = compressai_model(ARCH, spec.quality)
        if start is not None:
            if (start.spec.arch, start.spec.quality) != (ARCH, spec.quality):
                raise UsageError(f"`start` is {start!r}; wanted {ARCH} quality {spec.quality}")
            model.load_state_dict({**model.state_dict(), **value_tensors(start._model)})
        self._start = tensor_digest(value_tensors(model))
        self._model: Any = model.to(device, memory_format=torch.channels_last).train()
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._mean = {name: p.detach().clone() for name, p in self._parameters.items()}
        parameters = dict(model.named_parameters())
        self._trained = [p for name, p in parameters.items() if not name.endswith(_QUANTILES)]
        self._of_quantiles, *self._of_loss = _optimizers(parameters, spec)
        self._groups = [group for o in self._of_loss for group in o.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        # Importing compressai takes seconds.
        from compressai.losses import RateDistortionLoss

        self._loss = RateDistortionLoss(lmbda=spec.lmbda, metric="mse")

    def advance(self, x_B3HW: Tensor) -> CodecStep:
        """Makes one step on a batch in [0, 1]."""
        spec, model = self.spec, self._model
        x = x_B3HW.to(self._device).contiguous(memory_format=torch.channels_last)
        share = _schedule(self.step, spec)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * share
        bf16 = spec.precision == "bfloat16"
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # CompressAI draws its noise from torch's global generator. Both are mixed, so that no
            # two steps of neighbouring seeds share their noise.
            mixed = np.random.SeedSequence([spec.seed, self.step, 1]).generate_state(1)
            torch.manual_seed(int(mixed[0]))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
                y = model.g_a(x)
            y_hat, likelihoods = model.entropy_bottleneck(y.float())
            with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
                x_hat = model.g_s(y_hat)
        out = self._loss({"x_hat": x_hat.float(), "likelihoods": {"y": likelihoods}}, x)
        model.zero_grad(set_to_none=True)
        out["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self._trained, spec.clip_norm)
        if not math.isfinite(out["loss"].item()) or not math.isfinite(norm.item()):
            raise TrainingDivergedError(
                f"step {self.step + 1}: the loss is {out['loss'].item()}, its gradient's norm "
                f"{norm.item()}; the last checkpoint is as it was",
                hint="start again in a new folder with half the learning rate",
            )
        for optimizer in self._of_loss:
            optimizer.step()
        # CompressAI's second loss: it reaches the quantiles only, which the first one does not.
        model.aux_loss().backward()
        self._of_quantiles.step()
        decay = min(spec.ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, mean in self._mean.items():
                mean.lerp_(self._parameters[name], 1 - decay)
        self.step += 1
        bpp, mse = out["bpp_loss"].item(), 255**2 * out["mse_loss"].item()
        return CodecStep(self.step, bpp, mse, out["loss"].item(), spec.lr * share)

    def state(self, images: str) -> tuple[CodecPlace, Mapping[str, Tensor]]:
        """Returns all that `load` needs, as it is now."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"model/{name}"] = parameter
            tensors[f"mean/{name}"] = self._mean[name]
            moments = _moments([*self._of_loss, self._of_quantiles], parameter)
            for key, value in moments.items():
                tensors[f"{key}/{name}"] = value
        place = CodecPlace(step=self.step, spec=self.spec, images=images, start=self._start)
        return place, tensors

    @torch.no_grad()
    def load(self, place: CodecPlace, tensors: Mapping[str, Tensor]) -> None:
        """Goes to a state of the same run.

        Raises:
            CheckpointError: its tensors are not those of this model.
        """
        for name, tensor in self.state("")[1].items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise CheckpointError(
                    f"the checkpoint's {name!r} is missing or has another shape or dtype; wanted "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(found)
        self.step = place.step

    def encoder(self) -> FrozenEncoder:
        """Returns the averaged weights as a separate encoder."""
        model = own_model(self.spec.quality, self._mean)
        spec = EncoderSpec(
            arch=ARCH,
            quality=self.spec.quality,
            metric="mse",
            weights_sha256=tensor_digest(value_tensors(model)),
            precision="float32",
        )
        return FrozenEncoder(model, spec, device="cpu")


def _schedule(step: int, spec: CodecSpec) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then a cosine that ends at 0.

    Loshchilov and Hutter 2017, arXiv 1608.03983.
    """
    warmup = min(spec.warmup_steps, spec.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup + 1) / (spec.steps - warmup + 1))) / 2


def _check_same_run(out: Path, found: CodecPlace, wanted: CodecPlace) -> None:
    different = [
        f"`{name}` {was!r}, now {now!r}"
        for name, now, was in [
            *differing_fields(wanted.spec, found.spec),
            ("images", wanted.images, found.images),
            ("start", wanted.start, found.start),
        ]
        if was != now
    ]
    if different:
        raise RunMismatchError(
            f"{out} holds a run with other settings, at step {found.step}: {'; '.join(different)}",
            hint="repeat the run's own settings to continue with it, or name another --out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RateDistortion(Record):
    """One point of a codec on a set of images; every figure is a mean over the images."""

    num_images: int
    """How many images were coded."""
    bpp: float
    """Bits per pixel of the entropy coder's bytes (CompressAI's rANS)."""
    bpp_estimated: float
    """Bits per pixel by the entropy model's likelihoods, without a coder."""
    mse: float
    """Mean squared error on the scale 0-255, reconstruction clamped and not rounded."""
    psnr_db: float
    """10 log10(255^2 / MSE) of each image, then the mean."""
    lmbda: float
    """The weight of the distortion in `cost`."""
    cost: float
    """lmbda * mse + bpp: CompressAI's loss, `lmbda * 255^2 * MSE + bpp` with MSE on [0, 1]."""


def evaluate_rate_distortion(
    encoder: FrozenEncoder, images: Iterable[Tensor], *, lmbda: float = 0.025
) -> RateDistortion:
    """Codes whole images to bytes and back, one by one, in float32.

    Sides that are no multiples of 16 are padded with zeros by g_a's convolutions; the
    reconstruction is cut back, and the bits are divided by the pixels of the image.

    Args:
        encoder: A codec with symbols; stays as it is.
        images: uint8 (3, H, W), 0-255, RGB, of any sizes.
        lmbda: The weight of the distortion; 0.025 is CompressAI's for quality 5 and mse.

    Raises:
        UsageError: there are no images, one has another shape or dtype, or the encoder has no
            symbols.
        MissingDependencyError: compressai cannot be imported.
    """
    if not encoder.has_symbols:
        raise UsageError(f"{encoder!r} has no symbols of its own, so y alone cannot be coded")
    require_compressai(
        "real entropy coding",
        instead="FrozenEncoder.bits estimates the bits without it, and comes within 1 %",
    )
    model = compressai_model(ARCH, encoder.spec.quality).eval()
    model.load_state_dict({**model.state_dict(), **value_tensors(encoder._model)})
    model.to(device=encoder.device, memory_format=torch.channels_last).update()
    rows: list[tuple[float, float, float, float]] = []
    with torch.inference_mode(), fixed_arithmetic(encoder.device, tf32=False):
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
                raise UsageError(
                    f"image {len(rows)} has shape {tuple(image.shape)} and dtype {image.dtype}; "
                    "wanted (3, H, W) uint8"
                )
            x = image[None].to(encoder.device).float().div(255)
            x = x.contiguous(memory_format=torch.channels_last)
            num_pixels = x.shape[2] * x.shape[3]
            coded = model.compress(x)
            x_hat = model.decompress(coded["strings"], coded["shape"])["x_hat"]
            x_hat = x_hat[:, :, : x.shape[2], : x.shape[3]]
            _, likelihoods = model.entropy_bottleneck(model.g_a(x))
            bits = -torch.log2(likelihoods.double()).sum().item()
            mse = (x_hat - x).mul(255).square().double().mean().item()
            num_bytes = sum(len(string) for strings in coded["strings"] for string in strings)
            psnr = 10 * math.log10(255**2 / mse) if mse > 0 else math.inf
            rows.append((8 * num_bytes / num_pixels, bits / num_pixels, mse, psnr))
    if not rows:
        raise UsageError("there are no images to evaluate on; wanted at least one")
    bpp, estimated, mse, psnr = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return RateDistortion(
        num_images=len(rows),
        bpp=bpp,
        bpp_estimated=estimated,
        mse=mse,
        psnr_db=psnr,
        lmbda=lmbda,
        cost=lmbda * mse + bpp,
    )
