"""Animals-10: the paper's data set, by the paper's recipe and by its authors' code.

Paper:    Zhao and Sun, "Compress image to patches for Vision Transformer", arXiv 2502.10120, and
          the code that they published. 300 epochs from scratch at 256 px.
Command:  ci2p-cache run pipelines/animals10.py:paper_vitds animals10/
Images:   animals10/{butterfly,cat,...}/*: 26,179 photographs in ten folders (the Italian names of
          the original archive will do, classes are folder names).
Split:    there is no official one. Ours is the default of `encode`: in each class the tenth of the
          images with the smallest hash of seed 0 and path is `val`, exactly and for everyone.
Hours:    not measured here. By arithmetic: encoding 17 min at 48 views/s (two CPU cores) for
          paper_*, 1.1 h for the eight crops of authors_*. The paper trained CI2P-ViT in 9 h and
          ViT-B/16 in 20 h on one GPU of 24 GB.
Disk:     not measured here. By arithmetic, float16 at 92.9 kB a view: 4.6 GB for paper_*, 18 GB
          for authors_*. As int8 (--set encode.dtype=int8) 0.6 GB and 2.1 GB.
Hardware: one GPU; the encoder's official weights are fetched once.
Expect:   published top-1: CI2P-ViT 92.37, ViT-B/16 89.07, CNN-ViT 88.5, on the authors' own split.
          Not measured here. Report the last and the best epoch.

What the paper's summary leaves open is ours in paper_*: batches of 128 (the authors' code), a
warm-up of 20 epochs and a cosine down to 1.25e-6, no gradient clipping, no label smoothing.

authors_* is the authors' code as far as a cache can carry it. What differs, because it comes before
an encoder that is not linear and so before the cache: their random-resized crops, with RandAugment,
grey, blur, solarize and erasing, are drawn again in each epoch, here K = 8 are stored and one is
drawn; Mixup and CutMix on pixels are left out, for mixing latents is another method. How strong
their RandAugment is could not be read: here it is torchvision's default (--augment authors). Their
learning rate begins at a third of its peak, here at zero. Their 500 epochs let the cosine
rise again after 300, which is not copied. Stage two reads the images themselves for vit_b16 and
cnn_vit, in the order, the views and the split of the same cache. CNN-ViT is the paper's control
and not in the authors' code: ours has the encoder's topology, at random and trained.
"""

from __future__ import annotations

import dataclasses

import ci2p_cache as cc

_PAPER_ENCODE = cc.EncodeOptions(dtype="float16", size=256, views="flip")
_AUTHORS_ENCODE = cc.EncodeOptions(
    dtype="float16",
    size=256,
    resize_side=292,
    interpolation="bicubic",
    views="crops:8",
    augment="authors",
)

_PAPER_TRAIN = cc.TrainSpec(
    epochs=300,
    batch_size=128,
    optimizer="adam",
    lr=1e-4,
    min_lr=1.25e-6,
    warmup_epochs=20,
    clip_grad_norm=0,
    label_smoothing=0,
    drop_path=0.1,
)
_AUTHORS_TRAIN = dataclasses.replace(
    _PAPER_TRAIN,
    optimizer="adamw",
    weight_decay=0.05,
    decay_norm_and_bias=True,
    label_smoothing=0.1,
)


def paper_vit() -> cc.Experiment:
    """CI2P-ViT by the paper's summary; published 92.37."""
    return _paper("vit", "92.37 was published")


def paper_vitds() -> cc.Experiment:
    """CI2P-ViTds by the paper's summary; nothing that we could read was published for it."""
    return _paper("vitds", "no figure for it could be read")


def paper_vit_b16() -> cc.Experiment:
    """ViT-B/16 on images by the paper's summary; published 89.07."""
    return _paper("vit_b16", "89.07 was published")


def paper_cnn_vit() -> cc.Experiment:
    """CNN-ViT, a trained encoder of the same topology; published 88.5."""
    return _paper("cnn_vit", "88.5 was published")


def authors_vit() -> cc.Experiment:
    """CI2P-ViT by the authors' code, as far as a cache can carry it."""
    return _authors("vit")


def authors_vitds() -> cc.Experiment:
    """CI2P-ViTds by the authors' code, as far as a cache can carry it."""
    return _authors("vitds")


def authors_vit_b16() -> cc.Experiment:
    """ViT-B/16 on images with the crops, optimiser and schedule of authors_vit."""
    return _authors("vit_b16")


def authors_cnn_vit() -> cc.Experiment:
    """CNN-ViT on images with the crops, optimiser and schedule of authors_vit."""
    return _authors("cnn_vit")


def _paper(model: str, published: str) -> cc.Experiment:
    return cc.Experiment(
        name=f"animals10_paper_{model}",
        claim=f"{model} from scratch by the paper's recipe; {published}, on another split",
        encode=_PAPER_ENCODE,
        train=dataclasses.replace(_PAPER_TRAIN, model=model),
    )


def _authors(model: str) -> cc.Experiment:
    return cc.Experiment(
        name=f"animals10_authors_{model}",
        claim=f"{model} from scratch by the authors' code, without what a cache cannot carry",
        encode=_AUTHORS_ENCODE,
        train=dataclasses.replace(_AUTHORS_TRAIN, model=model),
    )
