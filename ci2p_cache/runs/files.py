"""What a run folder holds beside its evaluations: `args.yaml`, `model.json` and `summary.csv`.

::

    runs/<name>/
      args.yaml       what binds the folder (RunSettings), and what it was started with
      model.json      everything needed to rebuild the model and to read its latents
      model.py        a copy of the user's own model, if it has one; no command runs it unasked
      encoder.safetensors   the cache's, so that the folder alone classifies pictures
      summary.csv     a row per epoch
      tensorboard/    the same as events, and the loss and learning rate of each step
      steps.csv, wandb.json, wandb/   where they are asked for, see training/trackers.py
      checkpoints/    see training/checkpoint.py
      evaluations/    what `evaluate` found, see evaluations.py
      .lock           only while somebody trains here
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.paths import ENCODER
from ci2p_cache.errors import InputDataError, ManifestError, UsageError
from ci2p_cache.record import Record, read_json, read_regular, read_yaml, regular_file
from ci2p_cache.specs import Fingerprint

if TYPE_CHECKING:
    from ci2p_cache.models.registry import AnyModelConfig

__all__ = [
    "ARGS",
    "CODE",
    "EXPORT_FACTS",
    "MODEL_FILE",
    "SHARED",
    "SUMMARY",
    "EpochRecord",
    "ModelFile",
    "args_bytes",
    "best_epoch",
    "best_epoch_of",
    "has_epoch",
    "mean_wait_share",
    "num_parameters",
    "read_args",
    "read_model",
    "read_model_file",
    "read_summary",
    "summary_csv",
    "training_seconds",
]

ARGS, CODE, MODEL_FILE, SUMMARY = "args.yaml", "model.py", "model.json", "summary.csv"

SHARED = "config.json"
"""What a folder to share has in the place of the first three; see `inference/share.py`."""

EXPORT_FACTS = "ci2p_cache.json"
"""Where an exported `.pt2` keeps what ONNX has as `metadata_props`."""

_MAX_ARGS_BYTES = 2**16
"""Ours have a few thousand."""

_VERSIONS = (1, 2)
"""Versions of `model.json`; 1 has no copy of the encoder."""

_READ = (
    "epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "images",
    "images_per_second", "wait_share", "epoch_seconds", "lr", "grad_norm",
)  # fmt: skip
"""Columns that are read back."""

_OLD_NAMES = {"loss": "train_loss", "top1": "val_top1", "top5": "val_top5"}
"""What earlier versions called three of the columns -> what they are called."""

_MAX_BLOCKS = 1000
"""Most blocks of a model whose parameters are counted: a stranger's record may name any number."""

_MAX_SUMMARY_BYTES = 2**24
"""About 100,000 epochs."""


def args_bytes(args: dict[str, Any]) -> bytes:
    """Returns the content of `args.yaml`."""
    # Few commands read or write one.
    import yaml

    text: str = yaml.safe_dump(args, sort_keys=False, allow_unicode=True)
    return text.encode()


def read_args(run: Path, name: str = ARGS) -> dict[str, Any]:
    """Reads the `args.yaml` of a run, which may come from a stranger.

    Args:
        run: The folder.
        name: What the file is called there.

    Raises:
        FileNotFoundError: there is none, so it is no run.
        ManifestError: it is a link, too large, or no mapping of plain values.
        OSError: it cannot be read.
    """
    return read_yaml(run / name, max_bytes=_MAX_ARGS_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile(Record):
    """What rebuilds a model and says what its inputs and outputs mean; weights are elsewhere."""

    version: int
    """Version of this record, 1 or 2."""
    software: str
    """Name and version of what wrote it; information only."""
    fingerprint: Fingerprint
    """How the latents were made that it was trained from."""
    scale: float
    """y = stored * scale + offset[channel]; the step for symbols, 1.0 for floats."""
    offset: tuple[float, ...]
    """The codec's median of each channel for symbols, zeros for floats."""
    classes: tuple[str, ...]
    """Class names; an output of the model is an index into them."""
    class_titles: tuple[str, ...]
    """Names for people, in the order of `classes`."""
    encoder: FileRecord | None
    """The encoder's copy in the run folder; None where the run is older than such copies, or the
    model reads images."""


def read_model_file(run: Path) -> tuple[ModelFile, AnyModelConfig]:
    """Reads the `model.json` of a run; returns it and the record of the model in it.

    Raises:
        InputDataError: there is none.
        ManifestError: it is damaged, of another version, or contradicts itself; names the file.
    """
    path = run / MODEL_FILE
    hint = f"rm {path}, then run the same `train` command again: it writes the file anew"
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise InputDataError(
            f"{run} has no {MODEL_FILE}: training has not begun there",
            hint="run the same `train` command again",
        ) from error
    except (ManifestError, OSError) as error:
        raise ManifestError(str(error), hint=hint) from error
    if data.get("version") not in _VERSIONS:
        raise ManifestError(
            f"{path} has `version` {str(data.get('version'))[:40]}; this ci2p-cache reads "
            f"{' and '.join(map(str, _VERSIONS))}",
            hint="use the version of ci2p-cache that wrote it",
        )
    try:
        return read_model(data)
    except ManifestError as error:
        raise ManifestError(f"{path} is damaged: {error}", hint=hint) from error


def read_model(data: Mapping[str, Any]) -> tuple[ModelFile, AnyModelConfig]:
    """Reads the content of a `model.json`; returns it and the record of the model in it.

    Raises:
        ManifestError: it is damaged, or contradicts itself.
    """
    # Only here: it takes torch, for which whatever else reads a run folder has no use.
    from ci2p_cache.models.registry import config_from_dict

    fields = {"encoder": None} | {k: v for k, v in data.items() if k != "model"}
    file = ModelFile.from_dict(fields)
    config = config_from_dict(data.get("model", {}))
    _check(file, config)
    return file, config


def num_parameters(run: Path) -> tuple[int, int | None]:
    """Counts the parameters of a run's model, and those of the frozen g_a before it.

    Returns:
        Both; g_a has 0 where the model reads images, and None where an old run has no copy of it.

    Raises:
        InputDataError, ManifestError: as `read_model_file`; or the encoder's copy is damaged.
        UsageError: the installed timm cannot build the model, or it has too many blocks.
    """
    from safetensors import SafetensorError, safe_open

    from ci2p_cache.models.complexity import trainable_parameters

    _, config = read_model_file(run)
    blocks = getattr(config, "depth", 0) + sum(getattr(config, "depths", ()))
    if blocks > _MAX_BLOCKS:
        raise UsageError(f"the model has {blocks:,} blocks; up to {_MAX_BLOCKS:,} are counted")
    try:
        trainable, path = trainable_parameters(config), run / ENCODER
    except (RuntimeError, OverflowError) as error:  # sizes that no tensor has
        raise ManifestError(f"{run / MODEL_FILE} is damaged: {error}") from error
    if config.reads == "images":
        return trainable, 0
    try:
        regular_file(path).close()
        with safe_open(path, framework="np") as file:
            shapes = {
                name: file.get_slice(name).get_shape()
                for name in file.keys()  # noqa: SIM118  # no mapping
                # CompressAI saves constants beside them.
                if name.startswith("g_a.") and not name.endswith(("bound", "pedestal"))
            }
    except FileNotFoundError:
        return trainable, None
    except (OSError, SafetensorError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    return trainable, sum(map(math.prod, shapes.values()))


def _check(file: ModelFile, config: AnyModelConfig) -> None:
    """Raises ManifestError where parts of the file do not go together."""
    counts = {
        "outputs": config.num_classes,
        "class names": len(file.classes),
        "class titles": len(file.class_titles),
    }
    if len(set(counts.values())) > 1:
        raise ManifestError(f"it has {', '.join(f'{n} {what}' for what, n in counts.items())}")
    channels = file.fingerprint.latent.channels
    if len(file.offset) != channels:
        raise ManifestError(f"it has {len(file.offset)} offsets for {channels} channels")
    wanted = getattr(config, "latent_channels", channels)
    if config.reads == "latents" and wanted != channels:
        raise ManifestError(f"its model reads {wanted} channels, its latents have {channels}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord(Record):
    """One epoch: a row of `summary.csv`. Without a validation split its fields are None."""

    epoch: int
    """Epochs done, from 1."""
    epochs: int
    """Epochs of the whole run."""
    train_loss: float
    """Mean training loss, label smoothing included; nan where every step was skipped."""
    train_top1: float
    """Share of training images classified right during the epoch, 0 to 1; of mixed ones, as the
    class that has the larger share of them."""
    val_loss: float | None
    """Mean cross-entropy over the validation split, without label smoothing. This and the next two
    are of the averaged weights where the run makes them (`ema`)."""
    val_top1: float | None
    """Share of validation images whose class came first, 0 to 1."""
    val_top5: float | None
    """Share whose class was among the first five (all, with fewer classes), 0 to 1."""
    lr: float
    """Learning rate of the epoch's last step."""
    grad_norm: float
    """Mean L2 norm of all gradients together, before clipping."""
    skipped_steps: int
    """Steps left out because loss or gradients were not finite."""
    images: int
    """Training images whose step counted."""
    images_per_second: float
    """Training speed, waiting for data included, validation not."""
    wait_share: float
    """Share of the training time spent waiting for data, 0 to 1."""
    epoch_seconds: float
    """Wall time of training and validation, over all interrupted parts."""

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Rebuilds an epoch written by `to_dict`, of this version or an earlier one.

        Raises:
            ManifestError: a field is unknown, missing or of another type.
        """
        if isinstance(data, Mapping) and data.keys().isdisjoint(_OLD_NAMES.values()):
            data = {_OLD_NAMES.get(name, name): value for name, value in data.items()}
        # By name: with slots a dataclass is another class than the one that `super()` knows.
        return super(EpochRecord, cls).from_dict(data)

    @property
    def eta_seconds(self) -> float:
        """Expected time to the end of the run, should the coming epochs last as long as this."""
        return self.epoch_seconds * (self.epochs - self.epoch)


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord:
    """Returns the epoch of the highest top-1, or of the lowest training loss without validation.

    Args:
        history: The epochs in order, at least one; of equal ones the earlier wins.
    """

    def rank(record: EpochRecord) -> float:
        if record.val_top1 is not None:
            return -record.val_top1
        return record.train_loss if math.isfinite(record.train_loss) else math.inf

    return min(history, key=rank)


def summary_csv(history: Sequence[EpochRecord]) -> bytes:
    """Returns `summary.csv`: a header, then a row per epoch; floats read back exactly."""
    names = [field.name for field in dataclasses.fields(EpochRecord) if field.name != "epochs"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in history:
        writer.writerow(record.to_dict())
    return text.getvalue().encode()


def has_epoch(run: Path) -> bool:
    """Says whether an epoch of a run has ended; True where its `summary.csv` cannot be read."""
    try:
        return len(read_regular(run / SUMMARY, max_bytes=_MAX_SUMMARY_BYTES).splitlines()) > 1
    except FileNotFoundError:
        return False
    except (OSError, ManifestError):
        return True


def read_summary(run: Path) -> dict[str, list[float]]:
    """Returns the columns of a run's `summary.csv`, a value per epoch; an empty cell is nan.

    Raises:
        InputDataError: there is no `summary.csv`, it is damaged or lacks a column, or no epoch has
            ended yet.
    """
    path = run / SUMMARY
    try:
        text = read_regular(path, max_bytes=_MAX_SUMMARY_BYTES).decode("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        reader.fieldnames = [_OLD_NAMES.get(name, name) for name in reader.fieldnames or ()]
        rows = list(reader)
        columns = {name: [float(row[name] or "nan") for row in rows] for name in _READ}
    except FileNotFoundError as error:
        raise InputDataError(
            f"{run} has no {path.name}: it is no run folder, or no epoch of it has ended"
        ) from error
    except (KeyError, TypeError, ValueError, OSError, csv.Error, ManifestError) as error:
        raise InputDataError(f"{path} is damaged: {error}") from error
    if not rows:
        raise InputDataError(f"{path} has no epoch yet; there is nothing to draw")
    epochs = columns["epoch"]
    if not all(a < b for a, b in itertools.pairwise(epochs)) or math.isnan(epochs[-1]):
        raise InputDataError(f"{path} is damaged: its epochs do not ascend")
    return columns


def best_epoch_of(columns: dict[str, list[float]]) -> tuple[float, float] | None:
    """Returns epoch and value of the highest validation top-1, the earlier on a tie.

    None where the run had no validation split.
    """
    if all(map(math.isnan, columns["val_top1"])):
        return None
    best = int(np.nanargmax(columns["val_top1"]))
    return columns["epoch"][best], columns["val_top1"][best]


def training_seconds(columns: dict[str, list[float]]) -> list[float]:
    """Returns the seconds that each epoch trained, without validation; never more than it took."""
    return [
        min(images / rate, whole) if rate > 0 else math.nan
        for images, rate, whole in zip(
            columns["images"], columns["images_per_second"], columns["epoch_seconds"], strict=True
        )
    ]


def mean_wait_share(columns: dict[str, list[float]]) -> float:
    """Returns the share of all epochs' training time spent waiting for data; nan: not known."""
    wait = train = 0.0
    for seconds, share in zip(training_seconds(columns), columns["wait_share"], strict=True):
        if math.isfinite(seconds) and math.isfinite(share):
            wait, train = wait + seconds * share, train + seconds
    return wait / train if train else math.nan
