"""What is in one tar: its images with their labels; where tars come from is not known here.

A sample is a run of members whose paths are the same up to the first dot of the file name
(webdataset.github.io, "The WebDataset Format"): one image, and a `.cls` or `.json` with its label.
Images without any such file are listed too: the folders they are in may be their classes.
"""

from __future__ import annotations

import dataclasses

from ci2p_cache.errors import SourceError
from ci2p_cache.images.archives import Archive
from ci2p_cache.images.kinds import IMAGE_SUFFIXES, SNIFF_BYTES, is_image_content
from ci2p_cache.images.labels import LabelTable
from ci2p_cache.images.listed_layouts import LIST_NAMES
from ci2p_cache.images.names import for_display, is_hidden, join
from ci2p_cache.images.source import SourceOptions
from ci2p_cache.images.tar_images import NO_LABEL_FILE, Listed
from ci2p_cache.images.tar_members import Member
from ci2p_cache.images.tar_nested import TarWalk, repacked
from ci2p_cache.images.tar_sample import LabelFiles, Missing, Sample
from ci2p_cache.images.tar_streams import TarStream, open_stream

__all__ = ["TarLister", "refusal"]

_MAX_SAMPLE_MEMBERS = 1024

_MAX_LINKED_BYTES, _MAX_ALL_LINKED_BYTES = 2**16, 2**24
"""Of one label file that hard links lead to, and of all of them: they are kept."""

_MAX_TEXT_BYTES = 2**26
"""Of all lists of a public data set in one archive."""

_NO_MORE_DOTS = r" --transform='s,\.\([^./]*\.\),_\1,'"
"""An option of tar: the first dot of a name that has two becomes `_`."""


class _Content:
    """The first bytes of a member, read once.

    Args:
        size: Of the member.
        stream: Stands at its content; None where only `head` is known.
        head: What is known already.
    """

    def __init__(self, size: int, stream: TarStream | None, head: bytes = b"") -> None:
        self._size = size
        self.stream = stream
        self._head = head

    def first(self, count: int) -> bytes:
        """Returns that many bytes; fewer where it ends before, or they are not known."""
        missing = min(count, self._size) - len(self._head)
        if missing > 0 and self.stream is not None:
            self._head += self.stream.read(missing)
        return self._head[:count]


class TarLister:
    """Goes through one archive.

    Args:
        full: Its absolute path.
        archive: It, for its split.
        labels: Takes each label that is met.
        options: Which extension is the image, and where the label is.
    """

    def __init__(
        self, full: bytes, archive: Archive, labels: LabelTable, options: SourceOptions
    ) -> None:
        self._full = full
        self._archive = archive
        self._labels = labels
        self._files = LabelFiles(options)
        name = options.image_column
        self._image = None if name is None else name.lower().lstrip(".").encode()

    def list(self) -> Listed:
        """Returns the images, and what is none.

        Hard links to earlier members are images too: a first pass finds what they lead to.

        Raises:
            SourceError: it is damaged, or a sample is not as it should be.
            OSError: it cannot be read.
        """
        listed = self._pass(frozenset())
        if self._links:
            listed = self._pass(frozenset(self._links))
            listed.images = listed.images.by_offset()
        return listed

    def _pass(self, wanted: frozenset[bytes]) -> Listed:
        """Goes through once; `wanted` are the members that hard links lead to."""
        self._listed = listed = Listed()
        self._links: set[bytes] = set()
        self._targets: dict[bytes, tuple[Member, bytes]] = {}
        self._kept_bytes = self._text_bytes = 0
        self._apart: list[bytes] = []
        self._num_apart = 0
        self._unlabelled: bytes | None = None
        walk = TarWalk(open_stream(self._full), self._full)
        sample: Sample | None = None
        for found, stream in walk.members():
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
                self._keep(member, content)
            if is_hidden(member.name):
                listed.tally.add("hidden", self._shown(member))
                continue
            folder, _, name = member.name.rpartition(b"/")
            stem, _, extension = name.partition(b".")
            base = join(folder, stem)
            if sample is None or base != sample.base:
                self._finish(sample)
                sample = Sample(base)
            self._take(sample, member, extension.lower(), content)
        self._finish(sample)
        listed.is_nested = walk.is_nested
        self._tell_of_labels_apart()
        return listed

    def _keep(self, member: Member, content: _Content) -> None:
        """Keeps what is needed of a member that a hard link leads to."""
        count = SNIFF_BYTES
        if self._files.max_bytes(member.name.rpartition(b".")[2].lower()) is not None:
            count = min(member.size, _MAX_LINKED_BYTES)
            self._kept_bytes += count
        if self._kept_bytes > _MAX_ALL_LINKED_BYTES:
            raise self._error(member.name, "is one of too many label files with hard links")
        self._targets[member.name] = (member, content.first(count))

    def _take(self, sample: Sample, member: Member, extension: bytes, content: _Content) -> None:
        sample.count += 1
        if sample.count > _MAX_SAMPLE_MEMBERS:
            raise self._error(member.name, f"has more than {_MAX_SAMPLE_MEMBERS} members")
        max_bytes = self._files.max_bytes(extension)
        if max_bytes is not None and not (b"." in extension and member.size > max_bytes):
            if self._files.are_wanted:
                self._take_label(sample, member, extension, max_bytes, content)
            else:
                sample.add_other(extension)
        elif member.name.rpartition(b"/")[2] in LIST_NAMES:
            self._text_bytes += member.size
            is_kept = self._text_bytes <= _MAX_TEXT_BYTES
            self._listed.texts[member.name] = content.first(member.size) if is_kept else None
        elif self._is_image(member, extension, content):
            if sample.labels and sample.images:
                raise self._several(sample, sample.images[0].name, member.name)
            sample.images.append(member)
            if len(sample.images) > 1:
                # Where folders are classes, names may have dots.
                first = sample.images.pop(0)
                sample.several = sample.several or (first.name, member.name)
                sample.count -= 1
                self._add_unlabelled(first, self._files.label(sample, first))
        else:
            sample.add_other(extension)

    def _take_label(
        self, sample: Sample, member: Member, extension: bytes, max_bytes: int, content: _Content
    ) -> None:
        if sample.several is not None:
            raise self._several(sample, *sample.several)
        if extension in sample.labels:
            raise self._error(member.name, f"has two .{for_display(extension)}")
        if member.size > max_bytes:
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

    def _finish(self, sample: Sample | None) -> None:
        """Lists the image of a sample that is complete."""
        if sample is None:
            return
        if not sample.images:
            self._num_apart += len(sample.labels)
            if not self._apart:
                self._apart += [sample.base + b"." + extension for extension in sample.labels]
            return
        image = sample.images[0]
        try:
            label = self._files.label(sample, image)
            if not isinstance(label, Missing):
                self._listed.images.add(image, self._labels.add(label))
        except SourceError as error:
            raise self._error(image.name, f"has {error}") from error
        if isinstance(label, Missing):
            self._add_unlabelled(image, label)
        self._listed.has_labels |= bool(sample.labels)

    def _add_unlabelled(self, image: Member, why: str | int | Missing) -> None:
        self._listed.images.add(image, NO_LABEL_FILE)
        if self._listed.problem is None and isinstance(why, Missing):
            self._listed.problem = self._error(image.name, why.what, hint=why.hint)
            # Where its .json has other fields, it is beside it.
            self._unlabelled = image.name if why.hint is None else None

    def _tell_of_labels_apart(self) -> None:
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
                hint=repacked(self._full),
            )

    def _several(self, sample: Sample, one: bytes, other: bytes) -> SourceError:
        names = f"{for_display(one)} and {for_display(other)}"
        if one.rpartition(b".")[0] == other.rpartition(b".")[0]:
            last = for_display(one.rpartition(b".")[2])
            hint = f"repeat the command with --image-column {last}, or pack one image a sample"
            return self._error(sample.base, f"has several images, {names}; wanted one", hint=hint)
        return self._error(
            sample.base,
            f"has several images, {names}: the name of a sample ends at its first dot, so these "
            "are one sample",
            hint=repacked(self._full, options=_NO_MORE_DOTS, ending="renamed"),
        )

    def _shown(self, member: Member) -> bytes:
        return join(self._archive.path, member.name)

    def _error(self, name: bytes, what: str, hint: str | None = None) -> SourceError:
        root = self._full[: -len(self._archive.path)]
        return refusal(root, self._archive, name, what, hint=hint)


def refusal(
    root: bytes, archive: Archive, name: bytes, what: str, *, hint: str | None = None
) -> SourceError:
    """Returns the error of a member that is not as it should be.

    Args:
        root: The source's root.
        archive: Where the member is.
        name: Its name.
        what: What is wrong with it, as the rest of a sentence.
        hint: What helps; None: mend the archive.
    """
    shown = for_display(join(root.rstrip(b"/"), archive.path))
    return SourceError(
        f"{shown}: {for_display(name)} {what}",
        hint=hint or "mend the archive, or leave it out of the source",
    )
