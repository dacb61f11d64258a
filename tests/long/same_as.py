"""Holds what users get from this tree against what they got from a commit.

Both trees do the same work on the same images, through the command line and the public Python
names alone: encode in every kind, grow, convert, verify, train, evaluate, predict, export, report,
and refuse. What they write and print must be alike, byte for byte where no clock has a say.
Differences that are intended are listed in same_as.toml, with a reason.

    python tests/long/same_as.py COMMIT                        everything but the demo
    python tests/long/same_as.py COMMIT --all                  everything
    python tests/long/same_as.py COMMIT --only caches,surface  two groups
    python tests/long/same_as.py COMMIT --only 'caches/odd*'   units of one group, by name
    python tests/long/same_as.py COMMIT --keep FOLDER          what both wrote stays there

Prints a line per unit and a table, then each difference; exits 1 on any that is not listed. Two
processes work side by side, one per tree. A unit has one folder, and the trees take turns in it, so
that paths are the same; that is why nearly nothing has to be left out of the comparison.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.long.sameness import caches, documents, refusals, training
from tests.long.sameness.bench import Bench, BrokenUnitError, Unit
from tests.long.sameness.compare import (
    Difference,
    Intended,
    compared,
    read_intended,
    sorted_out,
)
from tests.long.sameness.inputs import Inputs, make_inputs
from tests.long.sameness.tree import REPO, Tree, check_out, copy_here

LIST = Path(__file__).with_suffix(".toml")
SIDES = ("base", "this")
_TO_ITS_END = "to its end"
_SHOWN = 16
"""Differences that are printed of a unit; --keep writes all of them."""


def all_units() -> list[Unit]:
    """Returns all units, those that take longest first."""
    return [*documents.units(), *training.units(), *caches.units(), *refusals.units()]


GROUPS = tuple(dict.fromkeys(unit.group for unit in all_units()))
LEFT_OUT = ("demo",)
"""Groups that run only if they are named, or with --all: the demo takes minutes, and nearly all
that it does is compared elsewhere."""


@dataclass
class Outcome:
    """What one tree gave in one unit."""

    notes: dict[str, Any]
    ended: str
    """"to its end", or what kept the unit from it."""
    documented: set[str]
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Tally:
    """What came out of a group, or of all."""

    units: int = 0
    compared: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """These two of both trees together."""
    differences: list[Difference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What failed in the commit itself: this program is wrong then, or the machine."""


class Schedule:
    """Deals units to the two trees so that no folder is used by both at once."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._left = {side: list(units) for side in SIDES}
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    def take(self, side: str) -> Unit | None:
        """Waits for a unit that is free; None where none is left."""
        with self._changed:
            while self._left[side]:
                for unit in self._left[side]:
                    if id(unit) not in self._busy:
                        self._left[side].remove(unit)
                        self._busy.add(id(unit))
                        return unit
                self._changed.wait()
            return None

    def give_back(self, unit: Unit) -> None:
        """Frees a unit's folder."""
        with self._changed:
            self._busy.discard(id(unit))
            self._changed.notify_all()

    def stop(self) -> None:
        """Deals nothing more."""
        with self._changed:
            for units in self._left.values():
                units.clear()
            self._changed.notify_all()


class Comparison:
    """Runs units in both trees, compares and prints."""

    def __init__(
        self, trees: dict[str, Tree], inputs: Inputs, root: Path, keep: Path | None
    ) -> None:
        self._trees, self._inputs, self._root, self._keep = trees, inputs, root, keep
        self._outcomes: dict[int, dict[str, Outcome]] = {}
        self._print = threading.Lock()
        self._failed: list[BaseException] = []
        self.tallies: dict[str, Tally] = {}
        self.documented: set[str] = set()
        self.with_json: set[str] = set()

    def run(self, units: Sequence[Unit]) -> None:
        """Runs all units; a line is printed for each that both trees have done."""
        schedule = Schedule(units)
        workers = [threading.Thread(target=self._work, args=(s, schedule)) for s in SIDES]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self._failed:
            raise self._failed[0]

    def _work(self, side: str, schedule: Schedule) -> None:
        try:
            self._trees[side].wait_until_warm()
            while (unit := schedule.take(side)) is not None:
                outcome = self._do(side, unit)
                schedule.give_back(unit)
                self._settle(side, unit, outcome)
        except BaseException as error:
            self._failed.append(error)
            schedule.stop()

    def _do(self, side: str, unit: Unit) -> Outcome:
        name = re.sub(r"[^\w.=]+", "-", f"{unit.group} {unit.name}")
        folder = self._root / "work" / name
        folder.mkdir(parents=True)
        bench = Bench(self._trees[side], self._trees["base"], folder, self._inputs)
        started, cpu, ended = time.monotonic(), bench.tree.cpu_seconds, _TO_ITS_END
        try:
            unit.work(bench)
        except BrokenUnitError as error:
            ended = str(error)
        except (AssertionError, KeyError, OSError, ValueError) as error:
            ended = f"{type(error).__name__}: {error}"
        seconds, cpu = time.monotonic() - started, bench.tree.cpu_seconds - cpu
        if self._keep is not None:
            (self._keep / side).mkdir(parents=True, exist_ok=True)
            shutil.move(folder, self._keep / side / name)
        else:
            shutil.rmtree(folder)
        return Outcome(bench.notes, ended, bench.documented, seconds, cpu)

    def _settle(self, side: str, unit: Unit, outcome: Outcome) -> None:
        """Compares a unit once both trees have done it."""
        with self._print:
            both = self._outcomes.setdefault(id(unit), {})
            both[side] = outcome
            if len(both) < len(SIDES):
                return
            base, ours = (both[each] for each in SIDES)
            tally = self.tallies.setdefault(unit.group, Tally())
            tally.units += 1
            tally.compared += len({*base.notes, *ours.notes})
            tally.seconds += base.seconds + ours.seconds
            tally.cpu_seconds += base.cpu_seconds + ours.cpu_seconds
            tally.differences += held_together(unit, base, ours)
            if base.ended != _TO_ITS_END:
                tally.problems.append(f"{unit.group}: {unit.name}: {base.ended}")
            self.documented |= base.documented | ours.documented
            if (unit.group, unit.name) == ("surface", "commands"):
                self.with_json |= documents.commands_with_json(ours.notes)
            found = sum(len(each.differences) for each in self.tallies.values())
            print(
                f"{unit.group}: {unit.name}: {len(ours.notes)} compared, "
                f"{base.seconds:.1f} + {ours.seconds:.1f} s, "
                f"cpu {base.cpu_seconds:.1f} + {ours.cpu_seconds:.1f} s; "
                f"{found} differences so far",
                flush=True,
            )


def held_together(unit: Unit, base: Outcome, ours: Outcome) -> Iterator[Difference]:
    """Compares what both trees gave in a unit."""
    notes = [
        {f"{unit.name}/{item}": value for item, value in each.notes.items()}
        for each in (base, ours)
    ]
    if base.ended != ours.ended:
        yield Difference(unit.group, f"{unit.name}/(ended)", base.ended, ours.ended)
        # What follows in the unit is missing for that reason.
        notes = [{name: each[name] for name in notes[0].keys() & notes[1].keys()} for each in notes]
    yield from compared(unit.group, *notes)


def chosen_units(only: str | None, *, every: bool = False) -> list[Unit]:
    """Returns the units that `--only` names, or those that run without it.

    Raises:
        ValueError: it names none.
    """
    units = all_units()
    if only is None:
        return [unit for unit in units if every or unit.group not in LEFT_OUT]
    chosen: list[Unit] = []
    for word in only.split(","):
        group, _, glob = word.partition("/")
        found = [u for u in units if u.group == group and fnmatchcase(u.name, glob or "*")]
        if not found:
            raise ValueError(f"--only {word!r} names no unit; the groups are {', '.join(GROUPS)}")
        chosen += [unit for unit in found if unit not in chosen]
    return chosen


def told(tallies: dict[str, Tally], intended: Sequence[Intended], forgotten: Sequence[str]) -> int:
    """Prints what came out; returns the exit code."""
    print(f"\n{'group':<12}   units  compared  differ  listed       s   cpu s")
    unlisted: list[Difference] = []
    counts = [0] * len(intended)
    for group, tally in tallies.items():
        others, found = sorted_out(tally.differences, intended)
        counts = [a + b for a, b in zip(counts, found, strict=True)]
        unlisted += others
        listed = len(tally.differences) - len(others)
        print(
            f"{group:<12} {tally.units:>7} {tally.compared:>9} {len(others):>7} {listed:>7} "
            f"{tally.seconds:>7.0f} {tally.cpu_seconds:>7.0f}"
        )
    for entry, number in zip(intended, counts, strict=True):
        if number:
            print(f"listed: {entry.group}: {entry.item}: {number} ({entry.reason}; {entry.since})")
        elif entry.group in tallies:
            print(f"stale: {entry.group}: {entry.item} covers nothing here ({entry.since})")
    for (group, unit), of_unit in groupby(unlisted, key=lambda each: (each.group, each.unit)):
        several = list(of_unit)
        shown = _first_of_each(several)
        print(*shown, sep="\n")
        if len(several) > len(shown):
            print(f"... and {len(several) - len(shown):,} more in {group}: {unit}")
    problems = [text for tally in tallies.values() for text in tally.problems]
    for text in problems:
        print(f"the commit itself fails: {text}")
    for name in forgotten:
        print(f"`{name} --json` is compared nowhere: add it to tests/long/sameness")
    total = sum(tally.compared for tally in tallies.values())
    print(f"{total:,} compared, {len(unlisted)} differences that are not listed")
    return int(bool(unlisted or problems or forgotten))


def _first_of_each(differences: Sequence[Difference]) -> list[Difference]:
    """Returns the first two differences of each document, and of all some."""
    shown: list[Difference] = []
    for _, several in groupby(differences, key=lambda each: each.item.partition("#")[0]):
        shown += islice(several, 2)
    return shown[:_SHOWN]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=f"groups: {', '.join(GROUPS)}"
    )
    parser.add_argument("commit", help="what git calls it")
    parser.add_argument("--only", metavar="GROUP[,GROUP]", help="these groups, or GROUP/UNIT*")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(LEFT_OUT)}")
    parser.add_argument("--keep", type=Path, help="a new folder for what both trees write")
    given = parser.parse_args()
    started = time.monotonic()
    try:
        units, intended = chosen_units(given.only, every=given.all), read_intended(LIST, GROUPS)
        if given.keep is not None:
            given.keep.mkdir(parents=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="same-as-", ignore_cleanup_errors=True) as name:
        root = Path(name).resolve()
        try:
            check_out(given.commit, root / "base")
        except ValueError as error:
            parser.error(str(error))
        copy_here(root / "this")
        with (
            Tree(root / "base", root / "base-scratch") as base,
            Tree(root / "this", root / "this-scratch") as this,
        ):
            inputs = make_inputs(root / "inputs")
            for text in inputs.skipped:
                print(f"skipped: {text} not here")
            comparison = Comparison(
                {"base": base, "this": this}, inputs, root, given.keep and given.keep.resolve()
            )
            comparison.run(units)
    forgotten: set[str] = set()
    if given.only is None:
        forgotten = comparison.with_json - comparison.documented
    if given.only is None and not given.all:
        print(f"left out without --all: {', '.join(LEFT_OUT)}")
        forgotten -= {unit.name for unit in all_units() if unit.group in LEFT_OUT}
    code = told(comparison.tallies, intended, sorted(forgotten))
    if given.keep is not None:
        each = [d for tally in comparison.tallies.values() for d in tally.differences]
        (given.keep / "differences.txt").write_text("".join(f"{d}\n" for d in each))
    print(f"{given.commit} and {REPO.name} in {time.monotonic() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
