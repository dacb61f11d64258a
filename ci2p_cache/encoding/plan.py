"""The plan: which sample is in which row of which shard, fixed before the first is encoded.

How an image came by its row is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ci2p_cache.cache.commit import sha256_file
from ci2p_cache.cache.manifest import Manifest, SplitRecord
from ci2p_cache.cache.paths import MANIFEST, PLAN
from ci2p_cache.errors import ManifestError, command
from ci2p_cache.parquet import parquet_bytes, read_parquet

__all__ = ["PLAN_SCHEMA", "Plan", "Sample", "ShardPlan", "read_plan"]

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

_FEWEST_SORTED = 64
"""Fewer rows may come sorted by chance."""


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
        tables: One table per split, of `PLAN_SCHEMA`, rows ascending from 0.
        records: The shape of each split.
    """

    def __init__(self, tables: dict[str, pa.Table], records: dict[str, SplitRecord]) -> None:
        self.tables = tables
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
        part = self.tables[split].slice(rows.start, len(rows))
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
        """Returns the plan with the bytes of some rows elsewhere in the source.

        Args:
            paths: Split -> row -> path.
        """
        tables = dict(self.tables)
        for split, moved in paths.items():
            found = tables[split]["path"].to_pylist()
            for row, path in moved.items():
                found[row] = path
            place = tables[split].schema.get_field_index("path")
            column = pa.array(found, pa.binary())
            tables[split] = tables[split].set_column(place, PLAN_SCHEMA.field("path"), column)
        return Plan(tables, self.splits)

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
    """Reads the plan of a cache folder, held against the manifest's digest and its splits.

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
