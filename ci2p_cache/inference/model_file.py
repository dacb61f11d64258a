"""`model.json` read back: the model, what its latents mean, its classes, and its encoder's copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.errors import InputDataError, ManifestError
from ci2p_cache.models.registry import AnyModelConfig, config_from_dict
from ci2p_cache.record import Record, read_json
from ci2p_cache.specs import Fingerprint

__all__ = ["MODEL_FILE", "ModelFile", "read_model_file"]

MODEL_FILE = "model.json"

_VERSIONS = (1, 2)
"""1 did not know of the encoder's copy."""


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
    """Reads the `model.json` of a run.

    Args:
        run: The run folder.

    Returns:
        The file, and the record of the model in it.

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
        fields = {"encoder": None} | {k: v for k, v in data.items() if k != "model"}
        file = ModelFile.from_dict(fields)
        config = config_from_dict(data.get("model", {}))
        _check(file, config)
    except ManifestError as error:
        raise ManifestError(f"{path} is damaged: {error}", hint=hint) from error
    return file, config


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
