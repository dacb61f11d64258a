"""`Classifier`: pictures to classes with what is in one run folder; the cache may be gone.

::

    picture -> view 0 -> g_a -> stored as the cache did -> dequantised -> model -> logits
    uint8      uint8     y      symbols or floats          latents        (B, K)

Shape suffixes: B batch, H W pixels, M latent channels, h w latent rows and columns, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ci2p_cache.errors import UsageError
from ci2p_cache.images.decode import decoder_name
from ci2p_cache.images.decoders import Decoders
from ci2p_cache.inference.model_inputs import as_floats, as_stored, encode_by_cores
from ci2p_cache.inference.pictures import find_pictures, read_ahead, read_picture, shown
from ci2p_cache.inference.prediction import Guess, Prediction, likeliest
from ci2p_cache.inference.run_encoder import load_run_encoder
from ci2p_cache.inference.run_folder import RunFolder, load_model, open_run
from ci2p_cache.machine import checked_device, ieee_float32, num_cores
from ci2p_cache.specs import Fingerprint
from ci2p_cache.training.metrics import autocast

if TYPE_CHECKING:
    from ci2p_cache.encoder.frozen import FrozenEncoder

__all__ = ["Classifier", "load_classifier"]


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
        """Gives logits, float32 (B, K) on `device`.

        Args:
            images_B3HW: RGB, uint8 0-255 or floating point in [0, 1], (B, 3, size, size) with the
                run's own size and B >= 1, on any device; not mean/std normalised.

        Raises:
            UsageError: the images have another shape or dtype.
            InputDataError, DigestError: as for `encoder`.
        """
        return self.logits(self.inputs(images_B3HW))

    def inputs(self, images_B3HW: Tensor) -> Tensor:
        """Gives what the model reads of images: latents, or the images themselves in [0, 1].

        The symbols are the cache's to the last one, see `encode_by_cores`.

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
        """Gives images as float32 in [0, 1] on `device`.

        Raises:
            UsageError: they have another shape or dtype than a call takes.
        """
        return as_floats(images_B3HW, size=self.fingerprint.image.size, device=self.device)

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """Runs g_a on float32 images in [0, 1], (B, 3, H, W); gives y, float32 (B, M, h, w).

        Raises:
            InputDataError, DigestError, UsageError: as for `encoder`.
        """
        return encode_by_cores(self.encoder, images_B3HW)

    def stored(self, y_BMhw: Tensor) -> Tensor:
        """Gives what the cache would store of y, of its dtype: saturated symbols, or y itself.

        Args:
            y_BMhw: float32 (B, M, h, w) on `device`.

        Raises:
            InputDataError, DigestError, UsageError: as for `encoder`, whose medians symbols need.
        """
        latent = self.fingerprint.latent
        return as_stored(y_BMhw, latent, self.encoder if latent.is_symbols else None)

    def dequantise(self, stored_BMhw: Tensor) -> Tensor:
        """Gives stored values as the loaders do: symbols * step + median, or y itself.

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

        Raises:
            ImageDecodeError: the file is missing, unreadable or no image.
            ResourceError: reading failed again and again.
        """
        return read_picture(os.fspath(path), self._decoders)

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
            paths: Files, folders and patterns, as `pictures.find_pictures` reads them.
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
        for batch in read_ahead(
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
            guesses = likeliest(self(torch.stack(views)), self.classes, self.class_titles, top=top)
        for path, view in batch:
            if isinstance(view, Tensor):
                yield Prediction(path=shown(path), guesses=next(guesses))
            else:
                yield Prediction(path=shown(path), error=view)


def load_classifier(
    path: str | Path,
    *,
    checkpoint: str | Path = "best",
    cache: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Classifier:
    """Loads a trained model and its encoder from one run folder.

    ::

        classifier = load_classifier("runs/vitds-1a2b3c4d")
        classifier.predict(["rose.jpg", "more/"])[0].guesses[0].name
        logits = classifier(images)             # uint8 (B, 3, 256, 256), or floats in [0, 1]

    Args:
        path: A run folder, or a checkpoint folder inside one.
        checkpoint: best, last, or a checkpoint folder or its name.
        cache: Where to take the encoder from instead of the run folder: for runs that were begun
            before run folders held a copy of it.
        device: auto (CUDA where there is one), cpu, cuda or cuda:1.

    Raises:
        InputDataError: there is no run, or no checkpoint yet.
        ManifestError: `args.yaml` or `model.json` is damaged; names the file.
        CheckpointError: the checkpoint is damaged, of another run, or does not fit the model.
        UsageError: there is no such device.
    """
    return Classifier(
        open_run(path, checkpoint=checkpoint), device=checked_device(device), cache=cache
    )
