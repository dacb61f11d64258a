"""Sums of an epoch that stay on the device, the pass over a split, and BatchNorm's statistics.

While it trains, BatchNorm follows mean and variance by a running average over some ten steps. In a
short run that average still holds its start, mean 0 and variance 1, and lags behind the weights.
So before weights are used or saved, means and variances are computed again from some training
samples (Wu and Johnson 2021, arXiv 2105.07576, who call it PreciseBN), as
`torch.optim.swa_utils.update_bn` does, but

- with dropout and stochastic depth off, as in validation, so that nothing random is drawn;
- with the batches shared out among the ranks: any number of ranks gives the same values;
- without batches whose statistics are not finite;
- no further than the last BatchNorm, behind which a forward pass changes no statistics.

Training normalises by its batches and never reads these statistics, so its weights stay the same.
Shape suffixes: B batch, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from ci2p_cache.cache.split import Split
from ci2p_cache.loader.batches import Batch, BatchLoader
from ci2p_cache.loader.latents import LatentLoader
from ci2p_cache.loader.order import Rows, block_order, epoch_order, rank_slice
from ci2p_cache.loader.pixels import PixelLoader
from ci2p_cache.training.ranks import Ranks
from ci2p_cache.training.spec import TrainSpec

__all__ = [
    "BatchNormStatistics",
    "TrainTotals",
    "Validation",
    "autocast",
    "opened_statistics",
    "validate",
]

_TOP = 5
_ALONE = Ranks()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context a forward pass runs in: bf16 autocast, or none for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class TrainTotals:
    """Sums over the steps of an epoch; nothing waits for the device until `read`.

    float64, so that a sum saved in the middle of an epoch continues to the same last bit. `start`
    is what an earlier `read` gave; empty at the start of an epoch.
    """

    NAMES = ("loss", "top1", "grad_norm", "images", "steps", "skipped")

    def __init__(self, device: torch.device, start: Mapping[str, float]) -> None:
        values = [start.get(name, 0.0) for name in self.NAMES]
        self._sums = torch.tensor(values, dtype=torch.float64, device=device)
        self._one_step = self._sums.new_tensor([1, 0])
        self._skipped = torch.zeros_like(self._sums)
        self._skipped[-1] = 1

    def add(
        self, *, loss: Tensor, correct: Tensor, grad_norm: Tensor, images: int, is_finite: Tensor
    ) -> None:
        """Adds a step: its mean loss, number of hits and L2 norm of all gradients, all scalars.

        Where `is_finite` is False the step counts only as skipped.
        """
        count = self._sums.new_full((), images)
        step = torch.stack([loss.double() * images, correct.double(), grad_norm.double(), count])
        self._sums += torch.where(is_finite, torch.cat([step, self._one_step]), self._skipped)

    def read(self) -> dict[str, float]:
        """Returns the sums by name, after waiting for the device."""
        return dict(zip(self.NAMES, self._sums.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Validation:
    """What a pass over the validation split gives."""

    loss: float
    """Mean cross-entropy per image, without label smoothing."""
    top1: float
    """Share of images whose class came first, 0 to 1."""
    top5: float
    """Share of images whose class was among the first five, or all where there are fewer."""


@torch.inference_mode()
def validate(
    model: nn.Module,
    loader: BatchLoader,
    *,
    precision: str,
    should_stop: Callable[[], bool],
    ranks: Ranks = _ALONE,
    observe: Callable[[Batch, Tensor], None] | None = None,
) -> Validation | None:
    """Runs the model in eval mode over every image of a split once, over all ranks together.

    Args:
        model: Its mode is put back afterwards.
        loader: Unshuffled; started at the beginning of its epoch.
        precision: float32 or bf16.
        should_stop: Asked before each batch; gives all ranks the same answer.
        ranks: Those that share the loader's batches.
        observe: Shown each batch with its logits, float32 (B, K) on its device; both may be used
            again for the next one.

    Returns:
        The means over all ranks' images, or None where it was stopped.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=loader.device)
    loader.set_epoch(0)
    try:
        for batch in loader:
            if should_stop():
                return None
            if not len(batch.labels):
                continue
            with autocast(loader.device, precision):
                logits_BK = model(batch.latents.contiguous(memory_format=torch.channels_last))
            sums += _scores(logits_BK.float(), batch.labels)
            if observe is not None:
                observe(batch, logits_BK.float())
    finally:
        model.train(was_training)
    ranks.add_up([sums])
    loss, top1, top5 = (sums / loader.num_samples).tolist()
    return Validation(loss, top1, top5)


def _scores(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Returns the sums over a batch of loss, top-1 hits and top-5 hits, float64 (3,)."""
    loss = cross_entropy(logits_BK, labels_B, reduction="sum")
    ranked = logits_BK.topk(min(_TOP, logits_BK.shape[1]), dim=1).indices
    hits = ranked == labels_B[:, None]
    return torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])


_BATCH_SIZE = 64
"""Largest batch; a spec with a smaller one trains with such statistics, and has memory for such."""
_LEAST_SAMPLES, _MOST_SAMPLES = 128, 1024
_SHARES = {"latents": 1 / 8, "images": 1 / 40}
"""Share of the train split that is sampled, between the least and the most.

Forward and backward of an epoch cost three forward passes, and CI2P-ViTds has its last BatchNorm in
the middle, CI2P-ViT at the start: an eighth costs 2 % of the epoch, a fortieth of the images 2.5 %
where decoding is all that takes time. With averaged weights it is half of that for each model.
Measured on 880 flowers after one epoch of `vitds_tiny`, twelve draws each: 64, 128, 256 and 512
samples give a loss that strays by 0.014, 0.007, 0.005 and 0.003, around that of all.

The last estimate of a run takes all samples, up to the most, so that a run ends with what its
weights reach. Of one epoch over 880 flowers that is a sixth of the time, a second; of six epochs,
or of 6,000 samples, it is 3 %.
"""


class BatchNormStatistics:
    """Estimates the BatchNorm statistics of models from the samples that a loader gives.

    The values are a function of the weights and the samples alone.

    Args:
        models: Of one architecture, on the loader's device.
        loaders: Give this rank's batches, the first one before the end of a run and the last one at
            its end, in each pass from where they stand now; None where it has none.
        precision: float32 or bf16.
        ranks: Those that share the batches.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        loaders: Sequence[BatchLoader | None],
        *,
        precision: str,
        ranks: Ranks,
    ) -> None:
        self._models = models
        self._loaders = [None if each is None else (each, each.state_dict()) for each in loaders]
        self._precision = precision
        self._ranks = ranks
        self._calls = 0
        self._last_call = 0

    @torch.no_grad()
    def estimate(self, *, final: bool = False) -> None:
        """Replaces the statistics by the means over the batches; the models' modes stay.

        All ranks call it together, and hold the same statistics then. `final` takes the batches for
        the end of a run.
        """
        norms = [norm for model in self._models for norm in _batch_norms(model)]
        buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
        one = torch.ones(1, device=statistics[0].device)
        # float64: the order in which ranks add does not show. The last one counts the batches.
        sums = torch.zeros_like(torch.cat([*map(torch.flatten, statistics), one]).double())
        with self._only_norms_training(norms):
            found = self._loaders[-1 if final else 0]
            if found is not None:
                found[0].load_state_dict(found[1])
            for batch in () if found is None else found[0]:
                inputs = batch.latents.contiguous(memory_format=torch.channels_last)
                for norm in norms:
                    norm.reset_running_stats()
                for model in self._models:
                    self._forward(model, inputs)
                values = torch.cat([*map(torch.flatten, statistics), one]).double()
                sums += torch.where(torch.isfinite(values).all(), values, 0)
        self._ranks.add_up([sums])
        means = torch.split(sums[:-1] / sums[-1], [each.numel() for each in statistics])
        for each, mean in zip(statistics, means, strict=True):
            each.copy_(mean)
        for buffer in buffers:
            if not buffer.is_floating_point():
                # As update_bn leaves it: of how many batches the statistics are.
                buffer.copy_(sums[-1])

    @contextlib.contextmanager
    def _only_norms_training(self, norms: list[_BatchNorm]) -> Iterator[None]:
        """Makes each forward pass give the statistics of its batch alone."""
        modes = [model.training for model in self._models]
        momenta = [norm.momentum for norm in norms]
        hooks = [norm.register_forward_hook(self._called) for norm in norms]
        try:
            for model in self._models:
                model.eval()
            for norm in norms:
                # Not train(): timm's own BatchNorm may hold a layer that drops values.
                norm.training, norm.momentum = True, 1.0
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for model, mode in zip(self._models, modes, strict=True):
                model.train(mode)

    def _forward(self, model: nn.Module, inputs: Tensor) -> None:
        """Passes a batch on to the last BatchNorm; the first time to the end, to learn which."""
        self._calls = 0
        with contextlib.suppress(_LastNormCalledError), autocast(inputs.device, self._precision):
            # Not model(): where that is compiled, this pass is not worth a separate graph.
            model.forward(inputs)
            self._last_call = self._calls

    def _called(self, *_: object) -> None:
        self._calls += 1
        if self._calls == self._last_call:
            raise _LastNormCalledError


class _LastNormCalledError(Exception):
    """Ends a forward pass early."""


@contextlib.contextmanager
def opened_statistics(
    models: Sequence[nn.Module],
    train: Split,
    spec: TrainSpec,
    *,
    device: torch.device,
    reads: Literal["latents", "images"],
    threads: int | None,
    ranks: Ranks,
) -> Iterator[BatchNormStatistics | None]:
    """Opens the samples of a run that statistics are estimated from, while the block runs.

    Args:
        models: Of one architecture, on the device.
        train: The split that the run trains from.
        spec: Its seed, order and batch size count.
        device: Where the models are.
        reads: Latents of the cache, or the images that it was made of.
        threads: Threads that read; None: one per core, shared by a machine's ranks.
        ranks: The ranks that train together.

    Yields:
        What estimates them; None where the models have no BatchNorm.
    """
    if not _batch_norms(models[0]):
        yield None
        return
    with contextlib.ExitStack() as stack:
        loaders: list[BatchLoader | None] = []
        for share in (_SHARES[reads] / len(models), 1):
            size, rows = _own_rows(train, spec, ranks, share=share)
            loader: BatchLoader | None = None
            if len(rows):
                loader = (LatentLoader if reads == "latents" else PixelLoader)(
                    train.subset(rows),
                    batch_size=size,
                    seed=spec.seed,
                    device=device,
                    threads=threads or ranks.num_threads,
                    recycle=True,
                )
                stack.enter_context(loader).set_epoch(spec.epochs)
            loaders.append(loader)
        yield BatchNormStatistics(models, loaders, precision=spec.precision, ranks=ranks)


def _own_rows(train: Split, spec: TrainSpec, ranks: Ranks, *, share: float) -> tuple[int, Rows]:
    """Returns the batch size, and the rows of this rank's batches, of which none is smaller.

    They are the first samples of the order that the epoch after the last would have, which suits
    the storage. Not of the first epoch's: what a run was trained on first its weights fit best, and
    a short run on 880 flowers was shown with losses that were 0.01 to 0.02 too high.
    """
    epoch = spec.epochs
    rows = train.valid_rows
    wanted = min(max(int(len(rows) * share), _LEAST_SAMPLES), _MOST_SAMPLES)
    size = min(spec.batch_size, _BATCH_SIZE, len(rows))
    num_batches = min(-(-wanted // size), len(rows) // size)
    if spec.order == "blocks":
        rows = block_order(rows, train.record.shard_rows, seed=spec.seed, epoch=epoch)
        rows = rows[: num_batches * size]
    own = rank_slice(num_batches, rank=ranks.rank, world_size=ranks.world_size)
    # Sorted by the loader's own order, which a part of the rows keeps.
    return size, epoch_order(rows, seed=spec.seed, epoch=epoch)[own.start * size : own.stop * size]


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the BatchNorms of a model that keep statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
