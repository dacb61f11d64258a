"""Parameters and MACs: the published figures, and the encoder's formula against CompressAI."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ci2p_cache.errors import UnknownModelError, UsageError
from ci2p_cache.models.complexity import (
    BASELINE,
    PAPER_MODELS,
    PUBLISHED,
    complexity,
    complexity_table,
)
from ci2p_cache.models.registry import create_model, list_models
from tests.support.tiers import thinned


def giga(count: int) -> float:
    return round(count / 1e9, 4)


@pytest.mark.parametrize(
    ("name", "parameters", "trainable", "gmacs", "reduction", "cached"),
    [
        ("vit", 88_956_320, 87_463_008, 8.4687, 63.34, 75.3),
        ("vitds", 49_699_424, 48_206_112, 6.6211, 71.34, 83.3),
    ],
)
def test_the_paper_models_have_the_published_figures(
    name, parameters, trainable, gmacs, reduction, cached
):
    row = complexity(name)
    assert row.encoder_parameters == 1_493_312
    assert row.trainable_parameters == trainable
    assert row.parameters == parameters
    assert giga(row.encoder_macs) == 2.7640
    assert giga(row.macs) == gmacs
    assert row.macs == row.encoder_macs + row.model_macs
    assert round(100 * row.reduction, 2) == reduction
    assert round(100 * row.cached_reduction, 1) == cached


def test_the_baseline_has_the_published_figures():
    row = complexity(BASELINE)
    assert row.parameters == row.trainable_parameters == 85_843_200
    assert row.encoder_parameters == row.encoder_macs == 0
    assert giga(row.macs) == 23.1022
    assert row.reduction == row.cached_reduction == 0


@pytest.mark.parametrize(
    ("size", "digits", "gmacs"),
    thinned(
        [
            (256, 4, (23.1268, 8.4768, 6.6303)),
            (384, 2, (55.43, 19.28, 15.45)),
            (512, 2, (107.00, 34.81, 28.78)),
        ],
        step=3,
    ),
)
def test_with_norms_and_pooling_the_figures_are_mmengines_to_the_digit(size, digits, gmacs):
    rows = [complexity(name, size=size) for name in PAPER_MODELS]
    for row, wanted in zip(rows, gmacs, strict=True):
        assert round(row.mmengine_macs / 1e9, digits) == wanted
        told = PUBLISHED.get((row.name, size))
        assert told is not None
        assert told.gmacs == wanted
        assert 0.998 < row.macs / row.mmengine_macs < 1


def test_the_papers_reduction_comes_out_to_the_digit():
    row, told = complexity("vit"), PUBLISHED["vit", 256]
    assert told is not None
    assert f"{100 * row.mmengine_reduction:.2f} %" == told.reduction == "63.35 %"
    assert round(row.parameters / 1e6, 2) == told.parameters_millions == 88.96
    row, told = complexity("vitds"), PUBLISHED["vitds", 256]
    assert told is not None
    assert round(row.parameters / 1e6, 1) == told.parameters_millions == 49.7
    assert round(100 * row.reduction, 1) == 71.3


def test_without_the_attention_products_the_rest_grows_with_the_area():
    for name in (BASELINE, "vitds"):
        small, large = complexity(name, size=224), complexity(name, size=448)
        assert large.attention_macs == 16 * small.attention_macs
        # Squeeze-and-excitation alone does not grow.
        growth = (large.macs - large.attention_macs) / (small.macs - small.attention_macs)
        assert growth == pytest.approx(4, abs=2e-3)
    num_tokens, width = 196, 768
    assert complexity(BASELINE, size=224).attention_macs == 12 * 2 * num_tokens**2 * width


@pytest.mark.slow
def test_models_on_images_have_no_encoder_that_a_cache_could_take_away():
    row = complexity("cnn_vit_tiny", size=64)
    assert row.encoder_parameters == row.encoder_macs == 0
    cached = complexity("vit_tiny", size=64)
    assert row.parameters == row.trainable_parameters == cached.parameters
    assert row.macs == cached.macs
    assert row.reduction == row.cached_reduction == cached.reduction


@pytest.mark.slow
def test_timms_models_are_counted_on_images_and_on_latents():
    deit = complexity("timm:deit_tiny_patch16_224", size=64)
    assert deit.encoder_macs == 0
    # Its 25 LayerNorms, 5 per value, each once: timm has a LayerNorm of its own below torch's.
    assert deit.norm_macs == 5 * 25 * (4 * 4 + 1) * 192
    ours = complexity("ci2p+timm:deit_tiny_patch16_224", size=64)
    assert giga(ours.encoder_macs) == giga(complexity("vit", size=64).encoder_macs)
    # 4 + 1 tokens instead of 16 + 1, 12 blocks, 192 wide.
    assert deit.attention_macs == 12 * 2 * 17**2 * 192
    assert ours.attention_macs == 12 * 2 * 5**2 * 192


@pytest.mark.parametrize(("quality", "width", "channels"), [(5, 128, 192), (8, 192, 320)])
def test_the_encoder_formula_equals_the_count_of_compressai(quality, width, channels):
    zoo = pytest.importorskip("compressai.zoo")
    g_a = zoo.bmshj2018_factorized(quality=quality, metric="mse", pretrained=False).g_a.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        g_a(torch.rand(1, 3, 64, 64))
    row = complexity("vit_tiny", size=64, latent_channels=channels, encoder_width=width)
    assert row.encoder_macs == counter.get_total_flops() // 2
    assert row.encoder_parameters == sum(p.numel() for p in g_a.parameters())


@pytest.mark.parametrize("name", thinned(["vitds_tiny", "vit_tiny"]))
def test_counts_on_the_meta_device_equal_those_of_a_real_forward_pass(name):
    model = create_model(name, num_classes=10).eval()
    # The counter does not know every fused attention that a processor may be given.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 192, 6, 6))
    row = complexity(name, size=96, num_classes=10)
    assert row.model_macs == counter.get_total_flops() // 2
    assert row.trainable_parameters == sum(p.numel() for p in model.parameters())


def test_the_attention_products_are_counted():
    small, large = complexity("vit_tiny", size=256), complexity("vit_tiny", size=512)
    # Everything but squeeze-and-excitation grows with the area, attention with its square.
    num_tokens, width, depth = (256 // 32) ** 2, 256, 12
    attention = depth * 2 * num_tokens**2 * width
    squeeze = 2 * 768 * 192 + 2 * 1152 * 288
    linear = small.model_macs - attention - squeeze
    assert large.model_macs == 4 * linear + 16 * attention + squeeze


@pytest.mark.parametrize("name", thinned(["vitds", "vit", BASELINE]))
def test_a_head_adds_its_weights_to_model_and_baseline(name):
    bare, whole = complexity(name), complexity(name, num_classes=1000)
    assert whole.parameters - bare.parameters == 768 * 1000 + 1000
    assert whole.macs - bare.macs == whole.baseline_macs - bare.baseline_macs == 768 * 1000


@pytest.mark.slow
def test_the_table_holds_the_baseline_and_every_model():
    table = complexity_table(64, num_classes=5)
    assert [row.name for row in table] == [BASELINE, *list_models("latents")]
    assert {(row.size, row.num_classes) for row in table} == {(64, 5)}
    assert table[2] == complexity(table[2].name, size=64, num_classes=5)


def test_the_dictionary_form_is_json_with_totals_and_reductions():
    row = complexity("vitds_tiny", size=64)
    data = json.loads(json.dumps(row.to_dict()))
    assert set(data) == {field.name for field in dataclasses.fields(row)} | {
        "parameters",
        "macs",
        "reduction",
        "cached_reduction",
        "linear_reduction",
        "cached_linear_reduction",
        "mmengine_macs",
        "mmengine_reduction",
    }
    assert data["parameters"] == row.encoder_parameters + row.trainable_parameters
    assert data["reduction"] == row.reduction


@pytest.mark.slow
def test_counting_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    complexity("vitds_tiny", size=32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 240}, "`size` is 240; it must be a multiple of 32"),
        ({"size": 0}, "`size` is 0; it must be a positive integer"),
        ({"size": -32}, "`size` is -32; it must be a positive integer"),
        ({"size": 256.0}, r"`size` is 256\.0; it must be a positive integer"),
        ({"encoder_width": 0}, "`encoder_width` is 0; it must be a positive integer"),
        ({"latent_channels": 0}, "`latent_channels` is 0"),
        ({"num_classes": -1}, "`num_classes` is -1"),
    ],
)
@pytest.mark.parametrize("name", thinned(["vitds_tiny", BASELINE]))
def test_sizes_and_counts_that_cannot_be_used_are_refused(name, options, match):
    with pytest.raises(UsageError, match=match):
        complexity(name, **options)


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownModelError, match="no model is named 'vit_b32'"):
        complexity("vit_b32")
