"""Python files that the user names, `FILE.py` or `FILE.py:NAME`: recipes, and models of their own.

Such a file is code, as a test file is for pytest. It is imported with everything that it does on
import. Nothing is loaded in this way unless its file is named on the command line or by the caller.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ci2p_cache.errors import UsageError

__all__ = [
    "import_file",
    "naming_errors",
    "needed_arguments",
    "pinned_location",
    "read_python",
    "split_location",
]

_MAX_BYTES = 2**20

_PINNED = re.compile(r"(.+\.py):([A-Za-z_]\w*)(?:#([0-9a-f]{64}))?")


def split_location(location: str) -> tuple[Path, str | None]:
    """Cuts `FILE.py:NAME` into file and name; the name is None in a plain `FILE.py`."""
    path, colon, name = location.rpartition(":")
    if colon and path.endswith(".py") and "/" not in name:
        return Path(path), name
    return Path(location), None


def pinned_location(name: str) -> tuple[Path, str, str | None] | None:
    """Cuts `FILE.py:NAME#SHA256` into file, name, and the digest that the file must have, if any.

    Returns None for what is no such location, as the name of a model that is not the user's own.
    """
    found = _PINNED.fullmatch(name)
    return (Path(found[1]), found[2], found[3]) if found else None


def read_python(path: Path, *, hint: str | None = None) -> bytes:
    """Returns the content of a Python file; `hint` says where such files are, for the error.

    Raises:
        UsageError: there is no such file, it is no Python file, or larger than 1 MiB.
    """
    if not path.exists():
        raise UsageError(f"there is no file {path}", hint=hint)
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"{path} is no Python file; wanted FILE.py or FILE.py:NAME")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise UsageError(f"{path} has {size:,} bytes; up to {_MAX_BYTES:,} are read")
    return path.read_bytes()


def import_file(path: Path, content: bytes) -> ModuleType:
    """Imports the content that was read of a file, under a name that no other module has.

    Neither the file nor Python's compiled copy of it is read again: what runs is what was read.

    Raises:
        UsageError: importing it raises; the message names the line.
    """
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"ci2p_cache_file_{digest}"
    spec = spec_from_file_location(name, path, loader=_Read(name, str(path), content))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses of the file look their module up.
    sys.modules[name] = module
    with naming_errors(str(path), path):
        spec.loader.exec_module(module)
    return module


class _Read(SourceFileLoader):
    """Loads a module from content in memory."""

    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError("without it Python neither reads nor writes a compiled copy")

    def get_data(self, path: str) -> bytes:
        return self._content


@contextmanager
def naming_errors(what: str, path: Path) -> Iterator[None]:
    """Turns whatever the code of a file raises into an error that names its line.

    Raises:
        UsageError: the block raised something.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line = error.lineno
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
        at = "" if line is None else f" in line {line}"
        raise UsageError(f"{what} raises {type(error).__name__}{at}: {error}") from error


def needed_arguments(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments that a call must give."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
