"""`ShardRange`: which part of a cache's shards one of several machines encodes.

A part is a stretch of the shards in their order (train, val, test, each by number), so what is
missing can be named, and asked for, in a few ranges: `2/4` is the second of four parts, `3-5/12`
the third to fifth of twelve. Parts are compared as fractions, so two that do not overlap never
share a shard, whatever the number of shards is and however many parts each was cut from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from ci2p_cache.errors import UsageError

__all__ = ["ShardRange", "split_positions"]

_TEXT = re.compile(r"(\d{1,7})(?:-(\d{1,7}))?/(\d{1,7})")
_LABEL = re.compile(r"(\d{1,7})-(\d{1,7})-of-(\d{1,7})")

_WANTED = "wanted i/n such as 2/4 (the second of four parts), 3-5/12, or auto"


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Parts `first` to `last` of `of` equal parts; numbered from 1.

    Raises:
        UsageError: the numbers are out of range, on construction.
    """

    first: int
    last: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= self.of:
            raise UsageError(
                f"`shard_range` is {self}; parts are numbered from 1 to their number, so 1/4 to "
                "4/4 or 2-3/4 are possible"
            )

    def __str__(self) -> str:
        first_last = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{first_last}/{self.of}"

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str]) -> Self:
        """Reads `--shard-range`.

        Args:
            text: i/n, i-j/n, or auto: this task's part of a Slurm job array, or this pod's part of
                an indexed Kubernetes job.
            environment: Looked at for auto alone. Slurm sets SLURM_ARRAY_TASK_ID, _COUNT, _MIN and
                _STEP itself; Kubernetes sets JOB_COMPLETION_INDEX, and the job's author sets
                JOB_COMPLETIONS to the job's `completions`.

        Raises:
            UsageError: the text is none of these, or auto finds no array of equal steps.
        """
        if text == "auto":
            return cls._of_environment(environment)
        match = _TEXT.fullmatch(text)
        if match is None:
            raise UsageError(f"`shard_range` is {text!r}; {_WANTED}")
        return cls(int(match[1]), int(match[2] or match[1]), int(match[3]))

    @classmethod
    def _of_environment(cls, environment: Mapping[str, str]) -> Self:
        def number(name: str, default: str = "") -> int:
            value = environment.get(name, default)
            if not value.isascii() or not value.isdigit():
                raise UsageError(
                    f"`shard_range` is auto, and {name} is {value!r}; wanted a number",
                    hint="--shard-range 2/4 says it without the environment",
                )
            return int(value)

        if "SLURM_ARRAY_TASK_ID" in environment:
            task, count = number("SLURM_ARRAY_TASK_ID"), number("SLURM_ARRAY_TASK_COUNT")
            low, step = number("SLURM_ARRAY_TASK_MIN"), number("SLURM_ARRAY_TASK_STEP", "1")
            index, rest = divmod(task - low, max(step, 1))
            if rest or not 0 <= index < count:
                raise UsageError(
                    f"`shard_range` is auto, and task {task} is none of {count} from {low} in "
                    f"steps of {step}: an array with gaps does not say which part is meant",
                    hint="submit --array=1-N, or give each task its --shard-range i/n",
                )
            return cls(index + 1, index + 1, count)
        if "JOB_COMPLETION_INDEX" in environment:
            index, count = number("JOB_COMPLETION_INDEX"), number("JOB_COMPLETIONS")
            return cls(index + 1, index + 1, count)
        raise UsageError(
            "`shard_range` is auto, and neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is "
            "set: this is no task of an array",
            hint="--shard-range 2/4 says it without the environment",
        )

    @property
    def label(self) -> str:
        """The name of its lock and of its staging folder: 2-3-of-4."""
        return f"{self.first}-{self.last}-of-{self.of}"

    @classmethod
    def of_label(cls, text: str) -> Self | None:
        """Reads a `label`; None where it is none."""
        match = _LABEL.fullmatch(text)
        try:
            return cls(*map(int, match.groups())) if match else None
        except UsageError:
            return None

    def positions(self, num_shards: int) -> range:
        """Returns which of all shards it has, from 0; empty where there are too few."""
        return range((self.first - 1) * num_shards // self.of, self.last * num_shards // self.of)

    def overlaps(self, other: ShardRange) -> bool:
        """Says whether some number of shards would give both a common one."""
        return (self.first - 1) * other.of < other.last * self.of and (
            other.first - 1
        ) * self.of < self.last * other.of


def split_positions(positions: range, num_shards: int) -> ShardRange:
    """Returns the range that asks for exactly these of all shards, for example 4-7/1252."""
    return ShardRange(positions[0] + 1, positions[-1] + 1, num_shards)
