"""The other systems of the paper's comparison, beside CI2P-ViT: counted as published, then trained.

DeiT, Swin and TNT are timm's. CvT is that of Hugging Face's transformers; CPVT, T2T-ViT and CeiT
are built here of timm's parts. vit-pytorch has a T2T-ViT too, whose token transformers are as wide
as what they read: 34.6 million parameters for T2T-ViT_t-14, published with 21.5.

Paper:    Zhao and Sun, arXiv 2502.10120, and those named in `SYSTEMS`.
Command:  python pipelines/systems.py flowers/ --out systems/
          python pipelines/systems.py                        only count
Needs:    pip install 'ci2p-cache[systems]'
Hours:    13 minutes on one of two AVX2 cores (AMD EPYC, 2026-11); README.md has the table.
Disk:     22 GB of checkpoints.

One cache, one order, one recipe for all: the same images in the same batches at the same rates. By
default that is far too little for accuracy (64 px, 250 images, 3 epochs: sized for two CPU cores);
it shows that each is trained, validated and saved. Parameters and MACs are of the published size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, unfold

import ci2p_cache as cc
from ci2p_cache.cli import render
from ci2p_cache.cli.ending import reported_errors
from ci2p_cache.cli.watch import EncodeWatch, TrainWatch
from ci2p_cache.models.baselines import IMAGENET_MEAN, IMAGENET_STD, Normalise


@dataclass(frozen=True)
class System:
    """A model, and what its own paper says of it."""

    title: str
    model: str
    paper: str
    millions: float
    """Parameters, as they were rounded there."""
    gmacs: float | None
    """None: not given there."""
    source: str
    """Where these two were read, 2026-11-30."""
    size: int = 224
    num_classes: int = 1000


_HERE = Path(__file__)

SYSTEMS = (
    System("ViT-B/16", "vit_b16", "arXiv 2010.11929", 86, None, "the paper, table 1"),
    System("DeiT-B", "timm:deit_base_patch16_224", "arXiv 2012.12877", 86, None,
           "github.com/facebookresearch/deit, README_deit.md"),
    System("Swin-B", "timm:swin_base_patch4_window7_224", "arXiv 2103.14030", 88, 15.4,
           "github.com/microsoft/Swin-Transformer, README.md"),
    System("TNT-B", "timm:tnt_b_patch16_224", "arXiv 2103.00112", 65.6, 14.1,
           "github.com/huawei-noah/Efficient-AI-Backbones, tnt_pytorch/readme.md"),
    # 32 M in table 3 and in github.com/microsoft/CvT, README.md, which has 7.1 too.
    System("CvT-21", f"{_HERE}:cvt_21", "arXiv 2103.15808", 31.54, 7.1,
           "the paper, section 4.1 (parameters) and table 3"),
    System("T2T-ViT_t-24", f"{_HERE}:t2t_vit_t_24", "arXiv 2101.11986", 64.1, 15.0,
           "github.com/yitu-opensource/T2T-ViT, README.md"),
    System("CPVT-B", f"{_HERE}:cpvt_b", "arXiv 2102.10882", 86, None,
           "not read there: two other texts quote it"),
    System("CeiT-S", f"{_HERE}:ceit_s", "arXiv 2103.11816", 24.2, 4.5,
           "github.com/coeusguo/ceit, README.md; GMAC not read there: another paper's table "
           "quotes it"),
    System("CI2P-ViT", "vit", "arXiv 2502.10120", 88.96, 8.4768, "the paper", 256, 0),
    System("CI2P-ViTds", "vitds", "arXiv 2502.10120", 49.7, 6.6303, "the paper", 256, 0),
)  # fmt: skip
"""The larger sizes, those whose parameters are published."""


def _reads_images(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Says of a function what its model reads, which `train --model` asks for."""
    make.reads = "images"  # type: ignore[attr-defined]  # functions take attributes
    return make


def _normalised(model: nn.Module) -> nn.Module:
    return nn.Sequential(Normalise(IMAGENET_MEAN, IMAGENET_STD), model)


class _Logits(nn.Module):
    """A model of transformers as a plain one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@_reads_images
def cvt_21(num_classes: int, drop_path_rate: float) -> nn.Module:
    """CvT-21 (Wu et al. 2021); stochastic depth in the last stage, as there."""
    from transformers import CvtConfig, CvtForImageClassification

    config = CvtConfig(
        depth=[1, 4, 16], num_labels=num_classes, drop_path_rate=[0.0, 0.0, drop_path_rate]
    )
    return _normalised(_Logits(CvtForImageClassification(config)))


def _rates(last: float, depth: int) -> list[float]:
    """Returns the stochastic depth of each block, from 0 at the first."""
    return [last * block / (depth - 1) for block in range(depth)]


class _PositionGenerator(nn.Module):
    """CPVT's positional encoding: a depthwise convolution over the patches, class token apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from timm.models.twins import PosConv

        self.conv = PosConv(width, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        first, patches = tokens_BND[:, :1], tokens_BND[:, 1:]
        side = isqrt(patches.shape[1])
        return torch.cat([first, self.conv(patches, (side, side))], dim=1)


@_reads_images
def cpvt_b(num_classes: int, image_size: int, drop_path_rate: float) -> nn.Module:
    """CPVT-B (Chu et al. 2021): DeiT-B whose positions come from the tokens, after block 1."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=image_size,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        pos_embed="none",
    )
    model.blocks.insert(1, _PositionGenerator(model.embed_dim))
    return _normalised(model)


class _TokenTransformer(nn.Module):
    """T2T's narrow transformer (B, N, D) -> (B, N, 64): one head, whose values are the shortcut."""

    def __init__(self, width: int, out: int = 64) -> None:
        super().__init__()
        from timm.layers.mlp import Mlp

        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(out)
        self.qkv, self.proj = nn.Linear(width, 3 * out, bias=False), nn.Linear(out, out)
        self.mlp = Mlp(out, out)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(tokens_BND)).unsqueeze(1).chunk(3, dim=-1)
        mixed = self.proj(scaled_dot_product_attention(query, key, value)) + value
        tokens = mixed.squeeze(1)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class _TokensToToken(nn.Module):
    """T2T's way from images to tokens (B, N, D): overlapping patches, three times, 16 px in all."""

    def __init__(self, width: int, **_: Any) -> None:
        super().__init__()
        self.first, self.second = _TokenTransformer(3 * 7 * 7), _TokenTransformer(64 * 3 * 3)
        self.project = nn.Linear(64 * 3 * 3, width)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        tokens = self.first(unfold(images_B3HW, 7, stride=4, padding=2).mT)
        tokens = self.second(_overlapping(tokens))
        out: Tensor = self.project(_overlapping(tokens))
        return out


def _overlapping(tokens_BND: Tensor) -> Tensor:
    """Returns each other token with its eight neighbours, (B, N / 4, 9 D)."""
    side = isqrt(tokens_BND.shape[1])
    maps_BDHW = tokens_BND.mT.reshape(len(tokens_BND), -1, side, side)
    return unfold(maps_BDHW, 3, stride=2, padding=1).mT


class _T2TViT(nn.Module):
    """T2T-ViT (Yuan et al. 2021): token transformers, then a deep and narrow ViT."""

    pos_embed: Tensor

    def __init__(self, num_classes: int, image_size: int, drop_path_rate: float) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        width, depth = 512, 24
        self.patches = _TokensToToken(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        positions = _sinusoid((image_size // 16) ** 2 + 1, width)
        self.register_buffer("pos_embed", positions, persistent=False)
        rates = _rates(drop_path_rate, depth)
        self.blocks = nn.Sequential(*[Block(width, 8, 3.0, drop_path=rate) for rate in rates])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        patches = self.patches(images_B3HW)
        first = self.cls_token.expand(len(patches), -1, -1)
        tokens = self.blocks(torch.cat([first, patches], dim=1) + self.pos_embed)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def _sinusoid(count: int, width: int) -> Tensor:
    """Returns the positions of Vaswani et al. 2017, (1, count, width)."""
    rates = 10000 ** -(torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None]


@_reads_images
def t2t_vit_t_24(num_classes: int, image_size: int, drop_path_rate: float) -> nn.Module:
    """T2T-ViT_t-24, with transformers in the token module as in the paper's main table."""
    return _normalised(_T2TViT(num_classes, image_size, drop_path_rate))


class _LocalMlp(nn.Module):
    """CeiT's LeFF in the place of a block's MLP: between its layers patches meet neighbours."""

    def __init__(self, in_features: int, hidden_features: int, **_: Any) -> None:
        super().__init__()

        def layer(given: int, out: int, kernel: int = 1, groups: int = 1) -> nn.Module:
            conv = nn.Conv2d(given, out, kernel, padding=kernel // 2, groups=groups)
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.GELU())

        self.layers = nn.Sequential(
            layer(in_features, hidden_features),
            layer(hidden_features, hidden_features, 3, hidden_features),
            layer(hidden_features, in_features),
        )

    def forward(self, tokens_BND: Tensor) -> Tensor:
        first, patches = tokens_BND[:, :1], tokens_BND[:, 1:]
        side = isqrt(patches.shape[1])
        seen = self.layers(patches.mT.reshape(len(patches), -1, side, side))
        return torch.cat([first, seen.flatten(2).mT], dim=1)


class _CeiT(nn.Module):
    """CeiT (Yuan et al. 2021): patches of a small CNN's map, LeFF, and attention over class tokens.

    The last block attends from the last layer's class token to those of all layers.
    """

    def __init__(self, num_classes: int, image_size: int, drop_path_rate: float) -> None:
        super().__init__()
        from timm.layers.mlp import Mlp
        from timm.models.cait import ClassAttn
        from timm.models.vision_transformer import Block

        width, heads, depth, channels = 384, 6, 12, 64
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(channels, width, 4, 4),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // 16) ** 2 + 1, width))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = _rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, drop_path=rate, mlp_layer=_LocalMlp)
            for rate in rates
        )
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = ClassAttn(width, heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        patches = self.stem(images_B3HW).flatten(2).mT
        first = self.cls_token.expand(len(patches), -1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.pos_embed
        firsts: list[Tensor] = []
        for block in self.blocks:
            tokens = block(tokens)
            firsts.insert(0, tokens[:, :1])
        found = firsts[0] + self.attention(self.norm1(torch.cat(firsts, dim=1)))
        found = found + self.mlp(self.norm2(found))
        logits: Tensor = self.head(self.norm(found[:, 0]))
        return logits


@_reads_images
def ceit_s(num_classes: int, image_size: int, drop_path_rate: float) -> nn.Module:
    """CeiT-S, the largest with a published number of parameters."""
    return _normalised(_CeiT(num_classes, image_size, drop_path_rate))


def _count(system: System) -> tuple[str, ...]:
    """Returns what a system has and costs, beside what its paper says."""
    found = cc.complexity(system.model, size=system.size, num_classes=system.num_classes)
    # The paper's own rows are mmengine's counts, which have norms and pooling in them.
    macs = found.macs if system.num_classes else found.mmengine_macs
    published = "-" if system.gmacs is None else f"{system.gmacs:g}"
    return (
        f"{system.title} ({system.paper})", f"{found.parameters:,}", f"{system.millions:g} M",
        f"{found.parameters / system.millions / 1e6 - 1:+.1%}", f"{macs / 1e9:.2f}", published,
    )  # fmt: skip


def _train(system: System, given: argparse.Namespace) -> tuple[str, ...]:
    """Trains a system from the one cache; a finished run returns at once."""
    spec = cc.TrainSpec(
        model=system.model, epochs=given.epochs, batch_size=given.batch_size, lr=given.lr
    )
    name = system.title.replace("/", "-")
    with render.ProgressLine("train", unit="steps") as line:
        done = cc.train(
            given.out / "shards", spec=spec, runs_dir=given.out / "runs", name=name,
            device=given.device, observers=[TrainWatch(line)],
        )  # fmt: skip
    last = done.last
    assert last.val_top1 is not None
    return f"{last.train_loss:.3f}", f"{last.val_top1:.1%}", f"{last.epoch_seconds:.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="?", help="images, a folder per class; none: only count")
    parser.add_argument("--out", type=Path, default=Path("systems"), help="cache and runs")
    parser.add_argument("--only", action="append", choices=[each.title for each in SYSTEMS])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    for name, kind, default in (
        ("size", int, 64), ("limit", int, 250), ("epochs", int, 3), ("batch-size", int, 16),
        ("lr", float, 1e-4),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    given = _parser().parse_args(arguments)
    columns = ["system", "parameters", "published", "", "GMAC", "published"]
    with reported_errors(go_on="run the same command again to continue"):
        if given.source is not None:
            columns += ["training loss", "top-1", "s/epoch"]
            options = cc.EncodeOptions(
                encoder="bundled", size=given.size, limit=given.limit, val_fraction=0.2
            )
            with render.ProgressLine("encode", unit="images") as line:
                cc.encode(given.source, given.out / "shards", options, observer=EncodeWatch(line))
        rows = []
        for system in SYSTEMS:
            if system.title in (given.only or [each.title for each in SYSTEMS]):
                trained = _train(system, given) if given.source is not None else ()
                rows.append((*_count(system), *trained))
    for row in (columns, ["---"] * len(columns), *rows):
        render.line(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
