"""When folders beside each other are most likely no classes, although nothing else is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ci2p_cache.images.archives import SPLIT_NAMES
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.splits import look_like_parts, look_like_splits, split_folders
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tree import Tree

__all__ = ["Doubt", "doubt"]

_MOST_LOOKED_INTO = 256
"""Of more folders only those with the name of a split are looked into."""

_LIST_HINT = "or write a list: a .csv with the columns path, label and split, and name it as SRC"


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why folders are most likely no classes."""

    what: str
    """Half a sentence behind the names of the folders."""
    hint: str
    """What gets the user on."""
    about_splits: bool = False
    """Whether it concerns a source without labels too."""


def doubt(tree: Tree, place: bytes, folders: Sequence[bytes]) -> Doubt | None:
    """Says why the folders in `place` are most likely no classes; None where they may be.

    Raises:
        SourceError: a folder cannot be listed.
        ResourceError: listing failed again and again.
    """
    names = [as_key(name) for name in folders]
    if look_like_splits(names):
        return Doubt(
            "these names look like splits, not classes",
            "call the folders train, val and test; a folder that is none of these has to go",
            about_splits=True,
        )
    if look_like_parts(names):
        return Doubt(
            "these names look like parts of one set, not classes",
            f"sort the images into class folders, {_LIST_HINT}; or --labels none",
        )
    few = len(folders) <= _MOST_LOOKED_INTO
    inner = {
        name: _folders_only(tree, join(place, name))
        for name in folders
        if few or name.lower() in SPLIT_NAMES
    }
    return _doubt_inside(folders, inner) if len(folders) > 1 else None


def _folders_only(tree: Tree, folder: bytes) -> frozenset[bytes]:
    """Returns the folders in a folder; none where it holds images too."""
    folders, files = tree.list_folder(folder, Tally())
    if not folders or any(tree.is_image(join(folder, name), Tally()) for name in files):
        return frozenset()
    return frozenset(folders)


def _doubt_inside(folders: Sequence[bytes], inner: dict[bytes, frozenset[bytes]]) -> Doubt | None:
    """Compares what is in folders that hold nothing but folders."""
    for name, below in inner.items():
        shown = for_display(name)
        if below and below <= set(folders):
            return Doubt(
                f"{shown} holds {_some(below)}, as if it were the source again",
                f"move {shown} out of the source; if it is a split, move the others into train/",
            )
        if len(set(split_folders(sorted(below)).values())) > 1:
            return Doubt(
                f"{shown} holds {_some(below)}, which look like splits within a class; they would "
                "be mixed",
                f"put the split above the class, as in train/{shown}/; {_LIST_HINT}",
                about_splits=True,
            )
        if name.lower() in SPLIT_NAMES and len(below) > 1 and not all(inner.values()):
            return Doubt(
                f"{shown} has the name of a split and holds folders ({_some(below)}), others hold "
                "images; it may be a split or a class",
                f"name {shown} itself as SRC if its folders are the classes, or move it away",
            )
    sets = list(inner.values())
    if len(sets) == len(folders) and len(sets[0]) > 1 and all(own == sets[0] for own in sets):
        return Doubt(
            f"each holds the same folders ({_some(sets[0])}), so these look like splits or "
            "versions of one set, not classes",
            f"name one of them as SRC, call them train, val and test, {_LIST_HINT}",
        )
    return None


def _some(names: frozenset[bytes]) -> str:
    shown = ", ".join(for_display(name) for name in sorted(names)[:3])
    return shown + (", ..." if len(names) > 3 else "")
