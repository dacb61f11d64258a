"""Which cases of a long table run in the default tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["thinned"]


def thinned(cases: Iterable[Any], *, step: int = 2) -> list[Any]:
    """Marks all but each `step`-th case slow; the first one is in the default tier.

    Args:
        cases: Parameters of one test; a tuple stands for several.
        step: How many cases one of the default tier stands for.
    """
    marked = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=pytest.mark.slow) if number % step else case)
    return marked
