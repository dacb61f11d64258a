"""`Classifier`: pictures to classes with what is in one run folder; the cache may be gone.

::

    picture -> view 0 -> g_a -> stored as the cache did -> dequantised -> model -> logits
    uint8      uint8     y      symbols or floats          latents        (B, K)

Shape suffixes: B batch, H W pixels, M latent channels, h w latent rows and columns, K classes.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError, UsageError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.images.names import Tally, as_key
from ci2p_cache.images.reading import read_file
from ci2p_cache.images.tree import DiskTree
from ci2p_cache.inference.run_folder import load_model, load_run_encoder, open_model
from ci2p_cache.machine import checked_device, ieee_float32, num_cores
from ci2p_cache.record import Record
from ci2p_cache.specs import Fingerprint
from ci2p_cache.training.metrics import autocast
from ci2p_cache.training.opened import RunFolder

if TYPE_CHECKING:
    from ci2p_cache.encoder.frozen import FrozenEncoder

__all__ = ["Classifier", "Guess", "Prediction", "find_pictures", "load_classifier"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess(Record):
    """One class that a picture may show."""

    label: int
    """Index into the model's classes."""
    name: str
    """Name of the class."""
    title: str
    """Its name for people."""
    probability: float
    """Softmax of the logits, 0 to 1."""
    logit: float
    """What the model gave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction(Record):
    """What the model says of one picture, or why it says nothing."""

    path: str
    """The file as it was named or found; bytes that are not UTF-8 are shown as \\xNN."""
    guesses: tuple[Guess, ...] = ()
    """The likeliest classes first; of equal ones the lower label. Empty where there is an error."""
    error: str | None = None
    """Why the picture could not be read; None where all is well."""


class Classifier:
    """A trained model with its encoder; made by `load_classifier`.

    Called with images it gives logits. Nothing of it changes, so threads may share one.

    Args:
        run: The run and the checkpoint.
        device: Where it computes.
        cache: A cache to take the encoder from instead of the run folder.

    Raises:
        CheckpointError: the weights are damaged or do not fit the model.
    """

    def __init__(
        self, run: RunFolder, *, device: torch.device, cache: str | Path | None = None
    ) -> None:
        self.run = run
        self.device = device
        self.reads: Literal["latents", "images"] = run.config.reads
        self._cache = cache
        self._model: nn.Module = load_model(run, device)
        self._precision = run.args.settings.spec.precision
        offset = torch.tensor(run.file.offset, dtype=torch.float32)
        self._offset_M11 = offset.to(device)[:, None, None]

    def __repr__(self) -> str:
        return f"Classifier({str(self.run.checkpoint)!r}, {self.run.config.name}, {self.device})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; logit k is of class k."""
        return self.run.file.classes

    @property
    def class_titles(self) -> tuple[str, ...]:
        """Names for people, in the order of `classes`."""
        return self.run.file.class_titles

    @property
    def fingerprint(self) -> Fingerprint:
        """How images become what the model reads."""
        return self.run.file.fingerprint

    @property
    def model(self) -> nn.Module:
        """The model alone, in eval mode: what it reads to logits (B, K)."""
        return self._model

    @cached_property
    def encoder(self) -> FrozenEncoder:
        """The frozen encoder, loaded and checked when first asked for.

        Raises:
            InputDataError: the run folder holds none.
            DigestError: it is another than the one that made the run's latents.
            UsageError: the model reads images, without an encoder.
        """
        if self.reads == "images":
            raise UsageError(f"{self.run.config.name} reads images; it has no encoder")
        return load_run_encoder(self.run, device=self.device, cache=self._cache)

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know before trusting the results, one sentence each."""
        wanted, here = self.fingerprint.image.decoder, decoder_name()
        if wanted == here:
            return ()
        return (
            f"the images of the run's cache were decoded by {wanted}, here it is {here}: pixels "
            "may differ in their last bits",
        )

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        """Returns logits, float32 (B, K) on `device`.

        Args:
            images_B3HW: RGB, uint8 0-255 or floating point in [0, 1], (B, 3, size, size) with the
                run's own size and B >= 1, on any device; not mean/std normalised.

        Raises:
            UsageError: the images have another shape or dtype.
            InputDataError, DigestError: as for `encoder`.
        """
        return self.logits(self.inputs(images_B3HW))

    def inputs(self, images_B3HW: Tensor) -> Tensor:
        """Returns what the model reads of images: latents, or the images themselves in [0, 1].

        The symbols are the cache's to the last one, see `latents`.

        Args:
            images_B3HW: As for a call.

        Returns:
            float32 (B, M, h, w) dequantised latents, or (B, 3, size, size), on `device`.

        Raises:
            UsageError: the images have another shape or dtype.
            InputDataError, DigestError: as for `encoder`.
        """
        images = self.checked(images_B3HW)
        if self.reads == "images":
            return images
        return self.dequantise(self.stored(self.latents(images)))

    def checked(self, images_B3HW: Tensor) -> Tensor:
        """Returns images as float32 in [0, 1] on `device`.

        Raises:
            UsageError: they have another shape or dtype than a call takes.
        """
        size = self.fingerprint.image.size
        shape, dtype = tuple(images_B3HW.shape), images_B3HW.dtype
        if shape[1:] != (3, size, size) or not shape[0]:
            raise UsageError(
                f"images have shape {shape}; wanted (batch, 3, {size}, {size}), the size that the "
                "run was trained at"
            )
        if dtype == torch.uint8:
            return images_B3HW.to(self.device).to(torch.float32).div_(255)
        if not dtype.is_floating_point:
            raise UsageError(f"images have dtype {dtype}; wanted uint8, or floats in [0, 1]")
        return images_B3HW.to(self.device, torch.float32)

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """Runs g_a on float32 images in [0, 1], (B, 3, H, W); gives y, float32 (B, M, h, w).

        As the cache did: on CPU one thread per call, with a part of the batch on each core.

        Raises:
            InputDataError, DigestError, UsageError: as for `encoder`.
        """
        encoder = self.encoder
        if images_B3HW.device.type != "cpu":
            return encoder(images_B3HW)
        threads = torch.get_num_threads()
        parts = images_B3HW.chunk(min(threads, len(images_B3HW)))
        try:
            with ThreadPoolExecutor(
                len(parts), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                return torch.cat(list(pool.map(encoder, parts)))
        finally:
            # torch keeps the number that was set last for threads that are still to come.
            torch.set_num_threads(threads)

    def stored(self, y_BMhw: Tensor) -> Tensor:
        """Returns what the cache would store of y, of its dtype: saturated symbols, or y itself.

        Args:
            y_BMhw: float32 (B, M, h, w) on `device`.

        Raises:
            InputDataError, DigestError, UsageError: as for `encoder`, whose medians symbols need.
        """
        return self.encoder.stored(y_BMhw, self.fingerprint.latent)[0]

    def dequantise(self, stored_BMhw: Tensor) -> Tensor:
        """Returns stored values as the loaders do: symbols * step + median, or y itself.

        Args:
            stored_BMhw: (B, M, h, w) of any dtype, on any device; not changed.

        Returns:
            float32 (B, M, h, w) on `device`.
        """
        latents = stored_BMhw.to(self.device, torch.float32, copy=True)
        if self.fingerprint.latent.is_symbols:
            if self.run.file.scale != 1.0:
                latents.mul_(self.run.file.scale)
            latents.add_(self._offset_M11)
        return latents

    def logits(self, inputs: Tensor) -> Tensor:
        """Runs the model as validation did; gives logits, float32 (B, K) on `device`.

        Args:
            inputs: What the model reads: dequantised latents such as `batch.latents`, or images in
                [0, 1].
        """
        inputs = inputs.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), ieee_float32(self.device):
            with autocast(self.device, self._precision):
                logits_BK = self._model(inputs)
            floats_BK: Tensor = logits_BK.float()
        return floats_BK.clone()  # an ordinary tensor again

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Reads one picture as validation images were read; gives uint8 (3, size, size).

        It is decoded in this process, as in the loaders: a file that crashes the decoder itself
        ends the command.

        Raises:
            ImageDecodeError: the file is missing, unreadable or no image.
            ResourceError: reading failed again and again.
        """
        if not os.path.exists(path):  # noqa: PTH110
            raise ImageDecodeError("there is no such file")
        folder, name = os.path.split(os.fsencode(path))
        data = read_file(folder or b".", name)
        return self._decoders.decode(data, split="val", key="").views[0]

    @cached_property
    def _decoders(self) -> Decoders:
        return Decoders(self.fingerprint.image).end_with(self)

    def predict(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        top: int = 5,
        batch_size: int = 32,
        threads: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Prediction]:
        """Says what pictures show.

        Args:
            paths: Files, folders and patterns, as `find_pictures` reads them.
            top: Number of classes given for each, all where there are fewer.
            batch_size: Pictures per batch.
            threads: Threads that read and decode; None: one per core.
            on_progress: Called with how many of how many pictures are done.

        Returns:
            One prediction per picture, in order; of what could not be read, the reason.

        Raises:
            UsageError: `top` or `batch_size` is below 1.
            InputDataError, DigestError: as for `encoder`.
        """
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"`{name}` is {value}; it must be at least 1")
        if self.reads == "latents":
            # Its errors come before any picture is read.
            _ = self.encoder
        listed = find_pictures(paths)
        done: list[Prediction] = []
        for batch in _read_ahead(
            listed, self.read, batch_size=batch_size, threads=threads or num_cores()
        ):
            done += self._predictions(batch, top)
            if on_progress is not None:
                on_progress(len(done), len(listed))
        return done

    def _predictions(
        self, batch: Sequence[tuple[str, Tensor | str]], top: int
    ) -> Iterator[Prediction]:
        """Yields the predictions of a batch, in order."""
        views = [view for _, view in batch if isinstance(view, Tensor)]
        guesses: Iterator[tuple[Guess, ...]] = iter(())
        if views:
            guesses = self._likeliest(self(torch.stack(views)), top)
        for path, view in batch:
            shown = as_key(os.fsencode(path))
            if isinstance(view, Tensor):
                yield Prediction(path=shown, guesses=next(guesses))
            else:
                yield Prediction(path=shown, error=view)

    def _likeliest(self, logits_BK: Tensor, top: int) -> Iterator[tuple[Guess, ...]]:
        """Yields the likeliest classes of each picture of a batch, the likeliest first."""
        logits_BK = logits_BK.cpu()
        shares_BK = logits_BK.softmax(dim=1)
        # Stable: of equal logits the lower label comes first.
        order_BK = logits_BK.argsort(dim=1, descending=True, stable=True)[:, :top]
        for logits, shares, order in zip(logits_BK, shares_BK, order_BK, strict=True):
            yield tuple(
                Guess(
                    label=label,
                    name=self.classes[label],
                    title=self.class_titles[label],
                    probability=float(shares[label]),
                    logit=float(logits[label]),
                )
                for label in order.tolist()
            )


def load_classifier(
    path: str | Path,
    *,
    checkpoint: str | Path = "last",
    cache: str | Path | None = None,
    device: str | torch.device = "auto",
    model: str | Path | None = None,
) -> Classifier:
    """Loads a trained model and its encoder from one run folder.

    ::

        classifier = load_classifier("runs/vitds-1a2b3c4d")
        classifier.predict(["rose.jpg", "more/"])[0].guesses[0].name
        logits = classifier(images)             # uint8 (B, 3, 256, 256), or floats in [0, 1]

    Args:
        path: A run folder, or a checkpoint folder inside one.
        checkpoint: last, best, or a checkpoint folder or its name.
        cache: Where to take the encoder from instead of the run folder: for runs that were begun
            before run folders held a copy of it.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.
        model: The file of the run's own model, `FILE.py`, if it has one; its code runs.

    Raises:
        InputDataError: there is no run, or no checkpoint yet.
        RefusedError, RunMismatchError: the run has a model of its own, and no file or another one
            is named.
        ManifestError: `args.yaml` or `model.json` is damaged; names the file.
        CheckpointError: the checkpoint is damaged, of another run, or does not fit the model.
        UsageError: there is no such device, or the run's model needs no file.
    """
    run = open_model(path, checkpoint=checkpoint, named=model)
    return Classifier(run, device=checked_device(device), cache=cache)


def find_pictures(names: Iterable[str | os.PathLike[str]]) -> list[tuple[str, str | None]]:
    """Lists the pictures that names stand for.

    Args:
        names: Files, folders (everything below them that is an image, hidden files left out), or
            patterns with `*`, `?`, `[...]` and `**`, where no file of that very name is there.

    Returns:
        (path, None) for each picture, in the order of the names, those of a folder or pattern in
        the order of their bytes; (name, reason) for what stands for no picture.
    """
    found: list[tuple[str, str | None]] = []
    for each in names:
        name = os.fspath(each)
        if os.path.isdir(name):  # noqa: PTH112
            found += _of_folder(name)
        elif os.path.lexists(name) or not glob.has_magic(name):
            found.append((name, None))
        else:
            matches = sorted(glob.glob(name, recursive=True), key=os.fsencode)  # noqa: PTH207
            files = [match for match in matches if not os.path.isdir(match)]  # noqa: PTH112
            found += [(file, None) for file in files] or [(name, "no file is named like that")]
    return found


def _of_folder(name: str) -> list[tuple[str, str | None]]:
    try:
        paths = list(DiskTree(os.fsencode(name)).images(b"", Tally()))
    except (SourceError, ResourceError) as error:
        return [(name, str(error))]
    if not paths:
        return [(name, "the folder holds no image")]
    return [(str(Path(name) / os.fsdecode(path)), None) for path in paths]


def _read_ahead(
    entries: Iterable[tuple[str, str | None]],
    read: Callable[[str], Tensor],
    *,
    batch_size: int,
    threads: int,
) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Reads pictures in threads, always a batch ahead of the one that is worked on.

    Yields:
        Batches in the order of the entries, which are as `find_pictures` gives them: each path
        with its picture, or with the reason why there is none.
    """

    def tried(path: str) -> Tensor | str:
        try:
            return read(path)
        except (ImageDecodeError, ResourceError) as error:
            return str(error)

    coming = iter(entries)
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:

        def started() -> list[tuple[str, str | Future[Tensor | str]]]:
            return [
                (path, pool.submit(tried, path) if reason is None else reason)
                for path, reason in islice(coming, batch_size)
            ]

        ahead = started()
        while ahead:
            batch, ahead = ahead, started()
            yield [(path, each if isinstance(each, str) else each.result()) for path, each in batch]
