"""The models: shapes, initialisation, records, and what they refuse."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from ci2p_cache.errors import ManifestError, UnknownModelError, UsageError
from ci2p_cache.models.ci2p_vit import ModelConfig
from ci2p_cache.models.registry import build_model, create_model, list_models, model_config
from tests.support.tiers import thinned

PRESETS = ("vit", "vit_small", "vit_tiny", "vitds", "vitds_small", "vitds_tiny")
WIDTHS = {"": 768, "_small": 384, "_tiny": 256}


def latents(*shape: int, seed: int = 3) -> torch.Tensor:
    """Latents of about the scale that g_a gives."""
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_meta(name: str, **options: Any) -> Any:
    """A model without storage: quick to build, and it still computes shapes."""
    with torch.device("meta"):
        return create_model(name, **options)


def in_memory(name: str, **options: Any) -> Any:
    """A real model, typed so that tests may reach its parts."""
    return create_model(name, **options)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_models_on_latents_are_the_paper_two_and_their_smaller_presets():
    assert list_models("latents") == PRESETS


@pytest.mark.parametrize(("name", "count"), [("vit", 87_463_008), ("vitds", 48_206_112)])
def test_trainable_parameters_of_the_paper_models_are_exact(name, count):
    assert num_parameters(on_meta(name, num_classes=0)) == count


def test_reshape_modules_have_the_parameters_of_the_published_code():
    vit, vitds = on_meta("vit"), on_meta("vitds")
    assert num_parameters(vit.patch_reshape) == 2_407_008
    assert num_parameters(vitds.patch_reshape) == 1_202_304
    assert num_parameters(vitds.cnn_reshape) == 1_805_856


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("num_classes", thinned([7, 0]))
def test_every_preset_gives_logits_or_pooled_features_of_non_square_latents(name, num_classes):
    width = WIDTHS[name.removeprefix("vitds").removeprefix("vit")]
    model = on_meta(name, num_classes=num_classes).eval()
    out = model(torch.empty(3, 192, 4, 6, device="meta"))
    assert out.shape == (3, num_classes or width)
    tokens = model.forward_features(torch.empty(3, 192, 4, 6, device="meta"))
    assert tokens.shape == (3, 2 * 3, width)


@pytest.mark.parametrize("name", ["vit_tiny", "vitds_tiny"])
@pytest.mark.parametrize("latent_channels", [320, 128])
def test_any_number_of_latent_channels_works(name, latent_channels):
    model = in_memory(name, num_classes=5, latent_channels=latent_channels).eval()
    assert model(latents(2, latent_channels, 4, 6)).shape == (2, 5)


def test_a_residual_exists_only_where_the_block_keeps_its_shape():
    def residuals(name: str, latent_channels: int = 192) -> list[bool]:
        model = on_meta(name, latent_channels=latent_channels)
        return [block.has_skip for block in model.patch_reshape]

    assert residuals("vit") == [True, False]
    assert residuals("vitds") == [True, True]
    assert residuals("vitds", 320) == [True, False]
    assert residuals("vitds_tiny", 64) == [True, True]
    assert [block.has_skip for block in on_meta("vitds").cnn_reshape] == [False]


def test_a_residual_block_with_a_silent_branch_passes_latents_on_unchanged():
    model = in_memory("vitds", num_classes=0).eval()
    for block in model.patch_reshape:
        nn.init.zeros_(block.conv_pwl.weight)
    y = latents(1, 192, 4, 6)
    assert torch.equal(model.patch_reshape(y), y)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("vit", {768: 12}),
        ("vit_small", {384: 6}),
        ("vit_tiny", {256: 4}),
        ("vitds", {192: 3, 768: 12}),
        # 64 does not divide 96; 48 is nearer to it than 96 is.
        ("vitds_small", {96: 2, 384: 6}),
        ("vitds_tiny", {64: 1, 256: 4}),
    ],
)
def test_heads_are_64_wide_where_that_divides_the_width(name, heads):
    attentions = [m for m in on_meta(name).modules() if hasattr(m, "qkv")]
    found = {attention.qkv.in_features: attention.num_heads for attention in attentions}
    assert found == heads
    assert len(attentions) == 12


def test_stochastic_depth_grows_linearly_over_both_scales():
    for name in ("vit_tiny", "vitds_tiny"):
        model = on_meta(name, drop_path_rate=0.22)
        blocks = [*model.blocks, *model.last_blocks]
        rates = [
            block.drop_path1.drop_prob if not isinstance(block.drop_path1, nn.Identity) else 0.0
            for block in blocks
        ]
        assert rates == pytest.approx([0.02 * i for i in range(12)])


def test_the_layers_are_those_of_the_paper():
    model = on_meta("vitds")
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 1
    assert {norm.eps for norm in norms} == {1e-6}
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(batch_norms) == 3 * 3
    assert {(norm.eps, norm.momentum) for norm in batch_norms} == {(1e-5, 0.1)}
    gelus = [m for m in model.modules() if isinstance(m, nn.GELU)]
    assert [gelu.approximate for gelu in gelus] == ["none"] * 12
    hard_swishes = [m for m in model.modules() if isinstance(m, nn.Hardswish)]
    assert len(hard_swishes) == 2 * 3
    assert sum(isinstance(m, nn.Hardsigmoid) for m in model.modules()) == 3
    assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    second = on_meta("vit").patch_reshape[1]
    assert second.conv_dw.kernel_size == (5, 5)
    assert second.conv_dw.stride == (2, 2)
    assert second.conv_dw.padding == (2, 2)
    assert second.se.conv_reduce.out_channels == 1152 // 4


def test_initialisation_is_a_pure_function_of_the_global_seed():
    torch.manual_seed(11)
    first = in_memory("vitds_tiny", num_classes=5, pos_embed=True)
    torch.manual_seed(11)
    again = in_memory("vitds_tiny", num_classes=5, pos_embed=True)
    other = in_memory("vitds_tiny", num_classes=5, pos_embed=True)
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_every_weight_is_drawn_from_the_paper_distribution():
    torch.manual_seed(0)
    model = in_memory("vit_tiny", num_classes=200, pos_embed=True)
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            fan_in, fan_out = part.in_features, part.out_features
            xavier = math.sqrt(2 / (fan_in + fan_out))
            wanted = 0.01 if name == "head" else 0.02 if ".attn." in name else xavier
            assert part.weight.std().item() == pytest.approx(wanted, rel=0.03), name
            if ".mlp." in name:
                assert part.weight.abs().max() <= xavier * math.sqrt(3)
                assert part.bias.std().item() == pytest.approx(1e-6, rel=0.3), name
            else:
                assert not part.bias.any(), name
        elif isinstance(part, nn.Conv2d):
            fan_out = part.out_channels * math.prod(part.kernel_size)
            wanted = math.sqrt(2 / fan_out)
            assert part.weight.std().item() == pytest.approx(wanted, rel=0.05), name
            assert part.bias is None or not part.bias.any()
        elif isinstance(part, (nn.LayerNorm, nn.BatchNorm2d)):
            assert torch.equal(part.weight, torch.ones_like(part.weight))
            assert not part.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)


def test_without_a_positional_embedding_blocks_do_not_see_the_order_of_tokens():
    torch.manual_seed(1)
    model = in_memory("vit_tiny", num_classes=0).eval()
    tokens = torch.randn(2, 6, 256)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert model.pos_embed is None
    straight, mixed = model.blocks(tokens), model.blocks(tokens[:, order])
    torch.testing.assert_close(mixed, straight[:, order])
    torch.testing.assert_close(mixed.mean(1), straight.mean(1))


@pytest.mark.parametrize(
    ("name", "shape"), [("vit_tiny", (1, 9, 256)), ("vitds_tiny", (1, 36, 64))]
)
def test_a_positional_embedding_is_added_to_the_first_tokens(name, shape):
    torch.manual_seed(2)
    model = in_memory(name, num_classes=4, pos_embed=True, latent_size=6).eval()
    assert model.pos_embed.shape == shape
    y = latents(2, 192, 6, 6)
    with_positions = model(y)
    nn.init.zeros_(model.pos_embed)
    plain = in_memory(name, num_classes=4).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"})
    assert torch.equal(model(y), plain(y))
    assert not torch.equal(with_positions, plain(y))


def test_tokens_are_row_major():
    torch.manual_seed(3)
    model = in_memory("vitds_tiny", num_classes=0).eval()
    seen = []
    model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = latents(1, 192, 4, 6)
    model(y)
    maps = model.patch_reshape(y)
    assert torch.equal(seen[0][0, 2 * 6 + 5], maps[0, :, 2, 5])


def test_the_second_scale_gets_the_map_of_the_first_the_right_way_round():
    torch.manual_seed(3)
    model = in_memory("vitds_tiny", num_classes=0).eval()
    seen: dict[str, torch.Tensor] = {}
    model.blocks.register_forward_hook(lambda _, __, out: seen.update(tokens=out))
    model.cnn_reshape.register_forward_pre_hook(lambda _, args: seen.update(maps=args[0]))
    model(latents(1, 192, 4, 6))
    assert seen["maps"].shape == (1, 64, 4, 6)
    assert torch.equal(seen["maps"][0, :, 3, 1], seen["tokens"][0, 3 * 6 + 1])


@pytest.mark.parametrize("name", ["vit_tiny", "vitds_tiny"])
def test_evaluation_is_deterministic_and_training_is_not(name):
    torch.manual_seed(4)
    model = in_memory(name, num_classes=4, drop_path_rate=0.5)
    y = latents(4, 192, 4, 6)
    assert not torch.equal(model(y), model(y))
    model.eval()
    assert torch.equal(model(y), model(y))


@pytest.mark.parametrize("name", ["vit_tiny", "vitds_tiny"])
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(5)
    model = in_memory(name, num_classes=4, pos_embed=True, latent_size=4, drop_path_rate=0.0)
    labels = torch.tensor([0, 3, 1, 2])
    loss: Any = nn.functional.cross_entropy(model(latents(4, 192, 4, 4)), labels)
    loss.backward()
    missing = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert missing == []


@pytest.mark.parametrize("name", ["vit_tiny", "vitds_tiny"])
def test_channels_last_latents_give_the_same_answer(name):
    torch.manual_seed(6)
    model = in_memory(name, num_classes=4).eval()
    y = latents(2, 192, 4, 6)
    plain = model(y)
    model.to(memory_format=torch.channels_last)
    there = model(y.to(memory_format=torch.channels_last))
    torch.testing.assert_close(there, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny", "vitds_tiny"])
def test_the_model_is_one_graph_for_torch_compile(name):
    model = in_memory(name, num_classes=4, pos_embed=True, latent_size=4).eval()
    y = latents(2, 192, 4, 4)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y), model(y))


@pytest.mark.parametrize("name", PRESETS)
def test_a_record_written_as_json_builds_the_same_model_again(name):
    config = model_config(name, num_classes=3, latent_channels=64, pos_embed=True, latent_size=4)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    with torch.device("meta"):
        one, other = build_model(config).state_dict(), build_model(again).state_dict()
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}


def test_weights_and_record_give_the_same_logits_again():
    torch.manual_seed(7)
    model = in_memory("vitds_tiny", num_classes=3).eval()
    again = build_model(ModelConfig.from_dict(model.config.to_dict())).eval()
    again.load_state_dict(model.state_dict())
    y = latents(2, 192, 4, 6)
    assert torch.equal(model(y), again(y))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "`version` is 2; this ci2p-cache reads 1"),
        ({"width": 3}, r"unknown fields \['width'\]"),
        ({"depths": "12"}, "depths wants"),
        ({"depths": [6, 6]}, "must be equally long"),
        ({"embed_dims": [1, 2, 3]}, "one or two positive integers"),
        ({"name": 5}, "name wants"),
    ],
)
def test_a_damaged_record_is_refused(change, match):
    data = model_config("vit_tiny").to_dict() | change
    with pytest.raises(ManifestError, match=match):
        ModelConfig.from_dict(data)


def test_a_record_that_lacks_a_field_or_is_no_object_is_refused():
    data = model_config("vit_tiny").to_dict()
    del data["depths"]
    with pytest.raises(ManifestError, match=r"lacks \['depths'\]"):
        ModelConfig.from_dict(data)
    with pytest.raises(ManifestError, match="wants an object, got list"):
        ModelConfig.from_dict([])  # type: ignore[arg-type]  # a damaged file may hold it


def test_an_unknown_name_is_answered_with_the_names_and_the_closest():
    with pytest.raises(UnknownModelError, match=r"'vit_ds_tiny'.*vit, .*vitds_tiny") as e:
        create_model("vit_ds_tiny")
    assert e.value.hint == "did you mean vitds_tiny?"
    assert e.value.exit_code == 2
    with pytest.raises(UnknownModelError, match="'resnet50'") as e:
        create_model("resnet50")
    assert e.value.hint is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": -1}, "`num_classes` is -1; it must be an integer >= 0"),
        ({"num_classes": 2.0}, r"`num_classes` is 2\.0"),
        ({"latent_channels": 0}, "`latent_channels` is 0; it must be an integer >= 1"),
        ({"latent_size": 0}, "`latent_size` is 0"),
        ({"latent_size": 7}, "`latent_size` is 7; it must be a multiple of 2"),
        ({"pos_embed": 1}, "`pos_embed` is 1; it must be True or False"),
        ({"drop_path_rate": 1.0}, r"`drop_path_rate` is 1\.0; wanted 0 <= rate < 1"),
        ({"drop_path_rate": float("nan")}, "`drop_path_rate` is nan"),
        ({"drop_path_rate": "0.1"}, "`drop_path_rate` is '0.1'"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(UsageError, match=match):
        create_model("vit_tiny", **options)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((2, 191, 4, 6), r"wants latents \(batch, 192, height, width\), got \(2, 191, 4, 6\)"),
        ((192, 4, 6), r"wants latents \(batch, 192, height, width\), got \(192, 4, 6\)"),
        ((2, 192, 5, 6), "even height and width, got 5x6.*multiple of 32"),
        ((2, 192, 4, 7), "even height and width, got 4x7"),
        ((2, 192, 0, 6), "even height and width, got 0x6"),
    ],
)
@pytest.mark.parametrize("name", ["vit_tiny", "vitds_tiny"])
def test_latents_of_another_shape_are_refused(name, shape, match):
    with pytest.raises(UsageError, match=match):
        on_meta(name)(torch.empty(shape, device="meta"))


def test_a_positional_embedding_refuses_latents_of_another_size():
    model = on_meta("vitds_tiny", pos_embed=True, latent_size=8)
    with pytest.raises(UsageError, match="positional embedding for 8x8 latents, got 4x16"):
        model(torch.empty(1, 192, 4, 16, device="meta"))
