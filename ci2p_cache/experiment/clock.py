"""Times the stages of something long, and tells of each as it starts and ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["StageClock"]

_Stage = TypeVar("_Stage", bound=str)


class StageClock(Generic[_Stage]):
    """Times stages by name.

    Args:
        tell: Called when a stage starts and ends: its name, one line (what it will do, or what came
            of it), and how many seconds it took, None when it starts.
    """

    def __init__(self, tell: Callable[[_Stage, str, float | None], None]) -> None:
        self._tell = tell
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: _Stage, plan: str) -> Iterator[list[str]]:
        """Tells of a stage that starts and, if it succeeds, what the caller put into the list.

        Args:
            name: The stage.
            plan: One line: what it will do.
        """
        self._tell(name, plan, None)
        started = time.perf_counter()
        outcome: list[str] = []
        yield outcome
        self.seconds[name] = time.perf_counter() - started
        self._tell(name, "; ".join(outcome), self.seconds[name])
