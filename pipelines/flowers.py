"""Flowers: 1,000 photographs of five kinds of flower, on a CPU.

Paper:    Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120; the
          tiny models are ours (models/registry.py).
Command:  ci2p-cache run pipelines/flowers.py:vitds_tiny flowers/
Images:   flowers/{daisy,dandelion,roses,sunflowers,tulips}/*.jpg, 200 each, 240 px and more.
Split:    the default: a tenth of each class, 100 of 1,000. The numbers below are from before it,
          with `--split hashed`, which drew 120.
Hours:    vitds_tiny: 65 s to encode, 11 min to train, 2026-11. vit_tiny: not measured; by
          arithmetic a third longer.
Disk:     19 MB of cache, 230 MB of checkpoints.
Hardware: one core of an AMD EPYC that other work shared.
Expect:   vitds_tiny: 67.5 % of 120 after the last epoch, the best, 2026-11-30; guessing gives
          20 %. vit_tiny: not measured. 120 images do not tell two points of
          accuracy apart: study.py, which validates every image once, is where models are compared.
"""

from __future__ import annotations

import ci2p_cache as cc

_ENCODE = cc.EncodeOptions(encoder="bundled", size=128)


def vitds_tiny() -> cc.Experiment:
    """CI2P-ViTds in its tiny size, 128 px, 20 epochs."""
    return _flowers("vitds_tiny")


def vit_tiny() -> cc.Experiment:
    """CI2P-ViT in its tiny size, 128 px, 20 epochs."""
    return _flowers("vit_tiny")


def _flowers(model: str) -> cc.Experiment:
    return cc.Experiment(
        name=f"flowers_{model}",
        claim=f"{model} learns from the bundled encoder's int8 symbols; guessing gives 20 %",
        encode=_ENCODE,
        train=cc.TrainSpec(model=model, epochs=20, batch_size=32),
    )
