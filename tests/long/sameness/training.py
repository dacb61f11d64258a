"""Units on training and what comes after it: runs, models, predictions, exports, reports."""

from __future__ import annotations

import hashlib
import html.parser
import re
from collections.abc import Callable
from pathlib import Path

from tests.long.sameness.bench import Bench, Unit
from tests.long.sameness.caches import BEST, ENCODE

__all__ = ["RUNS", "units"]

_CACHE = ("--shard-samples", 8)
_TRAIN = ("--epochs", 5, "--batch-size", 6, "--name", "run", "--device", "cpu", "--workers", 1)
"""Twenty steps: 24 images."""

RUNS = {
    "vitds_tiny": "--model vitds_tiny",
    "vit_tiny": "--model vit_tiny",
    "vit_ti16": "--model vit_ti16",
    "cnn_vit_tiny": "--model cnn_vit_tiny",
    "deit_tiny on latents": "--model ci2p+timm:deit_tiny_patch16_224",
    "mixed": "--model vitds_tiny --mixup 0.8 --cutmix 1 --mix-probability 0.7 --ema 0.9 "
    "--layer-decay 0.8 --pos-embed --accumulate 2 --order blocks --seed 3",
    "folds": "--model vitds_tiny --folds 3 --fold 1 --optimizer adam --resident yes "
    "--latent-flip 0.5 --warmup-epochs 2 --clip-grad-norm 0 --drop-path 0",
    "online": "--model vitds_tiny --online --save-every 3 --precision bf16 --epochs 2",
    "mixed pixels": "--model vit_ti16 --mixup 0.5 --ema 0.5 --label-smoothing 0",
}
"""Name -> options."""

_MODELS = (
    *("vit", "vit_small", "vit_tiny", "vitds", "vitds_small", "vitds_tiny"),
    *("cnn_vit", "cnn_vit_small", "cnn_vit_tiny", "vit_b16", "vit_s16", "vit_ti16"),
    *("timm:deit_tiny_patch16_224", "ci2p+timm:deit_tiny_patch16_224"),
    "ci2p+timm:vit_tiny_patch16_224",
)


def units() -> list[Unit]:
    """Returns the units of the groups training, inference and models."""
    found = [Unit("inference", name, work) for name, work in _INFERENCE.items()]
    found += [Unit("training", name, _training(words)) for name, words in RUNS.items()]
    return [*found, *(Unit("models", name, work) for name, work in _MODEL_UNITS.items())]


def _training(words: str) -> Callable[[Bench], None]:
    def work(bench: Bench) -> None:
        bench.run("encode", bench.inputs["parts"], "--out", "shards", *ENCODE, *_CACHE)
        train = ("train", "shards", *_TRAIN, *words.split())
        bench.document("train", *train)
        note_run(bench)
        bench.document("again", *train)
        bench.document("evaluate", "evaluate", "runs/run", *BEST)
        bench.document("evaluate last", "evaluate", "runs/run", "--checkpoint", "last")

    return work


def note_run(bench: Bench, run: str = "runs/run") -> None:
    """Notes all files of a run folder: bytes, or documents where clocks have a say."""
    root = bench.folder / run
    clocked = {"state.json", "digests.json", "summary.csv", "curves.png"}
    events = {path.name for path in root.rglob("events.out.tfevents*")}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        where = path.relative_to(bench.folder)
        if path.name == "state.json":
            bench.json_file(name, where)
        elif path.name == "digests.json":
            # It lists state.json, which holds times.
            bench.note(name, re.sub(r'("state.json",\s*"bytes": )\d+(,\s*"sha256": )"\w+"',
                                    r"\1n\2n", path.read_text()).splitlines())  # fmt: skip
        elif path.name == "summary.csv":
            bench.csv_file(name, where)
    bench.call("scalars", "scalars", folder=f"{run}/tensorboard")
    # Names of event files hold the time and the host.
    for path in root.rglob("events.out.tfevents*"):
        path.rename(path.with_name("events"))
    bench.files("run", run, leave_out=clocked | events | {"events"})


def _evaluation_files(bench: Bench) -> tuple[Path, Path]:
    """Where the only evaluation of a run is, in this version or an earlier one."""
    run = Path("runs/run")
    for path in (bench.folder / run / "evaluations").glob("*.json"):
        name = run / "evaluations" / path.name
        return name, name.with_suffix(".parquet")
    return run / "evaluation.json", run / "predictions.parquet"


def _after_training(bench: Bench) -> None:
    _train_small(bench)
    few = bench.inputs["few"]
    bench.document("evaluate", "evaluate", "runs/run", *BEST)
    evaluation, predictions = _evaluation_files(bench)
    bench.json_file("evaluation.json", evaluation)
    bench.text("evaluate, text", "evaluate", "runs/run", *BEST)
    bench.file("predictions.parquet", predictions)
    bench.document("evaluate from images", "evaluate", "runs/run", *BEST, "--from-images")
    bench.document("evaluate train", "evaluate", "runs/run", *BEST, "--split", "train")
    bench.document("predict", "predict", "runs/run", *BEST, few)
    bench.document("predict odd", "predict", "runs/run", *BEST, bench.inputs["odd"], codes=(3,))
    bench.document("predict one", "predict", "runs/run", f"{few}/ant/000.jpg", "--top", 1,
                   "--cache", "shards", "--checkpoint", "last")  # fmt: skip
    bench.text("predict, text", "predict", "runs/run", *BEST, few, "--top", 2)
    bench.call("classifier", "classify", run="runs/run", images=[few])
    # Charts of times are as long as their numbers.
    size = ("bytes",)
    bench.document("report", "report", "runs/run", "shards", "--out", "both.html", clocks=size)
    note_page(bench, "both.html")
    bench.document("report without", "report", "shards", "--no-pictures", "--out", "bare.html")
    note_page(bench, "bare.html")
    bench.run("train", "shards", *_SMALL, "--seed", 5, "--name", "other")
    bench.run("evaluate", "runs/other", *BEST)
    bench.document(
        "report of two", "report", "runs/run", "runs/other", "--out", "two.html", clocks=size
    )
    note_page(bench, "two.html")


_SMALL = ("--model", "vitds_tiny", "--epochs", 2, "--batch-size", 8, "--device", "cpu")


def _train_small(bench: Bench) -> None:
    bench.run("encode", bench.inputs["parts"], "--out", "shards", *ENCODE, *_CACHE)
    bench.run("train", "shards", *_SMALL, "--name", "run")


class _Text(html.parser.HTMLParser):
    """Collects the text of a page, and the digests of its pictures; of charts only that they are.

    What charts show is in the run's other files, and some of it is of a clock.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._left_out = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source = dict(attrs).get("src") or ""
        if tag == "svg" or (tag == "img" and source.startswith("data:image/svg")):
            self.parts.append("<chart>")
        elif tag == "img":
            digest = hashlib.sha256(source.encode()).hexdigest()
            self.parts.append(f"<img {dict(attrs).get('alt') or ''} {digest}>")
        self._left_out += tag in ("svg", "style")

    def handle_endtag(self, tag: str) -> None:
        self._left_out -= tag in ("svg", "style")

    def handle_data(self, data: str) -> None:
        if data.strip() and not self._left_out:
            self.parts.append(" ".join(data.split()))


_CLOCK = re.compile(r"[\d,.]+ (s|min|h)( \d\d (s|min))?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")
_CLOCK_LABELS = ("images/s", "waiting for data")


def note_page(bench: Bench, name: str) -> None:
    """Notes the text of an HTML page, with what clocks gave taken out."""
    page = _Text()
    page.feed((bench.folder / name).read_text("utf-8"))
    parts: list[str] = []
    for part in page.parts:
        before = parts[-1] if parts else ""
        # The share of waiting stands beside a time in tables, behind its label elsewhere.
        is_clock = _CLOCK.fullmatch(part) or before in _CLOCK_LABELS
        is_share = before == "(clock)" and part.endswith("%")
        parts.append("(clock)" if is_clock or is_share else _DATE.sub("(clock)", part))
    bench.note(name, parts)


def _exports(kind: str, what: str) -> Callable[[Bench], None]:
    def work(bench: Bench) -> None:
        _train_small(bench)
        suffix = {"onnx": "onnx", "torch": "pt2"}[kind]
        file = f"{what}.{suffix}"
        bench.document("export", "export", "runs/run", *BEST, "--out", file, "--to", kind,
                       "--what", what, "--count", 4)  # fmt: skip
        shape = [2, 3, 64, 64] if what == "full" else [2, 192, 4, 4]
        bench.call("outputs", "run_exported", path=file, shape=shape)

    return work


_INFERENCE: dict[str, Callable[[Bench], None]] = {
    "after training": _after_training,
    **{f"{kind} {what}": _exports(kind, what) for kind in ("onnx", "torch")
       for what in ("full", "model")},
}  # fmt: skip


def _complexities(bench: Bench) -> None:
    bench.document("all", "complexity", "--size", 256)
    bench.text("one size, text", "complexity", "--size", 64, "--model", "vit_tiny")
    bench.document("sizes", "complexity", "--sizes", "224,256", "--num-classes", 10)
    words = ("--model", "cnn_vit", "--model", "timm:deit_tiny_patch16_224", "--size", 96)
    bench.document("chosen", "complexity", *words, "--latent-channels", 320)


def _built(bench: Bench) -> None:
    bench.call("models", "build_models", names=list(_MODELS))
    bench.call("encoder", "encode_pictures", images=bench.inputs["folder"])


_MODEL_UNITS: dict[str, Callable[[Bench], None]] = {
    "complexity": _complexities,
    "built": _built,
}
