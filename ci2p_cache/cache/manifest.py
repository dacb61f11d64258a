"""`cache.json`: what a cache folder is, written when encoding starts and completed last."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.cache.paths import MANIFEST, commit_path, data_paths, index_path
from ci2p_cache.cache.staging import refuse_link
from ci2p_cache.errors import (
    FingerprintMismatchError,
    ManifestError,
    NotACacheError,
    UsageError,
    command,
)
from ci2p_cache.record import MAX_JSON_BYTES, Record, differing_fields, read_sealed, unsealed
from ci2p_cache.specs import (
    FORMAT_VERSION,
    FORMAT_VERSIONS,
    MAX_LATENT_BYTES,
    Fingerprint,
    LatentSpec,
    LayoutSpec,
)

__all__ = [
    "MAX_SHARD_BYTES", "ClassOrder", "Manifest", "SplitRecord", "class_order", "read_manifest",
    "refuse_difference", "shard_rows",
]  # fmt: skip

MAX_SHARD_BYTES = MAX_LATENT_BYTES
"""Raw latents of one shard at most: it is built in memory, and lost whole when a run is killed."""

_MAX_ROWS = 2**24
"""Most rows of one split. ImageNet-21k has 14 million: labels and valid take 84 MB in memory."""

_MAX_SHARDS = 2**20
"""Most shards of one split: one folder has as many files. ImageNet-21k in shards of 14 rows."""

_MAX_SPLITS = 8
"""There are train, val and test."""

_MAX_NAMES_BYTES = MAX_JSON_BYTES - 2**20
"""Limit for all class names and titles; the rest of `cache.json` has some 100 kB."""

_LOST = (
    f"put {MANIFEST} back from a backup, then run the same command; without one, encode again: "
    "ci2p-cache encode IMAGES --out NEW_FOLDER (nothing in this folder was changed)"
)
"""What gets on where the manifest is damaged: no other file holds all of its fields."""

_NOT_IN_FORMAT_1 = {"fold": False, "split": "hashed"}
"""Fields of the layout that came with format 2, and what they are in a cache of format 1."""

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
class SplitRecord(Record):
    """The shape of one split."""

    rows: int
    """Planned samples, N."""
    views: int
    """Views per sample, V."""
    shard_rows: int
    """Rows per shard, S."""
    valid_rows: int | None = None
    """Rows that hold a latent; None until encoding has finished."""
    bytes: int | None = None
    """Bytes of the committed shard files; None until encoding has finished."""
    source_bytes: int | None = None
    """Bytes of the source files of valid rows; None until encoding has finished."""
    clipped: int | None = None
    """Symbols saturated at the dtype's limit; None until encoding has finished."""
    exif_turned: int | None = None
    """Images whose EXIF orientation is not 1; None until encoding has finished."""
    names_split: bool = True
    """Whether its index parts have the column `split`; for older caches, which have none, false."""

    def __post_init__(self) -> None:
        bounds = {"rows": (0, _MAX_ROWS), "views": (1, 1024), "shard_rows": (1, 2**20)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"split `{name}` is {value}; {low} to {high} are possible")
        if self.num_shards > _MAX_SHARDS:
            raise UsageError(
                f"a split of {self.rows} rows has {self.num_shards} shards of {self.shard_rows}; "
                f"at most {_MAX_SHARDS} are possible",
                hint="repeat the command with more --shard-samples, fewer --views, or a smaller "
                "--dtype or --size",
            )
        if self.valid_rows is not None and not 0 <= self.valid_rows <= self.rows:
            raise UsageError(f"a split has {self.valid_rows} valid rows of {self.rows}")

    @property
    def num_shards(self) -> int:
        """Number of shards, the last one perhaps part-filled."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Returns the rows of a shard."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.rows))


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
    """What the order of `classes` is; for caches without it, it is added when they are read."""
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
        problem = next(self._problems(), None)
        if problem is not None:
            raise UsageError(problem)

    def _problems(self) -> Iterator[str]:
        latent, classes = self.fingerprint.latent, self.classes
        if self.format_version not in FORMAT_VERSIONS:
            yield f"format version {self.format_version} is none of {FORMAT_VERSIONS}"
        if problem := self.layout.problem(self.format_version, latent):
            yield problem
        for name in self.splits:
            if not _SPLIT_NAME.fullmatch(name):
                yield f"split name {name!r} is not of the form {_SPLIT_NAME.pattern}"
        if len(self.class_titles) != len(classes):
            yield f"{len(self.class_titles)} class titles for {len(classes)} classes"
        if len(self.offset) != latent.channels:
            yield f"{len(self.offset)} offsets for {latent.channels} channels"
        if not all(map(math.isfinite, self.offset)):
            yield "an offset is not finite"
        size = len(json.dumps([classes, self.class_titles], ensure_ascii=False))
        if size > _MAX_NAMES_BYTES:
            text = f"the names of {len(classes)} classes take {size} bytes"
            yield f"{text}; at most {_MAX_NAMES_BYTES} fit {MANIFEST}"
        if not 1 <= len(self.splits) <= _MAX_SPLITS:
            yield f"{len(self.splits)} splits; 1 to {_MAX_SPLITS} are possible"
        if len({record.names_split for record in self.splits.values()}) > 1:
            text = "some splits have index parts with the column `split` and some without"
            yield f"{text}; readers of `index/` want one form"
        for name, record in self.splits.items():
            views = self.fingerprint.views.num_views(name)
            rows = shard_rows(self.layout, latent, views)
            if record.views != views:
                yield f"split {name} has {record.views} views, its fingerprint makes {views}"
            if record.shard_rows != rows:
                text = f"split {name} has {record.shard_rows} rows per shard"
                yield f"{text}, its layout makes {rows}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, those of its format version."""
        values = Record.to_dict(self)
        if self.format_version == 1:
            for name in _NOT_IN_FORMAT_1:
                del values["layout"][name]
        return values

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
    if version not in FORMAT_VERSIONS:
        raise ManifestError(
            f"{path} has format version {version!r}; this ci2p-cache reads versions "
            f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSION}",
            hint=f"encode again: ci2p-cache encode IMAGES --out NEW_FOLDER (or use the ci2p-cache "
            f"that wrote it: {data.get('software', 'unknown')})",
        )
    try:
        manifest = unsealed(Manifest, _upgraded(data), path, intact=intact)
    except ManifestError as error:
        raise ManifestError(str(error), hint=_LOST) from error
    _refuse_links(root, manifest)
    return manifest


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """Adds what older caches lack: the order of the classes, `names_split`, `fold`, `split`."""
    names, splits, layout = (data.get(name) for name in ("classes", "splits", "layout"))
    if data["format_version"] == 1 and isinstance(layout, dict):
        data = {**data, "layout": {**_NOT_IN_FORMAT_1, **layout}}
    if isinstance(names, list):
        data = {"class_order": class_order(list(map(str, names))), **data}
    if isinstance(splits, dict):
        old = {"names_split": False}
        splits = {k: old | v if isinstance(v, dict) else v for k, v in splits.items()}
        data = {**data, "splits": splits}
    return data


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
    """Refuses settings that differ from those that the folder was made with, naming each field."""
    pairs: list[tuple[Record, Record]] = [
        (manifest.fingerprint, fingerprint),
        (manifest.layout, layout),
    ]
    lines = [
        f"  {name}: {made!r} in the folder, {asked!r} asked for"
        for ours, theirs in pairs
        for name, made, asked in differing_fields(ours, theirs)
    ]
    if lines:
        raise FingerprintMismatchError(
            f"{root} was made with other settings; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --out folder, or repeat the command with the folder's settings",
        )


def shard_rows(layout: LayoutSpec, latent: LatentSpec, views: int) -> int:
    """Returns S: `shard_samples`, or what fits MAX_SHARD_BYTES raw, whichever is less."""
    return max(1, min(layout.shard_samples, MAX_SHARD_BYTES // (views * latent.num_bytes)))
