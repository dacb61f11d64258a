"""`cache.json`: what a cache folder is, written when encoding starts and completed last."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.paths import MANIFEST, commit_path, data_paths, index_path
from ci2p_cache.cache.sealed import read_sealed
from ci2p_cache.cache.split_record import SplitRecord
from ci2p_cache.cache.staging import refuse_link
from ci2p_cache.errors import (
    FingerprintMismatchError,
    ManifestError,
    NotACacheError,
    UsageError,
    command,
)
from ci2p_cache.record import MAX_JSON_BYTES, Record, differing_fields
from ci2p_cache.specs import FORMAT_VERSION, MAX_LATENT_BYTES, Fingerprint, LatentSpec, LayoutSpec

__all__ = [
    "MAX_SHARD_BYTES",
    "ClassOrder",
    "Manifest",
    "SplitRecord",
    "class_order",
    "read_manifest",
    "refuse_difference",
    "shard_rows",
]


MAX_SHARD_BYTES = MAX_LATENT_BYTES
"""Raw latents of one shard at most: it is built in memory, and lost whole when a run is killed."""

_MAX_SPLITS = 8
"""There are train, val and test."""

_MAX_NAMES_BYTES = MAX_JSON_BYTES - 2**20
"""Of all class names and titles: what is left of `cache.json` has some 100 kB."""

_LOST = (
    f"put {MANIFEST} back from a backup, then run the same command; without one, encode again: "
    "ci2p-cache encode IMAGES --out NEW_FOLDER (nothing in this folder was changed)"
)
"""What gets on where the manifest is damaged: no other file holds all of its fields."""

_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_NUMBER = re.compile(r"-?[0-9]{1,18}")

ClassOrder = Literal["number", "text", "declared"]
"""How classes are ordered: by the numbers that they are, as text like torchvision's ImageFolder, or
otherwise: as the source declares them, or as they came when the cache grew."""


def class_order(classes: Sequence[str]) -> ClassOrder:
    """Returns the order that a list of classes is in; number where both are the same."""
    names, are_numbers = list(classes), all(map(_NUMBER.fullmatch, classes))
    if are_numbers and names == sorted(names, key=lambda name: (int(name), name)):
        return "number"
    return "text" if names == sorted(names) else "declared"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest(Record):
    """The content of `cache.json`."""

    format_version: int = FORMAT_VERSION
    """Version of the disk format."""
    software: str
    """Name and version of what wrote it; information only."""
    state: Literal["encoding", "complete"]
    """complete is written last, after everything that it vouches for."""
    fingerprint: Fingerprint
    """Every field that changes a value."""
    layout: LayoutSpec
    """Every field that changes which sample is where."""
    source: str
    """Where the images were read from; information only."""
    classes: tuple[str, ...]
    """Class names; a label is an index into them. Empty: encoded without labels, all are -1."""
    class_titles: tuple[str, ...]
    """Names for humans, in the order of `classes`."""
    class_order: ClassOrder = "text"
    """What the order of `classes` is; caches of before have it added when they are read."""
    splits: dict[str, SplitRecord]
    """Shape of each split, in the order train, val, test."""
    plan: FileRecord
    """plan.parquet."""
    encoder: FileRecord
    """encoder.safetensors."""
    offset: tuple[float, ...]
    """y = stored * scale + offset[channel]; the codec's medians for symbols, zeros for floats."""
    files: tuple[FileRecord, ...] = ()
    """Everything that finalising wrote: metadata, labels, valid, statistics, errors."""

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise UsageError(f"format version {self.format_version} is not {FORMAT_VERSION}")
        for name in self.splits:
            if not _SPLIT_NAME.fullmatch(name):
                raise UsageError(f"split name {name!r} is not of the form {_SPLIT_NAME.pattern}")
        if len(self.class_titles) != len(self.classes):
            raise UsageError(
                f"{len(self.class_titles)} class titles for {len(self.classes)} classes"
            )
        if len(self.offset) != self.fingerprint.latent.channels:
            raise UsageError(
                f"{len(self.offset)} offsets for {self.fingerprint.latent.channels} channels"
            )
        if not all(map(math.isfinite, self.offset)):
            raise UsageError("an offset is not finite")
        names_bytes = len(json.dumps([self.classes, self.class_titles], ensure_ascii=False))
        if names_bytes > _MAX_NAMES_BYTES:
            raise UsageError(
                f"the names of {len(self.classes)} classes take {names_bytes} bytes; at most "
                f"{_MAX_NAMES_BYTES} fit {MANIFEST}"
            )
        self._check_splits()

    def _check_splits(self) -> None:
        """Refuses splits whose shapes are not what fingerprint and layout make."""
        if not 1 <= len(self.splits) <= _MAX_SPLITS:
            raise UsageError(f"{len(self.splits)} splits; 1 to {_MAX_SPLITS} are possible")
        if len({record.names_split for record in self.splits.values()}) > 1:
            raise UsageError(
                "some splits have index parts with the column `split` and some without; readers of "
                "`index/` want one form"
            )
        for name, record in self.splits.items():
            views = self.fingerprint.views.num_views(name)
            if record.views != views:
                raise UsageError(
                    f"split {name} has {record.views} views, its fingerprint makes {views}"
                )
            rows = shard_rows(self.layout, self.fingerprint.latent, views)
            if record.shard_rows != rows:
                raise UsageError(
                    f"split {name} has {record.shard_rows} rows per shard, its layout makes {rows}"
                )

    @property
    def scale(self) -> float:
        """Y = stored * scale + offset[channel]; the step for symbols, 1.0 for floats."""
        return self.fingerprint.latent.step

    @property
    def is_complete(self) -> bool:
        """Whether encoding has finished."""
        return self.state == "complete"


def read_manifest(root: Path) -> Manifest:
    """Reads `cache.json` of a cache folder; it may come from a stranger.

    What it says is bounded, because it decides how much memory readers take and which files they
    open. A folder that passes can still be damaged; that shows when its files are read.

    Args:
        root: The folder; it may itself be reached by a link.

    Raises:
        NotACacheError: the folder is missing or holds no `cache.json`.
        ManifestError: it is damaged, absurd or of another format version, or a folder of the cache
            is a link.
    """
    path = root / MANIFEST
    try:
        data, intact = read_sealed(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotACacheError(
            f"{root} is no latent cache: it has no {MANIFEST}",
            # What is in a folder that is there is most likely the images.
            hint=command("encode", root, "--out", "shards/", note="if these are your images")
            if root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir())
            else command("encode", "IMAGES", "--out", root),
        ) from error
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    except ManifestError as error:
        raise ManifestError(str(error), hint=_LOST) from error
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path} has format version {version!r}; this ci2p-cache reads version "
            f"{FORMAT_VERSION}",
            hint=f"encode again: ci2p-cache encode IMAGES --out NEW_FOLDER (or use the ci2p-cache "
            f"that wrote it: {data.get('software', 'unknown')})",
        )
    if not intact:
        raise ManifestError(f"{path} is damaged: its own sha256 does not fit it", hint=_LOST)
    try:
        manifest = Manifest.from_dict(_with_class_order(data))
    except ManifestError as error:
        raise ManifestError(f"{path} is damaged: {error}", hint=_LOST) from error
    _refuse_links(root, manifest)
    return manifest


def _with_class_order(data: dict[str, Any]) -> dict[str, Any]:
    """Adds the order of the classes where it was not recorded; the classes stay as they are."""
    names = data.get("classes")
    given = {"class_order": class_order(list(map(str, names)))} if isinstance(names, list) else {}
    return given | data


def _refuse_links(root: Path, manifest: Manifest) -> None:
    """Refuses a cache of which a folder, listed or expected, leads elsewhere."""
    files = [file.path for file in (manifest.plan, manifest.encoder, *manifest.files)]
    for split in manifest.splits:
        files += [index_path(split, 0), commit_path(split, 0)]
        files += data_paths(manifest.layout, split, 0)
    for folder in sorted({parent for file in files for parent in Path(file).parents} - {Path()}):
        refuse_link(root / folder, root)


def refuse_difference(
    root: Path, manifest: Manifest, fingerprint: Fingerprint, layout: LayoutSpec
) -> None:
    """Holds the wanted settings against those that the folder was made with.

    Raises:
        FingerprintMismatchError: a field differs; the message lists each, and nothing is changed.
    """
    differences: list[tuple[str, Any, Any]] = [
        *differing_fields(manifest.fingerprint, fingerprint),
        *differing_fields(manifest.layout, layout),
    ]
    if differences:
        lines = [
            f"  {name}: {made!r} in the folder, {asked!r} asked for"
            for name, made, asked in differences
        ]
        raise FingerprintMismatchError(
            f"{root} was made with other settings; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --out folder, or repeat the command with the folder's settings",
        )


def shard_rows(layout: LayoutSpec, latent: LatentSpec, views: int) -> int:
    """Returns S: `shard_samples`, or what fits MAX_SHARD_BYTES raw, whichever is less."""
    return max(1, min(layout.shard_samples, MAX_SHARD_BYTES // (views * latent.num_bytes)))
