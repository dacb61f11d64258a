"""A folder to share opens as the run that it was made of, bit for bit; it holds nothing private."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ci2p_cache as cc
from ci2p_cache import errors
from tests.support.commands import Ran, needs
from tests.support.trained import SPEC, folder_of, make_run, rewrite_json

pytestmark = pytest.mark.usefixtures("one_thread", "nano")

OWN = """
from torch import nn


class Small(nn.Module):
    reads = "latents"

    def __init__(self, num_classes, latent_channels):
        super().__init__()
        self.head = nn.Linear(latent_channels, num_classes)

    def forward(self, latents):
        return self.head(latents.mean(dim=(2, 3)))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, `shards`, `runs/run` with an evaluation, and `elsewhere/shared`; read only."""
    root = make_run(tmp_path_factory.mktemp("share"))
    cc.evaluate(root / "runs" / "run", device="cpu")
    cc.export_model(root / "runs" / "run", root / "elsewhere" / "shared", to="huggingface")
    return root


@pytest.fixture
def shared(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return shutil.copytree(made / "elsewhere" / "shared", tmp_path / "shared")


def logits(folder: Path, images: torch.Tensor, **options: Any) -> torch.Tensor:
    return cc.load_classifier(folder, device="cpu", **options)(images)


def pictures(made: Path) -> torch.Tensor:
    classifier = cc.load_classifier(made / "runs" / "run", device="cpu")
    return torch.stack([classifier.read(f) for f in sorted((made / "src/val").rglob("*.jpg"))])


def test_the_command_writes_a_folder_that_predicts_and_evaluates_as_the_run_does(
    run: Callable[..., Ran], made: Path, tmp_path: Path
) -> None:
    words = ("export", made / "runs" / "run", "--format", "huggingface", "--check", made / "src")
    ran = run(*words, "--out", tmp_path / "mine", "--json")
    assert ran.code == 0, ran.err
    summary = json.loads(ran.out)
    assert summary["check"]["max_difference"] == summary["check"]["differing_values"] == 0
    folder = tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "encoder.safetensors", "README.md"),
    }
    assert summary["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    weights = folder_of(made / "runs" / "run") / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()
    predict = [run("predict", each, made / "src", "--json", "--device", "cpu")
               for each in (folder, made / "runs" / "run")]  # fmt: skip
    assert predict[0].code == 0, predict[0].err
    assert predict[0].out == predict[1].out
    refused = run("evaluate", folder, "--device", "cpu")
    assert (refused.code, "--cache DIR" in refused.err) == (2, True)
    refused = run("evaluate", folder, "--cache", made / "shards", "--device", "cpu")
    assert (refused.code, "--out DIR" in refused.err) == (2, True)
    ran = run("evaluate", folder, "--cache", made / "shards", "--device", "cpu", "--out",
              tmp_path / "scores", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    # The folder's name, and where the cache is, are said anew.
    left_out = dict.fromkeys(("run", "cache", "predictions"))
    wanted = cc.evaluate(made / "runs" / "run", device="cpu").to_dict()
    assert json.loads(ran.out) | left_out == json.loads(json.dumps(wanted)) | left_out
    assert len(list(folder.iterdir())) == 4


def test_training_begins_with_its_weights_as_with_the_runs(made: Path, tmp_path: Path) -> None:
    found = []
    for name, source in (("shared", made / "elsewhere/shared"), ("run", made / "runs/run")):
        spec = dataclasses.replace(SPEC, epochs=1, init_from=str(source))
        done = cc.train(made / "shards", spec=spec, runs_dir=tmp_path, name=name, device="cpu")
        args = yaml.safe_load((tmp_path / name / "args.yaml").read_text())
        weights = folder_of(Path(done.path)) / "model.safetensors"
        found.append((args["settings"]["init_from"], weights.read_bytes()))
    assert found[0] == found[1]
    # And so does what was trained from it, without saying where that was.
    cc.export_model(tmp_path / "shared", tmp_path / "again", to="huggingface")
    text = (tmp_path / "again" / "config.json").read_text()
    assert str(made) not in text
    assert found[0][0]["sha256"] in text


@pytest.mark.parametrize("kind", ["ema", "vit_nano16", "own", "shared"])
def test_any_model_gives_its_own_bits(made: Path, tmp_path: Path, kind: str) -> None:
    own = tmp_path / "mine.py"
    own.write_text(OWN)
    source = made / "elsewhere/shared"
    options: dict[str, Any] = {}
    if kind != "shared":
        changes: dict[str, Any] = {"model": f"{own}:Small" if kind == "own" else kind}
        changes |= {"drop_path": 0.0} if kind == "own" else {}
        if kind == "ema":
            changes = {"ema": 0.9}
        spec = dataclasses.replace(SPEC, epochs=1, **changes)
        source = Path(cc.train(made / "shards", spec=spec, runs_dir=tmp_path, device="cpu").path)
        options = {"model": own} if kind == "own" else {}
    out = tmp_path / "out"
    cc.export_model(source, out, to="huggingface", count=2, **options)
    assert (out / "encoder.safetensors").exists() == (kind != "vit_nano16")
    images = pictures(made)
    if kind == "own":
        options = {"model": out / "model.py"}
        with pytest.raises(errors.RefusedError, match="its code runs only if you name the file"):
            cc.load_classifier(out)
    assert torch.equal(logits(out, images, **options), logits(source, images, **options))


def test_classes_are_those_of_id2label_and_nothing_private_is_in_it(
    made: Path, shared: Path
) -> None:
    config = json.loads((shared / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}
    assert config["label2id"] == {"ant": 0, "bee": 1, "cat": 2}
    assert config["preprocessing"]["centre_crop"] == [64, 64]
    for name in ("config.json", "README.md"):
        text = (shared / name).read_text()
        assert str(made) not in text
        assert "device" not in text
    rewrite_json(shared / "config.json", id2label={"0": "Ameise", "1": "Biene", "2": "Katze"})
    renamed = cc.load_classifier(shared, device="cpu")
    assert renamed.classes == ("Ameise", "Biene", "Katze")
    (found,) = renamed.predict([next((made / "src").rglob("*.jpg"))])
    assert {(each.name, each.title) for each in found.guesses} == {
        ("Ameise", "Ameise"), ("Biene", "Biene"), ("Katze", "Katze"),
    }  # fmt: skip
    for names in (("Ameise", "Ameise", "cat"), ("", "bee", "cat")):
        rewrite_json(shared / "config.json", id2label=dict(zip("012", names, strict=True)))
        with pytest.raises(errors.ManifestError, match="a name twice, or an empty one"):
            cc.load_classifier(shared, device="cpu")


@needs("huggingface_hub")
def test_the_hubs_own_library_reads_the_card(made: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(made / "elsewhere" / "shared" / "README.md")
    assert card.data.license == "unknown"
    assert card.data.pipeline_tag == "image-classification"
    scores = cc.evaluate(made / "runs" / "run", device="cpu")
    results = {each.metric_name: each for each in card.data.eval_results or ()}
    assert results["top-1"].metric_type == "accuracy"
    assert results["top-1"].metric_value == scores.top1
    assert results["top-1"].dataset_split == "val"
    assert results["negative log-likelihood"].metric_value == scores.nll
    assert f"(95 % interval {scores.top1_low:.2%} to {scores.top1_high:.2%}" in card.text
    assert f"of {scores.samples} validation images" in card.text
    assert "- [ant" not in card.text
    assert '["ant", "bee", "cat"]' in card.text
    # Without an evaluation it has what training recorded; in the middle of an epoch, nothing.
    bare = shutil.copytree(made / "runs" / "run", tmp_path / "bare")
    shutil.rmtree(bare / "evaluations")
    cc.export_model(bare, tmp_path / "out", to="huggingface", count=1)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {each.metric_name for each in card.data.eval_results or ()} == {"top-1", "top-5"}
    assert "interval" not in card.text


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[errors.CacheError], str]] = {
    "weights": (lambda f: flip(f / "model.safetensors"), errors.CheckpointError,
                r"model\.safetensors is not what was written"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), errors.CheckpointError,
                   r"not a whole checkpoint.*model\.safetensors"),
    "encoder": (lambda f: flip(f / "encoder.safetensors"), errors.DigestError,
                r"encoder\.safetensors is not the encoder"),
    "no encoder": (lambda f: (f / "encoder.safetensors").unlink(), errors.DigestError,
                   r"encoder\.safetensors cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), errors.InputDataError,
                  "is no run folder"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_type": '),
                      errors.ManifestError, r"config\.json"),
    "transformers": (lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
                     errors.InputDataError, "not of ci2p-cache but of 'vit'"),
    "timm": (lambda f: (f / "config.json").write_text('{"architecture": "resnet18"}'),
             errors.InputDataError, "not of ci2p-cache but of 'resnet18'"),
    "a later version": (lambda f: rewrite_json(f / "config.json", ci2p_cache={"version": 2}),
                        errors.ManifestError, "has `version` 2; this ci2p-cache reads 1"),
    "fewer classes": (lambda f: rewrite_json(f / "config.json", id2label={"0": "ant"}),
                      errors.ManifestError, r"config\.json is damaged.*1 class names"),
    "no classes": (lambda f: rewrite_json(f / "config.json", id2label=None),
                   errors.ManifestError, r"config\.json is damaged"),
    "parts missing": (lambda f: rewrite_json(f / "config.json", ci2p_cache={"version": 1}),
                      errors.ManifestError, r"config\.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_or_foreign_is_refused_by_name(shared: Path, case: str) -> None:
    damage, kind, printed = DAMAGES[case]
    damage(shared)
    with pytest.raises(kind, match=printed):
        _ = cc.load_classifier(shared, device="cpu").encoder


class TestWhereItIsWritten:
    def test_files_of_its_names_are_replaced_only_by_name_and_others_stay(
        self, run: Callable[..., Ran], made: Path, shared: Path
    ) -> None:
        (shared / ".gitattributes").write_text("mine")
        (shared / "model.py").write_text("of an earlier export")
        (shared / "README.md").write_text("edited")
        words = ("export", made / "runs" / "run", "--format", "huggingface", "--out", shared)
        refused = run(*words)
        assert refused.code == 4
        assert "config.json is there already; nothing was changed" in " ".join(refused.err.split())
        assert (shared / "README.md").read_text() == "edited"
        assert run(*words, "--overwrite", "shared").code == 0
        assert {path.name for path in shared.iterdir()} == {
            *(".gitattributes", "config.json", "model.safetensors", "encoder.safetensors"),
            "README.md",
        }
        assert (shared / ".gitattributes").read_text() == "mine"
        assert [path.name for path in shared.parent.iterdir()] == ["shared"]

    def test_a_run_a_cache_a_file_and_half_of_it_are_refused(
        self, run: Callable[..., Ran], made: Path, tmp_path: Path
    ) -> None:
        words = ("export", made / "runs" / "run", "--format", "huggingface")
        for out, printed in (
            (made / "runs" / "run", "is a run folder"),
            (made / "shards" / "x", "is in the cache"),
            (tmp_path / "a.onnx", "is named as an export to onnx"),
        ):
            ran = run(*words, "--out", out, "--overwrite", out.name)
            assert ran.code == 2
            assert printed in " ".join(ran.err.split())
        (tmp_path / "file").touch()
        assert run(*words, "--out", tmp_path / "file").code == 6
        assert run(*words, "--what", "model", "--out", tmp_path / "x").code == 2
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
