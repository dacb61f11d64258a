"""Recipes: Python files whose public functions each return an `Experiment`.

A recipe file is code that the user names on the command line, as a test file is for pytest: it is
imported, with everything that it does on import, and its functions are called. Nothing is loaded
from a cache or a run folder in this way.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ci2p_cache.errors import UsageError, command
from ci2p_cache.experiment.spec import Experiment

__all__ = ["RecipeEntry", "list_recipes", "load_experiment", "split_location"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeEntry:
    """A recipe of a file."""

    name: str
    """Name of the function."""
    summary: str
    """First line of its docstring; empty where it has none."""


def split_location(location: str) -> tuple[Path, str | None]:
    """Cuts `FILE.py:NAME` into file and name; the name is None in a plain `FILE.py`."""
    path, colon, name = location.rpartition(":")
    if colon and path.endswith(".py") and "/" not in name:
        return Path(path), name
    return Path(location), None


def list_recipes(path: str | Path) -> tuple[RecipeEntry, ...]:
    """Returns the recipes of a file, in its order.

    They are the functions defined in the file itself whose name has no leading underscore, that can
    be called without arguments, and that are annotated to return an `Experiment`.

    Raises:
        UsageError: there is no such file, it is no Python file, or importing it raises.
    """
    return tuple(
        RecipeEntry(name=name, summary=(inspect.getdoc(function) or "").partition("\n")[0])
        for name, function in _recipes(_imported(Path(path)))
    )


def load_experiment(location: str) -> Experiment:
    """Returns the experiment of `FILE.py:NAME`.

    ::

        experiment = load_experiment("pipelines/flowers.py:vitds_tiny")

    Args:
        location: A Python file, a colon, and the name of a function in it that can be called
            without arguments.

    Raises:
        UsageError: there is no such file or function, the function needs arguments or returns
            something else, or the file or the function raises.
    """
    path, name = split_location(location)
    module = _imported(path)
    known = [entry for entry, _ in _recipes(module)]
    if name is None:
        raise UsageError(
            f"{path} has several recipes; which one? It has {_listed(known)}",
            hint=command("run", f"{path}:{known[0]}" if known else f"{path}:NAME"),
        )
    function = getattr(module, name, None)
    if not callable(function) or name.startswith("_"):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UsageError(
            f"{path} has no recipe {name!r}; it has {_listed(known)}",
            hint=command("run", f"{path}:{close[0]}") if close else None,
        )
    needed = _needed(function)
    if needed:
        raise UsageError(
            f"{path}:{name} wants the arguments {', '.join(needed)}; a recipe can be called "
            "without any"
        )
    with _told(f"{path}:{name}", path):
        experiment = function()
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{path}:{name} returns {type(experiment).__name__}; a recipe returns an Experiment"
        )
    return experiment


def _imported(path: Path) -> ModuleType:
    """Imports a file by its path, under a name that no other module has."""
    if not path.exists():
        raise UsageError(
            f"there is no file {path}",
            hint="recipes are in pipelines/ of the clone: ci2p-cache run pipelines/smoke.py",
        )
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"{path} is no Python file; wanted FILE.py or FILE.py:NAME")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"ci2p_cache_recipe_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses of the file look their module up.
    sys.modules[name] = module
    with _told(str(path), path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """Turns whatever a recipe raises into an error that names its line."""
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


def _recipes(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the recipes of an imported file."""
    for name, function in vars(module).items():
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        returns = function.__annotations__.get("return")
        text = returns if isinstance(returns, str) else getattr(returns, "__name__", "")
        is_public = text.rpartition(".")[2] == Experiment.__name__ and not name.startswith("_")
        if is_public and not _needed(function):
            yield name, function


def _needed(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the arguments that a call must give."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
