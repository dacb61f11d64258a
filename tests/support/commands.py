"""Where the project is, which packages a test needs, and what a command ended with."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["REPO", "Ran", "needs"]

REPO = Path(__file__).resolve().parents[2]


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips tests where a package is not installed, without importing it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@dataclass
class Ran:
    """What a command ended with."""

    code: int
    out: str
    err: str
