"""The frozen encoder against plain CompressAI calls, and the pure quantiser."""

from __future__ import annotations

import copy
import importlib.resources
import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ci2p_cache as cc
from ci2p_cache.encoder.architecture import value_tensors
from ci2p_cache.encoder.frozen import (
    FrozenEncoder,
    dequantize,
    fixed_arithmetic,
    quantize,
    saturate,
)
from ci2p_cache.encoder.load import load_encoder, load_saved_encoder, save_half
from ci2p_cache.encoder.zoo import compressai_model
from ci2p_cache.errors import UsageError, WeightsError
from tests.support.encoders import lively_state, needs_compressai, reference_of
from tests.support.pictures import picture
from tests.support.tiers import thinned

if TYPE_CHECKING:
    from compressai.models import CompressionModel


BUNDLED_FILE = "bmshj2018-factorized-5-mse.safetensors"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(*seeds: int, width: int = 96, height: int = 64) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1]."""
    stack = np.stack([np.asarray(picture(seed, width, height)) for seed in seeds])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div(255)


def drawn_model(arch: str) -> CompressionModel:
    """compressai's model of quality 1, drawn as it draws them."""
    torch.manual_seed(3)
    return compressai_model(arch, 1).eval()


@pytest.fixture(scope="module")
def bundled() -> FrozenEncoder:
    return load_encoder("bundled")


@pytest.fixture(scope="module", params=["bundled", "random quality 1"])
def pair(request, bundled, tmp_path_factory):
    """(our encoder, the tensors of its file read without our code)."""
    if request.param == "bundled":
        path = importlib.resources.files("ci2p_cache.encoder") / "bundled" / BUNDLED_FILE
        return bundled, safetensors.torch.load(path.read_bytes())
    path = tmp_path_factory.mktemp("weights") / "q1.pth.tar"
    state = lively_state(1, seed=11)
    torch.save(state, path)
    return load_encoder(weights=path, quality=1), state


# Sameness with CompressAI


@needs_compressai
@pytest.mark.parametrize(("width", "height"), [(96, 64), (32, 80)])
def test_every_stage_equals_plain_compressai_bit_for_bit(pair, width, height):
    encoder, tensors = pair
    model = reference_of(tensors, encoder.spec.quality)
    x = images(1, 2, width=width, height=height)
    with torch.inference_mode():
        inputs = x.contiguous(memory_format=torch.channels_last)
        wanted_y = model.g_a(inputs)
        bottleneck = model.entropy_bottleneck
        medians = bottleneck.quantiles[:, :, 1:2].reshape(1, -1, 1, 1)
        wanted_symbols = bottleneck.quantize(wanted_y, "symbols", medians)
        wanted_y_hat, likelihoods = bottleneck(wanted_y)
        wanted_x_hat = model(inputs)["x_hat"]

    y = encoder(x)
    symbols = encoder.quantize(y)
    y_hat = encoder.dequantize(symbols)
    assert y.dtype == torch.float32
    assert y.shape == (2, encoder.num_channels, height // 16, width // 16)
    assert y.is_contiguous()
    assert torch.equal(y, wanted_y)
    assert symbols.dtype == torch.int32
    assert torch.equal(symbols, wanted_symbols)
    assert int(symbols.abs().max()) > 5
    assert torch.equal(y_hat, wanted_y_hat)
    assert torch.equal(y_hat, bottleneck.dequantize(wanted_symbols, medians))
    assert torch.equal(encoder.decode(y_hat), wanted_x_hat)
    assert torch.equal(encoder.medians, medians.flatten())
    bits = -torch.log2(likelihoods.double()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(encoder.bits(y_hat), bits, rtol=1e-12, atol=0)


def test_the_memory_layout_of_images_changes_no_value(bundled):
    wanted = bundled(images(8))
    pixels = torch.from_numpy(np.array(picture(8, 96, 64)))
    # For one image the batch stride is arbitrary, and torch then takes it for NCHW.
    view = pixels.permute(2, 0, 1)[None].float().div(255)
    assert view.stride(0) == 3
    for x in (view, view.contiguous(), view.clone(memory_format=torch.channels_last)):
        assert torch.equal(bundled(x), wanted)


def test_a_batch_of_three_equals_three_batches_of_one(pair):
    encoder, _ = pair
    x = images(3, 4, 5)
    y = encoder(x)
    y_hat = encoder.dequantize(encoder.quantize(y))
    for i in range(3):
        assert torch.equal(encoder(x[i : i + 1]), y[i : i + 1])
        assert torch.equal(encoder.decode(y_hat[i : i + 1]), encoder.decode(y_hat)[i : i + 1])


def test_threads_that_share_an_encoder_get_the_same_values(bundled):
    x = images(1, 2)
    wanted, got = bundled(x), {}

    def work(i: int) -> None:
        torch.set_num_threads(1)
        got[i] = bundled(x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], wanted) for i in range(3))


def test_what_the_process_has_switched_on_changes_no_value_and_stays_switched_on(bundled):
    x = images(6)
    wanted = bundled(x)
    wanted_bits = bundled.bits(wanted)
    onednn: Any = cast("Any", torch.backends.mkldnn).conv
    before = onednn.fp32_precision
    onednn.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(bundled(x), wanted)
            assert torch.equal(bundled.decode(wanted), bundled.decode(wanted.clone()))
            assert torch.equal(bundled.bits(wanted), wanted_bits)
            assert torch.is_autocast_enabled("cpu")
        assert onednn.fp32_precision == "bf16"
    finally:
        onednn.fp32_precision = before


def test_loading_an_encoder_draws_no_random_numbers():
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    load_encoder("bundled")
    assert torch.equal(torch.rand(4), wanted)


def test_latents_can_be_trained_on(bundled):
    layer = torch.nn.Conv2d(bundled.num_channels, 2, 1)
    y = bundled(images(1))
    assert not y.requires_grad
    layer(y).sum().backward()
    assert layer.weight.grad is not None


def test_g_a_is_not_flip_equivariant(bundled):
    x = images(7)
    mirrored = bundled(x.flip(-1))
    assert float((mirrored - bundled(x).flip(-1)).norm() / mirrored.norm()) > 0.1


def test_bf16_is_near_float32_and_keeps_the_digest(bundled):
    rough = load_encoder("bundled", precision="bf16")
    x = images(1, 2)
    y, exact = rough(x), bundled(x)
    assert y.dtype == torch.float32
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.05
    assert rough.spec.precision == "bf16"
    assert rough.spec.weights_sha256 == bundled.spec.weights_sha256
    assert torch.equal(rough.decode(exact), bundled.decode(exact))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_g_a_in_place_and_in_parts_gives_the_bits_of_its_layers(precision):
    encoder = load_encoder("bundled", precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = copy.deepcopy(encoder._model.g_a).to(dtype)
    for count, size in ((1, 32), (5, 48), (15, 64)):
        x = torch.rand((count, 3, size, size + 16), generator=torch.Generator().manual_seed(size))
        with torch.inference_mode():
            wanted = plain(x.to(dtype).contiguous(memory_format=torch.channels_last)).float()
        # The first time a shape is met, convolutions of two libraries are compared.
        for _ in range(2):
            assert torch.equal(encoder(x), wanted)


@pytest.mark.slow
def test_g_a_gives_the_bits_of_its_layers_where_two_libraries_differ():
    # Without FMA oneDNN rounds otherwise than BLAS, which torch prefers on one thread.
    test = f"{__file__}::{test_g_a_in_place_and_in_parts_gives_the_bits_of_its_layers.__name__}"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0"]
    command += [f"{test}[float32]"]
    subprocess.run(command, env=environment, check=True)


def test_tf32_on_cpu_says_that_it_changes_nothing(bundled, caplog):
    with caplog.at_level(logging.WARNING, logger="ci2p_cache"):
        encoder = load_encoder("bundled", precision="tf32")
    assert "tf32 exists on CUDA only" in caplog.text
    assert torch.equal(encoder(images(1)), bundled(images(1)))


def test_copies_and_moves_give_the_same_encoder(bundled):
    x = images(2)
    for other in (copy.deepcopy(bundled), bundled.to("cpu")):
        assert other is not bundled
        assert other.spec == bundled.spec
        assert torch.equal(other(x), bundled(x))


def test_the_public_names_give_the_same_encoder(bundled):
    encoder = cc.load_encoder("bundled")
    assert encoder.spec == bundled.spec
    assert isinstance(encoder, cc.FrozenEncoder)
    assert encoder.spec.arch == "bmshj2018-factorized"
    assert (encoder.spec.quality, encoder.spec.metric) == (5, "mse")
    assert (encoder.num_channels, encoder.downsampling, encoder.has_symbols) == (192, 16, True)
    assert encoder.device == torch.device("cpu")
    assert "bmshj2018-factorized, quality 5" in repr(encoder)


@pytest.mark.parametrize(("tf32", "wanted"), [(False, "ieee"), (True, "tf32")])
def test_cudnn_is_switched_for_the_call_only(tf32, wanted):
    cudnn: Any = torch.backends.cudnn

    def switches() -> tuple[str, bool, bool]:
        return cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark

    before = switches()
    with fixed_arithmetic(torch.device("cuda"), tf32=tf32):
        assert switches() == (wanted, True, False)
    assert switches() == before
    with pytest.raises(KeyError), fixed_arithmetic(torch.device("cuda"), tf32=tf32):
        raise KeyError
    assert switches() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_repeats_itself_and_comes_near_the_cpu(bundled):
    encoder = bundled.to("cuda")
    x = images(1, 2)
    cudnn: Any = torch.backends.cudnn
    before = (cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark)
    y = encoder(x)
    assert torch.equal(y, encoder(x))
    assert (cudnn.conv.fp32_precision, cudnn.deterministic, cudnn.benchmark) == before
    torch.testing.assert_close(y.cpu(), bundled(x), rtol=1e-4, atol=1e-3)
    tf32 = load_encoder("bundled", precision="tf32", device="cuda")(x)
    assert not torch.equal(tf32, y)
    torch.testing.assert_close(encoder.decode(y).cpu(), bundled.decode(y), rtol=1e-4, atol=1e-3)


# Step and rate


@pytest.mark.parametrize("step", [0.25, 0.5, 2.0])
def test_other_steps_round_the_distance_to_the_median(pair, step):
    encoder, _ = pair
    y = encoder(images(1))
    symbols = encoder.quantize(y, step=step)
    scaled = (y.double() - encoder.medians[:, None, None].double()) / step
    assert float((symbols - scaled).abs().max()) <= 0.5 + 1e-4
    error = (encoder.dequantize(symbols, step=step) - y).abs()
    assert float(error.max()) <= step / 2 + 1e-4


def test_the_mass_of_a_bin_is_the_sum_of_the_bins_it_splits_into(bundled):
    channel = 4
    # Everywhere else the likelihood is at its lower bound of 1e-9, so one channel can be told.
    rest = (bundled.num_channels - 1) * -math.log2(float(np.float32(1e-9)))

    def mass(value: float, step: float) -> float:
        y_hat = torch.full((1, bundled.num_channels, 1, 1), 1e6)
        y_hat[0, channel] = value
        return math.pow(2.0, rest - float(bundled.bits(y_hat, step=step)[0]))

    middle = float(bundled.medians[channel])
    assert mass(middle, 1.0) > 1e-3
    halves = mass(middle - 0.25, 0.5) + mass(middle + 0.25, 0.5)
    assert mass(middle, 1.0) == pytest.approx(halves, rel=1e-4)
    assert sum(mass(middle + k, 1.0) for k in range(-60, 61)) == pytest.approx(1.0, abs=1e-3)


@needs_compressai
@pytest.mark.slow
def test_bundled_weights_compress_photographs_as_their_card_says(shared_data, bundled):
    model = reference_of(value_tensors(bundled._model), 5)
    model.update()
    paths = sorted((shared_data / "kodak").glob("*.png"))[1:3]
    if len(paths) < 2:
        pytest.skip(f"no Kodak images in {shared_data / 'kodak'}")
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div(255)
        y_hat = bundled.dequantize(bundled.quantize(bundled(x)))
        mse = float((bundled.decode(y_hat).clamp(0, 1) - x).mul(255).square().mean())
        estimate = float(bundled.bits(y_hat)[0])
        with torch.inference_mode():
            coded = model.compress(x.contiguous(memory_format=torch.channels_last))
        real = 8 * len(coded["strings"][0][0])
        assert real == pytest.approx(estimate, rel=0.01)
        assert 0.4 < real / (x.shape[2] * x.shape[3]) < 1.1
        assert 33 < 10 * math.log10(255**2 / mse) < 38


# Other architectures


@needs_compressai
@pytest.mark.parametrize(
    "arch",
    thinned(
        ["bmshj2018-hyperprior", "mbt2018-mean", "mbt2018", "cheng2020-anchor", "cheng2020-attn"],
        step=4,
    ),
)
def test_hyperprior_encoders_give_y_and_refuse_symbols(arch, tmp_path):
    model = drawn_model(arch)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "weights.pth.tar")
    encoder = load_encoder(weights=tmp_path / "weights.pth.tar", arch=arch, quality=1)
    x = images(1, width=80, height=48)
    with torch.inference_mode():
        model.to(memory_format=torch.channels_last)
        wanted = model.g_a(x.contiguous(memory_format=torch.channels_last))
        wanted_x = model.g_s(wanted.contiguous())
    y = encoder(x)
    assert torch.equal(y, wanted)
    assert torch.equal(encoder.decode(y), wanted_x)
    assert y.shape[1] == encoder.num_channels
    assert not encoder.has_symbols
    calls: list[Callable[[], object]] = [
        lambda: encoder.medians,
        lambda: encoder.quantize(y),
        lambda: encoder.dequantize(y.int()),
        lambda: encoder.bits(y),
    ]
    for refused in calls:
        with pytest.raises(UsageError, match="cached as float16 or float32"):
            refused()


def test_the_number_of_channels_follows_the_architecture(tmp_path):
    torch.save(lively_state(7, seed=1), tmp_path / "q7.pth")
    encoder = load_encoder(weights=tmp_path / "q7.pth", quality=7, metric="ms-ssim")
    assert encoder.num_channels == 320
    assert encoder.spec.metric == "ms-ssim"


# Saving


def test_a_saved_encoder_comes_back_the_same(pair, tmp_path):
    encoder, _ = pair
    encoder.save(tmp_path / "a.safetensors")
    encoder.save(tmp_path / "b.safetensors")
    saved = load_saved_encoder(tmp_path / "a.safetensors")
    saved.save(tmp_path / "c.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data == (tmp_path / "b.safetensors").read_bytes()
    assert data == (tmp_path / "c.safetensors").read_bytes() == encoder.to_bytes()
    assert saved.spec == encoder.spec
    y = encoder(images(1))
    assert torch.equal(saved(images(1)), y)
    assert torch.equal(saved.decode(y), encoder.decode(y))
    tensors = safetensors.torch.load(data)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    card = json.loads(header["__metadata__"]["ci2p_cache"])
    assert card["weights_sha256"] == encoder.spec.weights_sha256
    assert card["arch"] == "bmshj2018-factorized"


def test_the_precision_is_chosen_anew_for_a_saved_encoder(tmp_path):
    load_encoder("bundled", precision="bf16").save(tmp_path / "encoder.safetensors")
    assert load_saved_encoder(tmp_path / "encoder.safetensors").spec.precision == "float32"
    again = load_saved_encoder(tmp_path / "encoder.safetensors", precision="bf16")
    assert again.spec.precision == "bf16"


def test_a_saved_encoder_can_be_given_as_weights_file(bundled, tmp_path):
    bundled.save(tmp_path / "encoder.safetensors")
    assert load_encoder(weights=tmp_path / "encoder.safetensors").spec == bundled.spec
    with pytest.raises(WeightsError, match="is of bmshj2018-factorized quality 5 mse") as caught:
        load_encoder(weights=tmp_path / "encoder.safetensors", quality=3)
    assert caught.value.hint == "repeat the command with --arch bmshj2018-factorized --quality 5"


@pytest.mark.parametrize("where", [0.00001, 0.001, 0.3, 0.7, 0.999])
def test_a_flipped_bit_in_a_saved_encoder_is_seen(bundled, tmp_path, where):
    data = bytearray(bundled.to_bytes())
    data[int(len(data) * where)] ^= 0x10
    (tmp_path / "encoder.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"encoder\.safetensors"):
        load_saved_encoder(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 4000, 1_000_000])
def test_a_truncated_saved_encoder_is_seen(bundled, tmp_path, kept):
    (tmp_path / "encoder.safetensors").write_bytes(bundled.to_bytes()[:kept])
    with pytest.raises(WeightsError, match="damaged or no safetensors"):
        load_saved_encoder(tmp_path / "encoder.safetensors")


def test_a_foreign_file_is_no_saved_encoder(tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(WeightsError, match=r"encoder\.safetensors cannot be read"):
        load_saved_encoder(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="no encoder saved by ci2p-cache"):
        load_saved_encoder(path)
    for card in ("[" * 100_000, "{}", "3"):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={"ci2p_cache": card})
        with pytest.raises(WeightsError, match="damaged"):
            load_saved_encoder(path)
    known = {"format_version": 1, "metric": "mse", "weights_sha256": "0" * 64}
    for changed in (
        {"arch": "resnet50", "quality": 5},
        {"arch": "cheng2020-anchor", "quality": 8},
        {"arch": "mbt2018", "quality": 1, "format_version": 2},
    ):
        text = json.dumps({**known, **changed})
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata={"ci2p_cache": text})
        with pytest.raises(WeightsError, match="damaged"):
            load_saved_encoder(path)


def test_half_precision_files_hold_the_rounded_encoder(tmp_path):
    torch.save(lively_state(2, seed=4), tmp_path / "q2.pth")
    encoder = load_encoder(weights=tmp_path / "q2.pth", quality=2)
    halved = save_half(encoder, tmp_path / "half.safetensors")
    again = load_saved_encoder(tmp_path / "half.safetensors")
    assert again.spec == halved.spec != encoder.spec
    y, near = encoder(images(1)), again(images(1))
    assert torch.equal(near, halved(images(1)))
    assert 0 < float((near - y).norm() / y.norm()) < 0.01
    assert (tmp_path / "half.safetensors").stat().st_size * 1.9 < len(encoder.to_bytes())


def test_weights_too_large_for_float16_are_refused(tmp_path):
    state = lively_state(2, seed=4)
    state["g_s.0.bias"][3] = 70_000.0
    torch.save(state, tmp_path / "q2.pth")
    encoder = load_encoder(weights=tmp_path / "q2.pth", quality=2)
    with pytest.raises(WeightsError, match=r"'g_s\.0\.bias' .* not finite"):
        save_half(encoder, tmp_path / "half.safetensors")
    assert not (tmp_path / "half.safetensors").exists()


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet50"}, "wanted one of bmshj2018-factorized, bmshj2018-hyperprior"),
        ({"quality": 0}, "`quality` is 0; bmshj2018-factorized has qualities 1 to 8"),
        ({"quality": 9}, "`quality` is 9"),
        ({"arch": "cheng2020-attn", "quality": 7}, "cheng2020-attn has qualities 1 to 6"),
        ({"metric": "lpips"}, "wanted one of mse, ms-ssim"),
        ({"source": "random"}, "wanted official or bundled"),
        ({"source": "bundled", "quality": 3}, "quality 3 mse was asked for"),
        ({"source": "bundled", "metric": "ms-ssim"}, "the bundled encoder is bmshj2018-factor"),
        ({"source": "bundled", "arch": "mbt2018"}, "the bundled encoder is bmshj2018-factorized"),
        ({"source": "bundled", "weights": Path("x.pth")}, "choose one"),
        ({"source": "bundled", "precision": "float64"}, "wanted float32, tf32, bf16"),
        ({"source": "bundled", "device": "toaster"}, "wanted auto, cpu, cuda or cuda:1"),
        ({"source": "bundled", "device": "meta"}, "wanted auto, cpu, cuda or cuda:1"),
        ({"source": "bundled", "device": "cuda:77"}, "torch can use . CUDA devices"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        load_encoder(**arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(3, 32, 32),
        torch.zeros(1, 1, 32, 32),
    ],
)
def test_images_of_another_kind_are_refused(bundled, wrong):
    with pytest.raises(UsageError, match=r"wanted \(B, 3, H, W\) floats"):
        bundled(wrong)


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_that_is_no_width_is_refused(bundled, step):
    y = torch.zeros(1, 192, 1, 2)
    for call in (bundled.quantize, bundled.dequantize, bundled.bits):
        with pytest.raises(UsageError, match="`step` is"):
            call(y, step=step)


# The pure quantiser


@given(
    step=st.sampled_from([0.125, 0.5, 1.0, 1.5, 3.0]),
    seed=st.integers(0, 2**20),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7)),
)
def test_symbols_survive_dequantising_and_quantising_again(step, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(-300, 300, shape, generator=generator, dtype=torch.int32)
    medians = torch.rand(shape[1], generator=generator) - 0.5
    y_hat = dequantize(symbols, medians, step)
    assert y_hat.dtype == torch.float32
    assert torch.equal(quantize(y_hat, medians, step), symbols)
    scaled = symbols.numpy().astype(np.float32) * np.float32(step) + medians.numpy()[:, None, None]
    assert np.array_equal(y_hat.numpy(), scaled)


def test_quantising_leaves_its_input_alone():
    y = torch.full((1, 2, 1, 1), 0.6)
    medians = torch.tensor([0.25, -0.25])
    symbols = quantize(y, medians)
    assert symbols.flatten().tolist() == [0, 1]
    dequantize(symbols, medians)
    assert symbols.flatten().tolist() == [0, 1]
    assert y.flatten().tolist() == pytest.approx([0.6, 0.6])


@pytest.mark.parametrize(("limit", "dtype"), [(127, torch.int8), (32767, torch.int16)])
def test_saturation_clamps_and_counts_per_channel(limit, dtype):
    symbols = torch.zeros(2, 3, 2, 3, dtype=torch.int32)
    symbols[0, 1, 0, 2] = limit + 1
    symbols[1, 1, 1, 1] = -limit - 1
    symbols[1, 2] = torch.iinfo(torch.int32).min
    symbols[0, 0, 0, 0], symbols[0, 0, 0, 1] = limit, -limit
    stored, clipped = saturate(symbols, limit)
    assert stored.dtype == dtype
    assert clipped.dtype == torch.int64
    assert clipped.tolist() == [[0, 1, 0], [0, 1, 6]]
    assert torch.equal(stored.int(), symbols.clamp(-limit, limit))
    assert int(stored.min()) > torch.iinfo(dtype).min
    one, count = saturate(symbols[1], limit)
    assert torch.equal(one, stored[1])
    assert count.tolist() == [0, 1, 6]


def test_saturation_refuses_what_no_dtype_holds():
    with pytest.raises(UsageError, match="`limit` is 40000"):
        saturate(torch.zeros(1, 1, 1, dtype=torch.int32), 40000)
    with pytest.raises(UsageError, match="at least \\(M, h, w\\)"):
        saturate(torch.zeros(1, 1, dtype=torch.int32), 127)
