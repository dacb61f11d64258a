"""The few files of a source that stay open between reads; what they are is not known here."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Kept"]

_T = TypeVar("_T")


class Kept(Generic[_T]):
    """The open files that were asked for last; any number of threads may ask.

    Args:
        most: How many are kept. The one that was not asked for the longest goes first, and closes
            when no one reads from it any more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._files: OrderedDict[bytes, _T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: bytes, open_file: Callable[[], _T]) -> _T:
        """Returns the file of that path, opened where it is not kept."""
        with self._lock:
            file = self._files.pop(path, None) or open_file()
            self._files[path] = file
            if len(self._files) > self._most:
                self._files.popitem(last=False)
            return file
