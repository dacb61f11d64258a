"""The plan: which sample is in which row of which shard, fixed before the first is encoded.

A row is the rank of hash(seed, split, key), so rows are not sorted by class and any window of the
cache is mixed; a bad image never moves another. Sources that are best read in
sequence (tars, parquet) say so by `ImageRef.order`: their rows follow it, and are as mixed as they
were written. Shards may cross archives.

Where the source has no splits, `val` is an exact share of each class; older caches drew each image
for itself. Rows that a plan has keep their split.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.commit import sha256_file
from ci2p_cache.cache.manifest import Manifest, SplitRecord, shard_rows
from ci2p_cache.cache.paths import MANIFEST, PLAN
from ci2p_cache.errors import ManifestError, SourceError, command
from ci2p_cache.images.layouts import NONE_HINT
from ci2p_cache.images.source import ImageRef, ImageSource
from ci2p_cache.images.splits import SPLIT_ORDER, look_like_parts, look_like_splits
from ci2p_cache.parquet import parquet_bytes, read_parquet
from ci2p_cache.specs import LatentSpec, LayoutSpec, ViewSpec

__all__ = [
    "EarlierRows", "Plan", "Sample", "ShardPlan", "build_plan", "plan_of_rows", "plan_text",
    "read_plan", "refuse_no_classes",
]  # fmt: skip

_LEADS_OUT = r"^$|^/|(^|/)\.\.(/|$)"

PLAN_SCHEMA = pa.schema(
    [
        pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("path", pa.binary(), nullable=False),
    ]
)

_LISTED_SCHEMA = pa.schema([("order", pa.uint64()), *list(PLAN_SCHEMA)[-3:]])

_BLOCK_ROWS = 2**16
"""Listed samples that are Python objects at a time."""
_FEWEST_SORTED = 64
"""Fewer rows may come sorted by chance."""
_CLASSES_SHOWN, _MAX_NAME = 10, 40


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


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """All samples of all splits, as columns."""

    tables: dict[str, pa.Table]
    """One table per split, of `PLAN_SCHEMA`, rows ascending from 0."""
    splits: dict[str, SplitRecord]
    """The shape of each split."""

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
        part = self.tables[split].slice(rows.start, len(rows))
        columns = (part[name].to_pylist() for name in ("key", "label", "path"))
        samples = tuple(Sample(*values) for values in zip(rows, *columns, strict=True))
        return ShardPlan(split, shard, samples, self.shard_sha256(split, shard))

    def shard_sha256(self, split: str, shard: int) -> str:
        """Returns the digest of a shard's samples; a commit record of another plan does not fit.

        It is over "row NUL label NUL key NUL path LF" of each, without an object for any of them:
        a resumed run asks for all shards before it does anything else.
        """
        rows = self.splits[split].rows_of(shard)
        part = self.tables[split].slice(rows.start, len(rows))
        numbers = np.arange(rows.start, rows.start + part.num_rows)
        columns = [pa.array(numbers), part["label"], part["key"]]
        texts = [column.cast(pa.string()).cast(pa.binary()) for column in columns]
        lines = pc.binary_join_element_wise(*texts, part["path"], b"\0").combine_chunks()
        whole = pc.binary_join(pa.ListArray.from_arrays([0, len(lines)], lines), b"\n")
        digest = hashlib.sha256(whole[0].as_buffer())
        digest.update(b"\n")
        return digest.hexdigest()

    def with_paths(self, paths: Mapping[str, Mapping[int, bytes]]) -> Plan:
        """Returns the plan with other paths in the source, by split and row."""
        tables = dict(self.tables)
        for split, moved in paths.items():
            found = tables[split]["path"].to_pylist()
            for row, path in moved.items():
                found[row] = path
            column = pa.array(found, pa.binary())
            tables[split] = tables[split].set_column(
                PLAN_SCHEMA.get_field_index("path"), PLAN_SCHEMA.field("path"), column
            )
        return Plan(tables, self.splits)

    def with_views(self, layout: LayoutSpec, views: ViewSpec, latent: LatentSpec) -> Plan:
        """Returns the plan with other views, which may make other shards of the same rows."""
        tables, records = {}, {}
        for name, table in self.tables.items():
            num_views, old = views.num_views(name), self.splits[name]
            size = shard_rows(layout, latent, num_views)
            tables[name] = _table(name, size, None, table)
            records[name] = SplitRecord(
                rows=old.rows, views=num_views, shard_rows=size, names_split=old.names_split
            )
        return Plan(tables, records)

    def labels(self, split: str) -> npt.NDArray[np.int32]:
        """Returns the label of every row of a split, int32 (N,)."""
        return np.asarray(self.tables[split]["label"].to_numpy(), np.int32)

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
        return parquet_bytes(pa.concat_tables(self.tables.values(), promote_options="permissive"))


def read_plan(root: Path, manifest: Manifest) -> Plan:
    """Reads the plan of a cache folder, checked against the manifest's digest and its splits.

    Raises:
        ManifestError: it is missing or damaged, or no plan that this cache could have.
    """
    path = root / PLAN
    hint = command("verify", root, "--repair")
    try:
        digest, table = sha256_file(path), read_parquet(path, schemas=(PLAN_SCHEMA,))
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
        return f"does not be in shards of {record.shard_rows} rows"
    problem = _foreign_label(table, num_classes) or _leads_out(table)
    if problem is not None:
        return problem
    # Not count_distinct: it takes three times as long over a million keys.
    if len(pc.unique(table["key"])) != record.rows:
        return "has a key twice"
    return None


def _foreign_label(table: pa.Table, num_classes: int) -> str | None:
    labels = table["label"].to_numpy()
    if np.any((labels < -1) | (labels >= num_classes)):
        return f"has labels that are none of {num_classes} classes"
    return None


def _leads_out(table: pa.Table) -> str | None:
    for column in ("key", "path"):
        if pc.any(pc.match_substring_regex(table[column], _LEADS_OUT)).as_py():
            return f"has a {column} that is absolute, empty or holds '..'"
    return None


def build_plan(
    source: ImageSource,
    layout: LayoutSpec,
    views: ViewSpec,
    latent: LatentSpec,
    *,
    earlier: EarlierRows | None = None,
    counts: Counter[tuple[str | None, int]] | None = None,
) -> Plan:
    """Lists a source and gives every image its split and row.

    Args:
        source: Where the images are.
        layout: Validation share, seed, limit and shard size.
        views: How many views a training sample has; with `latent` it bounds the shard size.
        latent: The shape and dtype of one latent.
        earlier: The rows of the same folder's plan; they stay, and new ones follow.
        counts: Counts what the source has by (its split, label), for `refuse_no_classes`.

    Raises:
        SourceError: there is no image, two of a split have the same key, a key or path is absolute,
            empty or holds "..", or a label is none of the classes.
    """
    plan = earlier.plan if earlier is not None else Plan({}, {})
    listed = _by_split(
        _limited(_new_images(source, layout, earlier, counts), layout, plan), earlier
    )
    # Labels of a growth are those of the larger list of classes.
    num_classes = None if earlier else len(source.classes)
    undrawn = listed.pop(None, None)
    if undrawn is not None:
        # Of two images of one key, one could become train and the other val.
        _refuse_unusable(source, undrawn, num_classes)
        for name, found in _drawn(undrawn, layout, plan).items():
            listed[name] = pa.concat_tables([found, *([listed[name]] if name in listed else ())])
    names = {name for name in {*listed, *plan.splits} if name is not None}
    if not names:
        raise SourceError(f"{source.location()} holds no image")
    # One form for all index parts: readers of the whole folder take the schema of the first.
    names_split = all(record.names_split for record in plan.splits.values())
    tables, records = {}, {}
    for name in sorted(names, key=lambda n: (SPLIT_ORDER.index(n), n)):
        found = listed.get(name, _listed_table([]))
        _refuse_unusable(source, found, num_classes, split=name)
        num_views = views.num_views(name)
        size = shard_rows(layout, latent, num_views)
        found = _in_row_order(name, found, layout.seed)
        tables[name] = _table(name, size, plan.tables.get(name), found)
        records[name] = SplitRecord(
            rows=len(tables[name]), views=num_views, shard_rows=size, names_split=names_split
        )
    return Plan(tables, records)


def plan_of_rows(rows: Mapping[str, Iterable[Sample]], records: Mapping[str, SplitRecord]) -> Plan:
    """Puts a plan together again from all samples of each split, in row order."""
    tables = {}
    for name, samples in rows.items():
        listed = _listed_table([(None, each.key, each.label, each.path) for each in samples])
        tables[name] = _table(name, records[name].shard_rows, None, listed)
    return Plan(tables, dict(records))


def _by_split(
    refs: Iterable[tuple[ImageRef, str | None]], earlier: EarlierRows | None
) -> dict[str | None, pa.Table]:
    """Returns the images by split, as listed; None are those without one yet."""
    # In arrow's columns a sample takes about 80 bytes; as Python objects some 270.
    rows: dict[str | None, list[tuple[int | None, str, int, bytes]]] = {}
    blocks: dict[str | None, list[pa.Table]] = {}
    for ref, split in refs:
        label = earlier.label(ref) if earlier is not None else ref.label
        rows.setdefault(split, []).append((ref.order, ref.key, label, ref.path))
        if len(rows[split]) == _BLOCK_ROWS:
            blocks.setdefault(split, []).append(_listed_table(rows.pop(split)))
    for split, left in rows.items():
        blocks.setdefault(split, []).append(_listed_table(left))
    return {split: pa.concat_tables(own) for split, own in blocks.items()}


def _drawn(listed: pa.Table, layout: LayoutSpec, plan: Plan) -> dict[str, pa.Table]:
    """Divides images into train and val: of the n of a class, round(n * share) become val.

    Rows that the plan has stay and count as what they are; new ones become val in the order of
    their hashes, as many as the class lacks.
    """
    new = listed["label"].to_numpy()
    held = [plan.labels(name) if name in plan.tables else new[:0] for name in ("train", "val")]
    classes, number = np.unique(np.concatenate([new, *held]), return_inverse=True)
    own, *earlier = np.split(number, np.cumsum([len(new), len(held[0])]))
    num_new, num_train, num_val = (np.bincount(x, minlength=len(classes)) for x in (own, *earlier))
    lacking = np.rint((num_new + num_train + num_val) * layout.val_fraction) - num_val
    table = listed.append_column("hash", _hashes(listed["key"], "val", layout.seed))
    order = pc.sort_indices(table, [(name, "ascending") for name in ("label", "hash", "key")])
    place = np.empty(len(new), np.int64)
    place[order.to_numpy()] = np.arange(len(new))
    is_val = place - (np.cumsum(num_new) - num_new)[own] < lacking[own]
    parts = {"train": listed.filter(pa.array(~is_val)), "val": listed.filter(pa.array(is_val))}
    return {name: part for name, part in parts.items() if part.num_rows}


def _in_row_order(split: str, listed: pa.Table, seed: int) -> pa.Table:
    """Sorts by the order that the source gives, else by hash; should two be equal, by key."""
    if listed["order"].null_count:
        hashes = _hashes(listed["key"], f"row:{split}", seed)
        listed = listed.set_column(0, "order", pc.coalesce(listed["order"], hashes))
    return listed.sort_by([(column, "ascending") for column in _LISTED_SCHEMA.names])


def _hashes(keys: pa.ChunkedArray, purpose: str, seed: int) -> pa.Array:
    # A chunk at a time: all keys as Python objects would take more than the plan.
    texts = (key for chunk in keys.chunks for key in chunk.to_pylist())
    return pa.array(np.fromiter((_hash64(key, purpose, seed) for key in texts), np.uint64))


def _listed_table(rows: list[tuple[int | None, str, int, bytes]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(_LISTED_SCHEMA)
    arrays = [pa.array(c, t) for c, t in zip(columns, _LISTED_SCHEMA.types, strict=True)]
    return pa.table(arrays, schema=_LISTED_SCHEMA)


def _table(split: str, size: int, earlier: pa.Table | None, listed: pa.Table) -> pa.Table:
    """Numbers earlier samples, then new ones; the same ones give the same bytes, however listed."""
    tables = [listed] if earlier is None else [earlier, listed]
    samples = pa.concat_tables([table.select(["key", "label", "path"]) for table in tables])
    rows = np.arange(len(samples))
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows)), pa.int8()), [split]),
        pa.array(rows),
        pa.array(rows // size, pa.int32()),
        *samples.columns,
    ]
    return pa.table(columns, schema=PLAN_SCHEMA).combine_chunks()


def _refuse_unusable(
    source: ImageSource, listed: pa.Table, num_classes: int | None, *, split: str | None = None
) -> None:
    """Refuses what a source of the user's own may give, and two images of one key.

    A batch could not say which of the two it holds.
    """
    problem, where = _leads_out(listed), "" if split is None else f" in split {split}"
    if problem is None and num_classes is not None:
        problem = _foreign_label(listed, num_classes)
    if problem is not None:
        raise SourceError(f"what {source.location()} lists{where} {problem}")
    keys = listed["key"]
    if len(pc.unique(keys)) == len(keys):
        return
    counts = pc.value_counts(keys).to_pylist()
    double = next(item["values"] for item in counts if item["counts"] > 1)
    raise SourceError(
        f"{source.location()} lists {double!r} twice{where}; keys are unique in a split",
        hint="rename one of them, or leave one out",
    )


def _new_images(
    source: ImageSource,
    layout: LayoutSpec,
    earlier: EarlierRows | None,
    counts: Counter[tuple[str | None, int]] | None,
) -> Iterator[tuple[ImageRef, str | None]]:
    """Yields the images without a row yet, with their split; counts all of them.

    The split is None where the source has none and all of a class have to be known: `_drawn`.
    """
    for ref in source.scan():
        if counts is not None:
            counts[ref.split, ref.label] += 1
        split = ref.split if ref.split or layout.val_fraction else "train"
        if split is None and layout.split == "hashed":
            share = _hash64(ref.key, "val", layout.seed) / 2**64
            split = "val" if share < layout.val_fraction else "train"
        if earlier is None or not earlier.holds(ref, (split,) if split else ("train", "val")):
            yield ref, split


def _limited(
    refs: Iterable[tuple[ImageRef, str | None]], layout: LayoutSpec, plan: Plan
) -> Iterable[tuple[ImageRef, str | None]]:
    """Keeps as many images as the plan lacks up to `limit`, those of smallest hash.

    They are the same ones each time, spread over classes.
    """
    if layout.limit is None:
        return refs

    def rank(item: tuple[ImageRef, str | None]) -> tuple[int, bytes]:
        return _hash64(item[0].key, "limit", layout.seed), item[0].path

    left = max(0, layout.limit - plan.num_samples)
    # Where none is left they are listed all the same: what has gone or changed is found by it.
    return heapq.nsmallest(max(1, left), refs, key=rank)[:left]


def _hash64(key: str, purpose: str, seed: int) -> int:
    digest = _keyed(purpose, seed).copy()
    digest.update(key.encode())
    return int.from_bytes(digest.digest(), "little")


@cache
def _keyed(purpose: str, seed: int) -> hashlib.blake2b:
    """Returns the hash before the key: a copy of it costs half as much as a new one."""
    return hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"), person=purpose.encode())


class EarlierRows:
    """The rows that a cache has, and what a new listing of its source says of them."""

    def __init__(self, plan: Plan, labels: Sequence[int]) -> None:
        self.plan = plan
        self.paths: dict[str, dict[int, bytes]] = {name: {} for name in plan.splits}
        """Where the source has the original of a row now, by split and row."""
        self.moved: Mapping[tuple[str, str], tuple[str, int]] = {}
        """Split and key in the source -> split and row here, of images that have another name or
        split there now; they count as the rows that they were."""
        self.relabelled: set[str] = set()
        """Keys of rows that have another class in the source now."""
        self._to_label = labels
        self._labels = {name: plan.labels(name) for name in plan.splits}
        self._rows = {
            name: {key: row for row, key in enumerate(plan.tables[name]["key"].to_pylist())}
            for name in plan.splits
        }

    def label(self, ref: ImageRef) -> int:
        """Returns the label that an image of the source has in the cache."""
        return self._to_label[ref.label] if ref.label >= 0 else ref.label

    def holds(self, ref: ImageRef, splits: Sequence[str]) -> bool:
        """Whether one of these splits has a row for an image of the source; notes its path."""
        for split in splits:
            if (split, ref.key) in self.moved:
                name, row = self.moved[split, ref.key]
                self.paths[name][row] = ref.path
                return True
            if ref.key in self._rows.get(split, {}):
                row = self._rows[split][ref.key]
                self.paths[split][row] = ref.path
                if self._labels[split][row] != self.label(ref):
                    self.relabelled.add(ref.key)
                return True
        return False


def refuse_no_classes(source: ImageSource, counts: Counter[tuple[str | None, int]]) -> None:
    """Refuses a source from which no classifier could be trained; never one without classes.

    Raises:
        SourceError: all images to train from are of one class, the classes look like splits or
            parts, or train knows no class of another split.
    """
    classes, where = source.classes, source.location()
    if not classes:
        return
    by_split: dict[str | None, set[int]] = {}
    for split, label in counts:
        by_split.setdefault(split, set()).add(label)
    names = [classes[label] for label in sorted(set().union(*by_split.values()))]
    train = by_split.get("train") or by_split.get(None) or set()
    if len(train) < 2:
        count = sum(n for (split, _), n in counts.items() if split in ("train", None))
        found = f"{classes[min(train)] if train else None!r}"
        raise SourceError(
            "; ".join(
                (
                    f"all {count:,} images to train from in {where} are of one class, {found}",
                    "wanted at least two",
                    *source.notices,
                )
            ),
            hint="name the folder whose folders are the classes, if that is another; or "
            f"{NONE_HINT}",
        )
    if look_like_splits(names) or look_like_parts(names):
        raise SourceError(
            f"the classes of {where} would be {_listed(names)}, which look like splits or "
            "parts of one set",
            hint=f"give each image its class, by its folder or in a list; or {NONE_HINT}",
        )
    for split, own in by_split.items():
        if split in ("val", "test") and not own & train:
            raise SourceError(
                f"none of the {len(own)} classes of {split} in {where} is known to train: "
                f"{_listed([classes[label] for label in sorted(own)])} in {split}, "
                f"{_listed([classes[label] for label in sorted(train)])} in train",
                hint=f"give the class folders of {split} the names that train has; or {NONE_HINT}",
            )


def plan_text(plan: Plan, classes: tuple[str, ...]) -> str:
    """Returns splits, classes and counts in one line, for people."""
    splits = ", ".join(f"{name} {record.rows:,}" for name, record in plan.splits.items())
    text = f"{plan.num_samples:,} images ({splits})"
    if not classes:
        return f"{text}, no labels"
    labels = np.concatenate([plan.labels(name) for name in plan.splits])
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    shown = [f"{name[:_MAX_NAME]} {count:,}" for name, count in zip(classes, counts, strict=True)]
    listed = ", ".join(shown[:_CLASSES_SHOWN])
    if len(classes) > _CLASSES_SHOWN:
        listed += f", ... ({counts.min():,} to {counts.max():,} images each)"
    return f"{text}, {len(classes):,} classes: {listed}"


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > 5 else ""
    return ", ".join(repr(name[:_MAX_NAME]) for name in names[:5]) + more
