"""Whatever was trained, evaluation repeats it and the run folder alone classifies with it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned
from tests.support.trained import evaluation_of

KINDS: dict[str, dict[str, Any]] = {
    "averaged weights": {"model": "vitds_nano", "ema": 0.9},
    "a fold": {"model": "vitds_nano", "folds": 3, "fold": 1},
    "bf16": {"model": "vitds_nano", "precision": "bf16"},
    "images": {"model": "vit_nano16"},
    "images and a trainable encoder": {"model": "cnn_vit_nano"},
    "a stem replaced": {"model": "ci2p+timm:test_vit"},
}


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src` and `shards`: 12 + 6 pictures of two classes at 64 px."""
    root = tmp_path_factory.mktemp("kinds")
    write_image_folder(root / "src" / "train", {"ant": 7, "bee": 5})
    write_image_folder(root / "src" / "val", {"ant": 2, "bee": 4}, quality=60)
    cc.encode(root / "src", root / "shards", cc.EncodeOptions(encoder="bundled", size=64))
    return root


@pytest.mark.parametrize("kind", thinned(KINDS, step=3))
def test_a_run_of_any_kind_is_evaluated_as_it_was_validated(
    made: Path, tmp_path: Path, kind: str
) -> None:
    spec = dataclasses.replace(cc.TrainSpec(epochs=2, batch_size=6), **KINDS[kind])
    trained = cc.train(made / "shards", spec=spec, runs_dir=tmp_path, name="run", device="cpu")
    run = tmp_path / "run"
    result = cc.evaluate(run, device="cpu", checkpoint="best")
    assert (result.top1, result.nll) == (trained.best.val_top1, trained.best.val_loss)
    assert (result.recorded_top1, result.recorded_nll) == (result.top1, result.nll)
    assert result.samples == (4 if spec.folds else 6)
    assert (result.folds, result.fold) == (spec.folds, spec.fold)
    classifier = cc.load_classifier(run, device="cpu", checkpoint="best")
    assert (run / "encoder.safetensors").exists() == (classifier.reads == "latents")
    rows = pq.read_table(evaluation_of(run, which="best").with_suffix(".parquet")).to_pylist()
    split = "train" if spec.folds else "val"
    found = classifier.predict([made / "src" / split / row["key"] for row in rows], batch_size=6)
    # bf16 keeps three digits, and the batch decides how it adds.
    close = 1e-5 if spec.precision == "float32" else 1e-2
    for row, prediction in zip(rows, found, strict=True):
        assert prediction.error is None
        shares = {guess.label: guess.probability for guess in prediction.guesses}
        assert shares[row["predicted"]] == pytest.approx(row["confidence"], abs=close)
    shutil.rmtree(run)


@pytest.mark.slow
def test_an_image_model_is_exported_whole(made: Path, tmp_path: Path) -> None:
    spec = cc.TrainSpec(model="vit_nano16", epochs=1, batch_size=6)
    cc.train(made / "shards", spec=spec, runs_dir=tmp_path, name="run", device="cpu")
    summary = cc.export_model(tmp_path / "run", tmp_path / "a.pt2", to="torch", count=3)
    assert (summary.input_shape, summary.check.stored_values) == ((3, 64, 64), 0)
