"""Training a codec: the loop, its checkpoints, its command line, and the figures it reports."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ci2p_cache as cc
from ci2p_cache.encoder.architecture import value_tensors
from ci2p_cache.encoder.codec_checkpoint import CodecSpec
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoder.train import (
    CodecStep,
    CodecSummary,
    Muon,
    TrainingImages,
    evaluate_rate_distortion,
    train_codec,
)
from ci2p_cache.errors import (
    CheckpointError,
    RunMismatchError,
    TrainingDivergedError,
    UsageError,
    WeightsError,
)
from tests.support.commands import REPO
from tests.support.encoders import needs_compressai, reference_of
from tests.support.pictures import picture, write_image_folder

pytestmark = needs_compressai

SCRIPT = REPO / "pipelines" / "train_codec.py"
Wish = Literal["go", "save", "stop"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels(seed: int, width: int = 90, height: int = 70) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture(seed, width, height))).permute(2, 0, 1).contiguous()


def pictures(*seeds: int) -> TrainingImages:
    images = [pixels(seed, 70 + 9 * seed, 50 + 5 * seed) for seed in seeds]
    return TrainingImages(images, [1.0 + seed for seed in seeds], f"pictures {seeds}")


def spec(**changes: Any) -> CodecSpec:
    # Where bfloat16 is emulated a step of it takes nine times as long; one test is for it.
    small: dict[str, Any] = {
        "precision": "float32",
        "quality": 1,
        "steps": 6,
        "batch_size": 2,
        "crop_px": 32,
        "lr": 1e-3,
        "warmup_steps": 2,
    }
    return CodecSpec(**{**small, **changes})


def at(step: int, wish: Wish) -> Callable[[CodecStep], Wish]:
    return lambda done: wish if done.step == step else "go"


def same_weights(one: CodecSummary, other: CodecSummary) -> bool:
    return one.encoder.to_bytes() == other.encoder.to_bytes()


def run_script(*words: object) -> int:
    """Runs the script in this process, which takes no seconds to import torch; its exit code."""
    argv = sys.argv
    sys.argv = [str(SCRIPT), *map(str, words)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = argv
    return 0


# The loop


@pytest.mark.slow
def test_the_cost_falls_on_a_few_pictures(tmp_path):
    data = pictures(1, 2)
    start = train_codec(data, spec(steps=1, lr=1e-9), tmp_path / "start").encoder
    told: list[CodecStep] = []

    def control(done: CodecStep) -> Wish:
        told.append(done)
        return "go"

    trained = train_codec(data, spec(steps=40), tmp_path / "run", control=control)
    before = evaluate_rate_distortion(start, data.images)
    after = evaluate_rate_distortion(trained.encoder, data.images)
    assert after.cost < 0.8 * before.cost
    assert [done.step for done in told] == list(range(1, 41))
    assert told[-1].loss == pytest.approx(0.025 * told[-1].mse + told[-1].bpp)
    assert told[1].lr == 1e-3
    assert 0 < told[-1].lr < 1e-5


@pytest.mark.parametrize(
    ("optimizer", "precision", "steps"),
    [
        ("adam", "float32", 2),
        pytest.param("adam", "float32", 4, marks=pytest.mark.slow),
        pytest.param("muon", "bfloat16", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    tmp_path, optimizer, precision, steps
):
    settings = spec(steps=steps, optimizer=optimizer, precision=precision)
    data = pictures(1, 2, 3)
    whole = train_codec(data, settings, tmp_path / "whole")
    for step in range(1, steps):
        out = tmp_path / f"stopped-{step}"
        stopped = train_codec(data, settings, out, control=at(step, "stop"))
        assert stopped.steps_done == step
        torch.manual_seed(step)  # nothing of the process's own random numbers comes in
        resumed = train_codec(data, settings, out)
        assert (resumed.steps_done, resumed.resumed_at) == (steps, step)
        assert same_weights(whole, resumed)


@pytest.mark.slow
def test_a_run_killed_after_a_save_goes_on_from_there(tmp_path):
    data, settings = pictures(1, 2), spec()
    whole = train_codec(data, settings, tmp_path / "whole")

    def killed(done: CodecStep) -> Wish:
        if done.step == 5:
            raise KeyboardInterrupt
        return "save" if done.step == 3 else "go"

    with pytest.raises(KeyboardInterrupt):
        train_codec(data, settings, tmp_path / "run", control=killed)
    resumed = train_codec(data, settings, tmp_path / "run")
    assert resumed.resumed_at == 3
    assert same_weights(whole, resumed)
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == [
        "checkpoint-00000006.safetensors",
        "checkpoint.json",
    ]
    again = train_codec(data, settings, tmp_path / "run")
    assert (again.resumed_at, again.steps_done) == (6, 6)
    assert same_weights(again, resumed)


@pytest.mark.slow
def test_training_leaves_the_callers_random_numbers_and_the_start_alone(tmp_path):
    start = train_codec(pictures(1), spec(steps=1), tmp_path / "start").encoder
    before = start.to_bytes()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train_codec(pictures(1), spec(steps=2), tmp_path / "run", start=start)
    assert torch.equal(torch.rand(4), expected)
    assert start.to_bytes() == before


@pytest.mark.slow
def test_a_start_that_is_hardly_moved_stays_what_it_was(tmp_path):
    start = train_codec(pictures(1), spec(), tmp_path / "start").encoder
    settings = spec(steps=1, lr=1e-12, entropy_lr=1e-12, aux_lr=1e-12)
    moved = train_codec(pictures(1), settings, tmp_path / "run", start=start).encoder
    x = pixels(4)[None] / 255
    assert torch.allclose(moved(x), start(x), atol=1e-5)


def test_muon_moves_all_directions_of_a_kernel_alike():
    generator = torch.Generator().manual_seed(0)
    kernel = nn.Parameter(torch.zeros(8, 6, 5, 5))
    kernel.grad = torch.randn(8, 6, 5, 5, generator=generator)
    kernel.grad[0] *= 100
    Muon([kernel], lr=1e-3, dtype=torch.bfloat16).step()
    moved = torch.linalg.svdvals(kernel.detach().flatten(1)) / (0.2e-3 * 150**0.5)
    assert moved.min() > 0.6
    assert moved.max() < 1.3


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(TrainingDivergedError, match="step 2: the loss is"):
        train_codec(pictures(1), spec(lr=1e30, warmup_steps=0), tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "`steps` is 0"),
        ({"crop_px": 40}, "`crop_px` is 40; wanted a multiple of 16"),
        ({"quality": 9}, "`quality` is 9"),
        ({"lr": math.nan}, "`lr` is nan"),
        ({"lmbda": 0.0}, "`lmbda` is 0.0"),
        ({"ema_decay": 1.0}, "`ema_decay` is 1.0"),
        ({"min_scale": 1.5}, "`min_scale` is 1.5"),
        ({"precision": "float16"}, "`precision` is 'float16'; wanted one of bfloat16, float32"),
        ({"optimizer": "sgd"}, "`optimizer` is 'sgd'; wanted one of muon, adam"),
        ({"version": 2}, "`version` is 2"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        spec(**changes)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pixels(1, width=31), r"image 0 is \(3, 70, 31\) torch.uint8; .* at least `crop_px` 32"),
        (pixels(1).float(), "image 0 is .* torch.float32"),
        (pixels(1)[0], r"image 0 is \(70, 90\)"),
    ],
)
def test_images_that_cannot_be_cropped_are_refused(tmp_path, image, message):
    with pytest.raises(UsageError, match=message):
        train_codec(TrainingImages([image], [1.0], "one"), spec(), tmp_path)


@pytest.mark.parametrize("draws", [[], [1.0, 2.0], [0.0]])
def test_draws_that_do_not_belong_to_the_images_are_refused(tmp_path, draws):
    with pytest.raises(UsageError, match="1 images and"):
        train_codec(TrainingImages([pixels(1)], draws, "one"), spec(), tmp_path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run on one picture that was stopped after its first of six steps; (folder, encoder)."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    return folder, train_codec(pictures(1), spec(), folder, control=at(1, "stop")).encoder


def test_a_run_with_other_settings_images_or_start_is_refused(begun):
    folder, encoder = begun
    data, settings = pictures(1), spec()
    with pytest.raises(RunMismatchError, match=r"at step 1: `steps` 6, now 9; `lr` 0.001, now 0.1"):
        train_codec(data, spec(steps=9, lr=0.1), folder)
    with pytest.raises(RunMismatchError, match=r"`images` 'pictures \(1,\)', now 'pictures"):
        train_codec(pictures(1, 3), settings, folder)
    with pytest.raises(RunMismatchError, match="`start`"):
        train_codec(data, settings, folder, start=encoder)


def test_a_start_of_another_architecture_is_refused(tmp_path):
    with pytest.raises(UsageError, match="wanted bmshj2018-factorized quality 1"):
        train_codec(pictures(1), spec(), tmp_path, start=load_encoder("bundled"))


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_record(folder: Path, **changes: object) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: flip_byte(next(run.glob("*.safetensors")), -9), "is not what was written"),
        (lambda run: next(run.glob("*.safetensors")).unlink(), "is missing"),
        (lambda run: (run / "checkpoint.json").write_text("{"), "not JSON"),
        (lambda run: edit_record(run, version=2), "version wants .*got 2"),
        (lambda run: edit_record(run, surprise=1), "unknown fields"),
    ],
)
def test_a_damaged_checkpoint_is_refused(begun, tmp_path, damage, message):
    run = shutil.copytree(begun[0], tmp_path / "run")
    damage(run)
    with pytest.raises(CheckpointError, match=message):
        train_codec(pictures(1), spec(), run)


# The figures


def test_evaluation_equals_plain_compressai_calls():
    encoder = load_encoder("bundled")
    images = [pixels(1, 96, 64), pixels(2, 90, 70)]
    point = evaluate_rate_distortion(encoder, images, lmbda=0.05)
    model = reference_of(value_tensors(encoder._model), 5)
    model.update()
    bpp, mse, psnr, estimated = [], [], [], []
    for image in images:
        x = (image[None] / 255).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            coded = model.compress(x)
            x_hat = model.decompress(coded["strings"], coded["shape"])["x_hat"]
            likelihoods = model(x)["likelihoods"]["y"]
        x_hat = x_hat[:, :, : x.shape[2], : x.shape[3]]
        num_pixels = x.shape[2] * x.shape[3]
        bpp.append(8 * len(coded["strings"][0][0]) / num_pixels)
        estimated.append(-likelihoods.log2().sum().item() / num_pixels)
        mse.append(((x_hat - x) * 255).square().mean().item())
        psnr.append(10 * math.log10(255**2 / mse[-1]))
    assert point.num_images == 2
    assert point.bpp == np.mean(bpp)
    assert point.bpp_estimated == pytest.approx(np.mean(estimated), rel=1e-5)
    assert point.mse == pytest.approx(np.mean(mse), rel=1e-5)
    assert point.psnr_db == pytest.approx(np.mean(psnr), rel=1e-5)
    assert point.cost == 0.05 * point.mse + point.bpp


def test_evaluation_refuses_what_it_cannot_measure():
    encoder = load_encoder("bundled")
    with pytest.raises(UsageError, match="no images to evaluate on"):
        evaluate_rate_distortion(encoder, [])
    with pytest.raises(UsageError, match=r"image 0 has shape \(70, 90\)"):
        evaluate_rate_distortion(encoder, [pixels(1)[0]])


# The command line


@pytest.fixture(scope="module")
def script_run(warm, tmp_path_factory):
    """Three steps of the real script on a folder with every kind of picture; (folder, run)."""
    root = tmp_path_factory.mktemp("codec")
    images = root / "images"
    for seed in range(3):
        (images / "deep").mkdir(parents=True, exist_ok=True)
        picture(seed, 80 + seed, 60).save(images / "deep" / f"{seed}.png")
    picture(3).convert("L").save(images / "grey.jpg")
    picture(4).convert("CMYK").save(images / "cmyk.jpg")
    picture(5).convert("RGBA").save(images / "alpha.png")
    picture(6, 90, 31).save(images / "low.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (images / "notes.txt").write_text("no picture")
    words = ["--images", images, "2", "--out", root / "run", "--steps", 3, "--crop", 32]
    words += ["--batch-size", 2, "--precision", "float32", "--evaluate", images / "deep"]
    return root, words, warm.run(*words, module="pipelines.train_codec")


def test_the_script_trains_and_records(script_run):
    root, _, run = script_run
    assert run.code == 0, run.told
    assert "2 pictures are left out" in run.err
    assert "6 pictures, 3 steps of 2 crops" in run.err
    record = json.loads((root / "run" / "record.json").read_text())
    assert record["images"] == [{"folder": str(root / "images"), "times": 2.0, "pictures": 6}]
    assert record["left_out"] == 2
    assert record["spec"]["steps"] == 3
    bundled = load_encoder("bundled")
    assert record["start"] == {"from": "bundled", "weights_sha256": bundled.spec.weights_sha256}
    trained = load_encoder(weights=root / "run" / "weights.safetensors")
    assert record["weights_sha256"] == trained.spec.weights_sha256
    deep = sorted((root / "images" / "deep").iterdir())
    images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in deep]
    with_start = evaluate_rate_distortion(bundled, images).to_dict()
    with_end = evaluate_rate_distortion(trained, images).to_dict()
    assert record["results"]["start"] == pytest.approx(with_start)
    assert record["results"]["end"] == pytest.approx(with_end)
    lines = (root / "run" / "progress.csv").read_text().splitlines()
    assert lines[0] == "step,loss,bpp,mse,lr,seconds_per_step"
    assert lines[-1].startswith("3,")


def test_encode_takes_the_weights_that_the_script_wrote(warm, script_run, tmp_path):
    root, _, _ = script_run
    weights = root / "run" / "weights.safetensors"
    source = write_image_folder(tmp_path / "data", {"ant": 2, "bee": 2})
    run = warm.run(
        *("encode", source, "--size", 64, "--weights", weights, "--out", tmp_path / "shards"),
        *("--val-fraction", 0),
    )
    assert run.code == 0, run.told
    cache = cc.open_cache(tmp_path / "shards")
    digest = load_encoder(weights=weights).spec.weights_sha256
    assert cache.manifest.fingerprint.encoder.weights_sha256 == digest


@pytest.mark.slow
def test_the_script_interrupted_and_run_again_gives_the_same_weights(warm, script_run, tmp_path):
    root, words, _ = script_run
    again = [tmp_path / "run" if word == root / "run" else word for word in words]
    again[again.index("--steps") + 1] = 10
    whole = [tmp_path / "whole" if word == tmp_path / "run" else word for word in again]
    process = warm.start(*again, module="pipelines.train_codec")
    while "10 steps of 2 crops" not in process.told():
        assert process.poll() is None, process.told()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert "python " in process.wait()
    assert process.returncode == 128 + signal.SIGINT
    assert run_script(*again) == 0
    assert run_script(*whole) == 0
    names = ("run", "whole")
    one, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in names)
    assert one == other


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--images", "{empty}"], 3, "no picture that can be used, 0 left out"),
        (["--images", "{missing}"], 3, "is no folder"),
        (["--images", "{images}", "often"], 2, "wanted a folder, then at most one positive number"),
        (["--images", "{images}", "--steps", "0"], 2, "`steps` is 0"),
        (["--images", "{images}", "--quality", "3"], 2, "the bundled encoder is"),
        (["--images", "{images}", "--start", "{missing}"], 3, "cannot be read"),
        (["--images", "{images}", "--device", "abacus"], 2, "`device` is 'abacus'"),
        (["--images", "{images}", "--crop", "32", "--steps", "4"], 4, "other settings"),
    ],
)
def test_the_script_refuses_with_its_exit_code(script_run, tmp_path, words, code, message, capsys):
    root, _, _ = script_run
    (tmp_path / "empty").mkdir()
    places = {
        "empty": tmp_path / "empty",
        "missing": tmp_path / "missing",
        "images": root / "images",
    }
    assert run_script(*(word.format(**places) for word in words), "--out", root / "run") == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_scripts_help_teaches_by_example(capsys):
    assert run_script("--help") == 0
    told = capsys.readouterr().out
    assert "python pipelines/train_codec.py --images scans/ --out codec/" in told
    assert "ci2p-cache encode data/ --out shards/ --weights codec/weights.safetensors" in told


def test_weights_of_another_quality_say_which_they_are(begun, tmp_path):
    begun[1].save(tmp_path / "q1.safetensors")
    assert isinstance(load_encoder(weights=tmp_path / "q1.safetensors", quality=1), FrozenEncoder)
    with pytest.raises(WeightsError, match="is of bmshj2018-factorized quality 1"):
        load_encoder(weights=tmp_path / "q1.safetensors")
