"""A run folder alone classifies pictures, with the logits that the cache gives for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from tests.support.commands import Ran
from tests.support.pictures import picture
from tests.support.trained import SPEC, folder_of, make_run, rewrite_json

pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module", params=["int8", "float32"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, `shards` and `runs/run` of a dtype; read only."""
    return make_run(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of int8, for what does not depend on the dtype; read only."""
    return make_run(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of the run alone, to be damaged."""
    return shutil.copytree(made / "runs" / "run", tmp_path / "run")


def pictures_of(made: Path) -> list[Path]:
    """The validation images by row."""
    index = cc.open_cache(made / "shards")["val"]
    keys = [
        key
        for shard in range(index.record.num_shards)
        for key in index.read_index(shard, ["key"])["key"].to_pylist()
    ]
    return [made / "src" / "val" / key for key in keys]


def test_logits_of_a_picture_are_those_of_its_row(stored: Path) -> None:
    classifier = cc.load_classifier(stored / "runs" / "run", device="cpu")
    files = pictures_of(stored)
    with cc.LatentLoader(
        cc.open_cache(stored / "shards")["val"], batch_size=8, shuffle=False, views=0
    ) as loader:
        batch = next(iter(loader))
    views = torch.stack([classifier.read(file) for file in files])
    assert torch.equal(classifier.inputs(views), batch.latents)
    from_cache = classifier.logits(batch.latents)
    assert (classifier(views) - from_cache).abs().max() <= 1e-5
    assert (classifier(views / 255) - from_cache).abs().max() <= 1e-5
    # And so for the command's own numbers, in batches of another size.
    run = stored / "runs" / "run"
    made = cc.evaluate(run)
    rows = pq.read_table(run / "evaluations" / made.predictions.path).to_pylist()
    predictions = classifier.predict(files, batch_size=4)
    for row, prediction, logits in zip(rows, predictions, from_cache, strict=True):
        assert prediction.guesses[0].label == row["predicted"]
        assert prediction.guesses[0].probability == pytest.approx(row["confidence"], abs=1e-5)
        for guess in prediction.guesses:
            assert guess.logit == pytest.approx(float(logits[guess.label]), abs=1e-5)


def test_several_threads_give_the_symbols_of_one(made: Path) -> None:
    classifier = cc.load_classifier(made / "runs" / "run", device="cpu")
    views = torch.stack([classifier.read(file) for file in pictures_of(made)])
    one = classifier.inputs(views)
    torch.set_num_threads(3)
    try:
        assert torch.equal(classifier.inputs(views), one)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_a_run_folder_needs_no_cache_and_a_checkpoint_folder_is_one_of_it(
    made: Path, copy: Path
) -> None:
    (copy / "args.yaml").write_text(
        (copy / "args.yaml").read_text().replace(str(made / "shards"), "/nowhere")
    )
    file = pictures_of(made)[0]
    whole = cc.load_classifier(copy, checkpoint="last").predict([file])
    assert cc.load_classifier(folder_of(copy, "last")).predict([file]) == whole
    assert whole == cc.load_classifier(made / "runs" / "run", checkpoint="last").predict([file])
    committed = (made / "shards" / "encoder.safetensors").read_bytes()
    assert (copy / "encoder.safetensors").read_bytes() == committed
    record = json.loads((copy / "model.json").read_text())["encoder"]
    assert record["sha256"] == hashlib.sha256(committed).hexdigest()


def test_folders_and_patterns_keep_their_order(made: Path, tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a/z.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(3).save(tmp_path / name, format="PNG") if name != "note.txt" else (
            tmp_path / name
        ).write_text("no picture")
    odd = tmp_path / "a" / "[1].png"
    picture(4).save(odd)
    classifier = cc.load_classifier(made / "runs" / "run")
    found = classifier.predict([tmp_path / "b", str(tmp_path / "*/z.png"), odd, tmp_path], top=2)
    shown = [str(Path(p.path).relative_to(tmp_path)) for p in found]
    rest = ["a/[1].png", "a/z.png", "b/1.png", "b/2.png"]
    assert shown == ["b/1.png", "b/2.png", "a/z.png", "a/[1].png", *rest]
    assert all(len(p.guesses) == 2 and p.error is None for p in found)


def test_what_is_wrong_with_one_picture_leaves_the_others_alone(
    run: Callable[..., Ran], made: Path, tmp_path: Path
) -> None:
    good = pictures_of(made)[:2]
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good[0].read_bytes()[:400])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "empty").mkdir()
    names = [good[0], cut, tmp_path / "missing.jpg", tmp_path / "pipe.jpg", tmp_path / "empty",
             f"{tmp_path}/*.tiff", good[1]]  # fmt: skip
    ran = run("predict", made / "runs" / "run", *names, "--json", "--batch-size", "2")
    assert ran.code == 3
    told = json.loads(ran.out)
    assert [entry["error"] is None for entry in told] == [True, *[False] * 5, True]
    assert [entry["path"] for entry in told] == [str(name) for name in names]
    assert "5 of 7 could not be classified" in ran.err
    for text in (
        *("cut.jpg: JPEG", "missing.jpg: there is no such file", "pipe.jpg: it is no regular"),
        *("empty: the folder holds no image", "*.tiff: no file is named like that"),
    ):
        assert text in ran.err
    assert "Traceback" not in ran.err


def test_the_command_prints_a_table(run: Callable[..., Ran], made: Path) -> None:
    ran = run("predict", made / "runs" / "run", pictures_of(made)[0], "--top", "3")
    assert ran.code == 0, ran.err
    assert all(name in ran.out for name in ("ant", "bee", "cat", "%"))
    assert run("predict", made / "runs" / "run", "x.jpg", "--top", "0").code == 2


def test_images_of_another_shape_or_dtype_are_refused(made: Path) -> None:
    classifier = cc.load_classifier(made / "runs" / "run")
    with pytest.raises(errors.UsageError, match=r"\(1, 3, 32, 64\).*\(batch, 3, 64, 64\)"):
        classifier(torch.zeros(1, 3, 32, 64))
    with pytest.raises(errors.UsageError, match=r"\(0, 3, 64, 64\)"):
        classifier(torch.zeros(0, 3, 64, 64))
    with pytest.raises(errors.UsageError, match="int64; wanted uint8"):
        classifier(torch.zeros(1, 3, 64, 64, dtype=torch.int64))


def test_a_swapped_encoder_is_noticed(made: Path, copy: Path) -> None:
    path, file = copy / "encoder.safetensors", pictures_of(made)[0]
    right = cc.load_classifier(copy).predict([file])
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.DigestError, match=r"encoder\.safetensors is not the encoder that"):
        cc.load_classifier(copy).predict([file])
    path.unlink()
    with pytest.raises(errors.DigestError, match=r"encoder\.safetensors cannot be read") as caught:
        cc.load_classifier(copy).predict([file])
    assert f"--cache {made / 'shards'}" in str(caught.value.hint)
    assert cc.load_classifier(copy, cache=made / "shards").predict([file]) == right


def test_another_encoder_of_the_right_digest_is_noticed_too(made: Path, copy: Path) -> None:
    fingerprint = json.loads((copy / "model.json").read_text())["fingerprint"]
    fingerprint["encoder"]["weights_sha256"] = "0" * 64
    rewrite_json(copy / "model.json", fingerprint=fingerprint)
    with pytest.raises(errors.DigestError, match=r"`weights_sha256` '0{64}'"):
        cc.load_classifier(copy).predict([pictures_of(made)[0]])


def test_a_run_from_before_there_were_copies_asks_for_the_cache(made: Path, copy: Path) -> None:
    (copy / "encoder.safetensors").unlink()
    rewrite_json(copy / "model.json", version=1, encoder=None)
    file = pictures_of(made)[0]
    with pytest.raises(errors.InputDataError, match="holds no encoder") as caught:
        cc.load_classifier(copy).predict([file])
    assert f"--cache {made / 'shards'}" in str(caught.value.hint)
    assert cc.load_classifier(copy, cache=made / "shards").predict([file])[0].error is None


def test_a_damaged_encoder_of_the_cache_is_not_copied(made: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(made / "shards", tmp_path / "shards")
    path = cache / "encoder.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(errors.DigestError, match=r"encoder\.safetensors has sha256") as caught:
        cc.train(cache, spec=SPEC, runs_dir=tmp_path / "runs", name="a", device="cpu")
    assert f"verify {cache} --repair" in str(caught.value.hint)
    assert not (tmp_path / "runs" / "a" / "model.json").exists()
