"""ImageNet-1k: CI2P-ViT and CI2P-ViTds at 256, 384 and 512 px on a machine with 8 GPUs.

Paper:    Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120.
Command:  ci2p-cache run pipelines/imagenet.py:vitds imagenet/ --until encode
          torchrun --nproc-per-node 8 -m ci2p_cache run pipelines/imagenet.py:vitds imagenet/
          The first line encodes with one process per GPU; the second trains, evaluates, reports.
Images:   as ImageNet's own folders or tars; 1,281,167 + 50,000, its own validation split.
Hours:    not measured here. Training by arithmetic, three times the forward pass of the cached
          model, 300 epochs, GPUs that sustain 100 TFLOP/s each in bf16: vitds 3.1, 7.4, 14 h and
          vit 4.6, 10, 19 h at 256, 384, 512 px. At 256 px that is 34,000 (vitds) or 23,000 (vit)
          images/s, or 3.2 and 2.2 GB/s of float16 to be read: see disk.
Disk:     not measured here. By arithmetic from 92.9 kB (float16 + zstd) and 11.1 kB (int8 + zstd)
          a view of 256 px, image and mirror: 243 GB, 546 GB, 970 GB as float16; 29 GB, 65 GB,
          116 GB as int8 (--set encode.dtype=int8 --out int8/).
Hardware: 8 GPUs of 80 GB on one machine; nccl has not been run by us.
Expect:   published top-1 at 256 px: CI2P-ViTds 77, CI2P-ViT 72.9, ViT-B/16 77.91. Not measured
          here; the paper's ImageNet recipe could not be read, so the one below is ours.

Ours: AdamW, batches of 1,024 with a peak of 1e-3 (Touvron et al. 2021, "Training data-efficient
image transformers", arXiv 2012.12877: 5e-4 for each 512), warm-up of 20 epochs, bf16. A batch is
cut in 128 images per GPU, and in two or four parts of these at 384 and 512 px to save memory.
"""

from __future__ import annotations

import ci2p_cache as cc


def vit() -> cc.Experiment:
    """CI2P-ViT, 256 px; published 72.9."""
    return _imagenet("vit", 256, accumulate=1)


def vit_384() -> cc.Experiment:
    """CI2P-ViT, 384 px."""
    return _imagenet("vit", 384, accumulate=2)


def vit_512() -> cc.Experiment:
    """CI2P-ViT, 512 px."""
    return _imagenet("vit", 512, accumulate=4)


def vitds() -> cc.Experiment:
    """CI2P-ViTds, 256 px; published 77."""
    return _imagenet("vitds", 256, accumulate=1)


def vitds_384() -> cc.Experiment:
    """CI2P-ViTds, 384 px."""
    return _imagenet("vitds", 384, accumulate=2)


def vitds_512() -> cc.Experiment:
    """CI2P-ViTds, 512 px."""
    return _imagenet("vitds", 512, accumulate=4)


def _imagenet(model: str, size: int, *, accumulate: int) -> cc.Experiment:
    return cc.Experiment(
        name=f"imagenet_{model}_{size}",
        claim=f"{model} on ImageNet at {size} px; published at 256 px: vitds 77, vit 72.9",
        encode=cc.EncodeOptions(dtype="float16", size=size, views="flip", executor="processes"),
        train=cc.TrainSpec(
            model=model,
            epochs=300,
            batch_size=1024,
            accumulate=accumulate,
            optimizer="adamw",
            lr=1e-3,
            warmup_epochs=20,
            weight_decay=0.05,
            label_smoothing=0.1,
            precision="bf16",
        ),
    )
