"""The demo: generated pictures through both stages, end to end, in one folder.

::

    folder/pictures/CLASS/*.jpg -> folder/shards/ -> folder/runs/demo/ -> curves.png, preview.png

It shows that everything works on this machine; its accuracy says nothing about photographs, because
the pictures are drawn by this program.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ci2p_cache.cache.store import open_cache
from ci2p_cache.cache.verify import verify
from ci2p_cache.demo.records import DemoEvent, DemoOptions, DemoResult, DemoStep
from ci2p_cache.demo_pictures import CLASSES, write_pictures
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.progress import EncodeObserver, EncodeSummary
from ci2p_cache.encoding.run import encode
from ci2p_cache.errors import CacheError, IntegrityError, ResourceError, UsageError
from ci2p_cache.experiment.clock import StageClock
from ci2p_cache.outputs import refuse_url
from ci2p_cache.previews import PreviewResult, draw_preview
from ci2p_cache.report.plots import draw_curves
from ci2p_cache.training.run import TrainObserver, TrainSpec, TrainSummary, train

__all__ = ["run_demo"]

_Clock = StageClock[DemoStep]

_MODEL = "vitds_tiny"

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
    f"ci2p-cache train shards/ --model {_MODEL} --epochs 30",
    "ci2p-cache inspect shards/ --picture preview.png",
)


def run_demo(
    folder: str | Path | None = None,
    *,
    options: DemoOptions | None = None,
    on_event: Callable[[DemoEvent], None] | None = None,
    encode_observer: EncodeObserver | None = None,
    train_observer: TrainObserver | None = None,
) -> DemoResult:
    """Generates pictures, encodes, verifies, trains, and draws the curves and a preview.

    Args:
        folder: Where to put everything; new or empty. None: a new folder below the system's
            temporary one. It is kept either way.
        options: How large the demo is; None for the defaults.
        on_event: Called when a step starts and ends.
        encode_observer: Receives stage one's progress.
        train_observer: Receives stage two's progress and epochs.

    Raises:
        UsageError: `folder` holds something, or an option is too small.
        ResourceError: a folder or picture cannot be written.
        IntegrityError: the new cache does not verify.
        CacheError: the model did not learn; something in this installation is broken.
        InterruptedRunError: a signal stopped it while encoding or training.
    """
    options = options or DemoOptions()
    root = _empty_folder(folder)
    tell = on_event or (lambda _: None)
    clock = _Clock(lambda step, text, s: tell(DemoEvent(step=step, text=text, seconds=s)))
    _generate(root / "pictures", options, clock)
    encoded = _encode(root, options, clock, encode_observer)
    _verify(root, clock)
    trained = _train(root, options, clock, train_observer)
    preview = _draw(root, trained, clock)
    return _result(root, encoded, trained, preview, clock)


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


def _generate(pictures: Path, options: DemoOptions, clock: _Clock) -> None:
    total = options.per_class * len(CLASSES)
    plan = f"generating {total} pictures of {len(CLASSES)} kinds: {', '.join(CLASSES)}"
    with clock.stage("pictures", plan) as outcome:
        try:
            paths = list(write_pictures(pictures, per_class=options.per_class, seed=options.seed))
        except OSError as error:
            raise ResourceError(
                f"cannot write the pictures to {pictures}: {error.strerror or error}"
            ) from error
        size = sum(path.stat().st_size for path in paths)
        outcome.append(f"{len(paths)} JPEG files, {size / 1e6:.1f} MB, in {pictures}")


def _encode(
    root: Path, options: DemoOptions, clock: _Clock, observer: EncodeObserver | None
) -> EncodeSummary:
    plan = f"encoding them with the bundled encoder at {options.size} x {options.size} pixels"
    with clock.stage("encode", plan) as outcome:
        settings = EncodeOptions(
            encoder="bundled", size=options.size, val_fraction=0.2, seed=options.seed
        )
        summary = encode(root / "pictures", root / "shards", settings, observer=observer)
        outcome.append(
            f"{summary.images} pictures, {summary.views} latents, "
            f"{summary.bytes_per_image / 1e3:.1f} kB per picture with its views, "
            f"{summary.images_per_second:.0f} pictures/s, in {summary.path}"
        )
    return summary


def _verify(root: Path, clock: _Clock) -> None:
    with clock.stage("verify", "checking every byte of the cache") as outcome:
        findings = verify(root / "shards")
        if findings:
            first = findings[0]
            raise IntegrityError(
                f"the new cache in {root / 'shards'} is damaged: {first.path}: {first.problem}",
                hint="check the disk that it is on",
            )
        outcome.append("intact")


def _train(
    root: Path, options: DemoOptions, clock: _Clock, observer: TrainObserver | None
) -> TrainSummary:
    chance = 1 / len(CLASSES)
    plan = f"training {_MODEL} for {options.epochs} epochs, from the latents alone"
    with clock.stage("train", plan) as outcome:
        spec = TrainSpec(
            model=_MODEL,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        with _one_thread():
            summary = train(
                root / "shards", spec=spec, runs_dir=root / "runs", name="demo", observer=observer
            )
        top1 = summary.last.top1 or 0.0
        if top1 < _CLEARLY * chance:
            raise CacheError(
                f"the model did not learn: validation top-1 is {top1:.1%} after {options.epochs} "
                f"epochs, guessing gives {chance:.0%}, and at least {_CLEARLY * chance:.0%} was "
                f"expected; see {summary.path}"
            )
        outcome.append(
            f"validation top-1 {top1:.1%} where guessing gives {chance:.0%}, "
            f"{summary.last.images_per_second:.0f} pictures/s, in {summary.path}"
        )
    return summary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread on CPU.

    A second one makes so small a model 1.5 times as fast on two idle cores, and 20 times as slow on
    busy ones, where the threads wait for each other (measured). One gives the same numbers on both.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _draw(root: Path, trained: TrainSummary, clock: _Clock) -> PreviewResult:
    with clock.stage("draw", "drawing the curves and a preview") as outcome:
        draw_curves(trained.path, root / "curves.png")
        preview = draw_preview(open_cache(root / "shards"), root / "preview.png")
        outcome += [str(root / "curves.png"), preview.path]
    return preview


def _result(
    root: Path,
    encoded: EncodeSummary,
    trained: TrainSummary,
    preview: PreviewResult,
    clock: _Clock,
) -> DemoResult:
    psnr_db = [value for s in preview.samples for value in s.psnr_db if value is not None]
    return DemoResult(
        note=_NOTE,
        folder=str(root),
        pictures=str(root / "pictures"),
        cache=encoded.path,
        run=trained.path,
        curves=str(root / "curves.png"),
        preview=preview.path,
        images=encoded.images,
        classes=CLASSES,
        splits=encoded.splits,
        bytes_per_image=encoded.bytes_per_image,
        encode_images_per_second=encoded.images_per_second,
        train_images_per_second=trained.last.images_per_second,
        psnr_db=sum(psnr_db) / len(psnr_db),
        top1=trained.last.top1 or 0.0,
        chance=1 / len(CLASSES),
        seconds=clock.seconds,
        commands=_COMMANDS,
    )
