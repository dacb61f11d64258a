"""Options that several commands have, and what a shell completes where they are no closed list.

Options that are a `Literal` complete by themselves, paths are left to the shell. A completion must
not import torch, timm or compressai; so their names stand here, and a test holds them against
`list_models()` and CompressAI's zoo.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "CacheArgument",
    "CheckpointOption",
    "DeviceOption",
    "EncoderCacheOption",
    "JsonOption",
    "OwnModelOption",
    "RunArgument",
    "TrackOption",
    "archs",
    "checkpoints",
    "devices",
    "models",
    "splits",
    "trackers",
    "views",
]


def _of(*values: str) -> Callable[[str], list[str]]:
    def beginning(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return beginning


models = _of(
    *("vit", "vit_small", "vit_tiny", "vitds", "vitds_small", "vitds_tiny"),
    *("cnn_vit", "cnn_vit_small", "cnn_vit_tiny", "vit_b16", "vit_s16", "vit_ti16"),
    *("timm:", "ci2p+timm:"),
)
"""Our own models, then the two ways to one of timm's."""

archs = _of(
    *("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018"),
    *("cheng2020-anchor", "cheng2020-attn"),
)
"""CompressAI's zoo."""

devices = _of("auto", "cpu", "cuda")
views = _of("none", "flip", "crops:")
checkpoints = _of("best", "last")
splits = _of("train", "val", "test")


def trackers(text: str) -> list[Any]:
    """Reads what `--track` names; `train` refuses what it does not know."""
    return [] if text == "none" else text.split(",")


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", autocompletion=devices)]
CheckpointOption = Annotated[
    str,
    typer.Option(help="last, best, or a checkpoint folder.", autocompletion=checkpoints),
]
CacheArgument = Annotated[Path, typer.Argument(help="Cache folder.", metavar="DIR", readable=False)]
RunArgument = Annotated[
    Path, typer.Argument(help="Run folder, or a checkpoint in it.", metavar="RUN")
]
TrackOption = Annotated[
    str,
    typer.Option(
        help="Where numbers go beside summary.csv: tensorboard, csv, wandb, or none.",
        metavar="NAME,...",
        rich_help_panel="Machines",
        autocompletion=_of("tensorboard", "csv", "wandb", "none"),
    ),
]
OwnModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="The run's own model, if it has one; runs it.", metavar="FILE.py"),
]
EncoderCacheOption = Annotated[
    str | None,
    typer.Option(help="Take the encoder from this cache, not from the run.", metavar="DIR"),
]
