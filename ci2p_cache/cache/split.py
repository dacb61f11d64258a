"""`Split`: one split of a cache as Python sees it: indexed, looped over, pickled, restricted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.stored_split import StoredSplit
from ci2p_cache.errors import InvalidRowError, UsageError

__all__ = ["Split"]


class Split(StoredSplit, Dataset[tuple[Tensor, int]]):
    """One split of a cache; reading is safe from many threads, and from forked processes.

    ::

        y, label = split[3]                # float32 (V, M, h, w), int; -1 is the last row
        y, labels = split[[3, 5]]          # float32 (n, V, M, h, w), int64 (n,); a slice, list,
                                           # array or tensor of rows, or a mask, bool (N,)
        for y, label in split: ...         # every valid row, ascending

    `len(split)` is N. A row whose image could not be decoded keeps its number but holds nothing:
    `valid` is false there, and asking for it raises `InvalidRowError`. A loop over the split leaves
    it out, and so do `split[split.valid]` and `zip(split.valid_rows, split)`.

    It is a map-style dataset for `torch.utils.data.DataLoader`. Where rows are not valid, pass
    `sampler=SubsetRandomSampler(split.valid_rows)` too. A pickle holds the cache's absolute path or
    URL, the split's name, and for a subset a bit per row. It opens the cache again, which must
    still be the same one.

    Args:
        cache: The cache it belongs to; `open_cache` makes both.
        name: Its name.
    """

    def __init__(self, cache: CacheFolder, name: str) -> None:
        super().__init__(cache, name)
        self.scale: float = cache.manifest.scale
        self.offset = np.array(cache.manifest.offset, np.float32)
        self._is_subset = False

    def __repr__(self) -> str:
        valid = len(self.valid_rows) if self._is_subset else self.record.valid_rows
        return (
            f"Split({self.name!r} of {str(self.cache.path)!r}, rows={self.num_rows}, "
            f"valid_rows={valid}, shape={self.shape[1:]}, dtype={self.latent.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Nothing that was read, and no open file.
        valid = np.packbits(self.valid).tobytes() if self._is_subset else None
        return _unpickled, (self.cache, self.name, valid)

    def __copy__(self) -> Self:
        # Shares the open files; without this, copying would go by `__reduce__`.
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __len__(self) -> int:
        return self.num_rows

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.cache.classes

    @cached_property
    def targets(self) -> list[int]:
        """`labels` as a list, the name that torchvision's datasets have for it."""
        labels: list[int] = self.labels.tolist()
        return labels

    @cached_property
    def valid_rows(self) -> npt.NDArray[Any]:
        """Rows that hold a latent, ascending, int64; read-only, because loaders go by it."""
        return _valid_rows(self.valid)

    def subset(self, rows: Sequence[int] | npt.NDArray[Any] | Tensor) -> Split:
        """Returns a view of this split that holds some of its valid rows only.

        It reads the same files. Row numbers, `num_rows`, `shape`, `labels` and `latents` stay those
        of the whole split; `valid` and `valid_rows`, which loaders go by, are restricted.

        Args:
            rows: Distinct valid rows in any order, (n,), or a mask, bool (N,), as `split[rows]`
                takes them.

        Raises:
            UsageError: a row is named twice, or is not valid here.
            IndexError, TypeError: as for `split[rows]`.
        """
        wanted = np.sort(self._numbers(rows))
        odd = np.concatenate(
            [np.setdiff1d(wanted, self.valid_rows), wanted[1:][wanted[1:] == wanted[:-1]]]
        )
        if len(odd):
            raise UsageError(
                f"row {odd[0]} cannot be in a subset of split {self.name!r}: it is named twice, or "
                f"is none of its {len(self.valid_rows)} valid rows"
            )
        valid = np.zeros(self.num_rows, np.bool_)
        valid[wanted] = True
        return self._restricted(valid)

    def _restricted(self, valid: npt.NDArray[np.bool_]) -> Split:
        subset = self.__copy__()
        # As if read: cached properties are looked up among the instance's attributes first.
        subset.valid = valid
        subset.valid_rows = _valid_rows(valid)
        subset._is_subset = True
        return subset

    @overload
    def __getitem__(
        self, rows: slice | Sequence[int] | npt.NDArray[Any] | Tensor
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __getitem__(self, rows: int | np.integer[Any]) -> tuple[Tensor, int]: ...

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor | int]:
        """Returns the dequantised latents and the label of a row, or of many in the order given.

        Args:
            rows: A row, -N <= row < N, where negative ones count from the end. Or many: a slice, a
                list, range, array or tensor (n,) of rows, with repetitions, or a mask, bool (N,). A
                tuple is refused, because arrays take it for one index per axis.

        Returns:
            float32 (V, M, h, w) and an int; of many float32 (n, V, M, h, w) and int64 (n,), also
            where n is 0 or 1. The tensors are new ones on the CPU.

        Raises:
            IndexError: there is no such row, or a mask has not N entries.
            InvalidRowError: one of the rows is not valid.
            TypeError: `rows` is nothing of that kind.
            ShardError: a shard is missing or damaged.
        """
        if isinstance(rows, slice):
            return self._samples(np.arange(*rows.indices(self.num_rows), dtype=np.int64))
        if getattr(rows, "ndim", None) == 0:
            # A number of numpy's or torch's.
            rows = rows.item()
        if not isinstance(rows, int) or isinstance(rows, bool):
            return self._samples(self._numbers(rows))
        if not -self.num_rows <= rows < self.num_rows:
            raise self._no_row(rows)
        y, labels = self._samples(np.array([rows % self.num_rows]))
        return y[0], int(labels[0])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Returns what `split[row]` gives for each row, read in one call; DataLoader asks for it.

        Raises:
            IndexError, InvalidRowError, ShardError: as for `split[rows]`.
        """
        y, labels = self[rows]
        return list(zip(y, labels.tolist(), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Yields `split[row]` of every valid row, ascending.

        Raises:
            ShardError: a shard is missing or damaged.
        """
        return (self[row] for row in self.valid_rows)

    def __reversed__(self) -> Iterator[tuple[Tensor, int]]:
        """Yields `split[row]` of every valid row, descending."""
        return (self[row] for row in self.valid_rows[::-1])

    # Python would read every row for `x in split`, and compare tensors.
    __contains__ = None

    def _numbers(self, rows: Any) -> npt.NDArray[np.int64]:
        """Returns the rows that a list, array, tensor or mask names, (n,), 0 <= row < N."""
        found = rows.numpy(force=True) if isinstance(rows, Tensor) else np.asarray(rows)
        if found.ndim and found.dtype == np.bool_:
            if found.shape != (self.num_rows,):
                raise IndexError(
                    f"a mask of shape {found.shape} for the {self.num_rows} rows of split "
                    f"{self.name!r}"
                )
            return np.flatnonzero(found).astype(np.int64)
        if not found.size:
            # numpy takes an empty list for floats.
            found = found.astype(np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu" or isinstance(rows, tuple):
            raise TypeError(
                f"split {self.name!r} takes a row, or a slice, list, array or tensor of rows, or a "
                f"mask; got {type(rows).__name__} of {found.dtype}, shape {found.shape}"
            )
        outside = found[(found < -self.num_rows) | (found >= self.num_rows)]
        if len(outside):
            raise self._no_row(int(outside[0]))
        return found.astype(np.int64) % max(1, self.num_rows)

    def _no_row(self, row: int) -> IndexError:
        return IndexError(f"row {row} of {self.num_rows} in split {self.name!r}")

    def _samples(self, rows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Reads rows (n,) with all their views."""
        invalid = rows[~self.valid[rows]]
        if len(invalid):
            raise InvalidRowError(
                f"row {invalid[0]} of split {self.name!r} holds no latent, because its image could "
                f"not be decoded (see {self.cache.path / 'errors.parquet'}), or is not in this "
                f"subset{'' if self.cache.is_complete else ', or is not encoded yet'}",
                hint="`split.valid_rows` lists the rows that hold one",
            )
        stored = np.empty((len(rows), self.num_views, *self.latent.shape), self.latent.dtype)
        if len(rows) == 1:
            # Read by position: for a single row no file is mapped.
            for view, out in enumerate(stored[0]):
                self.read_into(int(rows[0]), view, out)
        else:
            views = np.tile(np.arange(self.num_views), len(rows))
            flat = stored.reshape(-1, *self.latent.shape)
            self.read_batch_into(np.repeat(rows, self.num_views), views, flat)
        y = torch.from_numpy(stored.astype(np.float32, copy=False))
        if self.latent.is_symbols:
            y.mul_(self.scale).add_(torch.from_numpy(self.offset)[:, None, None])
        return y, torch.from_numpy(self.labels[rows].astype(np.int64))


def _valid_rows(valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(valid).astype(np.int64)
    # Shuffled in place, it would change the order of every loader and of no seed.
    rows.flags.writeable = False
    return rows


def _unpickled(cache: Mapping[str, Split], name: str, valid: bytes | None) -> Split:
    """Returns a split of a cache, restricted to the rows whose bit is set if any are given."""
    split = cache[name]
    if valid is None:
        return split
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), count=split.num_rows)
    return split._restricted(bits.astype(np.bool_))
