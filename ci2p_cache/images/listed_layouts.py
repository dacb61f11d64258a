"""Public data sets whose labels or splits are in lists beside the images, as they are published.

======================  ====================================================================
CUB-200-2011            images/CLASS/, images.txt, image_class_labels.txt, train_test_split.txt
Food-101                images/CLASS/, meta/train.txt, meta/test.txt
Oxford-IIIT Pet         images/CLASS_NUMBER.jpg, annotations/trainval.txt, annotations/test.txt
======================  ====================================================================

Wah et al. 2011, CNS-TR-2011-001; Bossard et al. 2014, ECCV; Parkhi et al. 2012, CVPR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ci2p_cache.errors import SourceError
from ci2p_cache.images.imagenet import LABEL_FILES, text_lines
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tree import Tree

__all__ = ["LIST_NAMES", "Listing", "listed_layout"]

_IMAGES = b"images"


@dataclass(frozen=True, slots=True)
class Listing:
    """What the lists of a data set say about the files below its folder of images."""

    name: str
    """Of the data set."""
    path: bytes
    """The folder of images, below the tree's root."""
    splits: dict[str, dict[bytes, str]]
    """Split -> path below `path` -> class; train first. Only images that are there."""
    notices: tuple[str, ...]
    """Which images are in no list, and which listed ones are missing."""


def listed_layout(tree: Tree, folder: bytes, tally: Tally) -> Listing | None:
    """Returns what the lists in a folder say, where it is one of the data sets; None otherwise.

    Args:
        tree: Where the images are.
        folder: The folder that may be one of the data sets.
        tally: Takes files that are no images.

    Raises:
        SourceError: a list cannot be read, or no image of it is there.
    """
    if not tree.is_folder(join(folder, _IMAGES)):
        return None
    for name, (files, read) in _KNOWN.items():
        paths = [join(folder, file) for file in files]
        if not all(map(tree.is_file, paths)):
            continue
        lists = [text_lines(join(tree.root, path), tree) for path in paths]
        return _held_against(tree, join(folder, _IMAGES), name, read(*lists), tally)
    return None


def _held_against(
    tree: Tree, images: bytes, name: str, lists: dict[str, dict[str, str]], tally: Tally
) -> Listing:
    """Keeps what is there of the listed images; paths in lists are without extension, or with."""
    splits: dict[str, dict[bytes, str]] = {split: {} for split in lists}
    unlisted, count = b"", 0
    for path in tree.walk(images, tally):
        if not tree.is_image(path, tally):
            continue
        below = path[len(images) + 1 :]
        key = as_key(below)
        split = next((s for s, of in lists.items() if key in of or _stem(key) in of), None)
        if split is None:
            unlisted, count = unlisted or path, count + 1
        else:
            of = lists[split]
            splits[split][below] = of[key] if key in of else of[_stem(key)]
    shown = for_display(join(tree.root, images))
    found, listed = sum(map(len, splits.values())), sum(map(len, lists.values()))
    if not splits["train"]:
        raise SourceError(
            f"{shown} is laid out as {name}, and none of the {len(lists['train'])} images that its "
            "lists name for train is there",
            hint="unpack the images into it, or move the lists away",
        )
    notices = [f"{name}: splits and classes come from its lists, beside {shown}"]
    if count:
        notices.append(f"{count} images skipped that no list names: {for_display(unlisted)}")
    if found < listed:
        notices.append(f"{listed - found} of {listed} images in the lists of {name} are missing")
    return Listing(name, images, {s: of for s, of in splits.items() if of}, tuple(notices))


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _pairs(lines: list[str]) -> dict[str, str]:
    """Reads lines of an id, a space and a value; an empty line counts for nothing."""
    return dict(line.strip().split(" ", 1) for line in lines if " " in line.strip())


def _cub(images: list[str], split: list[str], classes: list[str]) -> dict[str, dict[str, str]]:
    """Reads "1 001.Albatross/1.jpg", "1 0" (1 for train) and "1 001.Albatross"."""
    paths, is_train, known = _pairs(images), _pairs(split), set(_pairs(classes).values())
    found: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    for number, path in paths.items():
        name = path.partition("/")[0]
        if is_train.get(number) not in ("0", "1") or name not in known:
            raise SourceError(
                f"CUB-200-2011: the image {number} ({path[:200]}) has no split in "
                "train_test_split.txt, or no class in classes.txt",
                hint="get the lists again",
            )
        found["train" if is_train[number] == "1" else "test"][path] = name
    return found


def _food(train: list[str], test: list[str]) -> dict[str, dict[str, str]]:
    """Reads "apple_pie/1005649"."""
    return {
        split: {line.strip(): line.partition("/")[0].strip() for line in lines if "/" in line}
        for split, lines in (("train", train), ("test", test))
    }


def _pets(train: list[str], test: list[str]) -> dict[str, dict[str, str]]:
    """Reads "Abyssinian_100 1 1 1": file name, then numbers; the name without its number counts."""
    found: dict[str, dict[str, str]] = {}
    for split, lines in (("train", train), ("test", test)):
        names = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
        found[split] = {name: name.rpartition("_")[0] for name in names if "_" in name}
    return found


_KNOWN: dict[str, tuple[tuple[bytes, ...], Callable[..., dict[str, dict[str, str]]]]] = {
    "CUB-200-2011": ((b"images.txt", b"train_test_split.txt", b"classes.txt"), _cub),
    "Food-101": ((b"meta/train.txt", b"meta/test.txt"), _food),
    "Oxford-IIIT Pet": ((b"annotations/trainval.txt", b"annotations/test.txt"), _pets),
}

LIST_NAMES = frozenset(
    {name.rpartition(b"/")[2] for names, _ in _KNOWN.values() for name in names} | LABEL_FILES
)
"""What files that say splits or classes are called."""
