"""Who may write to a cache folder: one run over all of it, or ranges of it side by side.

::

    all of it    .lock for as long as it runs; refused while a range runs
    a range      .lock.2-2-of-4 for as long as it runs; .lock for a moment, when it starts and
                 in each `gate`: to plan, and to finalise

Every decision that concerns the others (do we overlap, who plans, am I the last) is made while
`.lock` is held, so no two processes decide at once. Beside it: which folders no run may write to,
and how a signal ends a run.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ci2p_cache.cache.growth import growth_of, settle
from ci2p_cache.cache.lock import LOCK, LockHolder, live_ranges, locked, range_lock
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN
from ci2p_cache.cache.ranges import ShardRange
from ci2p_cache.cache.staging import remove_path
from ci2p_cache.errors import (
    InterruptedRunError,
    LockedError,
    NotACacheError,
    UsageError,
    command,
    stop_signals,
)
from ci2p_cache.outputs import refuse_url

__all__ = ["Hold", "held", "interruptible", "refuse_foreign_folder", "refuse_out"]

_RANGE = "range "
"""What a range calls itself in a lock."""

_BEFORE_MANIFEST = {LOCK, ".staging", PLAN, ENCODER}
"""What a run killed before it wrote the manifest may have left, beside the locks of ranges."""


@dataclass(slots=True)
class Hold:
    """What this process holds of a folder."""

    root: Path
    part: ShardRange | None
    """The range; None for all of it."""
    _locks: ExitStack = field(repr=False)

    @contextmanager
    def gate(self) -> Iterator[None]:
        """Holds `.lock` while the block runs, for what only one range at a time may do.

        It waits for whoever has it: another range, which needs it for the time of listing or
        finalising, or a run that is about to see this range and to be refused.

        Raises:
            ResourceError: the lock file cannot be written or removed.
        """
        if self.part is None:
            yield
            return
        with locked(self.root / LOCK, what=f"{_RANGE}{self.part}", waits_for=lambda _: True):
            yield

    def others(self) -> list[ShardRange]:
        """Returns the other ranges that run now; called within `gate`, nothing changes it."""
        return [part for part, _ in live_ranges(self.root) if part != self.part]

    def release(self) -> None:
        """Releases a range; called within `gate`, the next one there sees that it has ended."""
        if self.part is not None:
            self._locks.close()


@contextmanager
def held(
    root: Path,
    part: ShardRange | None = None,
    *,
    what: str = "encode",
    first: Callable[[], None] = lambda: None,
) -> Iterator[Hold]:
    """Holds a folder, or a range of it, while the block runs.

    Args:
        root: The cache folder; it exists.
        part: The range; None for all of the folder.
        what: What the holder of a whole folder does, for the loser's message.
        first: Called once the folder is held, before the locks have threads.

    Raises:
        LockedError: another process works on the folder, or on a range that overlaps.
        ResourceError: a lock file cannot be written or removed.
    """
    what = what if part is None else f"{_RANGE}{part}"

    def waits_for(holder: LockHolder) -> bool:
        return part is not None and holder.what.startswith(_RANGE)

    with ExitStack() as locks:
        with ExitStack() as moment:
            lock = locked(root / LOCK, what=what, waits_for=waits_for, is_kept=False)
            keep = (locks if part is None else moment).enter_context(lock)
            live = live_ranges(root)
            others = [each for each in live if part is None or part.overlaps(each[0])]
            if others:
                rest = f" and {len(others) - 1} other ranges" if len(others) > 1 else ""
                raise LockedError(
                    f"another process works on {root}: range {others[0][0]}{rest}"
                    + (", which this range overlaps" if part is not None else "")
                    + f": {others[0][1]}; this {what} changed nothing",
                    hint=command("status", root, note="says what is left to do"),
                )
            first()
            keep()
            _sweep(root, [each.label for each, _ in live])
            settle(root)
            if part is not None:
                locks.enter_context(locked(range_lock(root, part), what=what))
        yield Hold(root, part, locks)


def _sweep(root: Path, live: list[str]) -> None:
    """Removes what killed processes left: lock files of ranges, and what they had staged.

    Called while `.lock` is held, so no range but the `live` ones starts or works meanwhile.
    """
    for path in root.glob(f"{LOCK}.*"):
        label = path.name.removeprefix(f"{LOCK}.")
        if ShardRange.of_label(label) is not None and label not in live:
            remove_path(path)
    for folder in (root, growth_of(root)):
        staging = folder / ".staging" if folder is not None else None
        if staging is None or staging.is_symlink() or not staging.is_dir():
            continue
        for path in staging.iterdir():
            # A range's own workers stage under its label and a number.
            if not any(path.name == label or path.name.startswith(f"{label}-") for label in live):
                # One that is just ending removes it itself.
                shutil.rmtree(path, ignore_errors=True)


def refuse_out(root: Path, source: Path) -> None:
    """Refuses an output inside the source, and a folder that holds something else.

    Raises:
        UsageError: `root` is a URL, or is inside `source`.
        NotACacheError: the folder holds something else.
    """
    refuse_url(root, what="cache")
    if root.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"`out` {root} is inside the source {source}, where it would be listed as images",
            hint="choose an --out folder beside the source",
        )
    refuse_foreign_folder(root)


def refuse_foreign_folder(root: Path) -> None:
    """Refuses a file, and a folder that holds something else than a cache.

    Raises:
        NotACacheError: the folder holds something else.
    """
    if root.exists() and not root.is_dir():
        raise NotACacheError(f"{root} exists and is no folder", hint="choose another --out")
    if root.is_dir() and not (root / MANIFEST).exists():
        names = {path.name for path in root.iterdir() if not path.name.startswith(f"{LOCK}.")}
        foreign = sorted(names - _BEFORE_MANIFEST)
        if foreign:
            others = f" and {len(foreign) - 1} other entries" if len(foreign) > 1 else ""
            raise NotACacheError(
                f"{root} holds {foreign[0]!r}{others} but no {MANIFEST}, so it is no cache of ours "
                "and was not touched",
                hint="choose a new or empty --out folder",
            )


class _Signalled(KeyboardInterrupt):
    """Passes through code that catches `Exception`, as modules do while they are imported."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Raises `InterruptedRunError` in the block at the first of `stop_signals()`.

    A second signal meets the handlers that were there before, so it ends the process at once. Only
    SIGHUP is ignored then: a terminal that closes sends it two or three times. Outside the main
    thread, where Python delivers no signals, the block runs as it is.

    The message says what was interrupted and what is safe.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in stop_signals()}

    def stop(number: int, _: FrameType | None) -> None:
        for each, handler in earlier.items():
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else handler)
        raise _Signalled(number)

    for number in earlier:
        signal.signal(number, stop)
    try:
        yield
    except _Signalled as signalled:
        raise InterruptedRunError(message, signal_number=signalled.number) from None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
