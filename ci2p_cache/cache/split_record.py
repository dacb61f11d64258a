"""The shape of one split, as `cache.json` records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ci2p_cache.errors import UsageError
from ci2p_cache.record import Record

__all__ = ["SplitRecord"]

_MAX_ROWS = 2**24
"""Of one split. ImageNet-21k has 14 million; labels and valid then take 84 MB in memory."""

_MAX_SHARDS = 2**20
"""Of one split: as many files are in one folder. ImageNet-21k in shards of 14 rows."""


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
    """Whether its index parts have the column `split`; older caches do not say, and have none."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rows", 0, _MAX_ROWS),
            ("views", 1, 1024),
            ("shard_rows", 1, 2**20),
        ):
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuilds a record written by `to_dict`, also one of before `names_split`.

        Raises:
            ManifestError: a field is unknown, missing, of another type or out of range.
        """
        if isinstance(data, Mapping):
            data = {"names_split": False, **data}
        # By name: with slots a dataclass is another class than the one that `super()` knows.
        return super(SplitRecord, cls).from_dict(data)

    @property
    def num_shards(self) -> int:
        """Number of shards, the last one perhaps part-filled."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Returns the rows of a shard."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.rows))
