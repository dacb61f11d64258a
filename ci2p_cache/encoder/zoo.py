"""CompressAI's zoo: what there is in it, where its weights are, and what only compressai can do.

compressai takes seconds to import and has no wheels beyond Python 3.12. The paper's architecture
works without it; what needs it says so with `require_compressai`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ci2p_cache.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from compressai.models import CompressionModel

__all__ = ["ARCH", "ZOO", "compressai_model", "published_url", "require_arch", "require_compressai"]

ARCH = "bmshj2018-factorized"
"""The paper's architecture."""

_SMALL, _LARGE = (128, 192), (192, 320)
ZOO: dict[str, tuple[tuple[int, ...], ...]] = {
    ARCH: (_SMALL,) * 5 + (_LARGE,) * 3,
    "bmshj2018-hyperprior": (_SMALL,) * 5 + (_LARGE,) * 3,
    "mbt2018-mean": (_SMALL,) * 4 + (_LARGE,) * 4,
    "mbt2018": ((192, 192),) * 4 + (_LARGE,) * 4,
    "cheng2020-anchor": ((128,),) * 3 + ((192,),) * 3,
    "cheng2020-attn": ((128,),) * 3 + ((192,),) * 3,
}
"""Arch -> its sizes at quality 1, 2 and so on: N and M, or N alone where M is the same."""

_PUBLISHED = {
    metric: {
        quality: f"https://compressai.s3.amazonaws.com/models/v1/{ARCH}-{name}-{quality}-{digest}"
        ".pth.tar"
        for quality, digest in enumerate(digests.split(), start=1)
    }
    for metric, name, digests in (
        ("mse", "prior", "446d5c7f 87279a02 5c6f152b 1ed4405a 866ba797 9b02ea3a 6dfd6734 5232faa3"),
        (
            *("ms-ssim", "ms-ssim"),
            "9781d705 4a584386 5352f123 4f91b847 b3a88897 ee028763 8c265a29 8811bd14",
        ),
    )
}
"""The weights of ARCH, by metric and quality; a name ends in the first digits of its sha256."""


def published_url(arch: str, quality: int, metric: str) -> str:
    """Returns where CompressAI publishes an encoder's weights.

    Raises:
        UsageError: no weights are published for that combination.
        MissingDependencyError: only compressai knows, and it cannot be imported.
    """
    tables = {ARCH: _PUBLISHED}
    if arch != ARCH and arch in ZOO:
        require_arch(arch)
        from compressai.zoo.image import model_urls

        tables = model_urls
    try:
        return tables[arch][metric][quality]
    except KeyError as error:
        raise UsageError(
            f"no official weights are published for arch {arch!r}, metric {metric!r}, "
            f"quality {quality}; with weights of your own use --weights FILE"
        ) from error


def require_arch(arch: str) -> None:
    """Refuses an architecture that only compressai has, where it cannot be imported."""
    if arch != ARCH:
        require_compressai(f"architecture {arch}", instead=f"--arch {ARCH}, the default")


def require_compressai(purpose: str, *, instead: str) -> None:
    """Refuses what only compressai can do, where it cannot be imported.

    Args:
        purpose: What it is needed for.
        instead: What works without it.
    """
    try:
        import compressai.zoo.image  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs compressai, which cannot be imported ({error}); it installs with "
            "Python 3.11 and 3.12",
            hint=instead,
        ) from error


def compressai_model(arch: str, quality: int) -> CompressionModel:
    """Builds compressai's model with drawn weights; torch's global generator stays as it was."""
    from compressai.zoo.image import cfgs, model_architectures

    with torch.random.fork_rng(devices=[]):
        return model_architectures[arch](*cfgs[arch][quality])
