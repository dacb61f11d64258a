"""A folder to share: a trained model in the files that model hubs expect, which opens as a run.

::

    config.json           classes, preprocessing, and what rebuilds the model and its inputs
    model.safetensors     the weights, byte for byte those of the checkpoint
    encoder.safetensors   the frozen encoder, where the model reads latents
    model.py              the user's own model, if it has one; no command runs it unasked
    README.md             a model card, made from the run

`config.json` is written last and holds the digests of the others. Left out are paths, host and
device names, and all epochs but the last. `training/opened.py` reads it.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ci2p_cache import __version__
from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.paths import ENCODER
from ci2p_cache.cache.staging import StagingArea, sync_folder
from ci2p_cache.errors import RefusedError, UsageError
from ci2p_cache.models.own_models import OwnConfig
from ci2p_cache.outputs import check_folder
from ci2p_cache.record import read_regular
from ci2p_cache.runs.evaluations import EVALUATIONS, Evaluation, evaluation_name, read_evaluation
from ci2p_cache.runs.files import CODE, MODEL_FILE, SHARED
from ci2p_cache.training.checkpoint import AVERAGE, MODEL
from ci2p_cache.training.opened import SHARED_KEY, SHARED_VERSION, RunFolder

if TYPE_CHECKING:
    from ci2p_cache.inference.classifier import Classifier

__all__ = ["check_share", "put_in_place", "write_share"]

_CARD = "README.md"

_FILES = (SHARED, MODEL, ENCODER, CODE, _CARD)

_MAX_WEIGHTS_BYTES = 2**36

_SHOWN_CLASSES = 200

_CARD_TEXT = """# {name}

An image classifier with {num_classes} classes, trained with ci2p-cache {version}.

## Use

```
ci2p-cache predict THIS_FOLDER photo.jpg
```

```python
import ci2p_cache as cc

classifier = cc.load_classifier("THIS_FOLDER")
guesses = classifier.predict(["photo.jpg"])[0].guesses
```

{own}It opens with ci2p-cache, not with transformers or timm.

## Accuracy

{accuracy}

## Model and data

| | |
|---|---|
{table}

Classes:

```json
{classes}
```
{more}
## Training settings

```yaml
{settings}```

## Not stated

Where the images came from, their license, and the license of this model. Whoever shares it adds
them here, and sets `license` above.
"""


def check_share(out: Path, *, overwrite: bool) -> None:
    """Refuses a place where a folder to share must not or cannot be written.

    Raises:
        UsageError: it is a run folder, in a cache, or a URL.
        RefusedError: files of its names are there that may not be replaced.
        ResourceError: it cannot be written.
    """
    check_folder(out, what="export")
    if (out / MODEL_FILE).exists():
        raise UsageError(
            f"{out} is a run folder; wanted a folder for the export", hint="choose another --out"
        )
    there = [name for name in _FILES if os.path.lexists(out / name)]
    if there and not overwrite:
        raise RefusedError(
            f"{out / there[0]} is there already; nothing was changed",
            hint=f"--overwrite {shlex.quote(out.name)} replaces an export; other files stay",
        )


def write_share(classifier: Classifier, encoder: Path | None, folder: Path) -> None:
    """Writes the files of a model into a folder; `encoder` is the file of its encoder, if any.

    Raises:
        ManifestError: the run's evaluation is damaged.
        ResourceError: they cannot be written.
    """
    run = classifier.run
    weights = next(path for name in (AVERAGE, MODEL) if (path := run.checkpoint / name).exists())
    with StagingArea(folder) as staging:
        weights_record = staging.put(MODEL, read_regular(weights, max_bytes=_MAX_WEIGHTS_BYTES))
        record: FileRecord | None = None
        if encoder is not None:
            record = staging.put(ENCODER, read_regular(encoder, max_bytes=_MAX_WEIGHTS_BYTES))
        if isinstance(run.config, OwnConfig) and run.config.code is not None:
            staging.put(CODE, run.config.code.content)
        staging.put(_CARD, _card(classifier).encode("utf-8", "replace"))
        staging.put_json(SHARED, _config(run, weights_record, record))


def put_in_place(staged: Path, out: Path) -> None:
    """Moves an export to where it belongs; of a folder, what makes it count comes last."""
    if staged.is_file():
        with staged.open("rb") as file:
            os.fsync(file.fileno())
    if staged.is_file() or not out.exists():
        staged.replace(out)
        sync_folder(out.parent)
        return
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    for name in reversed(_FILES):
        if (staged / name).exists():
            (staged / name).replace(out / name)
    sync_folder(out)


def _config(run: RunFolder, weights: FileRecord, encoder: FileRecord | None) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    image, classes = run.file.fingerprint.image, run.file.classes
    state = replace(run.state, history=run.state.history[-1:])
    model = replace(run.file, encoder=encoder).to_dict() | {"model": run.config.to_dict()}
    return {
        "library_name": "ci2p-cache",
        "model_type": "ci2p-cache",
        "architectures": [run.config.name],
        "num_labels": len(classes),
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "preprocessing": {
            "color": "RGB",
            "exif_orientation": image.exif,
            "resize_shorter_side": image.resize_side,
            "interpolation": image.interpolation,
            "antialias": True,
            "centre_crop": [image.size, image.size],
            "value_range": [0.0, 1.0],
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
        },
        SHARED_KEY: {
            "version": SHARED_VERSION,
            "args": _public_args(run).to_dict(),
            "model": model,
            "state": state.to_dict(),
            "weights": weights.to_dict(),
        },
    }


def _public_args(run: RunFolder) -> Any:
    """Returns the run's arguments without paths and the device's name."""
    settings = run.args.settings
    spec = settings.spec
    if settings.init_from is not None:
        spec = replace(spec, init_from=f"sha256:{settings.init_from.sha256}")
    numerics = {name: value for name, value in run.args.numerics.items() if name != "device"}
    settings = replace(settings, spec=spec)
    return replace(run.args, cache="", numerics=numerics, settings=settings)


def _card(classifier: Classifier) -> str:
    """Returns the model card: a YAML head that hubs read, and Markdown."""
    run = classifier.run
    scores, accuracy = _scores(run)
    head: dict[str, Any] = {
        "library_name": "ci2p-cache",
        "pipeline_tag": "image-classification",
        "license": "unknown",
        "tags": ["image-classification", "ci2p-cache"],
    }
    if scores:
        data = f"{len(run.file.classes)} classes, {run.args.settings.data_sha256[:12]}"
        result = {
            "task": {"type": "image-classification", "name": "Image classification"},
            "dataset": {"type": "unknown", "name": data, "split": "val"},
            "metrics": [
                {"type": kind, "name": name, "value": value} for kind, name, value in scores
            ],
        }
        head["metrics"] = ["accuracy"]
        head["model-index"] = [{"name": run.path.name, "results": [result]}]
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n{_body(classifier, accuracy)}"


def _scores(run: RunFolder) -> tuple[list[tuple[str, str, float]], str]:
    """Returns (type, name, value) of each score on the run's own validation images, and a sentence.

    They are what `evaluate` found for these weights, or else what training recorded.
    """
    file = run.path / EVALUATIONS / f"{evaluation_name('val', run.state.name)}.json"
    found: Evaluation | None = read_evaluation(file) if file.exists() else None
    if found is not None and found.is_own_data:
        scores = [
            ("accuracy", "top-1", found.top1),
            ("accuracy", "top-5", found.top5),
            ("nll", "negative log-likelihood", found.nll),
            ("ece", "expected calibration error", found.ece),
        ]
        return scores, (
            f"Top-1 {found.top1:.2%} (95 % interval {found.top1_low:.2%} to {found.top1_high:.2%}, "
            f"Wilson), top-5 {found.top5:.2%}, of {found.samples:,} validation images. Negative "
            f"log-likelihood {found.nll:.4f}, expected calibration error {found.ece:.2%}."
        )
    last = run.state.history[-1] if run.state.history and not run.state.step else None
    if last is None or last.val_top1 is None or last.val_top5 is None:
        return [], "Not measured."
    return [("accuracy", "top-1", last.val_top1), ("accuracy", "top-5", last.val_top5)], (
        f"Top-1 {last.val_top1:.2%}, top-5 {last.val_top5:.2%} on the validation images, as "
        "training recorded it after this epoch."
    )


def _body(classifier: Classifier, accuracy: str) -> str:
    run, spec = classifier.run, _public_args(classifier.run).settings.spec
    image, latent = run.file.fingerprint.image, run.file.fingerprint.latent
    encoder, state = run.file.fingerprint.encoder, run.state
    count = sum(each.numel() for each in classifier.model.parameters())
    rows = [
        ("model", f"`{run.config.name}`, {count:,} parameters"),
        ("weights", f"after {state.epoch} of {spec.epochs} epochs"
         + f" and {state.step} steps" * bool(state.step) + ", averaged" * bool(spec.ema)),
        ("reads", "images" if classifier.reads == "images" else
         f"latents {latent.shape} as {latent.dtype}, made of the images by the encoder beside it"),
        ("pictures", f"RGB; shorter side to {image.resize_side} px ({image.interpolation}, "
         f"antialiased), centre {image.size} x {image.size} px, values 0 to 1, no mean or std"),
    ]  # fmt: skip
    if classifier.reads == "latents":
        what = f"{encoder.arch}, quality {encoder.quality}, {encoder.metric}, frozen; "
        rows.append(("encoder", f"{what}weights sha256 {encoder.weights_sha256[:12]}"))
    if state.history:
        rows.append(("training images", f"{state.history[-1].images:,} in the last epoch"))
    rows.append(("data", f"sha256 {run.args.settings.data_sha256}"))
    names = list(run.file.classes)
    more = f"\n{len(names) - _SHOWN_CLASSES:,} more are in `config.json`.\n" * (
        len(names) > _SHOWN_CLASSES
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    own = "Add `--model model.py`, its code, which you read first. "
    own *= isinstance(run.config, OwnConfig)
    return _CARD_TEXT.format(
        name=run.path.name,
        num_classes=len(names),
        version=__version__,
        own=own,
        accuracy=accuracy,
        table=table,
        classes=json.dumps(names[:_SHOWN_CLASSES], ensure_ascii=False),
        more=more,
        settings=yaml.safe_dump(spec.to_dict(), sort_keys=False),
    )
