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

`CodecSpec`: every setting that changes the numbers of a codec's training.

The batch of a step: random crops of the training images, a pure function of seed and step.

What is trained with them is not known here. Shape suffixes: B batch, H W pixels.

Muon for convolutions: momentum whose matrix is made nearly orthogonal before it is applied.

Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer for hidden layers in
neural networks", 2024, kellerjordan.github.io/posts/muon. All directions of a layer move equally
fast, also those whose gradients are small. The scale that gives its updates the size of Adam's,
so that both take the same learning rate, is that of Liu et al., "Muon is scalable for LLM
training", 2025, arXiv 2502.16982.

torch.optim.Muon takes matrices only; a kernel (A, B, k, k) is one of A rows here.

What moves a codec's parameters: Muon or Adam for the loss, and an Adam of the quantiles' own.

Where gradients come from, and when a step is made, is not known here.
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
from ci2p_cache.encoder.codec_checkpoint import (
    CODEC_ARCH,
    CodecPlace,
    CodecSpec,
    CodecState,
    CodecStore,
)
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.weights import tensor_digest
from ci2p_cache.encoder.zoo import compressai_model, require_compressai
from ci2p_cache.errors import CheckpointError, RunMismatchError, TrainingDivergedError, UsageError
from ci2p_cache.machine import checked_device
from ci2p_cache.record import differing_fields
from ci2p_cache.specs import EncoderSpec

__all__ = [
    "CodecOptimizers",
    "CodecSpec",
    "CodecStep",
    "CodecSummary",
    "Crops",
    "Muon",
    "TrainingImages",
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


class Crops:
    """Batches of random crops of training images.

    Args:
        data: The images.
        spec: Seed, batch size, and how crops are drawn.

    Raises:
        UsageError: there are no images, or the draws do not belong to them.
    """

    def __init__(self, data: TrainingImages, spec: CodecSpec) -> None:
        if len(data.images) == 0 or len(data.draws) != len(data.images) or min(data.draws) <= 0:
            raise UsageError(
                f"{len(data.images)} images and {len(data.draws)} draws; wanted at least one image "
                "and a positive number for each"
            )
        self._images = data.images
        self._spec = spec
        self._cumulative = np.cumsum(np.asarray(data.draws, dtype=np.float64))

    def batch(self, step: int) -> Tensor:
        """Gives the batch of a step: float32 (B, 3, crop_px, crop_px) in [0, 1].

        Raises:
            UsageError: an image is smaller than the crop or not uint8 (3, H, W).
        """
        rng = np.random.default_rng([self._spec.seed, step])
        crops = []
        for _ in range(self._spec.batch_size):
            # A draw that rounds up to the whole sum would be behind the last image.
            drawn = rng.random() * self._cumulative[-1]
            place = np.searchsorted(self._cumulative, drawn, side="right")
            index = min(int(place), len(self._images) - 1)
            crops.append(_crop(self._images[index], rng, self._spec, index))
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


_MOMENTUM = 0.95
"""The authors'."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The authors' quintic; five rounds bring singular values to about 0.7-1.2."""
_ROUNDS = 5
_ADAM_RMS = 0.2
"""Root mean square of an update at learning rate 1; Liu et al."""


class Muon(torch.optim.Optimizer):
    """The optimiser; its state is `exp_avg`, the averaged gradient of each parameter.

    Args:
        parameters: Kernels of convolutions, each of at least two dimensions.
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
    """Gives a matrix of the same singular vectors and singular values near 1, float32."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-12)).to(dtype)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x if wide is matrix else x.T).to(matrix.dtype)
    return result.contiguous()


class CodecOptimizers:
    """The optimisers of a bmshj2018-factorized codec.

    Args:
        parameters: All parameters of the model, by their names in it.
        spec: Learning rates, the kind, and where gradients are clipped.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: CodecSpec) -> None:
        # Kernels with a side of 3 colours are no mixing of features; Adam suits them better.
        kernels = {n for n, p in parameters.items() if p.ndim == 4 and 3 not in p.shape[:2]}
        by_muon = sorted(kernels) if spec.optimizer == "muon" else []
        rest = sorted(n for n in parameters if n not in by_muon and not _is_quantile(n))
        entropy = [parameters[n] for n in rest if n.startswith("entropy_bottleneck.")]
        others = [parameters[n] for n in rest if not n.startswith("entropy_bottleneck.")]
        groups: list[dict[str, Any]] = [
            {"params": others, "lr": spec.lr},
            {"params": entropy, "lr": spec.entropy_lr},
        ]
        quantiles = [p for name, p in parameters.items() if _is_quantile(name)]
        self._of_quantiles = torch.optim.Adam(quantiles, lr=spec.aux_lr)
        self._of_loss: list[Optimizer] = [torch.optim.Adam(groups)]
        if by_muon:
            dtype = getattr(torch, spec.precision)
            muon = Muon([parameters[n] for n in by_muon], lr=spec.lr, dtype=dtype)
            self._of_loss.append(muon)
        self._groups = [group for o in self._of_loss for group in o.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        self._trained = [p for name, p in parameters.items() if not _is_quantile(name)]
        self._clip_norm = spec.clip_norm

    def scale_lr(self, share: float) -> None:
        """Sets every learning rate of the loss to a share of its peak."""
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * share

    def clip_gradients(self) -> Tensor:
        """Clips the gradients of the loss; returns their L2 norm before, a scalar."""
        return nn.utils.clip_grad_norm_(self._trained, self._clip_norm)

    def step(self) -> None:
        """Moves all but the quantiles."""
        for optimizer in self._of_loss:
            optimizer.step()

    def step_quantiles(self) -> None:
        """Moves the quantiles."""
        self._of_quantiles.step()

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Gives an optimiser's state of a parameter, made as its first step would if missing."""
        for optimizer in (*self._of_loss, self._of_quantiles):
            if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                moments: dict[str, Tensor] = optimizer.state[parameter]
                if not moments:
                    moments["exp_avg"] = torch.zeros_like(parameter)
                    if isinstance(optimizer, torch.optim.Adam):
                        moments["step"] = torch.tensor(0.0)
                        moments["exp_avg_sq"] = torch.zeros_like(parameter)
                return moments
        raise AssertionError("every parameter has an optimiser")


def _is_quantile(name: str) -> bool:
    return name.endswith(".quantiles")


@dataclass(frozen=True, slots=True)
class CodecStep:
    """One optimiser step, as an observer is told of it."""

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
    """Of the whole run; `spec.steps` unless it was told to stop."""
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
    bfloat16 on a CPU, `machine.tune_allocator()` beforehand halves the time.

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
        TrainingDivergedError: the loss is not finite; the last checkpoint is kept.
        ResourceError: a checkpoint cannot be written.
    """
    require_compressai(
        "training a codec", instead="train on Python 3.11 or 3.12; encoding works on any"
    )
    crops = Crops(data, spec)
    run = _Run(spec, start, checked_device(device))
    store = CodecStore(out)
    state = store.load()
    if state is not None:
        _check_same_run(out, state.place, run.state(data.digest).place)
        run.load(state)
    resumed_at = saved_at = run.step
    while run.step < spec.steps:
        done = run.advance(crops.batch(run.step))
        wish = control(done)
        if wish != "go" or run.step == spec.steps:
            store.save(run.state(data.digest))
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
            model = compressai_model(CODEC_ARCH, spec.quality)
        if start is not None:
            if (start.spec.arch, start.spec.quality) != (CODEC_ARCH, spec.quality):
                raise UsageError(
                    f"`start` is {start!r}; wanted {CODEC_ARCH} quality {spec.quality}"
                )
            model.load_state_dict({**model.state_dict(), **value_tensors(start._model)})
        self._start = tensor_digest(value_tensors(model))
        self._model: Any = model.to(device, memory_format=torch.channels_last).train()
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._mean = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._optimizers = CodecOptimizers(dict(model.named_parameters()), spec)
        # Importing compressai takes seconds.
        from compressai.losses import RateDistortionLoss

        self._loss = RateDistortionLoss(lmbda=spec.lmbda, metric="mse")

    def advance(self, x_B3HW: Tensor) -> CodecStep:
        """Makes one step on a batch in [0, 1]."""
        spec, model = self.spec, self._model
        x = x_B3HW.to(self._device).contiguous(memory_format=torch.channels_last)
        share = _schedule(self.step, spec)
        self._optimizers.scale_lr(share)
        bf16 = spec.precision == "bfloat16"
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            # CompressAI draws its noise from torch's global generator.
            torch.manual_seed(_noise_seed(spec.seed, self.step))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
                y = model.g_a(x)
            y_hat, likelihoods = model.entropy_bottleneck(y.float())
            with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
                x_hat = model.g_s(y_hat)
        out = self._loss({"x_hat": x_hat.float(), "likelihoods": {"y": likelihoods}}, x)
        model.zero_grad(set_to_none=True)
        out["loss"].backward()
        norm = self._optimizers.clip_gradients()
        if not math.isfinite(out["loss"].item()) or not math.isfinite(norm.item()):
            raise TrainingDivergedError(
                f"step {self.step + 1}: the loss is {out['loss'].item()}, its gradient's norm "
                f"{norm.item()}; the last checkpoint is as it was",
                hint="start again in a new folder with half the learning rate",
            )
        self._optimizers.step()
        # CompressAI's second loss: it reaches the quantiles only, which the first one does not.
        model.aux_loss().backward()
        self._optimizers.step_quantiles()
        decay = min(spec.ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for name, mean in self._mean.items():
                mean.lerp_(self._parameters[name], 1 - decay)
        self.step += 1
        bpp, mse = out["bpp_loss"].item(), 255**2 * out["mse_loss"].item()
        return CodecStep(self.step, bpp, mse, out["loss"].item(), spec.lr * share)

    def state(self, images: str) -> CodecState:
        """Gives all that `load` needs, as it is now."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"model/{name}"] = parameter
            tensors[f"mean/{name}"] = self._mean[name]
            for key, value in self._optimizers.moments(parameter).items():
                tensors[f"{key}/{name}"] = value
        place = CodecPlace(step=self.step, spec=self.spec, images=images, start=self._start)
        return CodecState(place, tensors)

    @torch.no_grad()
    def load(self, state: CodecState) -> None:
        """Goes to a state of the same run.

        Raises:
            CheckpointError: its tensors are not those of this model.
        """
        wanted = self.state("").tensors
        for name, tensor in wanted.items():
            found = state.tensors.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise CheckpointError(
                    f"the checkpoint's {name!r} is missing or has another shape or dtype; wanted "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(found)
        self.step = state.place.step

    def encoder(self) -> FrozenEncoder:
        """Gives the averaged weights as an encoder of their own."""
        model = own_model(self.spec.quality, self._mean)
        spec = EncoderSpec(
            arch=CODEC_ARCH,
            quality=self.spec.quality,
            metric="mse",
            weights_sha256=tensor_digest(value_tensors(model)),
            precision="float32",
        )
        return FrozenEncoder(model, spec, device="cpu")


def _schedule(step: int, spec: CodecSpec) -> float:
    """Gives the share of the peak learning rate: linear warm-up, then a cosine that ends at 0.

    Loshchilov and Hutter 2017, arXiv 1608.03983.
    """
    warmup = min(spec.warmup_steps, spec.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup + 1) / (spec.steps - warmup + 1))) / 2


def _noise_seed(seed: int, step: int) -> int:
    """Mixes both, so that no two steps of neighbouring seeds share their noise."""
    return int(np.random.SeedSequence([seed, step, 1]).generate_state(1)[0])


def _check_same_run(out: Path, found: CodecPlace, wanted: CodecPlace) -> None:
    """Refuses to continue with a run of other settings.

    Raises:
        RunMismatchError: names what differs.
    """
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
