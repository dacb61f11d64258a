"""What is said where class folders were wanted and none is there, and which command helps."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import PARQUET_SUFFIXES, TAR_SUFFIXES
from ci2p_cache.images.names import as_key, for_display, join
from ci2p_cache.images.tally import Tally
from ci2p_cache.images.tree import DiskTree, Tree

__all__ = ["NONE_HINT", "WANTED", "no_class_folders"]

WANTED = (
    "wanted SRC/CLASS/image.jpg, SRC/train/CLASS/image.jpg with val/ and test/ beside train/, or "
    "ImageNet's ILSVRC/Data/CLS-LOC"
)
NONE_HINT = "--labels none encodes images without labels"

_OTHER_SOURCES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES, b".zip", b".csv", b".tsv")
_NUMBERED = re.compile(r"(.*[^\d._-])([._-])\d+\.\w+")
"""Names as `Abyssinian_12.jpg` and `cat.12.jpg`: class, sign, number."""
_FEWEST_OF_A_NAME = 2
_MOST_LOOKED_AT = 1000


def no_class_folders(tree: Tree, path: bytes, files: list[bytes], tally: Tally) -> SourceError:
    """Returns the error of a folder without class folders.

    Args:
        tree: Where it is.
        path: The folder.
        files: Its files.
        tally: What was left out.
    """
    images = [name for name in files if tree.is_image(join(path, name), Tally())]
    left_out = "; ".join(tally.notices())
    shown = for_display(join(tree.root, path))
    if left_out and not images:
        return SourceError(
            f"{shown} has no image in it; {left_out}", hint=_hint(tree, path, images)
        )
    if images:
        found = f"but {len(images)} images, for example {for_display(images[0])}"
    elif files:
        found = f"and {len(files)} files that are no images, for example {for_display(files[0])}"
    else:
        found = "and no files"
    return SourceError(
        f"{shown} has no class folders, {found}; {WANTED}",
        hint=_hint(tree, path, images),
    )


def _hint(tree: Tree, path: bytes, images: list[bytes]) -> str | None:
    on_disk = isinstance(tree, DiskTree)
    below = () if images else tree.walk(path, Tally())
    around = list(itertools.islice(below, _MOST_LOOKED_AT))
    for folder in dict.fromkeys((path, path.rpartition(b"/")[0])):
        around += [join(folder, name) for name in tree.list_folder(folder, Tally())[1]]
    other = next((name for name in around if name.lower().endswith(_OTHER_SOURCES)), None)
    if other is not None:
        file = for_display(join(tree.root, other) if on_disk else other)
        first = "" if on_disk else "unpack the archive, and "
        return f"{first}name {file} as SRC if it holds the images or their labels; or {NONE_HINT}"
    if not images:
        return None
    sign = _sign_behind_class(images)
    if sign and on_disk:
        place = shlex.quote(for_display(join(tree.root, path)))
        cut = "%%." if sign == "." else f"%{sign}"
        return (
            f"if the names of files begin with the class: (cd {place} && echo path,label && for f "
            f'in *{sign}*; do echo "$f,${{f{cut}*}}"; done) > labels.csv; mv labels.csv {place}; '
            f"then name {place}/labels.csv as SRC; or {NONE_HINT}"
        )
    return f"name the folder above it, if this is the folder of a class; or {NONE_HINT}"


def _sign_behind_class(images: list[bytes]) -> str | None:
    """Returns what stands between class and number, where all names have both."""
    found = [_NUMBERED.fullmatch(as_key(name)) for name in images]
    matches = [match for match in found if match is not None]
    names = Counter(match[1] for match in matches)
    signs = {match[2] for match in matches}
    if len(matches) < len(images) or len(signs) != 1 or len(names) < 2:
        return None
    return signs.pop() if max(names.values()) >= _FEWEST_OF_A_NAME else None
