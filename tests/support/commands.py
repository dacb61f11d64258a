"""What a command ended with, and where the project is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["REPO", "Ran"]

REPO = Path(__file__).resolve().parents[2]


@dataclass
class Ran:
    """What a command ended with."""

    code: int
    out: str
    err: str
