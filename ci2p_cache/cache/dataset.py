"""`SplitDataset`: one view of each valid row, as the loops of other libraries want it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ci2p_cache.errors import UsageError

if TYPE_CHECKING:
    from ci2p_cache.cache.split import Split

__all__ = ["SplitDataset"]


class SplitDataset(Dataset[tuple[Any, int]]):
    """The valid rows of a split, numbered 0 to n - 1, for the loops of other libraries.

    `dataset[i]` is a latent, float32 (M, h, w) on the CPU, and its label, an int;
    `Split.as_dataset` makes it. Reading is safe from threads and forked processes; a pickle opens
    the cache again, as a split's does, and needs a `transform` that can be pickled.

    Args:
        split: The split, or a subset of one.
        view: As for `Split.as_dataset`.
        transform: As for `Split.as_dataset`.

    Raises:
        UsageError: there is no such view.
    """

    def __init__(
        self,
        split: Split,
        view: int | Literal["random"] = 0,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        numbers = range(split.num_views)
        if view != "random" and (isinstance(view, bool) or view not in numbers):
            raise UsageError(
                f"`view` is {view!r}; split {split.name!r} has views 0 to {numbers[-1]}, "
                "or 'random'"
            )
        self.split = split
        self.view = view
        self._transform = transform

    def __repr__(self) -> str:
        return f"SplitDataset({self.split!r}, view={self.view!r}, transform={self.transform!r})"

    def __len__(self) -> int:
        return len(self.split.valid_rows)

    @property
    def transform(self) -> Callable[[Tensor], Any] | None:
        """What is applied to each latent. It cannot be replaced: timm's loaders try, for images."""
        return self._transform

    @transform.setter
    def transform(self, _: Any) -> None:
        raise UsageError(
            "`transform` cannot be replaced; timm's create_loader sets one for images, and rounds "
            "latents to uint8",
            hint="give `transform` to `as_dataset`, and the dataset to torch's DataLoader",
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.split.classes

    @cached_property
    def targets(self) -> list[int]:
        """The label of each item, the name that torchvision's datasets have for it."""
        labels: list[int] = self.split.labels[self.split.valid_rows].tolist()
        return labels

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Yields every item, in order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns a latent and its label.

        Raises:
            IndexError: there is no such item.
            ShardError: a shard is missing or damaged.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        """Returns what `dataset[i]` gives for each, read in one call; DataLoader asks for it.

        Raises:
            IndexError, ShardError: as for `dataset[i]`.
        """
        rows = self.split.valid_rows[np.asarray(indices, np.int64)]
        if self.view == "random":
            views = torch.randint(self.split.num_views, (len(rows),)).numpy()
        else:
            views = np.full(len(rows), self.view, np.int64)
        latents = self.split.read_views(rows, views)
        shown = latents if self._transform is None else map(self._transform, latents)
        return list(zip(shown, self.split.labels[rows].tolist(), strict=True))
