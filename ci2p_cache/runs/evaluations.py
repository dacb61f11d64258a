"""The evaluations of a run: a model's accuracy on a split, and its prediction for each image.

::

    runs/<name>/evaluations/
      val-epoch-0003-step-000000.json         an `Evaluation`
      val-epoch-0003-step-000000.parquet      its predictions, a row per image
      train-epoch-0003-step-000000.json       another split or checkpoint has its own files
      val-epoch-0003-step-000000-images.json              latents made of the images again
      test-epoch-0003-step-000000-cache-1a2b3c4d.json     another cache than the run's own

Earlier runs have one `evaluation.json` and `predictions.parquet`, of what was evaluated last; they
are still read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.errors import UsageError
from ci2p_cache.parquet import parquet_bytes, read_parquet
from ci2p_cache.record import Record, read_json

__all__ = [
    "EVALUATIONS",
    "OLD_EVALUATION",
    "CalibrationBin",
    "ClassScore",
    "Evaluation",
    "Predictions",
    "evaluation_name",
    "prediction_bytes",
    "predictions_path",
    "read_evaluation",
    "read_predictions",
]

EVALUATIONS = "evaluations"
"""Folder of a run in which they are."""

OLD_EVALUATION = "evaluation.json"
"""File of runs evaluated before each split and checkpoint had its own files."""

_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("predicted", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("top5", pa.list_(pa.int32()), nullable=False),
    ]
)

_READ = ("row", "key", "label", "predicted", "confidence", "correct")
"""Columns of `Predictions`."""


def evaluation_name(
    split: str, checkpoint: str, *, cache_sha256: str | None = None, from_images: bool = False
) -> str:
    """Returns the name of both files without their suffix.

    `cache_sha256` is over what a cache holds that is not the run's own. `from_images` says that a
    model that reads latents got them from the images.
    """
    name = f"{split}-{checkpoint}"
    if cache_sha256 is not None:
        name += f"-cache-{cache_sha256[:8]}"
    return f"{name}-images" if from_images else name


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBin(Record):
    """The images whose confidence is in low < confidence <= high."""

    low: float
    """Lower end, not included."""
    high: float
    """Upper end, included."""
    samples: int
    """Number of images."""
    confidence: float | None
    """Mean probability of the predicted class, 0 to 1; None for an empty bin."""
    accuracy: float | None
    """Share classified right, 0 to 1; None for an empty bin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore(Record):
    """How the images of one class were classified."""

    label: int
    """Index into the model's classes."""
    name: str
    """Name of the class."""
    samples: int
    """Images of it."""
    correct: int
    """Images among them that were classified right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Record):
    """The content of an evaluation's JSON file."""

    version: int = 1
    """Version of this record."""
    run: str
    """Name of the run."""
    model: str
    """Name of the model."""
    checkpoint: str
    """Name of the checkpoint folder."""
    epoch: int
    """Epochs done there."""
    step: int
    """Steps of the next epoch done there."""
    cache: str
    """Where the cache was; information only."""
    split: str
    """Name of the split."""
    folds: int
    """Parts that the train split was divided into for cross-validation; 0: none."""
    fold: int
    """The part that the images are of, where `folds` is not 0."""
    is_own_data: bool
    """Whether the cache holds the very samples that the run was trained from and validated on."""
    source: Literal["cache", "images"]
    """Whether latents came from the cache, or were made of the images again."""
    device: str
    """Where it was computed."""
    batch_size: int
    """Images per batch; another changes the last bits."""
    samples: int
    """Images."""
    top1: float
    """Share of images whose class came first, 0 to 1."""
    top1_low: float
    """Lower end of the 95 % interval of top-1 (Wilson 1927)."""
    top1_high: float
    """Upper end of it."""
    top5: float
    """Share whose class was among the first five (all, with fewer classes), 0 to 1."""
    nll: float
    """Mean negative log-likelihood of the right class, in nats."""
    ece: float
    """Expected calibration error over the bins, 0 to 1 (Guo et al. 2017, arXiv 1706.04599)."""
    bins: tuple[CalibrationBin, ...]
    """Fifteen bins of equal width, from 0 to 1."""
    per_class: tuple[ClassScore, ...]
    """One entry per class, in the order of the labels."""
    confusion: tuple[tuple[int, ...], ...]
    """(label, predicted label, count) of the pairs that occur, right ones too, in their order; of
    more than 100,000 the most frequent."""
    predictions: FileRecord
    """The predictions beside it, as they were written with this; `path` is the file's name."""
    recorded_top1: float | None
    """What the run recorded after that epoch; None in the middle of one or without validation."""
    recorded_nll: float | None
    """The same of `nll`."""

    def __post_init__(self) -> None:
        if self.version != 1:
            raise UsageError(f"`version` is {self.version}; this ci2p-cache reads 1")
        if any(len(each) != 3 for each in self.confusion):
            raise UsageError("an entry of `confusion` is not (label, predicted label, count)")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predictions:
    """A row per image; arrays of one length."""

    row: npt.NDArray[np.int64]
    """Row in the split."""
    key: list[str]
    """Name within the split."""
    label: npt.NDArray[np.int32]
    """The right class."""
    predicted: npt.NDArray[np.int32]
    """The class that came first."""
    confidence: npt.NDArray[np.float32]
    """Its probability, 0 to 1."""
    correct: npt.NDArray[np.bool_]
    """Whether it is right."""


def read_evaluation(path: Path) -> Evaluation:
    """Reads the JSON file of an evaluation, which may come from a stranger.

    Raises:
        FileNotFoundError: there is none.
        ManifestError: it is a link, damaged or of another version.
        OSError: it cannot be read.
    """
    return Evaluation.from_dict(read_json(path))


def predictions_path(evaluation: Path) -> Path:
    """Returns the file of the predictions beside the JSON file of an evaluation."""
    if evaluation.name == OLD_EVALUATION:
        return evaluation.with_name("predictions.parquet")
    return evaluation.with_suffix(".parquet")


def prediction_bytes(columns: Mapping[str, Any]) -> bytes:
    """Returns the parquet file of predictions.

    Args:
        columns: `row`, `key`, `label`, `predicted`, `confidence`, `correct`, `loss`, and `top5`:
            the labels of the likeliest five classes, the likeliest first.
    """
    arrays = {field.name: pa.array(columns[field.name], type=field.type) for field in _SCHEMA}
    return parquet_bytes(pa.table(arrays, schema=_SCHEMA))


def read_predictions(path: Path) -> Predictions:
    """Reads the predictions of an evaluation, which may come from a stranger.

    Raises:
        FileNotFoundError: they are not there.
        OSError, ValueError, pyarrow.ArrowException: they cannot be read, or are damaged.
    """
    table = read_parquet(path, _READ)
    if table.column_names != list(_READ):
        raise ValueError(f"it has columns {table.column_names}; wanted {list(_READ)}")
    columns = {name: table[name].combine_chunks().cast(_SCHEMA.field(name).type) for name in _READ}
    if not table.num_rows or any(column.null_count for column in columns.values()):
        raise ValueError("it has no rows, or rows with missing values")
    key = columns.pop("key").to_pylist()
    return Predictions(
        key=key, **{name: each.to_numpy(zero_copy_only=False) for name, each in columns.items()}
    )
