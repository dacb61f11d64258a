"""Public data sets whose labels or splits are in lists beside the images, as they are published.

======================  ====================================================================
ImageNet, Kaggle        ILSVRC/Data/CLS-LOC/{train,val}, LOC_val_solution.csv beside ILSVRC/
ImageNet, image-net.org train and val, ILSVRC2012_devkit_t12/data/; val is flat in both
Tiny ImageNet           a flat val with val_annotations.txt
CUB-200-2011            images/CLASS/, images.txt, image_class_labels.txt, train_test_split.txt
Food-101                images/CLASS/, meta/train.txt, meta/test.txt
Oxford-IIIT Pet         images/CLASS_NUMBER.jpg, annotations/trainval.txt, annotations/test.txt
======================  ====================================================================

Russakovsky et al. 2015, arXiv 1409.0575; Wah et al. 2011, CNS-TR-2011-001; Bossard et al. 2014,
ECCV; Parkhi et al. 2012, CVPR.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH119, PTH120, PTH122

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ci2p_cache.errors import SourceError
from ci2p_cache.images.labels import DEVKIT, find_file, small_file, text_lines
from ci2p_cache.images.names import Tally, as_key, for_display, join
from ci2p_cache.images.tree import Tree

__all__ = ["DEVKIT", "LIST_NAMES", "Listing", "data_folder", "flat_val_labels", "label_folders",
           "listed_layout"]  # fmt: skip

_SOLUTION = b"LOC_val_solution.csv"
_GROUND_TRUTH = b"ILSVRC2012_validation_ground_truth.txt"
_META = b"meta.mat"
_TINY = b"val_annotations.txt"
_NUM_CLASSES = 1000
_IMAGES = b"images"


def data_folder(tree: Tree, folder: bytes) -> bytes:
    """Returns the path of the folder below `folder` with ImageNet's train and val; or empty."""
    for below in (b"ILSVRC/Data/CLS-LOC", b"Data/CLS-LOC", b"CLS-LOC"):
        if tree.is_folder(join(folder, below)):
            return join(folder, below)
    return b""


def label_folders(root: bytes, data: bytes) -> tuple[bytes, ...]:
    """Returns the absolute folders in which files of labels and names are looked for, best first.

    They are the source, the folder with train and val, and those above it as far as the tree is
    called ILSVRC/Data/CLS-LOC.
    """
    found = [root, join(root, data)]
    for name in (b"CLS-LOC", b"Data", b"ILSVRC"):
        if os.path.basename(found[-1]) != name:
            break
        found.append(os.path.dirname(found[-1]))
    return tuple(dict.fromkeys(found))


def flat_val_labels(
    tree: Tree, folders: Sequence[bytes], names: Sequence[bytes], val: bytes
) -> tuple[dict[bytes, str], str]:
    """Finds the class of every image of a flat `val` folder.

    Args:
        tree: Where the folders are.
        folders: Where to look, as `label_folders` gives them.
        names: File names of the images, sorted.
        val: Absolute path of the folder. Tiny ImageNet's `val_annotations.txt` is in it, or in
            the one above.

    Returns:
        File name -> class (WordNet id), and the path of the file that says so.
    """
    for where, name, read in (
        ((val, os.path.dirname(val)), _TINY, _tiny_labels),
        (folders, _SOLUTION, _solution_labels),
        (folders, _GROUND_TRUTH, _ground_truth_labels),
    ):
        path = find_file(tree, where, name)
        if path is not None:
            return read(tree, path, names), for_display(path)
    raise SourceError(
        f"{for_display(val)} holds {len(names)} images, no class folders, and nothing says what "
        f"they show; looked for {_TINY.decode()} in it, for {_SOLUTION.decode()} and "
        f"{_GROUND_TRUTH.decode()} in "
        + ", ".join(for_display(folder) for folder in folders)
        + f", and in {DEVKIT.decode()}/ there",
        hint=f"put {_SOLUTION.decode()} (Kaggle) or {DEVKIT.decode()}/ (image-net.org) beside "
        "train and val, or sort the images into class folders; or --labels none encodes images "
        "without labels",
    )


def _tiny_labels(tree: Tree, path: bytes, names: Sequence[bytes]) -> dict[bytes, str]:
    """Reads rows `val_0.JPEG TAB n03444034 TAB 0 TAB 32 ...`: image, then class and box."""
    rows = [line.split("\t") for line in text_lines(path, tree)]
    classes = {row[0]: row[1].strip() for row in rows if len(row) > 1}
    return _of_each(path, classes, {name: as_key(name) for name in names})


def _solution_labels(tree: Tree, path: bytes, names: Sequence[bytes]) -> dict[bytes, str]:
    """Reads rows `ILSVRC2012_val_00000001,n01751748 111 108 ...`: id, then class and box."""
    rows = [row for row in csv.reader(text_lines(path, tree)) if len(row) >= 2 and row[1].strip()]
    classes = {row[0]: row[1].split()[0] for row in rows if row[0] != "ImageId"}
    return _of_each(path, classes, {name: as_key(os.path.splitext(name)[0]) for name in names})


def _of_each(path: bytes, classes: Mapping[str, str], ids: dict[bytes, str]) -> dict[bytes, str]:
    """Returns the class of each image by the id that `classes` has it under."""
    missing = next((name for name, id_ in ids.items() if not classes.get(id_)), None)
    if missing is not None:
        raise SourceError(
            f"{for_display(path)} has no row for the image {for_display(missing)}; "
            f"it has {len(classes)} rows, the folder {len(ids)} images"
        )
    return {name: classes[id_] for name, id_ in ids.items()}


def _ground_truth_labels(tree: Tree, path: bytes, names: Sequence[bytes]) -> dict[bytes, str]:
    """Reads one id per line, for the images in the order of their names."""
    lines = [line.strip() for line in text_lines(path, tree) if line.strip()]
    if len(lines) != len(names):
        raise SourceError(
            f"{for_display(path)} has {len(lines)} labels, but there are {len(names)} images; "
            "they belong together by position, so none can be missing",
            hint=f"complete the images, or use {_SOLUTION.decode()}, which names them",
        )
    wnids = _devkit_wnids(tree, join(os.path.dirname(path), _META), path)
    labels = {}
    for name, line in zip(names, lines, strict=True):
        number = int(line) if line.isascii() and line.isdigit() else 0
        if number not in wnids:
            raise SourceError(
                f"{for_display(path)} labels {for_display(name)} with {line!r}; wanted one of the "
                f"{len(wnids)} ids of {_META.decode()}, 1 to {_NUM_CLASSES}"
            )
        labels[name] = wnids[number]
    return labels


def _devkit_wnids(tree: Tree, path: bytes, truth: bytes) -> dict[int, str]:
    """Returns ILSVRC2012_ID -> WordNet id of the 1,000 leaf classes; their order is not sorted."""
    if not tree.is_file(path):
        raise SourceError(
            f"{for_display(truth)} numbers classes in the development kit's own order, which only "
            f"{_META.decode()} beside it explains; it is missing",
            hint=f"copy {_META.decode()} from {DEVKIT.decode()}/data",
        )
    # Only here: no other source needs it, and importing it takes time.
    from scipy.io import loadmat

    content = io.BytesIO(small_file(path, tree))
    try:
        synsets = loadmat(content, squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {int(number): str(wnid) for number, wnid in rows if int(number) <= _NUM_CLASSES}
    except Exception as error:
        # scipy raises nearly anything on a damaged file.
        raise SourceError(
            f"{for_display(path)} is not the development kit's table of synsets: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class Listing:
    """What the lists of a data set say about the files below its folder of images."""

    name: str
    """Name of the data set."""
    path: bytes
    """The folder of images, below the tree's root."""
    splits: dict[str, dict[bytes, str]]
    """Split -> path below `path` -> class; train first. Only images that are there."""
    notices: tuple[str, ...]
    """Which images are in no list, and which listed ones are missing."""


def listed_layout(tree: Tree, folder: bytes, tally: Tally) -> Listing | None:
    """Returns what the lists in a folder say, where it is one of the data sets; None otherwise.

    `tally` takes files that are no images.
    """
    if not tree.is_folder(join(folder, _IMAGES)):
        return None
    for name, (files, read) in _KNOWN.items():
        paths = [join(folder, file) for file in files]
        if all(map(tree.is_file, paths)):
            lists = [text_lines(join(tree.root, path), tree) for path in paths]
            return _found_of(tree, join(folder, _IMAGES), name, read(*lists), tally)
    return None


def _found_of(
    tree: Tree, images: bytes, name: str, lists: dict[str, dict[str, str]], tally: Tally
) -> Listing:
    """Takes what is there of the listed images; paths in lists are without extension, or with."""
    splits: dict[str, dict[bytes, str]] = {split: {} for split in lists}
    unlisted, count = b"", 0
    for path in tree.images(images, tally):
        below = path[len(images) + 1 :]
        keys = (as_key(below), as_key(below).rpartition(".")[0])
        found = next(((s, of[k]) for s, of in lists.items() for k in keys if k in of), None)
        if found is None:
            unlisted, count = unlisted or path, count + 1
        else:
            splits[found[0]][below] = found[1]
    shown = for_display(join(tree.root, images))
    num_found, num_listed = sum(map(len, splits.values())), sum(map(len, lists.values()))
    if not splits["train"]:
        raise SourceError(
            f"{shown} is laid out as {name}, and none of the {len(lists['train'])} images that its "
            "lists name for train is there",
            hint="unpack the images into it, or move the lists away",
        )
    notices = [f"{name}: splits and classes come from its lists, beside {shown}"]
    if count:
        notices.append(f"{count} images skipped that no list names: {for_display(unlisted)}")
    if num_found < num_listed:
        missing = num_listed - num_found
        notices.append(f"{missing} of {num_listed} images in the lists of {name} are missing")
    return Listing(name, images, {s: of for s, of in splits.items() if of}, tuple(notices))


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
    {name.rpartition(b"/")[2] for names, _ in _KNOWN.values() for name in names}
    | {_SOLUTION, _GROUND_TRUTH, _META, _TINY}
)
"""What files that say splits or classes are called."""
