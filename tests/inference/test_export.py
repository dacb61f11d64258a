"""An exported file gives what eager gives, or is not written; rounding is counted honestly."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.inference.export import check_export
from tests.support.commands import REPO, Ran, needs
from tests.support.trained import make_run

pytestmark = [
    needs("onnx", "onnxruntime", "onnxscript"),
    pytest.mark.usefixtures("one_thread", "nano"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, `shards` and `runs/run`; read only."""
    return make_run(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def classifier(made: Path) -> cc.Classifier:
    return cc.load_classifier(made / "runs" / "run", device="cpu")


def views(classifier: cc.Classifier, made: Path) -> Tensor:
    """Validation images in [0, 1]."""
    files = sorted((made / "src" / "val").rglob("*.jpg"))
    return torch.stack([classifier.read(file) for file in files]) / 255


@pytest.mark.slow
def test_onnx_from_images_to_logits(
    run: Callable[..., Ran],
    made: Path,
    classifier: cc.Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "model.onnx"
    ran = run("export", made / "runs" / "run", "--out", out, "--check", made / "src", "--count",
              "20", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    check = json.loads(ran.out)["check"]
    assert check["inputs"] == 20
    assert check["max_difference"] <= 1e-4 * check["scale"]
    assert check["stored_values"] == 20 * 192 * 4 * 4
    # What others do with the file, with batches of other sizes.
    images = views(classifier, made)
    import onnxruntime

    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    if not check["differing_values"]:
        for count in (1, 3, 6):
            found = session.run(["logits"], {"images": images[:count].numpy()})[0]
            gap = (torch.from_numpy(found) - classifier(images[:count])).abs().max()
            assert gap <= 1e-4 * check["scale"]
    import onnx

    model = onnx.load(out)
    onnx.checker.check_model(model)
    assert [
        d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim
    ] == [*("batch", 3, 64, 64)]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["ant", "bee", "cat"]
    assert metadata["input_size"] == "64"
    assert metadata["fingerprint"] == classifier.fingerprint.digest
    assert list(tmp_path.iterdir()) == [out]
    # The docs' own preparation of a picture is that of `predict`.
    page = (REPO / "docs" / "training.md").read_text("utf-8")
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnx" in b)
    photo = next((made / "src" / "val").rglob("*.jpg"))
    shutil.copyfile(photo, tmp_path / "photo.jpg")
    out.rename(tmp_path / "vitds.onnx")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert abs(names["images"][0] * 255 - classifier.read(photo).numpy()).max() < 1.5
    assert names["logits"].shape == (1, 3)


@pytest.mark.slow
def test_a_torch_program_from_images_to_logits(
    made: Path, classifier: cc.Classifier, tmp_path: Path
) -> None:
    summary = cc.export_model(
        made / "runs" / "run", tmp_path / "a.pt2", to="torch", images=[made / "src"], count=3
    )
    assert summary.check.differing_values == 0
    assert summary.check.stored_values == 3 * 192 * 4 * 4
    extra = {"ci2p_cache.json": ""}
    saved = torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    # The file holds an example of its input, and that is none of the pictures.
    assert saved.example_inputs is not None
    assert not saved.example_inputs[0][0].any()
    program = saved.module()
    for images in views(classifier, made).split(4):
        assert (program(images) - classifier(images)).abs().max() <= 1e-5
    assert json.loads(extra["ci2p_cache.json"])["model"] == "vitds_nano"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


@pytest.mark.slow
def test_the_model_alone_needs_no_encoder(
    made: Path, classifier: cc.Classifier, tmp_path: Path
) -> None:
    summary = cc.export_model(
        made / "runs" / "run", tmp_path / "a.pt2", to="torch", what="model", count=2
    )
    assert (summary.input_shape, summary.check.stored_values) == ((192, 4, 4), 0)
    latents = classifier.inputs(views(classifier, made))
    program = torch.export.load(tmp_path / "a.pt2").module()
    assert (program(latents) - classifier.logits(latents)).abs().max() <= 1e-5


@dataclass
class Pretended:
    """Says it is an exported file; its answers can be bent."""

    classifier: cc.Classifier
    bend_stored: Callable[[Tensor, Tensor], Tensor] = lambda stored, _: stored
    shift: float = 0.0

    def stored(self, inputs: Tensor) -> Tensor:
        y = self.classifier.latents(inputs)
        return self.bend_stored(self.classifier.stored(y).float(), y)

    def logits(self, inputs: Tensor) -> Tensor:
        read = self.classifier.dequantise(self.stored(inputs))
        return self.classifier.logits(read) + self.shift


def test_other_logits_are_refused(classifier: cc.Classifier, made: Path) -> None:
    images = views(classifier, made)
    good = check_export(Pretended(classifier), classifier, images, is_full=True)
    assert (good.max_difference, good.differing_values) == (0.0, 0)
    for shift in (2e-4 * good.scale, float("nan")):
        with pytest.raises(errors.IntegrityError, match=r"other logits.*the file was not written"):
            check_export(Pretended(classifier, shift=shift), classifier, images, is_full=True)


def test_symbols_may_fall_to_either_side_of_a_tie_and_are_counted(
    classifier: cc.Classifier, made: Path
) -> None:
    """The encoder's medians are moved so that one value of the first image is at a tie."""
    images = views(classifier, made)
    offset = torch.tensor(classifier.run.file.offset)[:, None, None]
    scaled = classifier.latents(images) - offset
    from_tie = (scaled - scaled.floor() - 0.5).abs()
    near = from_tie == from_tie.min()
    other = scaled.floor() + scaled.ceil() - scaled.round()

    def flip(stored: Tensor, y: Tensor) -> Tensor:
        mine = torch.isin(y - offset, scaled[near])
        return torch.where(mine, (y - offset).floor() + (y - offset).ceil() - stored, stored)

    assert bool((other != scaled.round())[near].all())
    if float(from_tie.min()) > 1e-3:
        pytest.fail("no value of these pictures is within 1e-3 of a tie")
    check = check_export(Pretended(classifier, flip), classifier, images, is_full=True)
    assert check.differing_values == int(near.sum())
    assert check.differing_inputs == 1
    assert check.max_difference == 0.0
    assert check.end_to_end_difference > 0.0


def test_symbols_that_differ_elsewhere_are_refused(classifier: cc.Classifier, made: Path) -> None:
    def wrong(stored: Tensor, _: Tensor) -> Tensor:
        changed = stored.clone()
        changed[:, 5, 1, 2] += 1
        return changed

    with pytest.raises(errors.IntegrityError, match="differ that are at no tie"):
        check_export(
            Pretended(classifier, wrong), classifier, views(classifier, made), is_full=True
        )


def test_what_cannot_be_exported_says_so_and_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made / "runs" / "run"
    with pytest.raises(errors.UsageError, match="`to` is 'tflite'"):
        cc.export_model(run, tmp_path / "a", to="tflite")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(errors.InputDataError, match=r"missing.jpg cannot be read: there is no su"):
        cc.export_model(run, tmp_path / "a.onnx", images=[tmp_path / "missing.jpg"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.MissingDependencyError, match="onnxruntime") as caught:
        cc.export_model(run, tmp_path / "a.onnx")
    assert str(caught.value.hint) == "pip install 'ci2p-cache[export]'"
    assert not list(tmp_path.iterdir())


class TestWhereItIsWritten:
    """All of it is decided before the run is opened: there is none at `nowhere`."""

    @pytest.mark.parametrize(
        ("name", "to", "told"),
        [
            ("a.pt2", "onnx", "is named as an export to torch, and the format is onnx"),
            ("a.onnx", "torch", "is named as an export to onnx, and the format is torch"),
            ("a.bin", "onnx", "does not end in .onnx"),
            ("a.pt", "torch", "does not end in .pt2"),
            ("a", "onnx", "does not end in .onnx"),
            ("model.json", "onnx", "does not end in .onnx"),
        ],
    )
    def test_another_suffix_is_refused(
        self, run: Callable[..., Ran], tmp_path: Path, name: str, to: str, told: str
    ) -> None:
        ran = run("export", tmp_path / "nowhere", "--format", to, "--out", tmp_path / name)
        assert ran.code == 2
        assert told in " ".join(ran.err.split())
        assert not list(tmp_path.iterdir())

    def test_a_file_is_replaced_only_under_its_name(
        self, run: Callable[..., Ran], made: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "a.pt2"
        out.write_bytes(b"precious")
        words = (
            "export",
            made / "runs" / "run",
            "--format",
            "torch",
            "--what",
            "model",
            "--out",
            out,
        )
        refused = run(*words)
        assert refused.code == 4
        assert "a.pt2 is there already; nothing was changed" in " ".join(refused.err.split())
        assert "--overwrite a.pt2 replaces it" in " ".join(refused.err.split())
        other = run(*words, "--overwrite", "b.pt2")
        assert other.code == 2
        assert "--overwrite names 'b.pt2', the file is 'a.pt2'" in " ".join(other.err.split())
        assert out.read_bytes() == b"precious"
        assert run(*words, "--overwrite", "a.pt2", "--count", "1").code == 0
        torch.export.load(out)
        assert list(tmp_path.iterdir()) == [out]

    def test_a_folder_in_its_place_is_refused_with_or_without_its_name(
        self, run: Callable[..., Ran], tmp_path: Path
    ) -> None:
        (tmp_path / "a.onnx").mkdir()
        for more in ((), ("--overwrite", "a.onnx")):
            ran = run("export", tmp_path / "nowhere", "--out", tmp_path / "a.onnx", *more)
            assert ran.code == 2
            assert "is a folder; wanted a file" in " ".join(ran.err.split())
        ran = run("export", tmp_path / "nowhere", "--out", tmp_path)
        assert ran.code == 2

    def test_a_folder_above_it_is_not_made_before_it(
        self, run: Callable[..., Ran], tmp_path: Path
    ) -> None:
        out = tmp_path / "new" / "er" / "a.pt2"
        assert run("export", tmp_path / "nowhere", "--format", "torch", "--out", out).code == 3
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_a_folder_above_it_is_made_with_it(
        self, run: Callable[..., Ran], made: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "new" / "er" / "a.pt2"
        options = ("--format", "torch", "--what", "model", "--count", "1", "--out", out)
        assert run("export", made / "runs" / "run", *options).code == 0
        assert out.is_file()

    def test_a_file_in_the_place_of_that_folder_is_named(
        self, run: Callable[..., Ran], tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        ran = run("export", tmp_path / "nowhere", "--out", tmp_path / "file" / "a.onnx")
        assert ran.code == 6
        assert f"{tmp_path / 'file'} is no folder" in ran.err.replace("\n", "")

    def test_a_cache_holds_no_export(
        self, run: Callable[..., Ran], made: Path, tmp_path: Path
    ) -> None:
        ran = run("export", tmp_path / "nowhere", "--out", made / "shards" / "a.onnx")
        assert ran.code == 2
        assert "is in the cache" in " ".join(ran.err.split())
