"""What a unit does with a tree: runs commands and notes what they gave."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.long.sameness.inputs import Inputs
from tests.long.sameness.tree import Ended, Tree

__all__ = ["CLOCKS", "Bench", "BrokenUnitError", "Unit", "first_lines"]

CLOCKS = frozenset(
    ("waiting_share", "wait_share", "encoder_share", "bottleneck", "free_bytes", "seconds")
)
"""Fields that hold what a clock or a disk said, like all that end in `_seconds` or `_per_second`.
Their types are compared, not their values."""


def is_clock(name: str, more: Iterable[str] = ()) -> bool:
    """Whether a field of that name holds what a clock said."""
    return name in CLOCKS or name in more or name.endswith(("_seconds", "_per_second"))


class BrokenUnitError(Exception):
    """A command did not end as the unit needs it."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Something to compare, in a folder of its own."""

    group: str
    name: str
    work: Callable[[Bench], None]


@dataclass
class Bench:
    """One unit at one tree.

    Paths are the same for both trees: each works in `folder` while the other does not.
    """

    tree: Tree
    """Whose commands are run."""
    base: Tree
    """The commit, also where `tree` is this tree."""
    folder: Path
    """Where commands run."""
    inputs: Inputs
    """Images and archives; read only."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What came out, by item."""
    documented: set[str] = field(default_factory=set)
    """Commands whose `--json` was compared."""

    def note(self, item: str, value: Any) -> None:
        """Notes a value that both trees must have alike."""
        assert item not in self.notes, f"{item} is noted twice"
        self.notes[item] = value

    def run(
        self,
        *words: object,
        codes: Iterable[int] = (0,),
        made_by_base: bool = False,
        stop_at: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Ended:
        """Runs a command that must end with one of these exit codes.

        Args:
            words: What follows `ci2p-cache`.
            codes: The exit codes.
            made_by_base: Whether the commit runs it, for both trees.
            stop_at: A text of stderr at which it is interrupted.
            environment: What is added to the environment.

        Raises:
            BrokenUnitError: it ended in another way.
        """
        tree = self.base if made_by_base else self.tree
        ended = tree.run(words, self.folder, stop_at=stop_at, environment=environment)
        if ended.code not in codes:
            shown = " ".join(str(word) for word in words)
            raise BrokenUnitError(f"`{shown}` ended with {ended.code}: {ended.err[-1500:].strip()}")
        return ended

    def document(
        self,
        item: str,
        *words: object,
        codes: Iterable[int] = (0,),
        clocks: Iterable[str] = (),
        types_only: bool = False,
    ) -> Any:
        """Runs a command with `--json` and notes its document and exit code.

        Args:
            item: Its name.
            words: What follows `ci2p-cache`.
            codes: The exit codes that it may have.
            clocks: More fields of which only the types are compared.
            types_only: Whether this holds for all of them.

        Returns:
            The document as it was printed.
        """
        ended = self.run(*words, "--json", codes=codes)
        # `bench encode` is one command, `encode` another.
        name = " ".join(str(word) for word in words[: 1 + (words[0] == "bench")])
        self.documented.add(name)
        found = json.loads(ended.out) if ended.out.strip() else None
        shown = types_of(found) if types_only else masked(found, clocks)
        said = first_lines(ended.err) if ended.code else {}
        self.note(item, {"code": ended.code, "json": shown, **said})
        return found

    def text(self, item: str, *words: object, codes: Iterable[int] = (0,)) -> None:
        """Runs a command and notes the lines of its stdout."""
        self.note(item, self.run(*words, codes=codes).out.splitlines())

    def ended(
        self, item: str, *words: object, environment: Mapping[str, str] | None = None
    ) -> None:
        """Runs a command that may end in any way; notes exit code and what it says of errors."""
        ended = self.run(*words, codes=range(7), environment=environment)
        self.note(item, {"code": ended.code} | first_lines(ended.err))

    def call(self, item: str, function: str, **arguments: Any) -> None:
        """Calls a function of api.py and notes what it returns."""
        ended = self.tree.call(function, self.folder, arguments)
        if ended.code:
            raise BrokenUnitError(f"{function}({arguments}) failed: {ended.err[-1500:].strip()}")
        self.note(item, json.loads(ended.out))

    def files(self, item: str, path: str = "", *, leave_out: Iterable[str] = ()) -> None:
        """Notes the digest of every file below a folder.

        Args:
            item: What stands before their names.
            path: The folder.
            leave_out: Names of files whose content is not noted, only that they are there.
        """
        root, left = self.folder / path, set(leave_out)
        for file in sorted(root.rglob("*")):
            if file.is_file():
                digest = "there" if file.name in left else digest_of(file)
                self.note(f"{item}/{file.relative_to(root).as_posix()}", digest)

    def file(self, item: str, path: str | Path) -> None:
        """Notes the digest of one file."""
        self.note(item, digest_of(self.folder / path))

    def json_file(self, item: str, path: Path, *, clocks: Iterable[str] = ()) -> None:
        """Notes a JSON file as a document."""
        data = json.loads((self.folder / path).read_text("utf-8"))
        self.note(item, masked(data, clocks))

    def csv_file(self, item: str, path: Path) -> None:
        """Notes a CSV file without the values of its clock columns."""
        rows = csv.DictReader(io.StringIO((self.folder / path).read_text("utf-8")))
        self.note(
            item, [{k: "clock" if is_clock(k) else v for k, v in row.items()} for row in rows]
        )

    def copy_input(self, name: str, target: str) -> Path:
        """Copies a folder of images that the unit will change; returns where to."""
        return Path(shutil.copytree(self.inputs[name], self.folder / target))


def digest_of(path: Path) -> str:
    """sha256 of a file, and its size."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{digest} ({path.stat().st_size} bytes)"


def masked(value: Any, clocks: Iterable[str] = ()) -> Any:
    """Returns a document in which clock fields, and these, hold their types instead of values."""
    if isinstance(value, dict):
        return {
            name: types_of(inner) if is_clock(name, clocks) else masked(inner, clocks)
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [masked(inner, clocks) for inner in value]
    return value


def types_of(value: Any) -> Any:
    """Returns a document with types instead of values; of a list those of its first element."""
    if isinstance(value, dict):
        return {name: types_of(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [types_of(inner) for inner in value[:1]]
    # A whole number of seconds is a float all the same.
    return "number" if type(value) in (int, float) else type(value).__name__


def first_lines(err: str) -> dict[str, str]:
    """Returns the error's line of a command's stderr, and the one that says what to try."""
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith(("error:", "Error:"))]
    tries = [line for line in lines if line.startswith("try:")]
    return {
        "first": errors[0] if errors else (lines[0] if lines else ""),
        "try": tries[0] if tries else "",
    }
