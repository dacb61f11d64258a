"""Who may write to a cache folder: one run over all of it, or ranges of it side by side.

::

    whole_folder    .lock for as long as it runs; refused while a range runs
    claimed         .lock.2-2-of-4 for as long as it runs; .lock for a moment, when it starts and
                    in each `gate`: to plan, and to finalise

Every decision that concerns the others (do we overlap, who plans, am I the last) is made while
`.lock` is held, so no two processes decide at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ci2p_cache.cache.growth import growth_of, settle
from ci2p_cache.cache.lock import LOCK, LockHolder, live_ranges, locked, range_lock
from ci2p_cache.cache.ranges import ShardRange
from ci2p_cache.cache.staging import remove_path
from ci2p_cache.errors import LockedError, command

__all__ = ["Claim", "claimed", "whole_folder"]

_RANGE = "range "
"""What a range calls itself in a lock."""


@contextmanager
def whole_folder(root: Path, *, what: str) -> Iterator[None]:
    """Holds all of a folder while the block runs.

    Args:
        root: The cache folder; it exists.
        what: What the holder does, for the loser's message.

    Raises:
        LockedError: another process works on it, or on a range of it.
        ResourceError: the lock file cannot be written or removed.
    """
    with locked(root / LOCK, what=what):
        live = live_ranges(root)
        if live:
            part, holder = live[0]
            rest = f" and {len(live) - 1} other ranges" if len(live) > 1 else ""
            raise LockedError(
                f"another process works on {root}: range {part}{rest}: {holder}; this {what} "
                "changed nothing",
                hint=command("status", root, note="says what is left to do"),
            )
        _sweep(root)
        settle(root)
        yield


@dataclass(slots=True)
class Claim:
    """A range that this process holds."""

    root: Path
    part: ShardRange
    _held: ExitStack = field(repr=False)

    @contextmanager
    def gate(self) -> Iterator[None]:
        """Holds `.lock` while the block runs, for what only one range at a time may do.

        It waits for whoever has it: another range, which needs it for the time of listing or
        finalising, or a run that is about to see this range and to be refused.

        Raises:
            ResourceError: the lock file cannot be written or removed.
        """
        with locked(self.root / LOCK, what=f"{_RANGE}{self.part}", waits_for=lambda _: True):
            yield

    def others(self) -> list[ShardRange]:
        """Returns the other ranges that run now; called within `gate`, nothing changes it."""
        return [part for part, _ in live_ranges(self.root) if part != self.part]

    def release(self) -> None:
        """Gives the range up; called within `gate`, the next one there sees it gone."""
        self._held.close()


@contextmanager
def claimed(root: Path, part: ShardRange) -> Iterator[Claim]:
    """Holds a range of a folder while the block runs.

    Args:
        root: The cache folder; it exists.
        part: The range.

    Raises:
        LockedError: another process works on all of the folder, or on a range that overlaps.
        ResourceError: a lock file cannot be written or removed.
    """
    what = f"{_RANGE}{part}"
    with ExitStack() as held:
        with locked(root / LOCK, what=what, waits_for=_is_range):
            for other, holder in live_ranges(root):
                if part.overlaps(other):
                    raise LockedError(
                        f"range {part} overlaps range {other}, which another process works on: "
                        f"{holder}; nothing in {root} was changed",
                        hint=command("status", root, note="says which ranges are missing"),
                    )
            _sweep(root)
            settle(root)
            held.enter_context(locked(range_lock(root, part), what=what))
        yield Claim(root, part, held)


def _is_range(holder: LockHolder | None) -> bool:
    return holder is not None and holder.what.startswith(_RANGE)


def _sweep(root: Path) -> None:
    """Removes what killed processes left: lock files of ranges, and what they had staged.

    Called while `.lock` is held, so no range starts meanwhile, and no one works on all shards.
    """
    live = [part.label for part, _ in live_ranges(root)]
    for path in root.glob(f"{LOCK}.*"):
        label = path.name.removeprefix(f"{LOCK}.")
        if ShardRange.of_label(label) is not None and label not in live:
            remove_path(path)
    growth = growth_of(root)
    for folder in (root, growth) if growth is not None else (root,):
        _sweep_staging(folder / ".staging", live)


def _sweep_staging(staging: Path, live: list[str]) -> None:
    if staging.is_symlink() or not staging.is_dir():
        return
    for path in staging.iterdir():
        # A range's own workers stage under its label and a number.
        if not any(path.name == label or path.name.startswith(f"{label}-") for label in live):
            # One that is just ending removes it itself.
            shutil.rmtree(path, ignore_errors=True)
