"""Whether an exported file gives what eager gives, and an honest count of what it does not.

Two programs that add in another order differ in the last bits. That is nothing after a float, but
where y is rounded a value at a tie may fall to either side, and one other symbol changes logits by
far more. So the graph is checked on both sides of the rounding: stored values may differ at ties
only, and are counted; and the logits must be those that eager gives from the file's own stored
values.

Shape suffixes: B batch, M latent channels, h w latent rows and columns, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ci2p_cache.errors import IntegrityError
from ci2p_cache.inference.classifier import Classifier
from ci2p_cache.inference.exported import Exported
from ci2p_cache.record import Record

__all__ = ["TOLERANCE", "ExportCheck", "check_export"]

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit."""

_TIE = 1e-3
"""How near to halfway between two symbols a value has to be to fall to either side."""

_FLOAT_NOISE = 1e-5
"""How far y may be apart between two programs, as a share of its largest value."""

_BATCH = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportCheck(Record):
    """What was compared, and how far apart it was."""

    inputs: int
    """Images, or latents, that were run through both."""
    scale: float
    """Largest absolute logit that eager gave."""
    max_difference: float
    """Largest difference of a logit, given the same stored values; refused above 1e-4 of scale."""
    end_to_end_difference: float
    """Largest difference of a logit from input to output, ties included."""
    stored_values: int
    """Symbols, or float16 values, that were compared; 0 where nothing is rounded on the way."""
    differing_values: int
    """Those of them that fell to the other side of a tie."""
    differing_inputs: int
    """Inputs in which that happened."""


def check_export(
    file: Exported, classifier: Classifier, inputs: Tensor, *, is_full: bool
) -> ExportCheck:
    """Runs an exported file and eager over the same inputs.

    Args:
        file: The file, opened.
        classifier: Eager, on the CPU.
        inputs: Images in [0, 1] (N, 3, size, size), or what the model reads.
        is_full: Whether the file reads images and encodes them.

    Raises:
        IntegrityError: they differ by more than rounding explains; says where.
    """
    is_full = is_full and classifier.reads == "latents"
    scale, gaps, end_to_end_gaps = 0.0, [0.0], [0.0]
    stored_values = differing = differing_inputs = 0
    # A single input first: the batch may be of any size.
    for part in (inputs[:1], *torch.split(inputs[1:], _BATCH)):
        if not len(part):
            continue
        found_BK, read = file.logits(part), part
        if is_full:
            y_BMhw = classifier.latents(part)
            wanted_BMhw = classifier.stored(y_BMhw)
            found_BMhw = file.stored(part)
            read = classifier.dequantise(wanted_BMhw)
            if found_BMhw is not None:
                differs_BMhw = _differing(classifier, y_BMhw, wanted_BMhw, found_BMhw)
                stored_values += differs_BMhw.numel()
                differing += int(differs_BMhw.sum())
                differing_inputs += int(differs_BMhw.flatten(1).any(dim=1).sum())
        eager_BK = classifier.logits(read)
        scale = max(scale, float(eager_BK.abs().max()))
        end_to_end_gaps.append(float((found_BK - eager_BK).abs().max()))
        if is_full and found_BMhw is not None:
            limit = classifier.fingerprint.latent
            if limit.is_symbols:
                found_BMhw = found_BMhw.clamp(-limit.symbol_limit, limit.symbol_limit)
            eager_BK = classifier.logits(classifier.dequantise(found_BMhw))
        gaps.append(float((found_BK - eager_BK).abs().max()))
    # torch's max, unlike Python's, is not a number where one of them is not; neither passes `<=`.
    difference, end_to_end = (float(torch.tensor(each).max()) for each in (gaps, end_to_end_gaps))
    if not difference <= TOLERANCE * scale:
        raise IntegrityError(
            f"the exported graph gives other logits than eager: they differ by {difference:.3g}, "
            f"{TOLERANCE:g} of the largest logit {scale:.3g} is allowed; the file was not written",
            hint="report it, with the versions of torch, onnx and onnxruntime; --to torch may do",
        )
    return ExportCheck(
        inputs=len(inputs),
        scale=scale,
        max_difference=difference,
        end_to_end_difference=end_to_end,
        stored_values=stored_values,
        differing_values=differing,
        differing_inputs=differing_inputs,
    )


def _differing(
    classifier: Classifier, y_BMhw: Tensor, wanted_BMhw: Tensor, found_BMhw: Tensor
) -> Tensor:
    """Returns where stored values differ, bool (B, M, h, w).

    Raises:
        IntegrityError: one differs that is not at a tie, or by more than one step.
    """
    latent = classifier.fingerprint.latent
    if latent.is_symbols:
        found_BMhw = found_BMhw.clamp(-latent.symbol_limit, latent.symbol_limit)
        offset_M11 = torch.tensor(classifier.run.file.offset)[:, None, None]
        scaled = (y_BMhw - offset_M11) / classifier.run.file.scale
        from_tie = (scaled - scaled.floor() - 0.5).abs()
        step = torch.ones_like(y_BMhw)
    else:
        # Neighbours in float16 are at most 2**-10 of the value apart; among the smallest values
        # that is less than what y itself differs by.
        from_tie = torch.zeros_like(y_BMhw)
        step = wanted_BMhw.float().abs() * 2**-10 + _FLOAT_NOISE * float(y_BMhw.abs().max())
    gap = (found_BMhw.float() - wanted_BMhw.float()).abs()
    differs = gap > 0
    wrong = differs & ((from_tie > _TIE) | (gap > step))
    if bool(wrong.any()):
        raise IntegrityError(
            f"the exported graph stores other values than the cache does: {int(wrong.sum())} of "
            f"{wrong.numel()} differ that are at no tie; the file was not written",
            hint="report it, with the versions of torch, onnx and onnxruntime",
        )
    return differs
