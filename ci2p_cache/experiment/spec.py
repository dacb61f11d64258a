"""`Experiment`: one whole recipe, from the images to the number that it claims.

::

    pipelines/flowers.py:vitds_tiny --load--> Experiment --changed by --set--> Experiment --run-->
        out/experiment.json, out/shards/, out/runs/NAME/, out/report.html

Recipes are Python files whose public functions each return an `Experiment`. A recipe file is code
that the user names on the command line, as a test file is for pytest: it is imported, with
everything that it does on import, and its functions are called. Nothing is loaded from a cache or a
run folder in this way.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.errors import ManifestError, RunMismatchError, UsageError, command
from ci2p_cache.imported import (
    import_file,
    naming_errors,
    needed_arguments,
    pinned_location,
    read_python,
    split_location,
)
from ci2p_cache.record import Record, differing_fields, read_json
from ci2p_cache.training.spec import TrainSpec

__all__ = [
    "EXPERIMENT",
    "HOW_TO_WRITE",
    "Experiment",
    "list_recipes",
    "load_experiment",
    "read_experiment",
    "recipe_command",
    "refuse_other",
    "settable_fields",
    "with_changes",
]

EXPERIMENT = "experiment.json"
"""Name of the file that holds the resolved experiment."""

_WHERE = "recipes are in pipelines/ of the clone: ci2p-cache run pipelines/smoke.py"

HOW_TO_WRITE = "pipelines/README.md says how to write a recipe"
"""Hint where a file has none."""

_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_SWITCH = {"true": True, "yes": True, "false": False, "no": False}

_ONE_CALL = (
    *("plan_only", "finalise", "shard_range", "retry_failed", "rescan", "reencode_changed"),
    "add_views",
)
"""What speaks of one call of `encode`, and so of no experiment."""

_FREE_FIELDS = {
    *("claim", "source", "encode.root", "encode.batch_size", "encode.workers", "encode.devices"),
    *("encode.max_errors", "encode.executor", "train.init_from"),
}
"""Fields that change no number of an experiment, and may differ when it continues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment(Record):
    """What to encode, what to train from it, and which weights count.

    Raises:
        UsageError: a value is out of range, on construction.
    """

    version: int = _VERSION
    """Version of this record."""
    name: str
    """Name of the experiment, of its folder and of its run: letters, digits, dots, dashes."""
    claim: str = ""
    """What it is to show, one sentence; printed beside what came out."""
    source: str | None = None
    """The images, as `encode` takes them; None: the caller says where they are."""
    generate: int | None = None
    """Draw so many of the demo's pictures per class instead of taking a source; None: do not."""
    encode: EncodeOptions = field(default_factory=EncodeOptions)
    """Stage one."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """Stage two."""
    checkpoint: Literal["best", "last"] = "last"
    """Weights that are evaluated; the best are chosen by the images that they are counted on."""

    def __post_init__(self) -> None:
        if self.version != _VERSION:
            raise UsageError(
                f"experiment `version` is {self.version!r}; this ci2p-cache reads {_VERSION}"
            )
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"experiment `name` is {self.name!r}; wanted up to 100 letters, digits, dots, "
                "dashes and underscores, beginning with a letter or digit"
            )
        for name, kind in (("encode", EncodeOptions), ("train", TrainSpec)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise UsageError(
                    f"experiment `{name}` is {type(value).__name__}; wanted {kind.__name__}"
                )
        if self.checkpoint not in ("best", "last"):
            raise UsageError(f"`checkpoint` is {self.checkpoint!r}; wanted best or last")
        if self.generate is not None and (type(self.generate) is not int or self.generate < 2):
            raise UsageError(f"`generate` is {self.generate!r}; wanted 2 or more per class")
        if self.generate is not None and self.source is not None:
            raise UsageError("`source` and `generate` do not go together: which images are meant?")
        given = [name for name in _ONE_CALL if getattr(self.encode, name)]
        if given:
            raise UsageError(
                f"`encode.{given[0]}` is {getattr(self.encode, given[0])!r}; an experiment encodes "
                "everything, so it takes no such option"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values, nested records as dictionaries."""
        return Record.to_dict(self) | {"encode": self.encode.to_dict()}


def read_experiment(folder: Path) -> Experiment | None:
    """Returns the experiment that a folder was made for, None where it holds no record of one.

    Raises:
        ManifestError: the record is damaged or of another version.
    """
    path = folder / EXPERIMENT
    try:
        data = read_json(path)
        if isinstance(data.get("encode"), dict):
            # Options that came later have their defaults in a folder of before, and there the
            # level that format 1 has where none is asked for was written out.
            made = data["encode"]
            if "fold" not in made and made.get("level") == 1:
                made = made | {"level": None}
            data["encode"] = EncodeOptions().to_dict() | made
        return Experiment.from_dict(data)
    except FileNotFoundError:
        return None
    except (ManifestError, OSError) as error:
        raise ManifestError(
            f"{path} is damaged or of another version: {error}",
            hint="choose another --out; the caches and runs in the folder are whole without it",
        ) from error


def refuse_other(folder: Path, made: Experiment, asked: Experiment) -> None:
    """Refuses to continue with another experiment than the one that a folder was made for.

    Raises:
        RunMismatchError: fields other than `_FREE_FIELDS` differ; the message lists them.
    """
    lines = [
        f"  {name}: {ours!r} in the folder, {theirs!r} asked for"
        for name, ours, theirs in differing_fields(_without_paths(made), _without_paths(asked))
        if name not in _FREE_FIELDS
    ]
    if lines:
        raise RunMismatchError(
            f"{folder} holds another experiment; nothing was changed:\n" + "\n".join(lines),
            hint="choose another --out, or leave it out and change --set name=NAME",
        )


def _without_paths(experiment: Experiment) -> Experiment:
    """Returns it with the bare name of a model of the user's own, whose digest binds its run."""
    own, train = pinned_location(experiment.train.model), experiment.train
    train = dataclasses.replace(train, model=f"{own[0].name}:{own[1]}" if own else train.model)
    return dataclasses.replace(experiment, train=train)


def settable_fields() -> tuple[str, ...]:
    """Returns the dotted names that `with_changes` takes, in the order of the records."""
    return tuple(_fields())


def with_changes(experiment: Experiment, changes: Sequence[str]) -> Experiment:
    """Returns an experiment with fields replaced.

    ::

        with_changes(experiment, ["train.epochs=2", "encode.size=64", "encode.limit=none"])

    Args:
        experiment: What is changed.
        changes: FIELD=VALUE each; the value is read as the field's type: a number, true or false,
            one of its choices, a text, numbers with commas between them, or none where the field
            may be None.

    Raises:
        UsageError: a field is unknown or given twice, a value is not of its type, or the experiment
            cannot be so.
    """
    fields = _fields()
    values: dict[str, dict[str, Any]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.strip()
        if not equals:
            raise UsageError(
                f"`--set` got {change!r}; wanted FIELD=VALUE, for example train.epochs=2"
            )
        if name not in fields:
            bare = name.rpartition(".")[2]
            close = [each for each in fields if each.rpartition(".")[2] == bare]
            close += difflib.get_close_matches(name, fields, n=3, cutoff=0.6)
            known = f"the fields are {', '.join(fields)}"
            if close:
                known = f"did you mean {' or '.join(dict.fromkeys(close))}?"
            raise UsageError(f"no field is named {name!r}; {known}")
        group, _, bare = name.rpartition(".")
        if bare in values.setdefault(group, {}):
            raise UsageError(f"`--set` names {name} twice; which value is meant?")
        values[group][bare] = _read(name, fields[name], text.strip())
    top = values.pop("", {})
    for group, changed in values.items():
        top[group] = dataclasses.replace(getattr(experiment, group), **changed)
    return dataclasses.replace(experiment, **top)


def _fields() -> dict[str, Any]:
    """Returns the type of every field that can be set, by its dotted name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Experiment).items():
        if isinstance(hint, type) and issubclass(hint, Record):
            inner = typing.get_type_hints(hint)
            found |= {f"{name}.{each}": kind for each, kind in inner.items()}
        else:
            found[name] = hint
    return {name: hint for name, hint in found.items() if name.rpartition(".")[2] != "version"}


def _read(name: str, wanted: Any, text: str) -> Any:
    """Reads a value of a field's type."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        if text.lower() == "none" and type(None) in args:
            return None
        return _read(name, next(arg for arg in args if arg is not type(None)), text)
    if origin is Literal:
        if text not in args:
            raise UsageError(f"`{name}` is {text!r}; wanted one of {', '.join(map(str, args))}")
        return text
    if origin is tuple:
        return tuple(_read(name, args[0], part.strip()) for part in text.split(","))
    if wanted is bool:
        if text.lower() not in _SWITCH:
            raise UsageError(f"`{name}` is {text!r}; wanted true or false")
        return _SWITCH[text.lower()]
    if wanted is Path:
        return Path(text)
    try:
        return wanted(text)
    except ValueError as error:
        kind = "a whole number" if wanted is int else "a number"
        raise UsageError(f"`{name}` is {text!r}; wanted {kind}") from error


def list_recipes(path: str | Path) -> dict[str, str]:
    """Returns the recipes of a file, in its order: name and first line of the docstring.

    They are the functions defined in the file itself whose name has no leading underscore, that can
    be called without arguments, and that are annotated to return an `Experiment`.

    Raises:
        UsageError: there is no such file, it is no Python file, or importing it raises.
    """
    return {
        name: (inspect.getdoc(function) or "").partition("\n")[0]
        for name, function in _recipes(_imported(Path(path)))
    }


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
            f"{path} has several recipes; which one? It has {', '.join(known) or 'none'}",
            hint=recipe_command(path, known[0]) if known else HOW_TO_WRITE,
        )
    function = getattr(module, name, None)
    if not callable(function) or name.startswith("_"):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UsageError(
            f"{path} has no recipe {name!r}; it has {', '.join(known) or 'none'}",
            hint=recipe_command(path, close[0]) if close else None,
        )
    if needed := needed_arguments(function):
        raise UsageError(
            f"{path}:{name} wants the arguments {', '.join(needed)}; a recipe can be called "
            "without any"
        )
    with naming_errors(f"{path}:{name}", path):
        experiment = function()
    if not isinstance(experiment, Experiment):
        raise UsageError(
            f"{path}:{name} returns {type(experiment).__name__}; a recipe returns an Experiment"
        )
    return experiment


def recipe_command(path: Path, name: str) -> str:
    """Returns the command that runs a recipe, with a word for the images if it names none.

    Args:
        path: The recipe's file.
        name: The recipe in it.
    """
    try:
        made = load_experiment(f"{path}:{name}")
    except UsageError:
        return command("run", f"{path}:{name}")
    wants_images = made.source is None and made.generate is None
    return command("run", f"{path}:{name}", *["IMAGES"] * wants_images)


def _imported(path: Path) -> ModuleType:
    return import_file(path, read_python(path, hint=_WHERE))


def _recipes(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields the recipes of an imported file."""
    for name, function in vars(module).items():
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        returns = function.__annotations__.get("return")
        text = returns if isinstance(returns, str) else getattr(returns, "__name__", "")
        is_public = text.rpartition(".")[2] == Experiment.__name__ and not name.startswith("_")
        if is_public and not needed_arguments(function):
            yield name, function
