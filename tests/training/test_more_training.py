"""More training for a run: from its weights, with more epochs, with layers or the encoder freed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.inference.export import export_model
from ci2p_cache.training.inputs import encoder_tensors
from ci2p_cache.training.records import TrainObserver, TrainPlan
from tests.support.caches import make_cache
from tests.support.commands import Ran
from tests.support.rank_jobs import do, job, numbers
from tests.support.trained import folder_of, make_run
from tests.training.test_training import assert_same_run, copy_run, replace_file, rows_of

SPEC = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=5)

pytestmark = pytest.mark.usefixtures("one_thread", "nano")


class Plans(TrainObserver):
    """Keeps the plan and the notices."""

    def __init__(self) -> None:
        self.plan: TrainPlan | None = None
        self.notices: list[str] = []

    def planned(self, plan: TrainPlan) -> None:
        self.plan = plan

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cache` of three classes with the run `runs/old` on it, and `other` of two classes."""
    root = tmp_path_factory.mktemp("more")
    make_cache(
        root / "cache", {"train": {"ant": 5, "bee": 4, "cat": 5}, "val": {"ant": 2, "bee": 4}}
    )
    make_cache(root / "other", {"train": {"dog": 6, "elk": 6}, "val": {"dog": 3, "elk": 3}})
    cc.train(root / "cache", spec=SPEC, runs_dir=root / "runs", name="old", device="cpu")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, their cache in `shards`, and the run `runs/run` on it."""
    return make_run(tmp_path_factory.mktemp("images"))


def changed(**fields: Any) -> cc.TrainSpec:
    return dataclasses.replace(SPEC, **fields)


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder_of(run, which) / "model.safetensors")


def begun(cache: Path, runs: Path, spec: cc.TrainSpec) -> tuple[Path, Plans]:
    """A run without a step that changes a weight, and its plan: what it begins with is left."""
    seen = Plans()
    spec = dataclasses.replace(spec, lr=1e-30, min_lr=0, weight_decay=0, epochs=1)
    made = cc.train(cache, spec=spec, runs_dir=runs, name="begun", device="cpu", observers=[seen])
    return Path(made.path), seen


def test_a_run_begins_with_the_weights_of_another_and_a_head_for_its_own_classes(
    folder: Path, tmp_path: Path
) -> None:
    old = folder / "runs" / "old"
    run, seen = begun(folder / "other", tmp_path, changed(init_from=str(old)))
    before, after = weights(old), weights(run)
    assert seen.plan is not None
    assert seen.plan.initial is not None
    assert seen.plan.initial.new == ("head.bias", "head.weight")
    assert seen.plan.initial.taken == len(before) - 2
    assert after["head.weight"].shape == (2, 16)
    for name in before.keys() - {"head.weight", "head.bias"}:
        # BatchNorm's statistics are those of the new images.
        if "running" not in name and "tracked" not in name:
            assert torch.equal(before[name], after[name]), name
    recorded = yaml.safe_load((run / "args.yaml").read_text())["settings"]["init_from"]
    assert recorded == dataclasses.asdict(seen.plan.initial) | {"new": ["head.bias", "head.weight"]}


def test_the_same_classes_keep_their_head_and_a_checkpoint_can_be_named(
    folder: Path, tmp_path: Path
) -> None:
    old = folder / "runs" / "old"
    first = old / "checkpoints" / "epoch-0001-step-000000"
    run, seen = begun(folder / "cache", tmp_path, changed(init_from=str(first)))
    assert seen.plan is not None
    assert seen.plan.initial is not None
    assert not seen.plan.initial.new
    assert torch.equal(
        load_file(first / "model.safetensors")["head.weight"], weights(run)["head.weight"]
    )


def test_weights_that_do_not_fit_are_refused_by_option_and_tensor(
    folder: Path, tmp_path: Path
) -> None:
    old = folder / "runs" / "old"
    for spec, kind, message in (
        (changed(model="vit_nano", init_from=str(old)), errors.UsageError,
         r"`init_from` \(--init-from\) is .*does not fit `model` \(--model\) vit_nano: \S+ is "),
        (changed(init_from=str(tmp_path)), errors.InputDataError, r"\(--init-from\): .*no run"),
        (changed(init_from="x.onnx"), errors.UsageError, "ONNX files do not keep"),
        (changed(init_from="x.pt2"), errors.InputDataError, "cannot be read"),
        (changed(init_from=str(old), freeze=9), errors.UsageError,
         r"`freeze` \(--freeze\) is 9; the model has 4 layers.*at most 3"),
        (changed(init_from=str(old), train_encoder=True, model="ci2p+timm:vit_tiny_patch16_224"),
         errors.UsageError, r"`train_encoder` \(--train-encoder\) takes vit or vitds"),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            cc.train(folder / "cache", spec=spec, runs_dir=tmp_path / "runs", device="cpu")
    assert not (tmp_path / "runs").exists()
    for fields in ({"freeze": 1}, {"freeze": 1, "init_from": "x", "train_encoder": True}):
        with pytest.raises(errors.UsageError, match=r"`freeze` \(--freeze\) is 1"):
            changed(**fields)


def test_frozen_layers_keep_their_weights_and_a_stopped_run_continues_to_the_same_bits(
    folder: Path,
) -> None:
    old = folder / "runs" / "old"
    spec = changed(init_from=str(old), freeze=2, ema=0.9, lr=1e-2)
    whole = Path(do(job("frozen", spec), folder)["summary"]["path"])
    for place in ("epoch 0 step 1 rank 0", "epoch 1 step 0 rank 0"):
        assert "error" in do(job("stopped", spec, events={place: "stop"}), folder)
    do(job("stopped", spec), folder)
    assert numbers(folder / "runs" / "stopped") == numbers(whole)
    before, after = weights(old), weights(whole)
    same = {name for name in before if torch.equal(before[name], after[name])}
    kept = {n for n in before if n.startswith(("patch_reshape.", "blocks.")) and "running" not in n}
    assert kept - {n for n in before if "tracked" in n} <= same
    assert not any(name.startswith(("last_blocks.", "norm.", "head.")) for name in same)
    moments = load_file(folder_of(whole, "last") / "optimizer.safetensors")
    assert not any("/blocks." in name for name in moments)


def test_other_initial_weights_are_another_run_and_their_place_is_not(
    folder: Path, tmp_path: Path
) -> None:
    moved = copy_run(folder / "runs" / "old", tmp_path / "moved")
    spec = changed(init_from=str(folder / "runs" / "old"))
    made = cc.train(folder / "cache", spec=spec, runs_dir=tmp_path, device="cpu")
    again = changed(init_from=str(moved))
    found = cc.train(folder / "cache", spec=again, runs_dir=tmp_path, device="cpu")
    assert (found.path, found.trained_epochs) == (made.path, 0)
    name = Path(made.path).name
    for other, message in (
        (changed(init_from=f"{moved}/checkpoints/epoch-0001-step-000000"), "init_from.sha256: '"),
        (changed(), "init_from: InitialWeights"),
    ):
        if other.init_from is not None and folder_of(moved).name == Path(other.init_from).name:
            other = changed(init_from=f"{moved}/checkpoints/{folder_of(moved, 'last').name}")
        with pytest.raises(errors.RunMismatchError, match=message):
            cc.train(folder / "cache", spec=other, runs_dir=tmp_path, name=name, device="cpu")


def edited(export: Path, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """Returns a `.pt2` in which the entry of each tensor was changed."""
    made = io.BytesIO()
    with zipfile.ZipFile(export) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("model_weights_config.json"):
                entries = json.loads(data)
                for entry in entries["config"].values():
                    edit(entry)
                data = json.dumps(entries).encode()
            new.writestr(name, data)
    return made.getvalue()


def test_an_export_gives_its_weights_and_a_damaged_one_is_refused(
    images: Path, tmp_path: Path
) -> None:
    run = images / "runs" / "run"
    export_model(run, tmp_path / "run.pt2", to="torch")
    spec = changed(init_from=str(tmp_path / "run.pt2"))
    made, seen = begun(images / "shards", tmp_path, spec)
    assert seen.plan is not None
    assert seen.plan.initial is not None
    assert not seen.plan.initial.new
    before, after = weights(run), weights(made)
    assert all(
        torch.equal(before[n], after[n]) for n in before if n.startswith(("blocks.", "head."))
    )
    content = (tmp_path / "run.pt2").read_bytes()
    # One value, repeated; with larger sizes it would fill the memory.
    vast = {"sizes": [{"as_int": 2**10}] * 2, "strides": [{"as_int": 0}] * 2}
    pickled = edited(tmp_path / "run.pt2", lambda entry: entry.update(use_pickle=True))
    bomb = edited(tmp_path / "run.pt2", lambda entry: entry["tensor_meta"].update(vast))
    for damaged in (content[: len(content) // 2], pickled, bomb):
        (tmp_path / "bad.pt2").write_bytes(damaged)
        with pytest.raises(
            errors.InputDataError, match="not a whole file of `export --format torch`"
        ):
            begun(images / "shards", tmp_path / "x", changed(init_from=str(tmp_path / "bad.pt2")))


def test_the_encoder_is_unfrozen_where_the_cached_run_ended(images: Path, tmp_path: Path) -> None:
    run = images / "runs" / "run"
    before = cc.evaluate(run, cache=images / "shards")
    start = changed(init_from=str(run), train_encoder=True)
    made, _ = begun(images / "shards", tmp_path / "begun", start)
    assert cc.evaluate(made).nll == pytest.approx(before.nll, rel=0.05)
    encoder = encoder_tensors(cc.open_cache(images / "shards"))
    kept = weights(made)
    torch.testing.assert_close({name: kept[name] for name in encoder}, encoder)
    trained = cc.train(
        images / "shards", spec=dataclasses.replace(start, lr=1e-2), runs_dir=tmp_path, name="all",
        device="cpu",
    )  # fmt: skip
    moved = weights(Path(trained.path))
    assert not any(torch.equal(moved[n], encoder[n]) for n in encoder if n.endswith("weight"))
    picture = next((images / "src" / "val").rglob("*.jpg"))
    assert cc.load_classifier(trained.path).predict([picture])


def test_with_a_constant_rate_a_finished_run_takes_more_epochs_to_the_same_weights(
    folder: Path,
) -> None:
    flat = changed(lr=1e-3, min_lr=1e-3, warmup_epochs=0.5, ema=0.9)
    longer = dataclasses.replace(flat, epochs=4)
    whole = Path(do(job("whole", longer), folder)["summary"]["path"])
    do(job("grown", flat), folder)
    # Stopped on the way, it continues as any other run.
    stopped = do(job("grown", longer, events={"epoch 2 step 1 rank 0": "stop"}), folder)
    assert "2 of 4 epochs and 2 steps" in stopped["error"]["text"]
    grown = Path(do(job("grown", longer), folder)["summary"]["path"])
    for file in ("optimizer.safetensors", "ema.safetensors", "model.safetensors"):
        ours, theirs = (load_file(folder_of(run, "last") / file) for run in (grown, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), file
    assert yaml.safe_load((grown / "args.yaml").read_text())["extended_from"] == [2]
    assert cc.evaluate(grown, checkpoint="last").epoch == 4
    first = grown / "checkpoints" / json.loads(
        (grown / "checkpoints" / "last.json").read_text())["best"]  # fmt: skip
    assert cc.evaluate(grown, checkpoint=first).run == "grown"
    refused = do(job("grown", flat), folder)
    assert "spec.epochs: 4 in the folder, 2 asked for" in refused["error"]["text"]


def test_where_the_schedule_ends_with_the_run_the_flag_that_trains_on_is_named(
    folder: Path,
) -> None:
    before = rows_of(folder / "runs" / "old")
    with pytest.raises(errors.RunMismatchError, match=r"2 `epochs` \(--epochs\), 5 are") as refused:
        cc.train(
            folder / "cache", spec=changed(epochs=5), runs_dir=folder / "runs", name="old",
            device="cpu",
        )  # fmt: skip
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("--init-from ")
    assert rows_of(folder / "runs" / "old") == before


def test_a_config_file_gives_every_setting_and_options_change_single_ones(
    folder: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    spec = changed(epochs=1, betas=(0.8, 0.95), ema=0.9, warmup_epochs=0.5, pos_embed=True)
    made = cc.train(folder / "cache", spec=spec, runs_dir=tmp_path / "one", device="cpu")
    copied = tmp_path / "my settings.yaml"
    copied.write_bytes((Path(made.path) / "args.yaml").read_bytes())
    # Neither a cache nor a name is given: the same settings and data give the same folder name.
    taken = run("train", "--config", copied, "--out", tmp_path / "two", "--device", "cpu")
    assert taken.code == 0, taken.err
    assert_same_run(tmp_path / "two" / Path(made.path).name, Path(made.path))
    other = run(
        "train", "--config", copied, "--seed", 3, "--out", tmp_path, "--name", "x", "--json"
    )
    assert other.code == 0, other.err
    recorded = yaml.safe_load((tmp_path / "x" / "args.yaml").read_text())["settings"]["spec"]
    assert cc.TrainSpec.from_dict(recorded) == dataclasses.replace(spec, seed=3)
    missing = run("train", "--config", tmp_path / "none.yaml")
    assert (missing.code, "there is no file" in missing.err) == (3, True)
    copied.write_text("version: 1\n")
    assert "is damaged or of another version" in run("train", "--config", copied).err


def test_settings_of_before_have_their_digest_and_are_read(folder: Path, tmp_path: Path) -> None:
    made = copy_run(folder / "runs" / "old", tmp_path / "old")
    args = yaml.safe_load((made / "args.yaml").read_text())
    spec = args["settings"]["spec"]
    for name in ("init_from", "freeze", "train_encoder", "fresh_views"):
        del spec[name]
    spec["version"] = 2
    replace_file(made / "args.yaml", yaml.safe_dump(args, sort_keys=False).encode())
    found = cc.train(folder / "cache", spec=SPEC, runs_dir=tmp_path, name="old", device="cpu")
    assert found.trained_epochs == 0
    # What the first version named such a run after.
    later = {"mixup", "cutmix", "mix_probability", "latent_flip", "ema", "layer_decay", "folds"}
    old = {name: value for name, value in spec.items() if name not in {*later, "fold"}}
    bound = args["settings"] | {"spec": old | {"version": 1}}
    text = json.dumps(bound, sort_keys=True, separators=(",", ":"))
    named = cc.train(folder / "cache", spec=SPEC, runs_dir=tmp_path, device="cpu")
    assert Path(named.path).name == f"vitds_nano-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
