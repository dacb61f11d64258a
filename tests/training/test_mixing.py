"""Mixup, CutMix and flipping of what the model reads, and the learning rates of layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.loader.order import rank_slice
from ci2p_cache.training.optim import make_optimizer, parameter_layers, set_lr
from ci2p_cache.training.step import Mix, draw_mix, flipped, mixed

BOTH = cc.TrainSpec(mixup=0.8, cutmix=1.0)


def numbered(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch (B, 3, 4, 6) in which no two values are alike, and labels."""
    x = torch.arange(batch * 3 * 4 * 6, dtype=torch.float32).view(batch, 3, 4, 6)
    return x, torch.tensor([2, 0, 1, 1, 3])[:batch]


def test_nothing_is_drawn_where_nothing_is_mixed() -> None:
    assert draw_mix(cc.TrainSpec(), size=(4, 4), seed=1) is None
    x, labels = numbered()
    same, targets = mixed(x, labels, None)
    assert same is x
    assert (targets.labels is labels, targets.partners, targets.share) == (True, None, 1.0)


def test_draws_are_a_function_of_the_seed_and_both_methods_come_half_and_half() -> None:
    draws = [draw_mix(BOTH, size=(16, 16), seed=seed) for seed in range(2000)]
    assert draws == [draw_mix(BOTH, size=(16, 16), seed=seed) for seed in range(2000)]
    boxes = [mix for mix in draws if mix is not None and mix.box is not None]
    assert all(mix is not None and 0 <= mix.share <= 1 for mix in draws)
    assert 900 < len(boxes) < 1100
    for spec, with_box in ((cc.TrainSpec(mixup=0.8), False), (cc.TrainSpec(cutmix=1.0), True)):
        alone = [draw_mix(spec, size=(16, 16), seed=seed) for seed in range(300)]
        assert all(mix is not None and (mix.box is not None) == with_box for mix in alone)
    # Beta(alpha, alpha) has mean 1/2, and variance 1/4 / (2 alpha + 1).
    shares = torch.tensor([mix.share for mix in draws if mix is not None and mix.box is None])
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(0.25 / 2.6, rel=0.15)


def test_a_share_of_the_batches_is_mixed() -> None:
    spec = dataclasses.replace(BOTH, mix_probability=0.3)
    mixes = [draw_mix(spec, size=(8, 8), seed=seed) for seed in range(1000)]
    assert 250 < sum(mix is not None for mix in mixes) < 350


def test_mixup_adds_the_sample_before_and_changes_nothing_in_place() -> None:
    x, labels = numbered()
    before = x.clone()
    got, targets = mixed(x, labels, Mix(0.75, None))
    for i in range(5):
        torch.testing.assert_close(got[i], 0.75 * x[i] + 0.25 * x[i - 1])
    assert torch.equal(x, before)
    assert targets.partners is not None
    assert targets.partners.tolist() == [3, 2, 0, 1, 1]
    assert targets.share == 0.75


def test_cutmix_puts_a_box_of_the_sample_before_into_each_and_counts_what_is_left() -> None:
    x, labels = numbered()
    spec = cc.TrainSpec(cutmix=1.0)
    cut = [draw_mix(spec, size=(4, 6), seed=seed) for seed in range(40)]
    assert len({mix.box for mix in cut if mix is not None}) > 10
    for mix in cut:
        assert mix is not None
        got, _ = mixed(x, labels, mix)
        for i in range(5):
            taken = (got[i] == x[i - 1]).all(dim=0)
            assert ((got[i] == x[i]).all(dim=0) ^ taken).all()
            assert 1 - taken.double().mean().item() == pytest.approx(mix.share)


def test_a_slice_of_one_sample_stays_as_it_is_and_one_of_none_is_empty() -> None:
    x, labels = numbered(1)
    for mix in (Mix(0.3, None), Mix(0.75, (0, 2, 0, 3))):
        got, targets = mixed(x, labels, mix)
        torch.testing.assert_close(got, x)
        logits = torch.randn(1, 4)
        loss = targets.loss(logits, label_smoothing=0.1)
        torch.testing.assert_close(loss, cross_entropy(logits, labels, label_smoothing=0.1))
        got, targets = mixed(x[:0], labels[:0], mix)
        assert (len(got), len(targets.chunk(2)[0].labels)) == (0, 0)


def test_the_loss_is_that_of_smoothed_soft_targets_in_parts_too() -> None:
    x, labels = numbered()
    _, targets = mixed(x, labels, Mix(0.3, None))
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    classes = one_hot(labels, 4).double()
    soft = 0.3 * classes + 0.7 * classes.roll(1, dims=0)
    wanted = cross_entropy(logits.double(), soft, label_smoothing=0.1)
    loss = targets.loss(logits, label_smoothing=0.1)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    parts = zip(logits.chunk(2), targets.chunk(2), strict=True)
    summed = sum(
        part.loss(rows, label_smoothing=0.1).item() * len(part.labels) / 5 for rows, part in parts
    )
    assert summed == pytest.approx(wanted.item(), rel=1e-6)


def test_hits_count_against_the_class_with_the_larger_share() -> None:
    x, labels = numbered()
    logits = one_hot(labels, 4).float()
    assert mixed(x, labels, Mix(0.6, None))[1].hits(logits) == 5
    # Of the partners 3 2 0 1 1 one is of the sample's own class.
    assert mixed(x, labels, Mix(0.4, None))[1].hits(logits) == 1


def test_flipping_mirrors_a_share_of_the_samples_the_same_ones_on_any_ranks() -> None:
    x = torch.randn(40, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    whole = flipped(x, 0.5, num_samples=40, own=slice(None), seed=7)
    mirrored = (whole == x.flip(-1)).flatten(1).all(dim=1)
    assert ((whole == x).flatten(1).all(dim=1) ^ mirrored).all()
    assert 10 < mirrored.sum() < 30
    for ranks in (2, 3):
        owns = [rank_slice(40, rank=rank, world_size=ranks) for rank in range(ranks)]
        parts = [flipped(x[own], 0.5, num_samples=40, own=own, seed=7) for own in owns]
        assert torch.equal(torch.cat(parts), whole)
    assert flipped(x, 0.0, num_samples=40, own=slice(None), seed=7) is x


def rates(model: torch.nn.Module, **fields: float) -> dict[str, float]:
    """The learning rate of each parameter at a rate of 1, by name."""
    optimizer = make_optimizer(model, cc.TrainSpec(lr=1.0, **fields))  # type: ignore[arg-type]  # floats
    set_lr(optimizer, 1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == len(names)
    return found


def test_without_layer_decay_all_parameters_learn_alike() -> None:
    assert set(rates(cc.create_model("vitds_tiny")).values()) == {1.0}


def test_layer_decay_slows_ci2p_layers_by_their_distance_from_the_head() -> None:
    found = rates(cc.create_model("vitds_tiny", pos_embed=True), layer_decay=0.5)
    for start, layer in (
        ("patch_reshape.", 0), ("pos_embed", 0), ("blocks.0.", 1), ("blocks.5.", 6),
        ("cnn_reshape.", 7), ("last_blocks.0.", 7), ("last_blocks.5.", 12), ("norm.", 13),
        ("head.", 13),
    ):  # fmt: skip
        assert {rate for name, rate in found.items() if name.startswith(start)} == {
            0.5 ** (13 - layer)
        }, start


def test_layer_decay_asks_timm_models_for_their_layers_also_inside_of_another() -> None:
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=5)
    found = rates(vit, layer_decay=0.5)
    assert found["blocks.2.mlp.fc1.weight"] == 2 * found["blocks.1.mlp.fc1.weight"]
    assert found["patch_embed.proj.weight"] == found["blocks.0.attn.qkv.bias"] / 2
    assert found["head.weight"] == 1.0
    outer = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), vit)
    layers = parameter_layers(outer)
    assert layers["0.weight"] == layers["1.patch_embed.proj.weight"] == 0
    assert layers["1.head.bias"] == max(layers.values()) == parameter_layers(vit)["head.bias"]


def test_layer_decay_is_refused_for_models_that_do_not_say_their_layers() -> None:
    for model, message in (
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), "Sequential does not say them"),
        (torch.nn.Sequential(cc.create_model("vit_tiny"), torch.nn.Linear(2, 2)), "1.weight"),
    ):
        with pytest.raises(errors.UsageError, match=message):
            make_optimizer(model, cc.TrainSpec(layer_decay=0.5))
