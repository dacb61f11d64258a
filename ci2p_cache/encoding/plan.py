"""The plan: which sample lies in which row of which shard, fixed before the first image is encoded.

A row is the rank of hash(seed, split, key), so rows are not sorted by class and any window of the
cache is mixed; nothing that goes wrong with one image moves another. Sources that are best read in
sequence (tars, parquet) say so by `ImageRef.order`: their rows follow it, and are as mixed as they
were written. Shards may cross archives.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.commit import sha256_file
from ci2p_cache.cache.index import parquet_bytes, read_parquet
from ci2p_cache.cache.manifest import Manifest, SplitRecord, shard_rows
from ci2p_cache.cache.paths import MANIFEST, PLAN
from ci2p_cache.errors import ManifestError, SourceError, command
from ci2p_cache.images.source import ImageRef, ImageSource
from ci2p_cache.specs import LatentSpec, LayoutSpec, ViewSpec

__all__ = ["Plan", "Sample", "ShardPlan", "build_plan", "plan_of_rows", "read_plan"]

_SPLIT_ORDER = ("train", "val", "test")

_LEADS_OUT = r"^$|^/|(^|/)\.\.(/|$)"

_SCHEMA = pa.schema(
    [
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("path", pa.binary(), nullable=False),
    ]
)


_LISTED_SCHEMA = pa.schema(
    [("rank", pa.uint64()), ("key", pa.string()), ("label", pa.int32()), ("path", pa.binary())]
)
_BLOCK_ROWS = 2**16

_FEWEST_SORTED = 64
"""Fewer rows may come sorted by chance."""
"""Listed samples that are Python objects at a time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One planned sample: its row, key, label and where its bytes are (relative to the source)."""

    row: int
    key: str
    label: int
    path: bytes


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The planned samples of one shard, in row order."""

    split: str
    shard: int
    samples: tuple[Sample, ...]
    sha256: str
    """What `Plan.shard_sha256` gives."""

    @property
    def first_row(self) -> int:
        """Row of the first sample."""
        return self.samples[0].row


class Plan:
    """All samples of all splits, kept as columns.

    Args:
        tables: One table per split, rows ascending from 0.
        records: The shape of each split.
    """

    def __init__(self, tables: dict[str, pa.Table], records: dict[str, SplitRecord]) -> None:
        self._tables = tables
        self.splits = records

    @property
    def num_samples(self) -> int:
        """Samples over all splits."""
        return sum(record.rows for record in self.splits.values())

    @property
    def num_shards(self) -> int:
        """Shards over all splits."""
        return sum(record.num_shards for record in self.splits.values())

    def shard_numbers(self) -> Iterator[tuple[str, int]]:
        """Yields (split, shard) of every shard, train first."""
        for name, record in self.splits.items():
            for shard in range(record.num_shards):
                yield name, shard

    def shard(self, split: str, shard: int) -> ShardPlan:
        """Returns the samples of one shard."""
        rows = self.splits[split].rows_of(shard)
        part = self._tables[split].slice(rows.start, len(rows))
        samples = zip(
            rows,
            part["key"].to_pylist(),
            part["label"].to_pylist(),
            part["path"].to_pylist(),
            strict=True,
        )
        digest = self.shard_sha256(split, shard)
        return ShardPlan(split, shard, tuple(Sample(*sample) for sample in samples), digest)

    def shard_sha256(self, split: str, shard: int) -> str:
        """Returns the digest of a shard's samples; its commit record tells a changed plan by it.

        It is over "row NUL label NUL key NUL path LF" of each, without an object for any of them:
        a resumed run asks for all shards before it does anything else.
        """
        rows = self.splits[split].rows_of(shard)
        part = self._tables[split].slice(rows.start, len(rows))
        numbers = np.arange(rows.start, rows.start + part.num_rows)
        columns = [pa.array(numbers), part["label"], part["key"]]
        texts = [column.cast(pa.string()).cast(pa.binary()) for column in columns]
        lines = pc.binary_join_element_wise(*texts, part["path"], b"\0").combine_chunks()
        whole = pc.binary_join(pa.ListArray.from_arrays([0, len(lines)], lines), b"\n")
        digest = hashlib.sha256(whole[0].as_buffer())
        digest.update(b"\n")
        return digest.hexdigest()

    def labels(self, split: str) -> npt.NDArray[np.int32]:
        """Returns the label of every row of a split, int32 (N,)."""
        return np.asarray(self._tables[split]["label"].to_numpy(), np.int32)

    def is_sorted_by_class(self, split: str) -> bool:
        """Whether neighbouring rows share their class far more often than mixed ones would.

        More than half of the way from chance to always: hashed rows never do, archives that were
        packed one class after the other do. Fewer than 64 rows never count as sorted.
        """
        labels = self.labels(split)
        if len(labels) < _FEWEST_SORTED:
            return False
        shares = np.unique(labels, return_counts=True)[1] / len(labels)
        chance = float((shares**2).sum())
        return len(shares) > 1 and float((labels[1:] == labels[:-1]).mean()) > (1 + chance) / 2

    def to_bytes(self) -> bytes:
        """Serialises to parquet."""
        return parquet_bytes(pa.concat_tables(self._tables.values(), promote_options="permissive"))


def build_plan(
    source: ImageSource,
    layout: LayoutSpec,
    views: ViewSpec,
    latent: LatentSpec,
    *,
    earlier: Plan | None = None,
) -> Plan:
    """Lists a source and gives every image its split and row.

    Args:
        source: Where the images are.
        layout: Validation share, seed, limit and shard size.
        views: How many views a training sample has; with `latent` it bounds the shard size.
        latent: The shape and dtype of one latent.
        earlier: A plan of the same folder; its samples keep their rows and new ones follow.

    Raises:
        SourceError: there is no image, or two of a split have the same key.
    """
    listed: dict[str, _Listed] = {}
    known = _known_keys(earlier) if earlier is not None else {}
    for ref in _limited(source.scan(), layout):
        split = ref.split or _drawn_split(ref, layout)
        if ref.key in known.get(split, ()):
            continue
        rank = ref.order
        if rank is None:
            rank = _hash64(ref.key, f"row:{split}", layout.seed)
        if split not in listed:
            listed[split] = _Listed()
        listed[split].add(rank, ref)
    names = {*listed, *(earlier.splits if earlier else ())}
    if not names:
        raise SourceError(f"{source.location()} holds no image")
    tables, records = {}, {}
    for name in sorted(names, key=lambda n: (_SPLIT_ORDER.index(n), n)):
        old = earlier._tables.get(name) if earlier else None
        found = listed.pop(name, _Listed()).ranked()
        _refuse_doubles(source, name, found)
        table = _table(name, found, old)
        num_views = views.num_views(name)
        size = shard_rows(layout, latent, num_views)
        tables[name] = _with_shards(table, name, size)
        records[name] = SplitRecord(rows=table.num_rows, views=num_views, shard_rows=size)
    return Plan(tables, records)


def plan_of_rows(rows: Mapping[str, Iterable[Sample]], records: Mapping[str, SplitRecord]) -> Plan:
    """Puts a plan together again from all its samples, each split's in row order.

    Args:
        rows: The samples of each split.
        records: The shape of each split.
    """
    tables = {}
    for name, samples in rows.items():
        columns = [(0, sample.key, sample.label, sample.path) for sample in samples]
        table = _table(name, _listed_table(columns), None)
        tables[name] = _with_shards(table, name, records[name].shard_rows)
    return Plan(tables, dict(records))


def read_plan(root: Path, manifest: Manifest) -> Plan:
    """Reads the plan of a cache folder, held against the manifest's digest and its splits.

    Raises:
        ManifestError: it is missing or damaged, or no plan that this cache could have.
    """
    path = root / PLAN
    hint = command("verify", root, "--repair")
    try:
        digest, table = sha256_file(path), read_parquet(path, schema=_SCHEMA)
    except (OSError, ManifestError) as error:
        raise ManifestError(f"{path} is damaged: {error}", hint=hint) from error
    if digest != manifest.plan.sha256:
        raise ManifestError(f"{path} is damaged: its sha256 is not that in {MANIFEST}", hint=hint)
    wanted = sum(record.rows for record in manifest.splits.values())
    if table.num_rows != wanted:
        raise ManifestError(f"{path} has {table.num_rows} rows, {MANIFEST} has {wanted}", hint=hint)
    splits = table["split"].cast(pa.string())
    tables = {
        name: table.filter(pc.equal(splits, name)).combine_chunks() for name in manifest.splits
    }
    for name, part in tables.items():
        problem = _impossible(part, manifest.splits[name], len(manifest.classes))
        if problem is not None:
            raise ManifestError(f"{path} is damaged: split {name} {problem}", hint=hint)
    return Plan(tables, dict(manifest.splits))


def _impossible(table: pa.Table, record: SplitRecord, num_classes: int) -> str | None:
    """Says why a split's part of a plan cannot be one that was made here; None where it can."""
    rows = np.arange(record.rows)
    if not np.array_equal(table["row"].to_numpy(), rows):
        return f"does not list rows 0 to {record.rows - 1} one after another"
    if not np.array_equal(table["shard"].to_numpy(), rows // record.shard_rows):
        return f"does not lie in shards of {record.shard_rows} rows"
    labels = table["label"].to_numpy()
    if np.any((labels < -1) | (labels >= num_classes)):
        return f"has labels that are none of {num_classes} classes"
    for column in ("key", "path"):
        if pc.any(pc.match_substring_regex(table[column], _LEADS_OUT)).as_py():
            return f"has a {column} that leads out of the source"
    # Not count_distinct: it takes three times as long over a million keys.
    if len(pc.unique(table["key"])) != record.rows:
        return "has a key twice"
    return None


class _Listed:
    """The samples of one split while they are listed.

    Kept in arrow's columns, about 80 bytes each; as Python objects they would take some 270.
    """

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._rows: list[tuple[int, str, int, bytes]] = []

    def add(self, rank: int, ref: ImageRef) -> None:
        """Adds one sample; `rank` decides its place."""
        self._rows.append((rank, ref.key, ref.label, ref.path))
        if len(self._rows) == _BLOCK_ROWS:
            self._tables.append(_listed_table(self._rows))
            self._rows = []

    def ranked(self) -> pa.Table:
        """Returns all samples by rank; should two have the same one, by key."""
        table = pa.concat_tables([*self._tables, _listed_table(self._rows)])
        return table.sort_by([(name, "ascending") for name in _LISTED_SCHEMA.names])


def _listed_table(rows: list[tuple[int, str, int, bytes]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(_LISTED_SCHEMA)
    arrays = [pa.array(c, t) for c, t in zip(columns, _LISTED_SCHEMA.types, strict=True)]
    return pa.table(arrays, schema=_LISTED_SCHEMA)


def _table(split: str, listed: pa.Table, earlier: pa.Table | None) -> pa.Table:
    first = earlier.num_rows if earlier is not None else 0
    count = listed.num_rows
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count), pa.int8()), [split])
    new = pa.table(
        [
            names,
            pa.array(np.arange(first, first + count), pa.int64()),
            pa.array(np.zeros(count), pa.int32()),
            listed["key"],
            listed["label"],
            listed["path"],
        ],
        schema=_SCHEMA,
    )
    return new if earlier is None else pa.concat_tables([earlier, new]).unify_dictionaries()


def _with_shards(table: pa.Table, split: str, size: int) -> pa.Table:
    """Fills in the shard numbers; the same samples give the same bytes, however listed."""
    count = table.num_rows
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count), pa.int8()), [split])
    shards = pa.array(np.arange(count) // size, pa.int32())
    columns = [names, table["row"], shards, table["key"], table["label"], table["path"]]
    return pa.table(columns, schema=_SCHEMA).combine_chunks()


def _refuse_doubles(source: ImageSource, split: str, listed: pa.Table) -> None:
    """Refuses two images of one key: a batch could not say which of them it holds."""
    keys = listed["key"]
    if len(pc.unique(keys)) == len(keys):
        return
    counts = pc.value_counts(keys).to_pylist()
    double = next(item["values"] for item in counts if item["counts"] > 1)
    raise SourceError(
        f"{source.location()} lists {double!r} twice in split {split}; keys are unique in a split",
        hint="rename one of them, or leave one out",
    )


def _limited(refs: Iterable[ImageRef], layout: LayoutSpec) -> Iterable[ImageRef]:
    """Keeps the `limit` images of smallest hash: the same ones each time, spread over classes."""
    if layout.limit is None:
        return refs
    return heapq.nsmallest(
        layout.limit, refs, key=lambda ref: (_hash64(ref.key, "limit", layout.seed), ref.path)
    )


def _drawn_split(ref: ImageRef, layout: LayoutSpec) -> str:
    """Draws train or val by the hash of the key alone, so added files move no other file."""
    if not layout.val_fraction:
        return "train"
    share = _hash64(ref.key, "val", layout.seed) / 2**64
    return "val" if share < layout.val_fraction else "train"


def _hash64(key: str, purpose: str, seed: int) -> int:
    digest = _keyed(purpose, seed).copy()
    digest.update(key.encode())
    return int.from_bytes(digest.digest(), "little")


@cache
def _keyed(purpose: str, seed: int) -> hashlib.blake2b:
    """Returns the hash before the key: a copy of it costs half as much as a new one."""
    return hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"), person=purpose.encode())


def _known_keys(plan: Plan) -> dict[str, set[str]]:
    return {name: set(plan._tables[name]["key"].to_pylist()) for name in plan.splits}
