"""Codec sweep: which encoder, and how many bytes an image, does the accuracy need?

Paper:    Zhao and Sun, arXiv 2502.10120, take quality 5 of bmshj2018-factorized (Balle et al. 2018,
          arXiv 1802.01436). The others: hyperprior of the same paper; Minnen et al. 2018,
          arXiv 1809.02736 (mbt2018-mean, mbt2018); Cheng et al. 2020, arXiv 2001.01568.
Command:  for q in 1 2 3 4 5 6 7 8; do
            ci2p-cache run pipelines/codec_sweep.py:quality_$q flowers/; done
          ci2p-cache report experiments/codec_*/runs/*
Images:   any source with classes; flowers.py says which were meant. For intervals by
          cross-validation: study.py.
Hours:    not measured here.
Disk:     not measured here. By the official entropy tables a view of 256 px carries 4.5 kB at
          quality 5 and 11.9 kB at quality 8, which no byte compressor beats: expect about twice.
Hardware: one GPU, or a CPU with --set encode.size=128 --set train.model=vitds_tiny.
Expect:   not measured here: it needs CompressAI's official weights for every quality, and they
          could not be fetched where this was written. `--set encode.weights=FILE` takes a file.

Quality 1 to 8 are cached as int16 symbols: those of quality 8 reach -421..420, which int8 would
saturate. The other architectures have no symbols, and are cached as float16 y; their
bytes per image are therefore no measure of their rate. `--set encode.metric=ms-ssim` takes the
encoders that were trained for MS-SSIM.
"""

from __future__ import annotations

import dataclasses

import ci2p_cache as cc

_ENCODE = cc.EncodeOptions(dtype="int16", size=256, views="flip")
_TRAIN = cc.TrainSpec(model="vitds_small", epochs=100, batch_size=64)


def quality_1() -> cc.Experiment:
    """Factorized prior, quality 1: 0.12 bpp on Kodak."""
    return _factorized(1)


def quality_2() -> cc.Experiment:
    """Factorized prior, quality 2: 0.19 bpp on Kodak."""
    return _factorized(2)


def quality_3() -> cc.Experiment:
    """Factorized prior, quality 3: 0.29 bpp on Kodak."""
    return _factorized(3)


def quality_4() -> cc.Experiment:
    """Factorized prior, quality 4: 0.44 bpp on Kodak."""
    return _factorized(4)


def quality_5() -> cc.Experiment:
    """Factorized prior, quality 5, the paper's: 0.65 bpp on Kodak."""
    return _factorized(5)


def quality_6() -> cc.Experiment:
    """Factorized prior, quality 6, 320 channels: 0.97 bpp on Kodak."""
    return _factorized(6)


def quality_7() -> cc.Experiment:
    """Factorized prior, quality 7, 320 channels: 1.35 bpp on Kodak."""
    return _factorized(7)


def quality_8() -> cc.Experiment:
    """Factorized prior, quality 8, 320 channels: 1.83 bpp on Kodak."""
    return _factorized(8)


def hyperprior() -> cc.Experiment:
    """Scale hyperprior, quality 5."""
    return _other("bmshj2018-hyperprior")


def mean_hyperprior() -> cc.Experiment:
    """Mean and scale hyperprior, quality 5."""
    return _other("mbt2018-mean")


def autoregressive() -> cc.Experiment:
    """Joint autoregressive and hierarchical prior, quality 5."""
    return _other("mbt2018")


def anchor() -> cc.Experiment:
    """Cheng et al. 2020 with residual blocks, quality 5."""
    return _other("cheng2020-anchor")


def attention() -> cc.Experiment:
    """Cheng et al. 2020 with attention, quality 5."""
    return _other("cheng2020-attn")


def _factorized(quality: int) -> cc.Experiment:
    return cc.Experiment(
        name=f"codec_q{quality}",
        claim=f"accuracy against bytes per image: quality {quality} of 1 to 8",
        encode=dataclasses.replace(_ENCODE, quality=quality),
        train=_TRAIN,
    )


def _other(arch: str) -> cc.Experiment:
    return cc.Experiment(
        name=f"codec_{arch}",
        claim=f"accuracy of another encoder of CompressAI's zoo: {arch}, quality 5",
        encode=dataclasses.replace(_ENCODE, arch=arch, quality=5, dtype="float16"),
        train=_TRAIN,
    )
