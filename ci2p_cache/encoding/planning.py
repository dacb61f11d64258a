"""Planning: gives every image of a source its split and its row; what a plan is for is elsewhere.

A row is the rank of hash(seed, split, key), so rows are not sorted by class and any window of the
cache is mixed; nothing that goes wrong with one image moves another. Sources that are best read in
sequence (tars, parquet) say so by `ImageRef.order`: their rows follow it, and are as mixed as they
were written. Shards may cross archives.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.manifest import SplitRecord, shard_rows
from ci2p_cache.encoding.plan import PLAN_SCHEMA, Plan, Sample
from ci2p_cache.errors import SourceError
from ci2p_cache.images.source import ImageRef, ImageSource
from ci2p_cache.images.splits import SPLIT_ORDER
from ci2p_cache.specs import LatentSpec, LayoutSpec, ViewSpec

__all__ = ["EarlierRows", "build_plan", "plan_of_rows"]

_LISTED_SCHEMA = pa.schema(
    [("rank", pa.uint64()), ("key", pa.string()), ("label", pa.int32()), ("path", pa.binary())]
)

_BLOCK_ROWS = 2**16
"""Listed samples that are Python objects at a time."""


def build_plan(
    source: ImageSource,
    layout: LayoutSpec,
    views: ViewSpec,
    latent: LatentSpec,
    *,
    earlier: EarlierRows | None = None,
) -> Plan:
    """Lists a source and gives every image its split and row.

    Args:
        source: Where the images are.
        layout: Validation share, seed, limit and shard size.
        views: How many views a training sample has; with `latent` it bounds the shard size.
        latent: The shape and dtype of one latent.
        earlier: The rows of the same folder's plan; they stay, and new ones follow.

    Raises:
        SourceError: there is no image, or two of a split have the same key.
    """
    listed: dict[str, _Listed] = {}
    plan = earlier.plan if earlier is not None else None
    refs: Iterable[tuple[ImageRef, str]] = (
        (ref, ref.split or _drawn_split(ref, layout)) for ref in source.scan()
    )
    if earlier is not None:
        refs = itertools.filterfalse(lambda item: earlier.holds(*item), refs)
    for ref, split in _limited(refs, layout, plan.num_samples if plan else 0):
        rank = ref.order
        if rank is None:
            rank = _hash64(ref.key, f"row:{split}", layout.seed)
        if split not in listed:
            listed[split] = _Listed()
        label = earlier.label(ref) if earlier is not None else ref.label
        listed[split].add((rank, ref.key, label, ref.path))
    names = {*listed, *(plan.splits if plan else ())}
    if not names:
        raise SourceError(f"{source.location()} holds no image")
    # One form for all index parts: readers of the whole folder take the schema of the first.
    names_split = all(record.names_split for record in plan.splits.values()) if plan else True
    tables, records = {}, {}
    for name in sorted(names, key=lambda n: (SPLIT_ORDER.index(n), n)):
        old = plan.tables.get(name) if plan else None
        found = listed.pop(name, _Listed()).ranked()
        _refuse_doubles(source, name, found)
        table = _table(name, found, old)
        num_views = views.num_views(name)
        size = shard_rows(layout, latent, num_views)
        tables[name] = _with_shards(table, name, size)
        records[name] = SplitRecord(
            rows=table.num_rows, views=num_views, shard_rows=size, names_split=names_split
        )
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


class _Listed:
    """The samples of one split while they are listed.

    Kept in arrow's columns, about 80 bytes each; as Python objects they would take some 270.
    """

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._rows: list[tuple[int, str, int, bytes]] = []

    def add(self, row: tuple[int, str, int, bytes]) -> None:
        """Adds one sample, as in `_LISTED_SCHEMA`; its rank decides its place."""
        self._rows.append(row)
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
        schema=PLAN_SCHEMA,
    )
    return new if earlier is None else pa.concat_tables([earlier, new]).unify_dictionaries()


def _with_shards(table: pa.Table, split: str, size: int) -> pa.Table:
    """Fills in the shard numbers; the same samples give the same bytes, however listed."""
    count = table.num_rows
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count), pa.int8()), [split])
    shards = pa.array(np.arange(count) // size, pa.int32())
    columns = [names, table["row"], shards, table["key"], table["label"], table["path"]]
    return pa.table(columns, schema=PLAN_SCHEMA).combine_chunks()


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


def _limited(
    refs: Iterable[tuple[ImageRef, str]], layout: LayoutSpec, taken: int
) -> Iterable[tuple[ImageRef, str]]:
    """Keeps the images of smallest hash: the same ones each time, spread over classes.

    Args:
        refs: Images and their splits.
        layout: How many a cache may hold: `limit`.
        taken: How many it holds.
    """
    if layout.limit is None:
        return refs

    def rank(item: tuple[ImageRef, str]) -> tuple[int, bytes]:
        return _hash64(item[0].key, "limit", layout.seed), item[0].path

    left = max(0, layout.limit - taken)
    # Where none is left they are listed all the same: what has gone or changed is found by it.
    return heapq.nsmallest(max(1, left), refs, key=rank)[:left]


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


class EarlierRows:
    """The rows that a cache has, and what a new listing of its source says of them.

    Args:
        plan: Its plan.
        labels: The label in the cache of each label of the source.
    """

    def __init__(self, plan: Plan, labels: Sequence[int]) -> None:
        self.plan = plan
        self.relabelled: set[str] = set()
        """Keys of rows that have another class in the source now."""
        self._to_label = labels
        self._rows = {
            name: {key: row for row, key in enumerate(plan.tables[name]["key"].to_pylist())}
            for name in plan.splits
        }
        self._labels = {name: plan.labels(name) for name in plan.splits}
        self._paths: dict[str, dict[int, bytes]] = {name: {} for name in plan.splits}
        self._moved: dict[tuple[str, str], tuple[str, int]] = {}

    def label(self, ref: ImageRef) -> int:
        """Returns the label that an image of the source has in the cache."""
        return self._to_label[ref.label] if ref.label >= 0 else ref.label

    def holds(self, ref: ImageRef, split: str) -> bool:
        """Whether the cache has a row for an image of the source; its place is noted."""
        place = self._moved.get((split, ref.key))
        if place is not None:
            self._paths[place[0]][place[1]] = ref.path
            return True
        row = self._rows.get(split, {}).get(ref.key)
        if row is None:
            return False
        self._paths[split][row] = ref.path
        if self._labels[split][row] != self.label(ref):
            self.relabelled.add(ref.key)
        return True

    def places(self, rows: Mapping[str, Iterable[int]]) -> dict[str, dict[int, bytes]]:
        """Returns where the source has the originals of some rows now, by split and row."""
        return {split: {row: self._paths[split][row] for row in rows[split]} for split in rows}

    def path(self, split: str, row: int) -> bytes | None:
        """Returns where the source has the original of a row now; None where it has it no more."""
        return self._paths[split].get(row)

    def has_gone(self, split: str) -> bool:
        """Whether the source lacks the original of any row of a split now."""
        return len(self._paths[split]) < self.plan.splits[split].rows

    def take_moved(self, found: Mapping[tuple[str, str], tuple[str, int]]) -> None:
        """Takes images as the rows that the cache has of them, whatever they are called now.

        Args:
            found: Split and key in the source -> split and row in the cache.
        """
        self._moved.update(found)
