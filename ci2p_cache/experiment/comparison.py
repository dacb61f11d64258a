"""Cross-validated configurations side by side: which images each got right, and what that proves.

::

    folds of one configuration --> Configuration (one bit per image) --+
    folds of another           --> Configuration                     --+--> paired_difference

The file of a study holds the bits, so that everything said about it can be computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ci2p_cache.errors import ManifestError, RunMismatchError, UsageError
from ci2p_cache.outputs import write_whole
from ci2p_cache.record import Record, differing_fields, json_bytes, read_json

__all__ = [
    "Configuration",
    "Difference",
    "Study",
    "StudySettings",
    "paired_difference",
    "read_study",
    "refuse_other_settings",
    "with_configuration",
    "write_study",
]

_DRAWS = 10_000
"""Draws of the bootstrap: the ends of a 95 % interval then stay within a few hundredths of it."""

_AT_ONCE = 500
"""Draws that are in memory together; 4 MB for a thousand images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySettings(Record):
    """What all configurations of a study share, unless a configuration is about it."""

    size: int
    """Side of the images in pixels."""
    epochs: int
    """Epochs of every run."""
    batch_size: int
    """Images per step."""
    lr: float
    """Peak learning rate."""
    folds: int
    """Parts of the data, each left out once."""
    seed: int
    """Seed of weights, order and views of every run, and of the rows of every cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration(Record):
    """One row of the table: what came of one configuration, over all folds."""

    name: str
    """Its name, as `--only` takes it."""
    what: str
    """What it is, in a few words."""
    model: str
    """Name of the model."""
    bits: str
    """Which images were classified right: hex of a bit per key, the first key's the highest."""
    samples: int
    """Images validated, each once."""
    correct: int
    """Those classified right."""
    seconds_per_epoch: float
    """Median wall time of training one epoch of one fold, validation not included."""
    bytes_per_view: float | None
    """Cache bytes per stored view; None where none is read."""
    gmac: float
    """Multiply-accumulates of one forward pass in the training step, in thousand millions."""
    device: str
    """Where it was trained."""
    command: str
    """What makes this row again."""

    @property
    def accuracy(self) -> float:
        """Share of the images classified right, 0 to 1."""
        return self.correct / self.samples

    def is_right(self) -> npt.NDArray[np.bool_]:
        """Returns which images were classified right, bool (samples,), in the order of the keys."""
        packed = np.frombuffer(bytes.fromhex(self.bits), np.uint8)
        return np.unpackbits(packed)[: self.samples].astype(np.bool_)

    @staticmethod
    def pack(is_right: npt.NDArray[np.bool_]) -> str:
        """Returns `bits`."""
        return np.packbits(is_right).tobytes().hex()


@dataclass(frozen=True, kw_only=True, slots=True)
class Study(Record):
    """The file of a study."""

    version: int = 1
    """Version of this record."""
    settings: StudySettings
    """What all configurations share."""
    keys: tuple[str, ...]
    """The images, sorted."""
    configurations: tuple[Configuration, ...]
    """What was run, sorted by name."""

    def __post_init__(self) -> None:
        if self.version != 1:
            raise UsageError(f"study `version` is {self.version}; this ci2p-cache reads 1")
        for each in self.configurations:
            size = len(each.bits) * 4
            if each.samples != len(self.keys) or not 0 <= size - each.samples < 8:
                raise UsageError(
                    f"configuration {each.name} speaks of {each.samples} images in {size} bits; "
                    f"the study has {len(self.keys)}"
                )
            if int(each.is_right().sum()) != each.correct:
                raise UsageError(f"configuration {each.name}: its bits do not add up")

    def find(self, name: str) -> Configuration | None:
        """Returns a configuration, None where it was not run."""
        return next((each for each in self.configurations if each.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much better one configuration is than another, in accuracy, -1 to 1."""

    value: float
    """Accuracy of the one less that of the other, on the same images."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of it."""


def paired_difference(
    ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_], *, seed: int = 0
) -> Difference:
    """Compares two configurations image by image (bootstrap: Efron 1979, percentile interval).

    Args:
        ours: Which images the one classified right, bool (N,).
        theirs: The same of the other, in the same order.
        seed: Seed of the draws.

    Raises:
        UsageError: they are not of the same images.
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise UsageError(f"two configurations of {ours.shape} and {theirs.shape} images")
    gain = ours.astype(np.float64) - theirs
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            gain[rng.integers(0, len(gain), (_AT_ONCE, len(gain)))].mean(axis=1)
            for _ in range(_DRAWS // _AT_ONCE)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(value=float(gain.mean()), low=float(low), high=float(high))


def read_study(path: Path) -> Study | None:
    """Reads the file of a study, None where there is none.

    Raises:
        ManifestError: it is damaged or of another version.
    """
    try:
        return Study.from_dict(read_json(path))
    except FileNotFoundError:
        return None
    except (ManifestError, ValueError) as error:
        raise ManifestError(f"{path} is damaged or of another version: {error}") from error


def with_configuration(
    study: Study | None, settings: StudySettings, keys: Sequence[str], added: Configuration
) -> Study:
    """Returns a study with a configuration added, or put in the place of that of its name.

    Raises:
        RunMismatchError: the study has other settings or images.
    """
    if study is None:
        return Study(settings=settings, keys=tuple(keys), configurations=(added,))
    refuse_other_settings(study, settings)
    if study.keys != tuple(keys):
        raise RunMismatchError(
            f"the study is of {len(study.keys)} other images than these {len(keys)}",
            hint="choose another --results",
        )
    others = [each for each in study.configurations if each.name != added.name]
    ordered = sorted([*others, added], key=lambda each: each.name)
    return dataclasses.replace(study, configurations=tuple(ordered))


def refuse_other_settings(study: Study, settings: StudySettings) -> None:
    """Raises RunMismatchError where a study has other settings; the message lists them."""
    lines = [
        f"  {name}: {ours!r} in the study, {theirs!r} asked for"
        for name, ours, theirs in differing_fields(study.settings, settings)
    ]
    if lines:
        raise RunMismatchError(
            "the study was made with other settings; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --results",
        )


def write_study(path: Path, study: Study) -> None:
    """Writes the file of a study whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    write_whole(path, json_bytes(study.to_dict()), what="study")
