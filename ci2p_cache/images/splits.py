"""Which names mean a split, and which names look like splits but cannot be read as such.

Names of one data set share what stands around the word: `seg_train` and `seg_test`, `Train Images`
and `Test Images`. A name counts only together with its neighbours, because a class may be called
`test` or `train`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["SPLIT_NAMES", "SPLIT_ORDER", "UNLABELLED", "look_like_parts", "look_like_splits",
           "split_folders"]  # fmt: skip

SPLIT_ORDER = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys((b"train", b"training", b"trainval"), "train"),
    **dict.fromkeys((b"val", b"valid", b"validation", b"dev", b"eval", b"evaluation"), "val"),
    **dict.fromkeys((b"test", b"testing"), "test"),
}
"""Names of folders and archives that mean a split, in any case."""

UNLABELLED = "unlabelled"
"""What a folder is that holds pictures to be predicted, beside `train` and another split."""

_UNLABELLED_NAMES = dict.fromkeys(
    (b"pred", b"prediction", b"predictions", b"unlabeled", b"unlabelled"), UNLABELLED
)
_WORDS = SPLIT_NAMES | _UNLABELLED_NAMES

_ANY_WORD = {word.decode() for word in _WORDS} | {"holdout"}
_CONTENTS = {
    *("set", "data", "dataset", "images", "image", "imgs", "img", "pics", "photos", "samples")
}  # fmt: skip
"""Words that say nothing of what images show."""
_FILLERS = _CONTENTS | {
    *("public", "private", "single", "final", "full", "all", "raw", "original", "new", "small"),
}
"""Words that a split's name may have beside the word for the split."""
_PARTS = {"part", "fold", "batch", "chunk", "shard", "split", "subset"}
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def split_folders(names: Sequence[bytes]) -> dict[bytes, str]:
    """Returns which of all folders beside each other are splits of one data set, and which each.

    They are `train`, `val`, `test` or another word for them in any case, with a prefix and a suffix
    that all of them share, or `UNLABELLED`. Without one for train the result is empty. A name with
    a prefix or suffix needs a second one; a folder `train` may stand alone.
    """
    lowered = {name: name.lower() for name in names}
    best: dict[bytes, str] = {}
    for before, after in _surroundings(list(lowered.values())):
        form = re.compile(re.escape(before) + rb"(.*)" + re.escape(after), re.DOTALL)
        matches = ((name, form.fullmatch(text)) for name, text in lowered.items())
        found = {name: _WORDS[m[1]] for name, m in matches if m is not None and m[1] in _WORDS}
        splits = set(found.values()) - {UNLABELLED}
        if len(splits) < 2:
            found = {name: split for name, split in found.items() if split == "train"}
        if "train" in splits and (splits > {"train"} or not before + after):
            best = max(best, found, key=len)
    return best


def _surroundings(names: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns what stands before and after a word for train in any of the names; nothing first."""
    found = [(b"", b"")]
    for name in names:
        for word, split in SPLIT_NAMES.items():
            at = name.find(word) if split == "train" else -1
            if at >= 0:
                found.append((name[:at], name[at + len(word) :]))
    return list(dict.fromkeys(found))


def look_like_splits(names: Sequence[str]) -> bool:
    """Whether each of two or more names says a split and nothing else that distinguishes them."""
    words = [_words(name) for name in names]
    if len(words) < 2:
        return False
    shared = set.intersection(*words) - _ANY_WORD
    return all(own & _ANY_WORD and not own - shared - _ANY_WORD - _FILLERS for own in words)


def look_like_parts(names: Sequence[str]) -> bool:
    """Whether two or more names are numbered parts of one thing: `part_1`, `images_001`, ..."""
    words = [_words(name) for name in names]
    numbered = all(any(char.isdigit() for char in name) for name in names)
    return (
        len(words) > 1
        and numbered
        and all(own == words[0] for own in words)
        and bool(words[0] & _PARTS or (words[0] and words[0] <= _CONTENTS))
    )


def _words(name: str) -> set[str]:
    """Returns the words of a name in lower case; `trainset` and `tests` lose their endings."""
    found = set()
    for word in re.split(r"[^a-z]+", _CAMEL.sub(" ", name).lower()):
        stem = re.sub(r"(set|data|images|s)$", "", word)
        found.add(stem if stem in _ANY_WORD else word)
    return found - {""}
