"""The content of one tar: images with their labels.

::

    members, and those of tars in the tar --one name up to the first dot--> sample --> image, label

A sample is a run of members whose paths are the same up to the first dot of the file name
(webdataset.github.io, "The WebDataset Format"): one image, and a `.cls` or `.json` with its label.
Images without any such file are listed too: the folders they are in may be their classes.

A `CLASS.tar` in a tar counts as a folder `CLASS`: ImageNet's training images come so
(`ILSVRC2012_img_train.tar`). The inner tars are plain, so their content is in the outer one as it
is, and nothing is unpacked. Tars in tars in tars are refused.
"""

# Paths are bytes here, which pathlib does not have.
# ruff: noqa: PTH119

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import TAR_SUFFIXES, Archive
from ci2p_cache.images.labels import NO_LABEL, LabelTable, written
from ci2p_cache.images.listed_layouts import LIST_NAMES
from ci2p_cache.images.names import Tally, as_key, for_display, is_hidden, join
from ci2p_cache.images.source import SourceOptions
from ci2p_cache.images.tar_bytes import Member, TarStream, members, open_stream
from ci2p_cache.images.tree import IMAGE_SUFFIXES, SNIFF_BYTES, is_image_content

__all__ = ["NO_LABEL_FILE", "Listed", "TarLister", "refusal", "stem"]

NO_LABEL_FILE = -1
"""Label of an image that has no file of labels beside it."""

_INNER = b".tar"
_CLS, _JSON = b"cls", b"json"
_OF_SAMPLES = (*IMAGE_SUFFIXES, b".cls", b".json")
_FIELDS = ("label", "cls", "class_name")

_MAX_SAMPLE_MEMBERS = 1024
_MAX_LABEL_BYTES = {_CLS: 4096, _JSON: 2**24}
_MAX_OTHER_LABEL_BYTES = 4096
"""Largest label file with another extension, which an option names, or `k.final.cls` for k."""
_MAX_LINKED_BYTES, _MAX_ALL_LINKED_BYTES = 2**16, 2**24
"""Limits for one hard-linked label file, and for all of them: they stay in memory."""
_MAX_TEXT_BYTES = 2**26
"""Limit for all lists of a public data set in one archive."""
_MOST_NAMED = 8
"""Fields or extensions that a message names."""

_NO_MORE_DOTS = r" --transform='s,\.\([^./]*\.\),_\1,'"
"""An option of tar: the first dot of a name that has two becomes `_`."""


class _Images:
    """The images of one archive, in some 30 bytes and their name each."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._numbers = array("q")
        """Four numbers for each image: end of its name, offset, size, label."""

    def add(self, image: Member, label: int) -> None:
        """Adds one image; `label` is what `LabelTable.add` returned, or NO_LABEL_FILE."""
        self._names += image.name
        self._numbers.extend((len(self._names), image.offset, image.size, label))

    def __len__(self) -> int:
        return len(self._numbers) // 4

    def __iter__(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields name, offset, size and label."""
        return map(self._row, range(len(self)))

    def _row(self, at: int) -> tuple[bytes, int, int, int]:
        end, offset, size, label = self._numbers[4 * at : 4 * at + 4]
        return bytes(self._names[self._numbers[4 * at - 4] if at else 0 : end]), offset, size, label

    def by_offset(self) -> _Images:
        """Returns them in the order of their content, which is how an archive is best read."""
        ordered = _Images()
        for at in np.argsort(np.array(self._numbers[1::4]), kind="stable").tolist():
            name, offset, size, label = self._row(at)
            ordered.add(Member(name, offset, size), label)
        return ordered


@dataclass(slots=True)
class Listed:
    """What was found in one archive."""

    images: _Images = field(default_factory=_Images)
    tally: Tally = field(default_factory=Tally)
    """What is no image."""
    is_nested: bool = False
    """Whether it holds tars, which were read."""
    texts: dict[bytes, bytes | None] = field(default_factory=dict)
    """Lists of a public data set, by name; None for one that was too large."""
    has_labels: bool = False
    """Whether there are files of labels."""
    problem: SourceError | None = None
    """Why the first image without a label has none; None where all have one."""


@dataclass(slots=True)
class _Sample:
    """Members that belong together, collected while the tar is read."""

    base: bytes
    """Their path up to the first dot of the file name."""
    image: Member | None = None
    labels: dict[bytes, bytes] = field(default_factory=dict)
    """Content of the label files, by extension."""
    others: list[bytes] = field(default_factory=list)
    """Extensions of the members that are neither."""
    several: tuple[bytes, bytes] | None = None
    """Names of two images, where there is more than one."""
    count: int = 0


@dataclass(slots=True)
class _Content:
    """The first bytes of a member, read once."""

    size: int
    """Size of the member."""
    stream: TarStream | None
    """Stands at its content; None where only `head` is known."""
    head: bytes = b""

    def first(self, count: int) -> bytes:
        """Returns that many bytes; fewer where it ends before, or they are not known."""
        missing = min(count, self.size) - len(self.head)
        if missing > 0 and self.stream is not None:
            self.head += self.stream.read(missing)
        return self.head[:count]


class TarLister:
    """Lists one archive.

    Args:
        full: Its absolute path.
        archive: It, for messages.
        labels: Takes each label that is met.
        options: `image_column` is the extension of the images; `label_column` that of the labels,
            or a field of the .json; with `labels` none, what is found does not count.
    """

    def __init__(
        self, full: bytes, archive: Archive, labels: LabelTable, options: SourceOptions
    ) -> None:
        self._full = full
        self._archive = archive
        self._labels = labels
        self._options = options
        self._image = _extension(options.image_column)
        self._label = _extension(options.label_column)

    def list(self) -> Listed:
        """Returns the images, and the other members.

        Hard links to earlier members are images too: a first pass finds what they lead to.
        """
        listed = self._pass(frozenset())
        if self._links:
            listed = self._pass(frozenset(self._links))
            listed.images = listed.images.by_offset()
        return listed

    def _pass(self, wanted: frozenset[bytes]) -> Listed:
        """Reads all headers once; `wanted` are the members that hard links lead to."""
        self._listed = listed = Listed()
        self._links: set[bytes] = set()
        self._targets: dict[bytes, tuple[Member, bytes]] = {}
        self._linked_bytes = self._text_bytes = 0
        self._apart: list[bytes] = []
        self._num_apart = 0
        self._unlabelled: bytes | None = None
        sample: _Sample | None = None
        for found, stream in _walk(open_stream(self._full), self._full, listed):
            member, content = found, _Content(found.size, stream)
            if found.link:
                self._links.add(found.link)
            if found.link in self._targets:
                target, head = self._targets[found.link]
                member = dataclasses.replace(target, name=found.name)
                content = _Content(target.size, None, head)
            if not member.is_file:
                listed.tally.add("member", self._shown(member))
                continue
            if member.name in wanted:
                self._note_target(member, content)
            if is_hidden(member.name):
                listed.tally.add("hidden", self._shown(member))
                continue
            folder, _, name = member.name.rpartition(b"/")
            first, _, extension = name.partition(b".")
            base = join(folder, first)
            if sample is None or base != sample.base:
                self._finish(sample)
                sample = _Sample(base)
            self._take(sample, member, extension.lower(), content)
        self._finish(sample)
        self._note_labels_apart()
        return listed

    def _note_target(self, member: Member, content: _Content) -> None:
        """Remembers what is needed of a member that a hard link leads to."""
        count = SNIFF_BYTES
        if self._max_label_bytes(member.name.rpartition(b".")[2].lower()) is not None:
            count = min(member.size, _MAX_LINKED_BYTES)
            self._linked_bytes += count
        if self._linked_bytes > _MAX_ALL_LINKED_BYTES:
            raise self._error(member.name, "is one of too many label files with hard links")
        self._targets[member.name] = (member, content.first(count))

    def _take(self, sample: _Sample, member: Member, extension: bytes, content: _Content) -> None:
        sample.count += 1
        if sample.count > _MAX_SAMPLE_MEMBERS:
            raise self._error(member.name, f"has more than {_MAX_SAMPLE_MEMBERS} members")
        most = self._max_label_bytes(extension)
        if most is not None and not (b"." in extension and member.size > most):
            if self._options.labels == "auto":
                self._take_label(sample, member, extension, most, content)
            else:
                sample.others.append(extension)
        elif member.name.rpartition(b"/")[2] in LIST_NAMES:
            self._text_bytes += member.size
            fits = self._text_bytes <= _MAX_TEXT_BYTES
            self._listed.texts[member.name] = content.first(member.size) if fits else None
        elif self._is_image(member, extension, content):
            first, sample.image = sample.image, member
            if first is not None:
                if sample.labels:
                    raise self._several(sample, first.name, member.name)
                # Where folders are classes, names may have dots.
                sample.several = sample.several or (first.name, member.name)
                sample.count -= 1
                self._add_unlabelled(first, self._label_of(sample, first))
        else:
            sample.others.append(extension)

    def _take_label(
        self, sample: _Sample, member: Member, extension: bytes, most: int, content: _Content
    ) -> None:
        if sample.several is not None:
            raise self._several(sample, *sample.several)
        if extension in sample.labels:
            raise self._error(member.name, f"has two .{for_display(extension)}")
        if member.size > most:
            raise self._error(member.name, f"has a label file of {member.size} bytes")
        text = content.first(member.size)
        if len(text) < member.size and content.stream is None:
            raise self._error(member.name, f"is a hard link to {member.size} bytes of no label")
        sample.labels[extension] = text

    def _is_image(self, member: Member, extension: bytes, content: _Content) -> bool:
        last = extension.rpartition(b".")[2]
        known = b"." + last in IMAGE_SUFFIXES
        if self._image is not None:
            if known and self._image not in (extension, last):
                self._listed.tally.add("unchosen", self._shown(member))
            return self._image in (extension, last)
        return known or is_image_content(
            self._shown(member), content.first(SNIFF_BYTES), self._listed.tally
        )

    def _finish(self, sample: _Sample | None) -> None:
        """Lists the image of a sample that is complete."""
        if sample is None:
            return
        image = sample.image
        if image is None:
            self._num_apart += len(sample.labels)
            self._apart = self._apart or [sample.base + b"." + each for each in sample.labels]
            return
        try:
            label = self._label_of(sample, image)
            if not isinstance(label, SourceError):
                self._listed.images.add(image, self._labels.add(label))
        except SourceError as error:
            raise self._error(image.name, f"has {error}") from error
        if isinstance(label, SourceError):
            self._add_unlabelled(image, label)
        self._listed.has_labels |= bool(sample.labels)

    def _add_unlabelled(self, image: Member, why: str | int | SourceError) -> None:
        self._listed.images.add(image, NO_LABEL_FILE)
        if self._listed.problem is None and isinstance(why, SourceError):
            self._listed.problem = self._error(image.name, str(why), hint=why.hint)
            # Where its .json has other fields, it is beside it.
            self._unlabelled = image.name if why.hint is None else None

    def _note_labels_apart(self) -> None:
        """Says so where images and their labels are there, but not beside each other."""
        listed = self._listed
        is_cls = any(name.endswith(b".cls") for name in self._apart)
        # Class folders may have a .json of their own.
        if not is_cls and 2 * self._num_apart < len(listed.images):
            return
        listed.has_labels |= self._num_apart > 0
        if self._num_apart and self._unlabelled is not None:
            listed.problem = self._error(
                self._unlabelled,
                f"has no label beside it, and {self._num_apart} label files, for example "
                f"{for_display(self._apart[0])}, have no image beside them; the members of a "
                "sample must follow one another",
                hint=self._repacked(),
            )

    def _max_label_bytes(self, extension: bytes) -> int | None:
        """Returns how large a label file of that extension may be; None where it is none."""
        before, _, last = extension.rpartition(b".")
        if extension == self._label:
            return _MAX_LABEL_BYTES.get(extension, _MAX_OTHER_LABEL_BYTES)
        if last == self._label or last in _MAX_LABEL_BYTES:
            own = _MAX_LABEL_BYTES.get(last, _MAX_OTHER_LABEL_BYTES)
            return _MAX_OTHER_LABEL_BYTES if before else own
        return None

    def _label_of(self, sample: _Sample, image: Member) -> str | int | SourceError:
        """Returns what the .cls says, or else the .json, which with a .cls can be anything.

        Where there is no label, it is the reason: the rest of a sentence, and what helps.
        """
        # `k.final.cls` belongs to `k.final.jpg`, where there is no `k.cls`.
        middle = image.name[len(sample.base) + 1 :].lower().rpartition(b".")[0]
        parted = [(each.rpartition(b"."), text) for each, text in sample.labels.items()]
        files = {last: text for (before, _, last), text in parted if before == middle}
        files |= {last: text for (_, dot, last), text in parted if not dot}
        wanted = self._label or _CLS
        if wanted in files and wanted != _JSON:
            return as_key(files[wanted])
        if _JSON in files:
            return self._in_json(files[_JSON])
        beside = [*sample.others[:_MOST_NAMED], *sample.labels]
        found = f"; found .{for_display(b', .'.join(beside)[:300])}" if beside else ""
        looked = ".cls or .json"
        if self._label is not None:
            column = self._options.label_column
            looked = f".{for_display(self._label)} or a .json with `{column}`"
        return SourceError(f"has no label; looked for a {looked} beside it{found}")

    def _in_json(self, text: bytes) -> str | int | SourceError:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"a .json that is no JSON: {error}") from error
        fields = found if isinstance(found, dict) else {}
        usable = {name: value for name, value in fields.items() if _is_label(value)}
        column = self._options.label_column
        wanted = _FIELDS if column is None else (column,)
        for name in wanted:
            if name in usable:
                label = written(usable[name])
                return NO_LABEL if label is None else label
        names = ", ".join(list(fields)[:_MOST_NAMED]) or "none"
        best = [name for name in usable if "class" in name.lower() or "categ" in name.lower()]
        best = (best or list(usable) or ["FIELD"])[:1]
        return SourceError(
            f"has no label: its .json has the fields {for_display(names.encode()[:300])}; looked "
            f"for {' or '.join(wanted)} with a text or a whole number",
            hint=f"repeat the command with --label-column {best[0][:100]}",
        )

    def _several(self, sample: _Sample, one: bytes, other: bytes) -> SourceError:
        what = f"has several images, {for_display(one)} and {for_display(other)}"
        if one.rpartition(b".")[0] == other.rpartition(b".")[0]:
            last = for_display(one.rpartition(b".")[2])
            hint = f"repeat the command with --image-column {last}, or pack one image a sample"
            return self._error(sample.base, f"{what}; wanted one", hint=hint)
        return self._error(
            sample.base,
            f"{what}: the name of a sample ends at its first dot, so these are one sample",
            hint=self._repacked(options=_NO_MORE_DOTS, ending="renamed"),
        )

    def _repacked(self, *, options: str = "", ending: str = "sorted") -> str:
        """Returns the command that packs the archive again, its members sorted by their names."""
        folder = for_display(stem(self._full))
        parts = (for_display(self._full), folder, f"{folder}-{ending}.tar")
        old, folder, new = map(shlex.quote, parts)
        return (
            f"mkdir {folder} && tar -xf {old} -C {folder} && "
            f"tar --sort=name{options} -cf {new} -C {folder} ."
        )

    def _shown(self, member: Member) -> bytes:
        return join(self._archive.path, member.name)

    def _error(self, name: bytes, what: str, hint: str | None = None) -> SourceError:
        root = self._full[: -len(self._archive.path)]
        return refusal(root, self._archive, name, what, hint=hint)


def _extension(column: str | None) -> bytes | None:
    return None if column is None else column.lower().lstrip(".").encode()


def _is_label(value: object) -> bool:
    try:
        written(value)
    except SourceError:
        return False
    return value is not None


def _walk(stream: TarStream, path: bytes, listed: Listed) -> Iterator[tuple[Member, TarStream]]:
    """Yields the members but not the folders, in order, with a stream that stands at each.

    Members of inner tars have `CLASS/` before their name and their offset in the outer one;
    `listed` notes whether there are any. Tars beside images are refused, and packed ones.
    """
    is_flat, packed = False, b""
    for member in members(stream, path):
        name = member.name.lower()
        if not member.is_file or is_hidden(member.name):
            yield member, stream
            continue
        if name.endswith(_OF_SAMPLES):
            is_flat = True
            if listed.is_nested:
                raise _not_nested(path, f"holds {for_display(member.name)} beside tars")
        if name.endswith(_INNER) and not is_flat:
            listed.is_nested = True
            yield from _inner(stream, path, member)
            continue
        if name.endswith(TAR_SUFFIXES) and not is_flat:
            packed = packed or member.name
        yield member, stream
    if packed and not is_flat:
        raise _not_nested(
            path,
            f"holds the packed tar {for_display(packed)}; a tar in a tar is read in place, so it "
            "must be plain",
        )


def _inner(around: TarStream, path: bytes, outer: Member) -> Iterator[tuple[Member, TarStream]]:
    folder = outer.name[: -len(_INNER)]
    # Packed as `tar cf daisy.tar daisy/`, the class stands there twice.
    own = os.path.basename(folder) + b"/"
    stream = _Inner(around, outer.size)
    for member in members(stream, join(path, outer.name)):
        if member.name.lower().endswith(TAR_SUFFIXES) and not is_hidden(member.name):
            raise _not_nested(
                path,
                f"holds {for_display(outer.name)}, which holds {for_display(member.name)}; tars in "
                "tars in tars are not read",
            )
        yield (
            dataclasses.replace(
                member,
                name=join(folder, member.name.removeprefix(own)),
                link=member.link and join(folder, member.link.removeprefix(own)),
                offset=outer.offset + member.offset,
            ),
            stream,
        )


class _Inner:
    """A `TarStream` over a member of another, which stands at it; it ends where that ends."""

    def __init__(self, outer: TarStream, size: int) -> None:
        self._outer = outer
        self._size = size
        self.position = 0

    def read(self, count: int) -> bytes:
        data = self._outer.read(min(count, self._size - self.position))
        self.position += len(data)
        return data

    def skip(self, count: int) -> None:
        before = self._outer.position
        self._outer.skip(min(count, self._size - self.position))
        self.position += self._outer.position - before


def _not_nested(path: bytes, what: str) -> SourceError:
    archive, folder = (shlex.quote(for_display(each)) for each in (path, stem(path)))
    return SourceError(
        f"{for_display(path)} {what}; wanted images with labels, or tars alone, one for each class",
        hint=f"mkdir {folder} && tar -xf {archive} -C {folder}; then sort what is in it into class "
        "folders, and encode the folder",
    )


def stem(path: bytes) -> bytes:
    """Returns an archive's path without its suffix."""
    suffix = max((s for s in TAR_SUFFIXES if path.lower().endswith(s)), key=len, default=b"")
    return path[: len(path) - len(suffix)]


def refusal(
    root: bytes, archive: Archive, name: bytes, what: str, *, hint: str | None = None
) -> SourceError:
    """Returns the error of a member that is not as it should be; `what` ends the sentence."""
    shown = for_display(join(root.rstrip(b"/"), archive.path))
    return SourceError(
        f"{shown}: {for_display(name)} {what}",
        hint=hint or "mend the archive, or leave it out of the source",
    )
