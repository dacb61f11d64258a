"""`Experiment`: one whole recipe, from the images to the number that it claims.

::

    pipelines/flowers.py:vitds_tiny --load--> Experiment --changed by --set--> Experiment --run-->
        out/experiment.json, out/shards/, out/runs/NAME/, out/report.html
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.errors import ManifestError, RunMismatchError, UsageError
from ci2p_cache.record import Record, differing_fields, read_json
from ci2p_cache.training.spec import TrainSpec

__all__ = ["EXPERIMENT", "FREE_FIELDS", "Experiment", "read_experiment", "refuse_other"]

EXPERIMENT = "experiment.json"
"""Name of the file that holds the resolved experiment."""

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_ONE_CALL = ("plan_only", "finalise", "shard_range", "retry_failed", "rescan", "reencode_changed")
"""What speaks of one call of `encode`, and so of no experiment."""

FREE_FIELDS = frozenset(
    {
        "claim",
        "source",
        "encode.root",
        "encode.batch_size",
        "encode.workers",
        "encode.devices",
        "encode.max_errors",
        "encode.executor",
    }
)
"""Fields that change no number of an experiment, and may differ when it continues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment(Record):
    """What to encode, what to train from it, and which weights count.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    version: int = _VERSION
    """Version of this record."""
    name: str
    """Name of the experiment, of its folder and of its run: letters, digits, dots, dashes."""
    claim: str = ""
    """What it is to show, one sentence; printed beside what came out."""
    source: str | None = None
    """The images, as `encode` takes them; None: whoever runs it says where they are."""
    generate: int | None = None
    """Draw so many of the demo's pictures per class instead of taking a source; None: do not."""
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    """Stage one."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """Stage two."""
    checkpoint: Literal["best", "last"] = "last"
    """Weights that are evaluated; the best are chosen by the images that they are counted on."""

    def __post_init__(self) -> None:
        if self.version != _VERSION:
            raise UsageError(
                f"experiment `version` is {self.version!r}; this ci2p-cache reads {_VERSION}"
            )
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"experiment `name` is {self.name!r}; wanted up to 100 letters, digits, dots, "
                "dashes and underscores, beginning with a letter or digit"
            )
        for name, kind in (("encode", EncodeOptions), ("train", TrainSpec)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise UsageError(
                    f"experiment `{name}` is {type(value).__name__}; wanted {kind.__name__}"
                )
        if self.checkpoint not in ("best", "last"):
            raise UsageError(f"`checkpoint` is {self.checkpoint!r}; wanted best or last")
        if self.generate is not None and (type(self.generate) is not int or self.generate < 2):
            raise UsageError(f"`generate` is {self.generate!r}; wanted 2 or more per class")
        if self.generate is not None and self.source is not None:
            raise UsageError("`source` and `generate` do not go together: which images are meant?")
        given = [name for name in _ONE_CALL if getattr(self.encode, name)]
        if given:
            raise UsageError(
                f"`encode.{given[0]}` is {getattr(self.encode, given[0])!r}; an experiment encodes "
                "everything, so it takes no such option"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, nested records as dictionaries."""
        return Record.to_dict(self) | {"encode": self.encode.to_dict()}


def read_experiment(folder: Path) -> Experiment | None:
    """Returns the experiment that a folder was made for, None where it holds no record of one.

    Raises:
        ManifestError: the record is damaged or of another version.
    """
    path = folder / EXPERIMENT
    try:
        data = read_json(path)
        if isinstance(data.get("encode"), dict):
            # Options that came later have their defaults in a folder of before.
            data["encode"] = EncodeOptions().to_dict() | data["encode"]
        return Experiment.from_dict(data)
    except FileNotFoundError:
        return None
    except (ManifestError, OSError) as error:
        raise ManifestError(
            f"{path} is damaged or of another version: {error}",
            hint="choose another --out; the caches and runs in the folder are whole without it",
        ) from error


def refuse_other(folder: Path, made: Experiment, asked: Experiment) -> None:
    """Refuses to continue with another experiment than the one that a folder was made for.

    Raises:
        RunMismatchError: fields other than `FREE_FIELDS` differ; the message lists them.
    """
    lines = [
        f"  {name}: {ours!r} in the folder, {theirs!r} asked for"
        for name, ours, theirs in differing_fields(made, asked)
        if name not in FREE_FIELDS
    ]
    if lines:
        raise RunMismatchError(
            f"{folder} holds another experiment; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --out, or leave it out and change --set name=NAME",
        )
