"""A model in a file outside the package: trained, resumed, used, and never run unasked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.models.registry import model_config
from ci2p_cache.runs.files import EpochRecord, num_parameters
from ci2p_cache.training.records import TrainObserver
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.trained import folder_of, rewrite_json

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = """
import torch
from torch import nn


class Small(nn.Module):
    reads = "latents"

    def __init__(self, num_classes, latent_channels, drop_path_rate):
        super().__init__()
        self.conv = nn.Conv2d(latent_channels, 8, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(drop_path_rate)
        self.head = nn.Linear(8, num_classes)

    def forward(self, latents):
        return self.head(self.drop(self.norm(self.conv(latents)).relu()).mean(dim=(2, 3)))


def pixels(num_classes, image_size, drop_path_rate):
    return nn.Sequential(
        nn.Conv2d(3, 8, image_size), nn.Flatten(), nn.Dropout(drop_path_rate),
        nn.Linear(8, num_classes),
    )


pixels.reads = "images"
"""


class Stops(TrainObserver):
    """Stops a run after its first epoch."""

    def epoch(self, record: EpochRecord) -> None:
        if record.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, `shards`, `mine.py`, and `runs/run`, which was never interrupted; read only."""
    root = tmp_path_factory.mktemp("own")
    (root / "mine.py").write_text(CODE)
    write_image_folder(root / "src" / "train", {"ant": 6, "bee": 5})
    write_image_folder(root / "src" / "val", {"ant": 2, "bee": 3})
    cc.encode(root / "src", root / "shards", cc.EncodeOptions(encoder="bundled", size=32))
    train(root, root / "runs", "run")
    return root


def spec(file: Path, name: str = "Small") -> cc.TrainSpec:
    return cc.TrainSpec(model=f"{file}:{name}", epochs=2, batch_size=4)


def train(made: Path, runs: Path, name: str, file: Path | None = None, **options: object) -> Path:
    """Trains two epochs from the cache of `made`, with its model or that of another file."""
    chosen = spec(file or made / "mine.py")
    done = cc.train(
        made / "shards", spec=chosen, runs_dir=runs, name=name, device="cpu", **options,  # type: ignore[arg-type]  # any option
    )  # fmt: skip
    return Path(done.path)


def copied(path: Path, folder: Path, extra: str = "") -> Path:
    """A copy of the file in another folder, or a changed one that leaves a trace when it runs."""
    folder.mkdir(exist_ok=True)
    trace = "\nimport pathlib\npathlib.Path(__file__).with_name('ran').touch()\n" if extra else ""
    target = folder / path.name
    target.write_text(path.read_text() + trace)
    return target


def test_stopped_and_resumed_from_a_moved_file_it_gives_the_same_bits(
    made: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.InterruptedRunError):
        train(made, tmp_path, "run", observers=[Stops()])
    run = train(made, tmp_path, "run", copied(made / "mine.py", tmp_path / "elsewhere"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder_of(each, "last") / name for each in (run, made / "runs" / "run"))
        assert ours.read_bytes() == theirs.read_bytes()
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    assert (run / "model.py").read_text() == CODE
    bound = yaml.safe_load((run / "args.yaml").read_text())["settings"]["spec"]["model"]
    assert bound == f"mine.py:Small#{digest}"
    assert str(made) not in (run / "model.json").read_text()


def test_a_changed_file_does_not_resume_and_does_not_run_for_what_was_trained(
    made: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(made / "runs" / "run", tmp_path / "run")
    with pytest.raises(errors.RunMismatchError, match="nothing was changed") as refused:
        train(made, tmp_path, "run", copied(made / "mine.py", tmp_path / "new", "# changed"))
    assert "spec.model: 'mine.py:Small#" in str(refused.value)
    (tmp_path / "new" / "ran").unlink()
    for use in (cc.evaluate, cc.load_classifier):
        with pytest.raises(errors.RunMismatchError, match="nothing of it was run"):
            use(run, model=tmp_path / "new" / "mine.py")
    assert not (tmp_path / "new" / "ran").exists()


def test_it_is_evaluated_predicted_and_exported_once_its_file_is_named(
    run: Callable[..., Ran], made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / "runs" / "run", tmp_path / "run")
    # The run's own copy, named by hand, does as well.
    scores = cc.evaluate(folder, model=folder / "model.py:Small", device="cpu")
    assert (scores.top1, scores.nll) == (scores.recorded_top1, scores.recorded_nll)
    named = ("--model", made / "mine.py")
    ran = run("predict", folder, made / "src" / "val", "--json", *named)
    assert [each["error"] for each in json.loads(ran.out)] == [None] * 5
    summary = cc.export_model(
        folder, tmp_path / "own.pt2", to="torch", what="model", count=2, model=made / "mine.py"
    )
    classifier = cc.load_classifier(folder, device="cpu", model=made / "mine.py")
    program = torch.export.load(summary.path).module()
    latents = torch.randn(3, 192, 2, 2)
    assert (program(latents) - classifier.logits(latents)).abs().max() <= 1e-5


def test_no_command_runs_the_code_of_a_run_folder_by_itself(
    run: Callable[..., Ran], made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / "runs" / "run", tmp_path / "run")
    copied(made / "mine.py", tmp_path / "hostile", "# changed").replace(folder / "model.py")
    out = ("--out", tmp_path / "a.pt2", "--format", "torch")
    for command, *more in (("evaluate",), ("predict", made / "src"), ("export", *out)):
        ran = run(command, folder, *more)
        assert ran.code == 4, ran.err
        assert "mine.py:Small; its code runs only if you name the file" in ran.err
    assert run("report", folder, "--out", tmp_path / "page.html").code == 0
    data = json.loads((folder / "model.json").read_text())
    assert num_parameters(folder)[0] == data["model"]["parameters"]
    # A stranger's record may say where its code is; it has no field for that.
    for field, value in (("code", str(folder / "model.py")), ("name", f"{folder}/model.py:Small")):
        rewrite_json(folder / "model.json", model=data["model"] | {field: value})
        with pytest.raises(errors.ManifestError):
            cc.evaluate(folder, model=made / "mine.py")
    args = (folder / "args.yaml").read_text()
    (folder / "args.yaml").write_text(args.replace("mine.py:Small", f"{folder}/model.py:Small"))
    ran = run("train", "--config", folder / "args.yaml", "--out", tmp_path / "runs")
    assert ran.code == 4
    assert "--config names the model model.py:Small; its code runs only" in ran.err
    assert not (folder / "ran").exists()


def test_a_file_is_not_named_for_a_run_that_needs_none(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "runs" / "run", tmp_path / "run")
    config = model_config("vit_tiny", num_classes=2, latent_size=2)
    rewrite_json(folder / "model.json", model=config.to_dict())
    with pytest.raises(errors.UsageError, match="has the model vit_tiny; it needs no file"):
        cc.load_classifier(folder, model=made / "mine.py")


def test_its_weights_begin_another_run_without_its_code(made: Path, tmp_path: Path) -> None:
    begun = dataclasses.replace(spec(made / "mine.py"), init_from=str(made / "runs" / "run"))
    cc.train(made / "shards", spec=begun, runs_dir=tmp_path, name="more", device="cpu")
    settings = yaml.safe_load((tmp_path / "more" / "args.yaml").read_text())["settings"]
    assert settings["init_from"]["taken"] == 9
    assert settings["init_from"]["new"] == []


def test_a_recipe_names_one_on_images_and_continues_where_it_was_moved(
    made: Path, tmp_path: Path
) -> None:
    recipe = cc.Experiment(
        name="own",
        source=str(made / "src"),
        encode=cc.EncodeOptions(encoder="bundled", size=32),
        train=spec(made / "mine.py", "pixels"),
    )
    done = cc.run_experiment(recipe, tmp_path / "out", device="cpu", until="evaluate")
    assert done.scores is not None
    moved = spec(copied(made / "mine.py", tmp_path / "elsewhere"), "pixels")
    again = cc.run_experiment(
        dataclasses.replace(recipe, train=moved), tmp_path / "out", device="cpu", until="evaluate"
    )
    assert again.trained is not None
    assert again.trained.trained_epochs == 0
    assert again.scores == done.scores


WRONG = {
    "says nothing": ("def make(): return nn.Linear(1, 1)", "does not say what it reads"),
    "no module": ("def make(): return 3", "returns int; wanted a torch.nn.Module"),
    "an argument": ("def make(width): ...", "wants the arguments width"),
    "raises": ("def make():\n    raise KeyError('x')", "raises KeyError in line 10: 'x'"),
    "no such name": ("def other(): ...", "has no class or function 'make'"),
    "a syntax error": ("def make(:", "raises SyntaxError in line 9"),
    "its input": ("class make(Net):\n    def forward(self, x): return self.net(x[0])",
                  r"make on latents \(2, 4, 2, 2\) raises RuntimeError"),
    "its shape": ("class make(Net):\n    def forward(self, x): return x.mean(1)",
                  r"gives \(2, 2, 2\) for latents \(2, 4, 2, 2\); wanted logits \(2, 3\)"),
    "its kind": ("class make(Net):\n    def forward(self, x): return [x]", "gives list for"),
    "its dtype": ("class make(Net):\n    def forward(self, x): return super().forward(x).half()",
                  r"gives torch\.float16 .* wanted float32"),
    "not finite": ("class make(Net):\n    def forward(self, x): return super().forward(x) / 0",
                   "not finite"),
    "no gradients": ("class make(Net):\n    @torch.no_grad()\n"
                     "    def forward(self, x): return super().forward(x)", "without gradients"),
    "half weights": ("def make(): return Net().half()", r"parameters of torch\.float16"),
    "one memory": ("class make(Net):\n    def __init__(self):\n        super().__init__()\n"
                   "        self.other = self.net", "in one memory"),
}  # fmt: skip
NET = """import torch
from torch import nn
class Net(nn.Module):
    reads = 'latents'
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 3)
    def forward(self, x): return self.net(x.flatten(1))
"""


@pytest.mark.parametrize(("code", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_trained_is_refused_before_it_is(
    tmp_path: Path, code: str, message: str
) -> None:
    (tmp_path / "m.py").write_text(NET + code)
    with pytest.raises(errors.UsageError, match=message):
        cc.create_model(
            f"{tmp_path / 'm.py'}:make", num_classes=3, latent_channels=4, latent_size=2,
            drop_path_rate=0.0,
        )  # fmt: skip


def test_a_setting_that_it_takes_no_notice_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def make(): ...")
    with pytest.raises(
        errors.UsageError, match=r"`drop_path_rate`, and 0\.1 is asked for"
    ) as caught:
        cc.create_model(f"{tmp_path / 'm.py'}:make")
    assert "train: --drop-path 0" in str(caught.value.hint)


def test_a_name_may_hold_the_digest_that_the_file_must_have(made: Path) -> None:
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    model = cc.create_model(f"{made / 'mine.py'}:Small#{digest}", num_classes=2)
    assert model.config.reads == "latents"  # type: ignore[union-attr]  # each has a record
    with pytest.raises(errors.RunMismatchError, match=r"mine\.py has changed"):
        cc.create_model(f"{made / 'mine.py'}:Small#{'0' * 64}")
    with pytest.raises(errors.UsageError, match=r"reads latents \(batch, 192, 16, 16\), got"):
        model(torch.zeros(1, 192, 8, 8))
