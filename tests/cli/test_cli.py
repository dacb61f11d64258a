"""The command line: what is printed where, and the documented exit code of each kind of error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ci2p_cache as cc
from ci2p_cache.cli.encode import encode as encode_command
from ci2p_cache.cli.train import train as train_command
from ci2p_cache.encoder.architecture import FactorizedPrior
from ci2p_cache.record import sealed_bytes
from tests.support.commands import Ran
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

pytestmark = pytest.mark.usefixtures("nano")


ENCODE = ("--encoder", "bundled", "--size", "32", "--shard-samples", "4")


@pytest.fixture(scope="module")
def cache_dir(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "shards"
    options = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4)
    cc.encode(image_folder, out, options)
    return out


@pytest.fixture
def copy(cache_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache_dir, tmp_path / "shards")
    return tmp_path / "shards"


def test_encode_verify_inspect_train_one_after_another(
    run: Callable[..., Ran], image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    first = run("encode", image_folder, "--out", out, *ENCODE)
    assert first.code == 0, first.err
    assert "21 images" in first.out
    assert f"next: ci2p-cache train {out}" in first.out.replace("\n", "")
    assert "nothing: everything was committed" in run(
        "encode", image_folder, "--out", out, *ENCODE
    ).out  # fmt: skip
    assert run("verify", out).code == 0
    assert "bmshj2018-factorized" in run("inspect", out).out
    trained = run(
        "train", out, "--model", "vitds_nano", "--epochs", "2", "--batch-size", "8",
        "--out", tmp_path / "runs", "--name", "one",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "epoch 2/2" in trained.err
    assert trained.err.startswith(
        "plan: vitds_nano, 1,084,043 trainable parameters, float32 on cpu\n"
        "  19 training images, 2 views each, 2 validation images, 3 classes\n"
        f"  2 epochs of 3 steps of 8 images, into {tmp_path}/runs/one\n"
    )
    assert (tmp_path / "runs" / "one" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_json_goes_to_stdout_alone(run: Callable[..., Ran], cache_dir: Path) -> None:
    card = json.loads(run("inspect", cache_dir, "--json").out)
    assert card["complete"] is True
    sample = json.loads(run("inspect", cache_dir, "--row", "0", "--json").out)
    assert sample["row"] == 0
    assert json.loads(run("verify", cache_dir, "--json").out) == []
    rows = json.loads(run("complexity", "--model", "vitds_nano", "--size", 64, "--json").out)
    assert [row["name"] for row in rows] == ["vit_b16", "vitds_nano"]


@pytest.mark.slow
def test_complexity_prints_the_papers_figures(run: Callable[..., Ran]) -> None:
    text = run("complexity").out
    for figure in ("88,956,320", "49,699,424", "8.4687", "6.6211", "-63.34%", "-71.34%"):
        assert figure in text
    for figure in ("63.3 %", "71.3 %", "63.35 %", "about 72 %", "55.43", "34.81", "28.78"):
        assert figure in text


@pytest.mark.slow
def test_complexity_counts_what_is_asked_for(run: Callable[..., Ran]) -> None:
    options = ("--model", "vit_ti16", "--model", "timm:test_vit", "--json")
    rows = json.loads(run("complexity", "--size", 64, *options).out)
    assert [row["name"] for row in rows] == ["vit_b16", "vit_ti16", "timm:test_vit"]
    rows = json.loads(run("complexity", "--sizes", "64,96", "--json").out)
    assert [(row["name"], row["size"]) for row in rows] == [
        (name, size) for size in (64, 96) for name in ("vit_b16", "vit", "vitds")
    ]
    assert {row["published"] for row in rows} == {None}
    assert "64 x 64 px" not in run("complexity", "--sizes", "64").out
    assert "Table 2" not in run("complexity", "--size", "64").out
    refused = run("complexity", "--sizes", "64,big")
    assert refused.code == 2
    assert "--sizes is '64,big'; wanted image sides" in refused.err


def test_an_environment_variable_stands_for_an_option_and_a_flag_wins(
    run: Callable[..., Ran], image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI2P_CACHE_ENCODE_VIEWS", "none")
    run("encode", image_folder, "--out", tmp_path / "a", *ENCODE)
    run("encode", image_folder, "--out", tmp_path / "b", *ENCODE, "--views", "flip")
    assert cc.open_cache(tmp_path / "a")["train"].num_views == 1
    assert cc.open_cache(tmp_path / "b")["train"].num_views == 2


@pytest.mark.parametrize("command", [[], ["encode"], ["status"], ["verify"], ["inspect"],
                                     ["convert"], ["train"], ["evaluate"], ["predict"], ["export"],
                                     ["report"], ["run"], ["complexity"], ["demo"],
                                     ["doctor"]])  # fmt: skip
def test_help_teaches_by_example_in_its_first_lines(
    run: Callable[..., Ran], command: list[str]
) -> None:
    shown = run(*command, "--help")
    assert shown.code == 0
    assert "  ci2p-cache " in "\n".join(shown.out.splitlines()[2:10])


@pytest.mark.parametrize(
    ("command", "spec"), [(encode_command, cc.EncodeOptions), (train_command, cc.TrainSpec)]
)
def test_flags_and_library_have_the_same_defaults(command: Callable[..., None], spec: type) -> None:
    flags = {name: value.default for name, value in inspect.signature(command).parameters.items()}
    for field in dataclasses.fields(spec):
        if field.name in flags:
            assert flags[field.name] == field.default, field.name


def test_the_flags_of_train_are_these(run: Callable[..., Ran]) -> None:
    """A new flag is a new promise: add it here, and say in the commit why it is worth one."""
    flags = [name for name in inspect.signature(train_command).parameters if name != "cache"]
    assert flags == [
        "config", "model", "epochs", "batch_size", "accumulate", "optimizer", "lr", "min_lr",
        "warmup_epochs", "weight_decay", "clip_grad_norm", "label_smoothing", "drop_path",
        "pos_embed", "precision", "order", "seed", "mixup", "cutmix", "mix_probability",
        "latent_flip", "ema", "layer_decay", "folds", "fold", "fresh_views", "init_from",
        "freeze", "train_encoder", "out", "name", "device", "workers", "resident", "compile",
        "save_every", "track", "from_images", "overwrite", "json",
    ]  # fmt: skip


PANELS = {
    "encode": ("Everyday", "Images", "Encoder", "Views", "Storage", "Machines"),
    "train": (
        "Everyday",
        "Model and optimiser",
        "Regularisation",
        "Data",
        "Fine-tuning",
        "Machines",
    ),
    "bench train": ("Options",),
    "verify": ("Options",),
}


@pytest.mark.parametrize(("command", "wanted"), PANELS.items())
def test_help_shows_each_option_in_one_panel_the_everyday_ones_first(
    run: Callable[..., Ran], command: str, wanted: tuple[str, ...]
) -> None:
    text = run(*command.split(), "--help").out
    panels = dict(zip(*[iter(re.split(r"\n([A-Z][\w -]+):\n", text)[3:])] * 2, strict=True))
    assert tuple(panels) == wanted
    flags = re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.M)
    assert len(flags) == len(set(flags))
    assert len(re.findall(r"^  -", panels[wanted[0]], re.M)) <= 12
    assert "-h, --help" in panels[wanted[0]]


def test_augmentation_can_be_set_by_environment_variables(
    run: Callable[..., Ran], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI2P_CACHE_TRAIN_LAYER_DECAY", "2")
    ran = run("train", cache_dir, "--mixup", "0.8")
    assert ran.code == 2
    assert "`layer_decay` is 2.0; wanted a number, 0 < value <= 1" in ran.err.replace("\n", " ")


class TestBadInput:
    def refused(self, ran: Ran, code: int, *texts: str) -> None:
        assert ran.code == code, ran.err
        assert "error:" in ran.err
        flat = " ".join(ran.err.split())
        for text in texts:
            assert text in flat
        assert "Traceback" not in ran.err

    def test_an_empty_folder(self, run: Callable[..., Ran], tmp_path: Path) -> None:
        (tmp_path / "src").mkdir()
        self.refused(run("encode", tmp_path / "src", "--out", tmp_path / "out", *ENCODE), 3, "src")
        assert not (tmp_path / "out").exists()

    def test_a_folder_of_text_files(self, run: Callable[..., Ran], tmp_path: Path) -> None:
        (tmp_path / "src" / "notes").mkdir(parents=True)
        (tmp_path / "src" / "notes" / "a.txt").write_text("no picture")
        self.refused(
            run("encode", tmp_path / "src", "--out", tmp_path / "out", *ENCODE), 3, "image"
        )

    def test_a_missing_and_an_unreadable_folder(
        self, run: Callable[..., Ran], tmp_path: Path
    ) -> None:
        ran = run("encode", tmp_path / "nowhere", "--out", tmp_path / "out", *ENCODE)
        self.refused(ran, 3, "nowhere")
        (tmp_path / "file").write_text("x")
        ran = run("encode", tmp_path / "file", "--out", tmp_path / "out", *ENCODE)
        self.refused(ran, 3, "file")

    @pytest.mark.parametrize("locked", thinned(["src/ant", "src"]))
    def test_an_unreadable_folder(self, warm: WarmParent, tmp_path: Path, locked: str) -> None:
        folder = write_image_folder(tmp_path / "src", {"ant": 1, "bee": 1})
        (tmp_path / locked).chmod(0)
        try:
            command = ("encode", folder, "--out", tmp_path / "out", *ENCODE)
            shown = warm.run(*command, unprivileged=True)
        finally:
            (tmp_path / locked).chmod(0o755)
        assert shown.code == 3, shown.told
        assert "Permission denied" in shown.err
        assert not (tmp_path / "out").exists()

    def test_an_existing_cache_of_other_settings(
        self, run: Callable[..., Ran], image_folder: Path, copy: Path
    ) -> None:
        ran = run("encode", image_folder, "--out", copy, *ENCODE, "--views", "none", "--seed", "4")
        self.refused(ran, 4, "views.kind: 'flip' in the folder, 'none' asked for", "seed: 0")

    def test_a_size_that_is_no_multiple_of_32(
        self, run: Callable[..., Ran], image_folder: Path, tmp_path: Path
    ) -> None:
        ran = run("encode", image_folder, "--out", tmp_path / "out", "--size", "100")
        self.refused(ran, 2, "`size` is 100", "multiple of 32")

    def test_weights_of_another_architecture(
        self, run: Callable[..., Ran], image_folder: Path, tmp_path: Path
    ) -> None:
        torch.save(FactorizedPrior(16, 24).state_dict(), tmp_path / "small.pth.tar")
        ran = run(
            "encode", image_folder, "--out", tmp_path / "out", "--weights",
            tmp_path / "small.pth.tar",
        )  # fmt: skip
        self.refused(ran, 3, "small.pth.tar", "g_a")

    def test_no_network_and_no_weights_names_three_ways(
        self,
        run: Callable[..., Ran],
        image_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        # Port 9 of loopback: no one listens, so the connection is refused at once.
        monkeypatch.setenv("CI2P_CACHE_WEIGHTS_URL", "http://127.0.0.1:9/")
        ran = run("encode", image_folder, "--out", tmp_path / "out")
        self.refused(ran, 6, "--weights", "--encoder bundled", str(tmp_path / "home"))
        assert not (tmp_path / "out").exists()

    def test_an_unknown_model(
        self, run: Callable[..., Ran], cache_dir: Path, tmp_path: Path
    ) -> None:
        ran = run("train", cache_dir, "--model", "vitsd", "--out", tmp_path / "runs")
        self.refused(ran, 2, "vitsd", "vitds")
        assert not (tmp_path / "runs").exists()

    def test_a_half_encoded_cache_given_to_train(
        self, run: Callable[..., Ran], copy: Path, tmp_path: Path
    ) -> None:
        manifest = json.loads((copy / "cache.json").read_text())
        manifest["state"] = "encoding"
        (copy / "cache.json").write_bytes(sealed_bytes(manifest))
        next(copy.glob("commits/*")).unlink()
        ran = run("train", copy, "--model", "vitds_nano", "--out", tmp_path / "runs")
        self.refused(ran, 4, "not encoded to its end", "ci2p-cache encode")

    def test_a_corrupt_shard_given_to_train(
        self, run: Callable[..., Ran], copy: Path, tmp_path: Path
    ) -> None:
        for path in copy.glob("latents.zarr/train/latents/c.*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        ran = run(
            "train", copy, "--model", "vitds_nano", "--epochs", "1", "--out", tmp_path / "runs"
        )
        self.refused(ran, 5, "shard", "rows", f"ci2p-cache verify {copy}")
        self.refused(run("verify", copy), 5, "findings", f"verify {copy} --repair")

    def test_no_cache_at_all(self, run: Callable[..., Ran], tmp_path: Path) -> None:
        for command in ("train", "inspect", "verify"):
            self.refused(run(command, tmp_path), 4, "is no latent cache")

    def test_a_name_is_shown_as_it_is(self, run: Callable[..., Ran], tmp_path: Path) -> None:
        ran = run("verify", tmp_path / ":dog:[bold]")
        assert ":dog:[bold]" in ran.err.replace("\n", "")

    def test_too_many_bad_images(self, run: Callable[..., Ran], tmp_path: Path) -> None:
        source = write_image_folder(tmp_path / "src", {"ant": 4, "bee": 1})
        (source / "ant" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
        encode = ("encode", source, "--out", tmp_path / "out", *ENCODE)
        self.refused(run(*encode, "--max-errors", "0"), 3, "ant/bad.jpg", "--max-errors")
        assert run(*encode).code == 0

    def test_overwrite_wants_the_folders_name(
        self, run: Callable[..., Ran], image_folder: Path, copy: Path
    ) -> None:
        again = ("encode", image_folder, "--out", copy, *ENCODE, "--views", "none")
        self.refused(run(*again, "--overwrite", "other"), 2, "shards")
        planned = run(*again, "--overwrite", "shards", "--plan-only", "--device", "cpu")
        # What each machine is to run must not remove what the others have done.
        shown = next(line for line in planned.out.splitlines() if line.startswith("on each of"))
        words = shlex.split(shown.partition("ci2p-cache ")[2])
        assert words == [*map(str, again), "--device", "cpu", "--shard-range", words[-1]]
        assert run(*words).code == 0
        assert run(*again, "--overwrite=shards").code == 0


def test_in_a_log_there_is_no_bar(warm: WarmParent, image_folder: Path, tmp_path: Path) -> None:
    logged = warm.start("encode", image_folder, *ENCODE, "--out", tmp_path / "out")
    assert "complete" in (told := logged.wait())
    assert "\x1b" not in told


def test_python_dash_m_runs_the_same_command() -> None:
    command = [sys.executable, "-m", "ci2p_cache", "--version"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == f"ci2p-cache {cc.__version__}"


@pytest.mark.slow
def test_train_inspect_and_verify_run_where_compressai_is_not_installed(
    cache_dir: Path, tmp_path: Path
) -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "compressai":
            raise ModuleNotFoundError("compressai is not installed")
sys.meta_path.insert(0, Blocked())
from ci2p_cache.cli.app import run_command
for command in COMMANDS:
    sys.argv = ["ci2p-cache", *command]
    try:
        run_command()
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
"""
    cache, runs = str(cache_dir), str(tmp_path / "runs")
    commands = [
        ["convert", cache, "--out", str(tmp_path / "tars"), "--format", "webdataset"],
        ["inspect", cache],
        ["inspect", cache, "--row", "0"],
        ["verify", cache],
        ["train", cache, "--model", "vitds_tiny", "--epochs", "1", "--out", runs],
    ]
    text = code.replace("COMMANDS", repr(commands))
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)
    assert list((tmp_path / "runs").glob("*/summary.csv"))


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "{cache}", "--format", "npy", "--out", "s3://bucket/arrays"),
        ("convert", "{cache}", "--format", "webdataset", "--out", "s3://bucket/tars"),
        ("train", "{cache}", "--model", "vitds_nano", "--out", "gs://bucket/runs"),
        ("report", "{cache}", "--no-pictures", "--out", "https://host/report.html"),
        ("inspect", "{cache}", "--picture", "s3://bucket/look.png"),
        ("demo", "--out", "s3://bucket/demo"),
    ],
    ids=lambda words: "-".join(words[:1]),
)
def test_what_is_written_to_a_url_is_refused_and_no_folder_gets_that_name(
    run: Callable[..., Ran],
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*(str(cache_dir) if word == "{cache}" else word for word in words))
    assert ran.code == 2
    assert "is a URL" in " ".join(ran.err.split())
    assert not list(tmp_path.iterdir())
