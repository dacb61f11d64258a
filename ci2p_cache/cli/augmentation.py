"""Options of `train` that are off by default, in a panel of their own: their flags and help."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["CutMix", "Ema", "Fold", "Folds", "LatentFlip", "LayerDecay", "MixProbability", "Mixup"]

_PANEL = "Augmentation and averaging"

Mixup = Annotated[
    float,
    typer.Option(
        help="Alpha of latent Mixup, of pixels for models on images; 0: off.",
        rich_help_panel=_PANEL,
    ),
]
CutMix = Annotated[
    float,
    typer.Option(
        help="Alpha of latent CutMix; 0: off. With both, half and half.",
        rich_help_panel=_PANEL,
    ),
]
MixProbability = Annotated[
    float, typer.Option(help="Share of the batches that are mixed.", rich_help_panel=_PANEL)
]
LatentFlip = Annotated[
    float,
    typer.Option(
        help="Probability of mirroring latents: wrong, there to be shown wrong.",
        rich_help_panel=_PANEL,
    ),
]
Ema = Annotated[
    float,
    typer.Option(
        help="Decay of averaged weights, which are then validated; 0: off.",
        rich_help_panel=_PANEL,
    ),
]
LayerDecay = Annotated[
    float,
    typer.Option(
        help="Factor on the learning rate per layer towards the input.",
        rich_help_panel=_PANEL,
    ),
]
Folds = Annotated[
    int,
    typer.Option(
        help="Parts of the train split, one of which validates; 0: use val.",
        rich_help_panel=_PANEL,
    ),
]
Fold = Annotated[int, typer.Option(help="The part that validates, from 0.", rich_help_panel=_PANEL)]
