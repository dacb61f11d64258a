"""The paper's codec from torch layers against compressai's own, bit for bit, and without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from ci2p_cache.encoder.architecture import own_model, value_tensors
from ci2p_cache.encoder.codec_checkpoint import CodecSpec
from ci2p_cache.encoder.frozen import dequantize, quantize
from ci2p_cache.encoder.load import load_encoder, load_saved_encoder
from ci2p_cache.encoder.train import TrainingImages, evaluate_rate_distortion, train_codec
from ci2p_cache.encoder.weights import WeightsCard, official_url, tensor_digest, weights_bytes
from ci2p_cache.encoder.zoo import ARCH, ZOO, compressai_model
from ci2p_cache.errors import MissingDependencyError, WeightsError
from tests.support.encoders import lively_state, needs_compressai, reference_of
from tests.support.pictures import picture

if TYPE_CHECKING:
    from compressai.models import CompressionModel

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def generated(count: int, width: int, height: int) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1]."""
    stack = np.stack([np.asarray(picture(seed, width, height)) for seed in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div(255)


def photographs(shared_data: Path) -> torch.Tensor:
    """Eight pieces of real photographs, (8, 3, 101, 77)."""
    pieces: list[Any] = []
    for path in sorted((shared_data / "flowers").rglob("*.jpg")):
        piece = np.asarray(Image.open(path).convert("RGB"))[150:251, 200:277]
        if piece.shape == (101, 77, 3) and len(pieces) < 8:
            pieces.append(piece)
    assert len(pieces) == 8
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).float().div(255)


def drawn(quality: int, *, lively: bool) -> CompressionModel:
    """compressai's own initialisation; lively: with latents of many symbols and other medians."""
    model = compressai_model(ARCH, quality).eval().requires_grad_(False)
    if lively:
        model.g_a[6].weight *= 60
        model.entropy_bottleneck.quantiles += torch.rand(model.M, 1, 1)
    return model


def assert_same(theirs: CompressionModel, quality: int, x: torch.Tensor) -> None:
    """Holds every stage of our own model to compressai's, in both layouts of memory."""
    tensors = value_tensors(theirs)
    bottleneck = theirs.entropy_bottleneck
    medians = bottleneck.quantiles[:, 0, 1]
    for layout in LAYOUTS:
        model = own_model(quality, tensors).to(memory_format=layout)
        theirs.to(memory_format=layout)
        images = x.contiguous(memory_format=layout)
        with torch.inference_mode():
            wanted = theirs.g_a(images)
            wanted_hat, likelihoods = bottleneck(wanted)
            y = model.g_a(images)
            y_hat = dequantize(quantize(y, medians), medians)
            mass = model.entropy_bottleneck.bin_mass(y_hat.transpose(0, 1).flatten(1)[:, None], 1)
            assert torch.equal(y, wanted)
            assert torch.equal(y_hat, wanted_hat)
            assert torch.equal(mass, likelihoods.transpose(0, 1).flatten(1)[:, None])
            assert torch.equal(model.g_s(y_hat), theirs(images)["x_hat"])


def bits_by_compressai(theirs: CompressionModel, y_hat: torch.Tensor, step: float) -> torch.Tensor:
    """What `FrozenEncoder.bits` adds up, by compressai's cumulative."""
    bottleneck = theirs.entropy_bottleneck
    values = y_hat.transpose(0, 1).reshape(y_hat.shape[1], 1, -1)
    with torch.inference_mode():
        lower = bottleneck._logits_cumulative(values - step / 2, stop_gradient=True)
        upper = bottleneck._logits_cumulative(values + step / 2, stop_gradient=True)
        mass = bottleneck.likelihood_lower_bound(torch.sigmoid(upper) - torch.sigmoid(lower))
        bits = -torch.log2(mass.double()).reshape(y_hat.shape[1], len(y_hat), -1)
        return bits.sum(dim=(0, 2))


# Against compressai


@needs_compressai
@pytest.mark.parametrize(("count", "width", "height"), [(1, 75, 50), (3, 32, 64)])
def test_every_stage_equals_compressai_bit_for_bit(count, width, height):
    torch.manual_seed(count)
    assert_same(drawn(1, lively=True), 1, generated(count, width, height))


@needs_compressai
@pytest.mark.parametrize("step", [1.0, 0.25])
def test_bits_equal_compressai_bit_for_bit(step):
    encoder = load_encoder("bundled")
    y_hat = encoder.dequantize(
        encoder.quantize(encoder(generated(2, 70, 40)), step=step), step=step
    )
    theirs = reference_of(value_tensors(encoder._model), 5)
    assert torch.equal(encoder.bits(y_hat, step=step), bits_by_compressai(theirs, y_hat, step))


@needs_compressai
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("quality", range(1, 9))
def test_all_qualities_equal_compressai_on_pictures_and_photographs(shared_data, quality, count):
    torch.manual_seed(quality)
    real = photographs(shared_data)[:count]
    for lively in (False, True):
        theirs = drawn(quality, lively=lively)
        for x in (generated(count, 64, 48), generated(count, 53, 35), real):
            assert_same(theirs, quality, x)


@needs_compressai
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8])
def test_the_bundled_encoder_equals_compressai_on_pictures_and_photographs(shared_data, count):
    encoder = load_encoder("bundled")
    theirs = reference_of(value_tensors(encoder._model), 5)
    for x in (generated(count, 96, 64), generated(count, 53, 35), photographs(shared_data)):
        assert_same(theirs, 5, x[:count])
        theirs.to(memory_format=torch.channels_last)
        y = encoder(x[:count])
        with torch.inference_mode():
            wanted = theirs.g_a(x[:count].contiguous(memory_format=torch.channels_last))
        assert torch.equal(y, wanted)
        y_hat = encoder.dequantize(encoder.quantize(y))
        assert torch.equal(encoder.bits(y_hat), bits_by_compressai(theirs, y_hat, 1.0))


@needs_compressai
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constants_of_a_file_are_taken_as_compressai_takes_them(dtype):
    theirs = drawn(2, lively=True)
    for name, buffer in theirs.named_buffers():
        if name.endswith(("pedestal", "bound")):
            buffer.mul_(1.5).add_(1e-3)
    assert_same(theirs, 2, generated(1, 50, 40))
    ours = own_model(2, value_tensors(theirs)).to(dtype)
    x = generated(1, 48, 48).to(dtype)
    with torch.inference_mode():
        assert torch.equal(ours.g_a(x), theirs.to(dtype).g_a(x))


@needs_compressai
@pytest.mark.parametrize("quality", [5, 8])
def test_digest_and_bytes_are_those_of_compressais_model(tmp_path, quality):
    path = tmp_path / "weights.safetensors"
    # The constants are left out, as in the bundled file.
    parameters = {n: t for n, t in lively_state(quality, 3).items() if "_reparam" not in n}
    safetensors.torch.save_file({n: t.half() for n, t in parameters.items()}, path)
    encoder = load_encoder(weights=path, quality=quality)
    halves = {name: tensor.half() for name, tensor in parameters.items()}
    theirs = value_tensors(reference_of(halves, quality))
    ours = value_tensors(encoder._model)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert (ours[name].dtype, ours[name].shape) == (torch.float32, tensor.shape)
    assert encoder.spec.weights_sha256 == tensor_digest(theirs)
    assert encoder.to_bytes() == weights_bytes(theirs, WeightsCard.of(encoder.spec))


@needs_compressai
def test_names_of_old_files_are_read_as_compressai_reads_them(tmp_path):
    from compressai.models.utils import remap_old_keys
    from compressai.zoo.pretrained import load_pretrained

    state = lively_state(1, 5)
    wanted = load_encoder(weights=_file(state, tmp_path / "new.safetensors"), quality=1).spec
    for parts in (
        ("_matrices.", "_biases.", "_factors."),
        ("_matrix", "_bias", "_factor"),
    ):
        old = {}
        for name, tensor in state.items():
            for new, part in zip(("matrices.", "biases.", "factors."), parts, strict=True):
                name = name.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{part}")
            old[f"module.{name}"] = tensor
        assert set(remap_old_keys("entropy_bottleneck", load_pretrained(old))) == set(state)
        path = _file(old, tmp_path / f"{parts[0]}.safetensors")
        assert load_encoder(weights=path, quality=1).spec == wanted


def _file(state: dict[str, torch.Tensor], path: Path) -> Path:
    safetensors.torch.save_file(state, path)
    return path


@needs_compressai
def test_sizes_and_urls_are_those_of_compressais_zoo(monkeypatch):
    from compressai.zoo.image import cfgs, model_urls

    monkeypatch.delenv("CI2P_CACHE_WEIGHTS_URL", raising=False)
    assert list(ZOO) == list(model_urls)
    for arch, sizes in ZOO.items():
        assert dict(enumerate(sizes, start=1)) == cfgs[arch]
        for metric, urls in model_urls[arch].items():
            assert {q: official_url(arch, q, metric) for q in urls} == urls


# Loading


def test_a_loaded_encoder_shares_no_memory_with_its_file(tmp_path):
    path = _file(lively_state(1, 1), tmp_path / "weights.safetensors")
    encoder = load_encoder(weights=path, quality=1)
    before = encoder.to_bytes()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(100_000))
    assert encoder.to_bytes() == before


# Without compressai


@pytest.fixture
def without_compressai(monkeypatch):
    """Has every import of compressai fail, as where it is not installed."""
    for name in ("compressai", *(n for n in sys.modules if n.startswith("compressai."))):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "compressai.zoo.image", None)


@pytest.mark.usefixtures("without_compressai")
class TestWithoutCompressai:
    def test_the_papers_encoder_does_all_that_a_cache_asks_of_it(self, tmp_path):
        load_encoder("bundled").save(tmp_path / "encoder.safetensors")
        encoder = load_saved_encoder(tmp_path / "encoder.safetensors")
        y_hat = encoder.dequantize(encoder.quantize(encoder(generated(1, 32, 32))))
        assert encoder.decode(y_hat).shape == (1, 3, 32, 32)
        assert float(encoder.bits(y_hat)[0]) > 0
        assert official_url(ARCH, 8, "ms-ssim").endswith("ms-ssim-8-8811bd14.pth.tar")

    def test_another_architecture_says_what_works_instead(self, tmp_path):
        weights = _file(lively_state(1, 1), tmp_path / "weights.safetensors")
        for file in (None, weights):
            with pytest.raises(MissingDependencyError, match=r"mbt2018 needs compressai") as caught:
                load_encoder(arch="mbt2018", weights=file)
            assert caught.value.hint == f"--arch {ARCH}, the default"
            assert caught.value.exit_code == 2
            assert "\n" not in str(caught.value)

    def test_an_encoder_of_another_architecture_in_a_cache_is_not_called_damaged(self, tmp_path):
        card: dict[str, Any] = {
            "format_version": 1,
            "arch": "mbt2018",
            "quality": 1,
            "metric": "mse",
            "weights_sha256": "0" * 64,
        }
        path = tmp_path / "encoder.safetensors"
        metadata = {"ci2p_cache": json.dumps(card)}
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(MissingDependencyError, match="mbt2018 needs compressai"):
            load_saved_encoder(path)

    def test_weights_of_another_architecture_are_refused_by_what_they_hold(self, tmp_path):
        state = {**lively_state(1, 1), "h_a.0.weight": torch.zeros(1)}
        path = _file(state, tmp_path / "hyper.safetensors")
        with pytest.raises(WeightsError, match=r"1 keys unexpected.*has a hyperprior \(h_a\)"):
            load_encoder(weights=path, quality=1)

    def test_training_and_real_coding_say_what_works_instead(self, tmp_path):
        pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
        data = TrainingImages([pixels], [1.0], "one picture")
        with pytest.raises(MissingDependencyError, match="training a codec needs compressai"):
            train_codec(data, CodecSpec(steps=1), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        with pytest.raises(MissingDependencyError, match="real entropy coding needs") as caught:
            evaluate_rate_distortion(load_encoder("bundled"), [pixels])
        assert "FrozenEncoder.bits" in (caught.value.hint or "")
