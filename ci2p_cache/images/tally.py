"""What a listing leaves out, counted; why it is left out is the lister's business."""

from __future__ import annotations

from collections import Counter

from ci2p_cache.images.names import for_display

__all__ = ["Tally"]

_SENTENCES = {
    "hidden": "hidden files or folders skipped",
    "empty": "folders left out that hold no image",
    "special": "entries skipped that are neither files nor folders (pipes, sockets, devices)",
    "broken": "links skipped that lead nowhere",
    "loop": "links skipped that lead back to a folder above them",
    "ignored": "files ignored that are no images",
    "unreadable": "files of unknown kind ignored, because they may not be read",
    "member": "archive members skipped that are no files (links, pipes, devices)",
    "unlabelled": "images without a label skipped",
    "unchosen": "images left out whose extension is not that of --image-column",
    "outside": "images left out that are in no class folder",
    "stray": "images ignored that are beside the class folders, in none of them",
}


class Tally:
    """Counts what a listing leaves out, with the first example of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._foreign: Counter[str] = Counter()

    def add(self, kind: str, path: bytes) -> None:
        """Counts one entry; `kind` is one of the kinds that have a sentence."""
        self._counts[kind] += 1
        self._examples.setdefault(kind, for_display(path))

    def add_foreign(self, name: str, path: bytes) -> None:
        """Counts one image of a format that is not read; `name` is its suffix or format."""
        self._foreign[name] += 1
        self._examples.setdefault("foreign", for_display(path))

    def merge(self, other: Tally) -> None:
        """Adds what another tally counted."""
        self._counts += other._counts
        self._foreign += other._foreign
        self._examples = {**other._examples, **self._examples}

    def notices(self) -> tuple[str, ...]:
        """Returns one sentence per kind that was met."""
        found = [
            f"{self._counts[kind]} {sentence}, for example {self._examples[kind]}"
            for kind, sentence in _SENTENCES.items()
            if self._counts[kind]
        ]
        if self._foreign:
            kinds = ", ".join(f"{count} {name}" for name, count in sorted(self._foreign.items()))
            found.append(
                f"{self._foreign.total()} images ignored whose format is not read ({kinds}), for "
                f"example {self._examples['foreign']}; convert them to PNG or JPEG to use them"
            )
        return tuple(found)
