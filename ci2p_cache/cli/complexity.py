"""`ci2p-cache complexity`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ci2p_cache.cli import choices, render
from ci2p_cache.errors import UsageError

if TYPE_CHECKING:
    from ci2p_cache.models.complexity import Complexity, Published

__all__ = ["complexity"]


def complexity(
    size: Annotated[
        int | None,
        typer.Option(help="Print the table of one image side only, a multiple of 32 pixels."),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Print the paper's table only, for these sides.", metavar="PX,PX,..."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Count this model, ours or one of timm (repeat it), and ViT-B/16.",
            autocompletion=choices.models,
        ),
    ] = None,
    latent_channels: Annotated[
        int, typer.Option(help="M: 192 for CompressAI quality 1-5, 320 for 6-8.")
    ] = 192,
    num_classes: Annotated[int, typer.Option(help="Outputs of the head; 0 counts none.")] = 0,
    json: choices.JsonOption = False,
) -> None:
    """Count parameters and MACs of the models, with and without the frozen encoder.

    \b
      ci2p-cache complexity                          at 256 px, and Table 2
      ci2p-cache complexity --size 384               at 384 px
      ci2p-cache complexity --sizes 224,256,384,512  the paper's Table 2
      ci2p-cache complexity --model cnn_vit --model timm:deit_small_patch16_224
      ci2p-cache complexity --latent-channels 320    CompressAI quality 6-8

    MACs count convolutions, linear layers, GDN and both attention products. "cached" and "without
    encoder" are what is left in the training step once the latents come from a cache. The paper's
    figures are mmengine's, which also counts norms and pooling.
    """
    from ci2p_cache.models.complexity import (
        BASELINE,
        PAPER_MODELS,
        PAPER_SIZES,
        PUBLISHED,
        complexity_table,
    )

    if latent_channels not in (192, 320):
        raise UsageError(
            f"`latent_channels` is {latent_channels}; CompressAI's encoder has 192 or 320"
        )
    options = {
        "latent_channels": latent_channels,
        "encoder_width": 128 if latent_channels == 192 else 192,
        "num_classes": num_classes,
    }
    chosen = tuple(dict.fromkeys((BASELINE, *model))) if model else None
    one_size: tuple[Complexity, ...] = ()
    if size is not None or sizes is None:
        one_size = complexity_table(256 if size is None else size, names=chosen, **options)
    many_sizes: list[Complexity] = []
    if sizes is not None or size is None:
        for side in PAPER_SIZES if sizes is None else _sides(sizes):
            many_sizes += complexity_table(side, names=chosen or PAPER_MODELS, **options)
    # The published figures are for this setting.
    is_papers = latent_channels == 192 and num_classes == 0
    known = {
        (row.name, row.size): PUBLISHED.get((row.name, row.size)) if is_papers else None
        for row in (*one_size, *many_sizes)
    }
    if json:
        rows = {(row.name, row.size): row for row in (*one_size, *many_sizes)}
        render.print_json([_json_row(row, known[key]) for key, row in rows.items()])
        return
    head = "without head" if num_classes == 0 else f"with a head of {num_classes} classes"
    if one_size:
        _print_one_size(one_size, head)
    if one_size and many_sizes:
        render.line()
    if many_sizes:
        _print_paper(many_sizes, head, known)


def _sides(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--sizes is {text!r}; wanted image sides in pixels with commas between: 256,384"
        ) from error


def _json_row(row: Complexity, known: Published | None) -> dict[str, Any]:
    return row.to_dict() | {"published": known.to_dict() if known else None}


def _print_one_size(rows: tuple[Complexity, ...], head: str) -> None:
    render.print_table(
        ("model", "parameters", "trainable", "GMAC", "vs ViT-B/16", "GMAC cached", "vs ViT-B/16"),
        [
            (
                row.name,
                row.parameters,
                row.trainable_parameters,
                f"{row.macs / 1e9:.4f}",
                _percent(row.reduction),
                # Models on images have no encoder that a cache could take away.
                f"{row.model_macs / 1e9:.4f}" if row.encoder_macs else "",
                _percent(row.cached_reduction) if row.encoder_macs else "",
            )
            for row in rows
        ],
        title=f"{rows[0].size} x {rows[0].size} px, backbone {head}",
    )


def _print_paper(
    rows: list[Complexity], head: str, known: dict[tuple[str, int], Published | None]
) -> None:
    render.print_table(
        ("px", "model", "GMAC", "without attention", "without encoder", "without both"),
        [
            (
                row.size,
                row.name,
                _share(row.macs, row.reduction),
                _share(row.macs - row.attention_macs, row.linear_reduction),
                _share(row.model_macs, row.cached_reduction) if row.encoder_macs else "",
                _share(row.model_macs - row.attention_macs, row.cached_linear_reduction)
                if row.encoder_macs
                else "",
            )
            for row in rows
        ],
        title=f"the paper's Table 2 rebuilt: GMAC and saved against ViT-B/16, backbone {head}",
    )
    render.line()
    render.print_table(
        ("px", "model", "parameters", "paper", "GMAC, mmengine", "authors' code", "saved", "paper"),
        [
            (
                row.size,
                row.name,
                row.parameters,
                f"{it.parameters_millions} M" if it and it.parameters_millions else "",
                f"{row.mmengine_macs / 1e9:.4f}",
                f"{it.gmacs}" if it else "",
                f"{100 * row.mmengine_reduction:.2f} %" if row.mmengine_reduction else "",
                (it.reduction or "") if it else "",
            )
            for row in rows
            for it in (known[row.name, row.size],)
        ],
        title="beside what was published: counted as mmengine does, norms and pooling too",
    )


def _share(macs: int, reduction: float) -> str:
    shown = f"{macs / 1e9:.4f}"
    return f"{shown}  -{100 * reduction:.1f} %" if reduction else shown


def _percent(reduction: float) -> str:
    return f"{-reduction:.2%}" if reduction else ""
