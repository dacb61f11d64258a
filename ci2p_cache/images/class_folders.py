"""Folders in archives that say what images show: `CLASS/...` or `{train,val,test}/CLASS/...`.

Folders on disk are `folder.FolderSource`'s business; the rules are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import SPLIT_NAMES
from ci2p_cache.images.names import for_display
from ci2p_cache.images.splits import UNLABELLED, split_folders

__all__ = ["ClassFolders", "find_class_folders", "refuse_shards"]

_MOST_NAMED = 5
_SHARD = re.compile(
    rb"(shards?|parts?|train|val|valid|validation|test|data|batch|chunk|images?|imgs?|files?|set)"
    rb"[-_.]?\d+",
    re.IGNORECASE,
)
_WNID = re.compile(rb"n\d{8}")


@dataclass(frozen=True, slots=True)
class ClassFolders:
    """Where class folders are."""

    depth: int
    """Folders around everything, which mean nothing."""
    splits: Mapping[bytes, str]
    """Folder below these -> split; empty where class folders come at once."""

    def place(self, path: bytes) -> tuple[str | None, bytes, bytes] | None:
        """Returns split, class and the path below the split; None for an image in no class."""
        parts = path.split(b"/")[self.depth :]
        split = None
        if self.splits:
            split = self.splits.get(parts[0])
            parts = parts[1:] if split is not None else []
        return (split, parts[0], b"/".join(parts)) if len(parts) > 1 else None


def find_class_folders(folders: Iterable[bytes]) -> ClassFolders:
    """Finds out which level of folders is the classes.

    Args:
        folders: The folders that images lie in; empty for the top.

    Raises:
        SourceError: there are none, or it is not clear; the message does not say where.
    """
    paths = [tuple(folder.split(b"/")) if folder else () for folder in folders]
    depth = 0
    while True:
        heads = {path[depth] for path in paths if len(path) > depth}
        splits = split_folders(sorted(heads))
        named = [name for name in heads if name.lower() in SPLIT_NAMES]
        if heads and not splits and len(named) == len(heads):
            raise SourceError(
                f"it has {_listed(named)} and no train folder",
                hint="add train, or rename the folder if its name is a class",
            )
        if splits and len(splits) == len(heads):
            break
        if len(heads) != 1 or any(len(path) < depth + 2 for path in paths):
            splits = _refuse_mixed(splits, heads)
            break
        depth += 1
    # Pictures to be predicted, in a folder of their own, have no labels.
    splits = {name: split for name, split in splits.items() if split != UNLABELLED}
    if len(set(splits.values())) < len(splits):
        raise SourceError(f"{_listed(splits)}: two folders are one split", hint="keep one of them")
    for path in paths:
        if splits and len(path) == depth + 1 and splits.get(path[depth], "test") != "test":
            raise SourceError(f"{for_display(path[depth])} in it has images in no class folder")
    level = depth + bool(splits)
    classes = {
        path[level] for path in paths if len(path) > level and (not splits or path[depth] in splits)
    }
    if len(classes) < 2:
        what = f"one class folder, {_listed(classes)}" if classes else "no class folders"
        raise SourceError(f"it has {what}")
    return ClassFolders(depth, splits)


def refuse_shards(folders: Iterable[bytes], *, alone: bool) -> None:
    """Refuses tars that are called like the parts of one data set, and not like classes.

    Args:
        folders: What the tars stand for.
        alone: Whether they lie in one tar, where only class tars are known to.

    Raises:
        SourceError: they are; the message does not say where.
    """
    names = sorted({folder.rpartition(b"/")[2] for folder in folders})
    numbered = len(names) > 1 and len({re.sub(rb"\d+", b"0", name) for name in names}) == 1
    synsets = all(_WNID.fullmatch(name) for name in names)
    if all(map(_SHARD.fullmatch, names)) or (numbered and not alone and not synsets):
        raise SourceError(f"its tars ({_listed(names)}) are called like parts, not like classes")


def _refuse_mixed(splits: Mapping[bytes, str], heads: Iterable[bytes]) -> dict[bytes, str]:
    """Refuses splits beside other folders; one such name alone is a class."""
    if len(splits) > 1:
        others = [name for name in heads if name not in splits]
        raise SourceError(
            f"it has split folders ({_listed(splits)}) beside other folders ({_listed(others)}); "
            "they cannot be both splits and classes",
            hint="leave the other folders out of the archive",
        )
    return {}


def _listed(names: Iterable[bytes]) -> str:
    found = sorted(names)
    more = ", ..." if len(found) > _MOST_NAMED else ""
    return ", ".join(for_display(name) for name in found[:_MOST_NAMED]) + more
