"""One sample of a tar: the members whose names are the same up to the first dot, and its label."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ci2p_cache.errors import SourceError
from ci2p_cache.images.labels import NO_LABEL, written
from ci2p_cache.images.names import as_key, for_display
from ci2p_cache.images.source import SourceOptions
from ci2p_cache.images.tar_members import Member

__all__ = ["LabelFiles", "Missing", "Sample"]

_CLS, _JSON = b"cls", b"json"
_MAX_BYTES = {_CLS: 4096, _JSON: 2**24}
_MAX_OTHER_BYTES = 4096
"""Of a label file of another extension, which an option names, and of `k.final.cls` for k."""

_FIELDS = ("label", "cls", "class_name")

_MOST_NAMED = 8
"""Fields or extensions that a message names."""


@dataclass(slots=True)
class Sample:
    """Members that belong together, while they are met."""

    base: bytes
    """Their path up to the first dot of the file name."""
    images: list[Member] = field(default_factory=list)
    labels: dict[bytes, bytes] = field(default_factory=dict)
    """Content of the label files, by extension."""
    others: list[bytes] = field(default_factory=list)
    """Extensions of the first members that are neither."""
    several: tuple[bytes, bytes] | None = None
    """Names of two images, where there is more than one."""
    count: int = 0

    def add_other(self, extension: bytes) -> None:
        """Notes a member that is neither image nor label."""
        if len(self.others) < _MOST_NAMED:
            self.others.append(extension)


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a sample has no label, as the rest of a sentence, and what helps."""

    what: str
    hint: str | None = None


class LabelFiles:
    """Knows which members hold labels, and reads them.

    Args:
        options: `label_column` names an extension, or a field of the .json; with `labels` none,
            what is found does not count.
    """

    def __init__(self, options: SourceOptions) -> None:
        self.are_wanted = options.labels == "auto"
        """Whether what they hold counts."""
        self._column = options.label_column
        self._own = None if self._column is None else self._column.lower().lstrip(".").encode()

    def max_bytes(self, extension: bytes) -> int | None:
        """Returns how large a label file of that extension may be; None where it is none.

        Args:
            extension: All behind the first dot, in lower case.
        """
        before, _, last = extension.rpartition(b".")
        if extension == self._own:
            return _MAX_BYTES.get(extension, _MAX_OTHER_BYTES)
        if last == self._own or last in _MAX_BYTES:
            return _MAX_OTHER_BYTES if before else _MAX_BYTES.get(last, _MAX_OTHER_BYTES)
        return None

    def label(self, sample: Sample, image: Member) -> str | int | Missing:
        """Returns what the .cls says, or else the .json, which with a .cls can be anything.

        Raises:
            SourceError: the .json is none; the message does not say where.
        """
        # `k.final.cls` belongs to `k.final.jpg`, where there is no `k.cls`.
        middle = image.name[len(sample.base) + 1 :].lower().rpartition(b".")[0]
        files = {}
        for extension, text in sample.labels.items():
            before, _, last = extension.rpartition(b".")
            if before == middle:
                files[last] = text
        files |= {each: text for each, text in sample.labels.items() if b"." not in each}
        wanted = self._own or _CLS
        if wanted in files and wanted != _JSON:
            return as_key(files[wanted])
        if _JSON in files:
            return self._in_json(files[_JSON])
        beside = [*sample.others, *sample.labels]
        found = f"; found .{for_display(b', .'.join(beside)[:300])}" if beside else ""
        looked = ".cls or .json"
        if self._own is not None:
            looked = f".{for_display(self._own)} or a .json with `{self._column}`"
        return Missing(f"has no label; looked for a {looked} beside it{found}")

    def _in_json(self, text: bytes) -> str | int | Missing:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"a .json that is no JSON: {error}") from error
        fields = found if isinstance(found, dict) else {}
        usable = {name: value for name, value in fields.items() if _is_label(value)}
        wanted = _FIELDS if self._column is None else (self._column,)
        for name in wanted:
            if name in usable:
                label = written(usable[name])
                return NO_LABEL if label is None else label
        names = ", ".join(list(fields)[:_MOST_NAMED]) or "none"
        best = [name for name in usable if "class" in name.lower() or "categ" in name.lower()]
        best = (best or list(usable) or ["FIELD"])[:1]
        return Missing(
            f"has no label: its .json has the fields {for_display(names.encode()[:300])}; looked "
            f"for {' or '.join(wanted)} with a text or a whole number",
            hint=f"repeat the command with --label-column {best[0][:100]}",
        )


def _is_label(value: object) -> bool:
    try:
        written(value)
    except SourceError:
        return False
    return value is not None
