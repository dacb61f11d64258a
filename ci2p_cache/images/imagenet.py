"""ImageNet as it comes: where its images are, and the labels and names kept beside them.

Layouts: the Kaggle tree `ILSVRC/Data/CLS-LOC/{train,val}` with `LOC_val_solution.csv` and
`LOC_synset_mapping.txt` beside `ILSVRC/`; and the archives of image-net.org with the development
kit `ILSVRC2012_devkit_t12` (Russakovsky et al. 2015, arXiv 1409.0575). In both `val` is flat.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH119, PTH120, PTH122

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.tree import DiskTree, Tree

__all__ = ["DEVKIT", "LABEL_FILES", "data_folder", "flat_val_labels", "label_folders",
           "read_titles", "text_lines"]  # fmt: skip

DEVKIT = b"ILSVRC2012_devkit_t12"
"""Folder of the development kit; it may be beside train and val and is no class."""

_SOLUTION = b"LOC_val_solution.csv"
_GROUND_TRUTH = b"ILSVRC2012_validation_ground_truth.txt"
_META = b"meta.mat"
_TINY = b"val_annotations.txt"
_SYNSETS = b"LOC_synset_mapping.txt"
LABEL_FILES = frozenset({_SOLUTION, _GROUND_TRUTH, _META, _TINY})
"""What files with the labels of a flat `val` are called."""
_NUM_CLASSES = 1000
_MAX_TEXT_BYTES = 64 * 2**20
_DISK = DiskTree(b"/")


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
    current = found[-1]
    for name in (b"CLS-LOC", b"Data", b"ILSVRC"):
        if os.path.basename(current) != name:
            break
        current = os.path.dirname(current)
        found.append(current)
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

    Raises:
        SourceError: there is no file of labels, or it does not fit the images.
    """
    tiny = _find(tree, (val, os.path.dirname(val)), _TINY)
    if tiny is not None:
        return _tiny_labels(tree, tiny, names), for_display(tiny)
    solution = _find(tree, folders, _SOLUTION)
    if solution is not None:
        return _solution_labels(tree, solution, names), for_display(solution)
    truth = _find(tree, folders, _GROUND_TRUTH)
    if truth is not None:
        return _ground_truth_labels(tree, truth, names), for_display(truth)
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


def _find(tree: Tree, folders: Sequence[bytes], name: bytes) -> bytes | None:
    for folder in folders:
        for below in (b"", b"data", DEVKIT, join(DEVKIT, b"data")):
            path = join(folder, join(below, name))
            if tree.is_file(path):
                return path
    return None


def text_lines(path: bytes, tree: Tree = _DISK) -> list[str]:
    """Returns the lines of a small UTF-8 file.

    Args:
        path: Its absolute path.
        tree: Where it is.

    Raises:
        SourceError: it cannot be read, is too large or is not UTF-8.
    """
    try:
        return _small_file(path, tree).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{for_display(path)} cannot be read: {error}") from error


def _small_file(path: bytes, tree: Tree) -> bytes:
    try:
        content = tree.content(path, _MAX_TEXT_BYTES)
    except ResourceError:
        raise
    except (OSError, ImageDecodeError) as error:
        raise SourceError(f"{for_display(path)} cannot be read: {error}") from error
    if content is None:
        raise SourceError(
            f"{for_display(path)} is larger than {_MAX_TEXT_BYTES} bytes; is it that file?"
        )
    return content


def _tiny_labels(tree: Tree, path: bytes, names: Sequence[bytes]) -> dict[bytes, str]:
    """Reads rows `val_0.JPEG TAB n03444034 TAB 0 TAB 32 ...`: image, then class and box."""
    rows = [line.split("\t") for line in text_lines(path, tree)]
    classes = {row[0]: row[1].strip() for row in rows if len(row) > 1}
    return _of_each(path, classes, {name: as_key(name) for name in names})


def _of_each(path: bytes, classes: Mapping[str, str], ids: dict[bytes, str]) -> dict[bytes, str]:
    """Returns the class of each image by the id that `classes` has it under."""
    missing = next((name for name, id_ in ids.items() if not classes.get(id_)), None)
    if missing is not None:
        raise SourceError(
            f"{for_display(path)} has no row for the image {for_display(missing)}; "
            f"it has {len(classes)} rows, the folder {len(ids)} images"
        )
    return {name: classes[id_] for name, id_ in ids.items()}


def _solution_labels(tree: Tree, path: bytes, names: Sequence[bytes]) -> dict[bytes, str]:
    """Reads rows `ILSVRC2012_val_00000001,n01751748 111 108 ...`: id, then class and box."""
    classes: dict[str, str] = {}
    for row in csv.reader(text_lines(path, tree)):
        words = row[1].split() if len(row) >= 2 else []
        if words and row[0] != "ImageId":
            classes[row[0]] = words[0]
    return _of_each(path, classes, {name: as_key(os.path.splitext(name)[0]) for name in names})


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
    """Returns ILSVRC2012_ID -> WordNet id of the 1,000 leaf classes, which are not in sorted order.

    Raises:
        SourceError: the file is missing or of another form.
    """
    if not tree.is_file(path):
        raise SourceError(
            f"{for_display(truth)} numbers classes in the development kit's own order, which only "
            f"{_META.decode()} beside it explains; it is missing",
            hint=f"copy {_META.decode()} from {DEVKIT.decode()}/data",
        )
    # Only here: no other source needs it, and importing it takes time.
    from scipy.io import loadmat

    content = io.BytesIO(_small_file(path, tree))
    try:
        synsets = loadmat(content, squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        wnids = {int(number): str(wnid) for number, wnid in rows if int(number) <= _NUM_CLASSES}
    except Exception as error:
        # scipy raises nearly anything on a damaged file.
        raise SourceError(
            f"{for_display(path)} is not the development kit's table of synsets: {error}"
        ) from error
    return wnids


def read_titles(
    folders: Sequence[bytes], classes: Sequence[str], tree: Tree = _DISK
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds names for people.

    Looks for `classes.json` ({folder: title}), `classes.txt` (lines "folder title words") and
    ImageNet's `LOC_synset_mapping.txt` (the same lines), and takes the first that exists; also
    Tiny ImageNet's `words.txt`, where `wnids.txt` is beside it.

    Args:
        folders: Where to look.
        classes: The class names.
        tree: Where the folders are.

    Returns:
        One title per class, the class name where none is given; and notices.
    """
    tiny = (b"words.txt",) if _find(tree, folders, b"wnids.txt") else ()
    for name in (b"classes.json", b"classes.txt", _SYNSETS, *tiny):
        path = _find(tree, folders, name)
        if path is None:
            continue
        try:
            lines = text_lines(path, tree)
            is_json = name.endswith(b".json")
            titles = _json_titles(path, lines) if is_json else _line_titles(lines, classes)
        except SourceError as error:
            return tuple(classes), (f"no names for people were read: {error}",)
        known = [title for title in classes if title in titles]
        notices = []
        if len(known) < len(classes):
            missing = next(title for title in classes if title not in titles)
            notices.append(
                f"{for_display(path)} names {len(known)} of {len(classes)} classes; "
                f"not, for example, {missing}"
            )
        return tuple(titles.get(name, name) for name in classes), tuple(notices)
    return tuple(classes), ()


def _json_titles(path: bytes, lines: list[str]) -> Mapping[str, str]:
    try:
        found = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{for_display(path)} is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(title, str) for title in found.values()):
        raise SourceError(f"{for_display(path)} wants an object of folder names and titles")
    return found


def _line_titles(lines: list[str], classes: Sequence[str]) -> Mapping[str, str]:
    """Reads lines of a class and its title; a class may have spaces, so the longest one counts."""
    known = set(classes)
    titles: dict[str, str] = {}
    for line in lines:
        for name, title in _divisions(line.strip()):
            if name in known:
                titles[name] = title or name
                break
    return titles


def _divisions(line: str) -> Iterator[tuple[str, str]]:
    """Yields (head, rest) of a line cut at each of its white space, longest head first."""
    yield line, ""
    for position in range(len(line) - 1, 0, -1):
        if line[position].isspace():
            yield line[:position].rstrip(), line[position:].strip()
