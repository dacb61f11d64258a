"""What both benchmarks share: rates over rotated repeats, tables, and what the machine is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

__all__ = [
    "Rates",
    "Report",
    "Table",
    "installed",
    "machine",
    "num_cores",
    "pinned",
    "rotated",
    "take_turns",
]

T = TypeVar("T")


@dataclass(frozen=True)
class Rates:
    """One contestant's images per second, one value per repeat."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def over(self, other: Rates) -> Rates:
        """The ratio in each repeat: what changes the machine's speed between them drops out."""
        return Rates(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def cells(self, form: str = "{:,.0f}") -> list[str]:
        """Median, smallest, largest."""
        return [form.format(v) for v in (self.median, min(self.values), max(self.values))]


def rotated(items: Sequence[T], repeat: int, repeats: int) -> list[T]:
    """The items in another cyclic order each repeat, so that no place is always the same one's."""
    start = repeat * len(items) // max(repeats, 1)
    return [*items[start:], *items[:start]]


def take_turns(
    contestants: Sequence[T], timed: Callable[[T], float], repeats: int
) -> dict[T, Rates]:
    """Measures every contestant once per repeat, in rotated order."""
    found: dict[T, list[float]] = {contestant: [] for contestant in contestants}
    for repeat in range(repeats):
        for contestant in rotated(contestants, repeat, repeats):
            found[contestant].append(timed(contestant))
    return {contestant: Rates(tuple(values)) for contestant, values in found.items()}


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Keeps every thread of this process, also a library's own, on so many cores."""
    before = os.sched_getaffinity(0)
    try:
        _pin(set(sorted(before)[-cores:]))
        yield
    finally:
        _pin(before)


def _pin(cores: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


@dataclass
class Table:
    """Rows of text under a head, printed aligned or as Markdown."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        widths = [
            max(len(row[i]) for row in [list(self.head), *self.rows]) for i in range(len(self.head))
        ]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [list(self.head), *self.rows]
        ]
        return "\n".join([self.title, *lines, *self.notes])

    def markdown(self) -> str:
        lines = [" | ".join(row) for row in (self.head, ["---"] * len(self.head), *self.rows)]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"**{self.title}**\n", *(f"| {line} |" for line in lines), *notes])

    def as_dicts(self) -> list[dict[str, str]]:
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Report:
    """What a benchmark found, ready to print; it names no host and no folder."""

    machine: dict[str, str]
    data: str
    tables: list[Table]
    rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Per second, of each repeat, by the contestants' keys."""

    def publish(self, *, markdown: bool, path: Path | None) -> None:
        """Prints it, and writes it as JSON where that is asked for."""
        print("; ".join(f"{name} {value}" for name, value in self.machine.items()))
        print(self.data)
        for table in self.tables:
            print()
            print(table.markdown() if markdown else table.text())
        if path is not None:
            record = {
                "machine": self.machine,
                "data": self.data,
                "tables": {table.title: table.as_dicts() for table in self.tables},
                "rates": self.rates,
            }
            path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def installed(package: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Processor, cores, memory, and the versions of whatever is measured; nothing that names it."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {
        "processor": model,
        "cores": str(num_cores()),
        "memory": f"{memory:.0f} GiB",
        "load when begun": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }
    return found | {name: installed(name) or "not installed" for name in packages}
