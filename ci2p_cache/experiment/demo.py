"""The demo: an experiment on generated pictures, to see that this machine does both stages.

::

    folder/pictures/CLASS/*.jpg -> folder/shards/ -> folder/runs/demo/ -> report.html

Its accuracy says nothing about photographs, because the pictures are drawn by this program.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.verify import verify
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.errors import CacheError, IntegrityError, ResourceError, UsageError
from ci2p_cache.experiment.run import StageClock, StageEvent, run_experiment
from ci2p_cache.experiment.spec import Experiment
from ci2p_cache.outputs import refuse_url
from ci2p_cache.pictures.drawn import CLASSES
from ci2p_cache.record import Record
from ci2p_cache.training.records import TrainObserver
from ci2p_cache.training.spec import TrainSpec

__all__ = ["DEMO", "DemoResult", "run_demo"]

DEMO = Experiment(
    name="demo",
    generate=120,
    encode=EncodeOptions(encoder="bundled", size=128, views="none", val_fraction=0.2),
    # Small batches, so that few pictures make enough steps.
    train=TrainSpec(model="vitds_tiny", epochs=4, batch_size=32, warmup_epochs=1),
)
"""Half a minute on two cores. Three training seeds gave 72 to 76 %, and with mirrored views, which
double the encoding, 73 to 76 %; three epochs gave 65 to 69 %."""

_CLEARLY = 2.0
"""Times chance that validation top-1 must reach: with the default's 127 validation pictures and
five classes, guessing gets there less than once in a million demos."""

_NOTE = (
    "The pictures are generated: coloured patterns drawn by this program, no photographs. "
    "The accuracy shows that both stages work, and nothing about real images."
)

_COMMANDS = (
    "ci2p-cache encode IMAGES --out shards/ --encoder bundled",
    "ci2p-cache verify shards/",
    "ci2p-cache train shards/ --model vitds_tiny --epochs 30",
    "ci2p-cache inspect shards/ --picture preview.png",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult(Record):
    """What the demo made and measured."""

    note: str
    """That the pictures are generated."""
    folder: str
    """Where everything is; it stays."""
    pictures: str
    """Folder of the generated pictures."""
    cache: str
    """The cache."""
    run: str
    """The run folder."""
    report: str
    """Page with the learning curves, the confusions, and originals beside reconstructions."""
    images: int
    """Pictures encoded."""
    classes: tuple[str, ...]
    """Their classes."""
    splits: dict[str, int]
    """Pictures per split."""
    bytes_per_image: float
    """Cache bytes per picture, all its views together."""
    encode_images_per_second: float
    """Speed of stage one."""
    train_images_per_second: float
    """Speed of stage two in its last epoch."""
    top1: float
    """Validation top-1 after the last epoch, 0 to 1."""
    chance: float
    """Top-1 of guessing."""
    seconds: dict[str, float]
    """Wall time of each step."""
    commands: tuple[str, ...]
    """The commands that do the same on one's own IMAGES."""


def run_demo(
    folder: str | Path | None = None,
    *,
    experiment: Experiment = DEMO,
    on_event: Callable[[StageEvent], None] | None = None,
    encode_observer: EncodeObserver | None = None,
    train_observer: TrainObserver | None = None,
) -> DemoResult:
    """Generates pictures, encodes, verifies, trains, evaluates, and writes a report.

    Args:
        folder: Where to put everything; new or empty. None: a new folder below the system's
            temporary one. It stays either way.
        experiment: What to run; it draws its own pictures.
        on_event: Called when a step starts and ends.
        encode_observer: Receives stage one's progress.
        train_observer: Receives stage two's progress and epochs.

    Raises:
        UsageError: `folder` holds something.
        ResourceError: a folder or picture cannot be written.
        IntegrityError: the new cache does not verify.
        CacheError: the model did not learn; something in this installation is broken.
        InterruptedRunError: a signal stopped it while encoding or training.
    """
    root = _empty_folder(folder)
    made = run_experiment(
        experiment, root, until="encode", on_event=on_event, encode_observer=encode_observer
    )
    clock = StageClock(on_event)
    with clock.stage("verify", "checking every byte of the cache") as outcome:
        for finding in verify(made.cache):
            text = f"the new cache in {made.cache} is damaged: {finding.path}: {finding.problem}"
            raise IntegrityError(text, hint="check the disk that it is on")
        outcome.append("intact")
    learnt = run_experiment(
        experiment,
        root,
        # The cache is complete by now, so this stage shows nothing.
        on_event=lambda each: on_event(each) if on_event and each.stage != "encode" else None,
        train_observer=train_observer,
    )
    encoded, trained = made.encoded, learnt.trained
    assert encoded is not None
    assert trained is not None
    assert learnt.report is not None
    top1, chance = trained.last.val_top1 or 0.0, 1 / len(CLASSES)
    if top1 < _CLEARLY * chance:
        raise CacheError(
            f"the model did not learn: validation top-1 is {top1:.1%} after {trained.last.epoch} "
            f"epochs, guessing gives {chance:.0%}, and at least {_CLEARLY * chance:.0%} was "
            f"expected; see {trained.path}"
        )
    seconds = {**made.seconds, **clock.seconds}
    seconds |= {step: took for step, took in learnt.seconds.items() if step != "encode"}
    return DemoResult(
        note=_NOTE,
        folder=str(root),
        pictures=str(root / "pictures"),
        cache=encoded.path,
        run=trained.path,
        report=learnt.report,
        images=encoded.images,
        classes=CLASSES,
        splits=encoded.splits,
        bytes_per_image=encoded.bytes_per_image,
        encode_images_per_second=encoded.images_per_second,
        train_images_per_second=trained.last.images_per_second,
        top1=top1,
        chance=chance,
        seconds=seconds,
        commands=_COMMANDS,
    )


def _empty_folder(folder: str | Path | None) -> Path:
    if folder is None:
        return Path(tempfile.mkdtemp(prefix="ci2p-cache-demo-"))
    refuse_url(folder, what="demo")
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with os.scandir(root) as entries:
            found = next(entries, None)
    except FileExistsError as error:
        raise UsageError(f"the demo's folder {root} is a file; wanted a new folder") from error
    except OSError as error:
        raise ResourceError(f"cannot use the folder {root}: {error.strerror}") from error
    if found is not None:
        raise UsageError(
            f"the demo's folder {root} is not empty: it holds {found.name!r}",
            hint="give it a new folder, or none: it then makes a temporary one",
        )
    return root
