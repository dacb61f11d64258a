"""What a source was found to hold: counted while it is listed, refused where it teaches nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ci2p_cache.encoding.plan import Plan
from ci2p_cache.errors import SourceError
from ci2p_cache.images.layouts import NONE_HINT
from ci2p_cache.images.source import ImageRef, ImageSource
from ci2p_cache.images.splits import look_like_parts, look_like_splits

__all__ = ["CountedSource", "plan_text"]

_CLASSES_SHOWN = 10
_MAX_NAME = 40


class CountedSource:
    """An `ImageSource` that gives what another gives, and counts images by split and class.

    Args:
        source: The other.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._counts: Counter[tuple[str | None, int]] = Counter()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the other; so with `class_titles` and `notices`."""
        return self._source.classes

    @property
    def class_titles(self) -> tuple[str, ...]:
        """See `classes`."""
        return self._source.class_titles

    @property
    def notices(self) -> tuple[str, ...]:
        """See `classes`."""
        return self._source.notices

    def location(self) -> str:
        """Returns where the other is."""
        return self._source.location()

    def scan(self) -> Iterator[ImageRef]:
        """Yields every image of the other; errors as the other has them."""
        self._counts.clear()
        for ref in self._source.scan():
            self._counts[ref.split, ref.label] += 1
            yield ref

    def read(self, path: bytes) -> bytes:
        """Returns the content of one image of the other; errors as it has them."""
        return self._source.read(path)

    def file_of(self, path: bytes) -> tuple[bytes, bool] | None:
        """Returns the file of an image; errors as it has them."""
        return self._source.file_of(path)

    def refuse_no_classes(self) -> None:
        """Refuses what was listed where no classifier could be trained from it.

        Raises:
            SourceError: all images to train from are of one class, the classes look like splits or
                parts, or train knows no class of another split. Never without classes.
        """
        classes, where = self._source.classes, self._source.location()
        if not classes:
            return
        by_split: dict[str | None, set[int]] = {}
        for split, label in self._counts:
            by_split.setdefault(split, set()).add(label)
        names = [classes[label] for label in sorted(set().union(*by_split.values()))]
        train = by_split.get("train") or by_split.get(None) or set()
        if len(train) < 2:
            count = sum(n for (split, _), n in self._counts.items() if split in ("train", None))
            found = f"{classes[min(train)] if train else None!r}"
            raise SourceError(
                "; ".join(
                    (
                        f"all {count:,} images to train from in {where} are of one class, {found}",
                        "wanted at least two",
                        *self._source.notices,
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
                    hint=f"give the class folders of {split} the names that train has; or "
                    f"{NONE_HINT}",
                )


def plan_text(plan: Plan, classes: tuple[str, ...]) -> str:
    """Returns splits, classes and counts in one line, for people.

    Args:
        plan: The planned samples.
        classes: Class names.
    """
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
