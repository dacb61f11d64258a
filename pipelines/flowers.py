"""Flowers: 1,000 photographs of five kinds of flower, on a CPU.

Paper:    Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120; the
          tiny models are ours (models/registry.py).
Command:  ci2p-cache run pipelines/flowers.py:vitds_tiny flowers/
Images:   flowers/{daisy,dandelion,roses,sunflowers,tulips}/*.jpg, 200 each, 240 px and more.
Split:    drawn by hash of each file name, a tenth of each class on average and not exactly: 120 of
          1,000 here. `pipelines/stratify.py` writes a list with exact shares.
Hours:    not measured yet. By arithmetic: 17,600 training images for each model, at 38 (vitds_tiny)
          and 28 (vit_tiny) images/s of one core's own time: 8 and 11 minutes; encoding 1 minute.
Disk:     7 MB.
Hardware: one core of an AMD EPYC that other work shared.
Expect:   not measured yet; guessing gives 20 %. 120 images do not tell two points of accuracy
          apart: study.py, which validates every image once, is where models are compared.
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
