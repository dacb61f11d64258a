"""The rules of the house: who may import whom, who prints, what is banned, what is documented, how
long files and functions are.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache
import ci2p_cache.errors

PACKAGE = Path(ci2p_cache.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PIPELINES = sorted((PACKAGE.parent / "pipelines").rglob("*.py"))
MAX_LINES = 300
MAX_BODY_LINES = 60
"""From the first statement behind the docstring to the end: options and their help do not count."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "machine": {"errors"},
    "record": {"errors"},
    "parquet_pages": set(),
    "intervals": set(),
    "specs": {"errors", "record"},
    "remote": {"errors"},
    "images": {"errors", "parquet_pages", "record", "remote", "specs"},
    "encoder": {"machine", "errors", "record", "specs"},
    "cache": {"errors", "parquet_pages", "record", "remote", "specs"},
    "models": {"errors", "record", "specs"},
    "encoding": {"machine", "errors", "record", "remote", "specs", "images", "encoder", "cache"},
    "loader": {"machine", "errors", "record", "specs", "cache"},
    "training": {"machine", "errors", "record", "specs", "cache", "loader", "models"},
    "inference": {
        *("machine", "errors", "record", "specs", "images", "encoder", "cache", "loader", "models"),
        *("training", "intervals"),
    },
    "report": {"errors", "record", "remote", "specs", "cache", "intervals"},
    "experiment": {
        *("errors", "record", "specs", "cache", "encoding", "demo_pictures", "training"),
        *("inference", "report", "illustrations", "loader", "machine", "models"),
    },
    "preview_figure": {"errors", "record", "specs", "cache"},
    "reconstructions": {"errors", "record", "specs", "cache", "images", "encoder"},
    "previews": {
        "errors",
        "record",
        "specs",
        "cache",
        "images",
        "encoder",
        "preview_figure",
        "reconstructions",
    },
    "illustrations": {
        "errors",
        "record",
        "specs",
        "cache",
        "images",
        "encoder",
        "reconstructions",
        "remote",
        "report",
    },
}
"""Room -> rooms it may import. Rooms not named here (the cli, the demo) stand on top of all."""

EXCEPTIONS = {
    # Loading from the source images needs images, and the encoder where it is in the loop.
    ("loader/online.py", "encoder"),
    ("loader/pixels.py", "images"),
}


def from_root(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    room = room_of(path)
    if room not in MAY_IMPORT:
        return
    name = path.relative_to(PACKAGE).as_posix()
    for module in imported_modules(path):
        package, _, rest = module.partition(".")
        if package == "ci2p_cache" and rest:
            target = rest.split(".")[0]
            allowed = target == room or target in MAY_IMPORT[room]
            assert allowed or (name, target) in EXCEPTIONS, f"{name} imports {module}"


def test_the_rooms_within_encoding_do_not_know_each_other() -> None:
    # What lies beside them calls the executors; dry runs, repairs and conversions stand upon it.
    root = PACKAGE / "encoding"
    inner = {path.name for path in root.iterdir() if (path / "__init__.py").exists()}
    assert inner == {"convert", "dry_run", "executors", "repair"}
    for path in root.rglob("*.py"):
        own = path.relative_to(root).parts[0]
        for module in imported_modules(path):
            target = module.removeprefix("ci2p_cache.encoding.").partition(".")[0]
            if module.startswith("ci2p_cache.encoding.") and target in inner:
                beside = own not in inner and target == "executors"
                assert target == own or beside, f"{from_root(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_encoder_imports_compressai_and_only_the_cli_prints(path: Path) -> None:
    text = path.read_text("utf-8")
    if room_of(path) != "encoder":
        assert "compressai" not in {module.split(".")[0] for module in imported_modules(path)}
    if room_of(path) != "cli":
        assert not re.search(r"^\s*print\(|sys\.std(out|err)\.write|sys\.exit\(", text, re.M)


@pytest.mark.parametrize(
    "path", FILES + PIPELINES, ids=lambda p: str(p.relative_to(PACKAGE.parent))
)
def test_files_are_short_and_open_with_a_sentence(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


@pytest.mark.parametrize(
    "path", FILES + PIPELINES, ids=lambda p: str(p.relative_to(PACKAGE.parent))
)
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno if body else 0
        assert lines <= MAX_BODY_LINES, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    text = path.read_text("utf-8")
    for banned in (
        r"\bimport pickle\b",
        r"allow_pickle\s*=\s*True",
        r"shell\s*=\s*True",
        r"\bextractall\b",
        r"(?<![.\w])eval\(",
        r"(?<![.\w])exec\(",
        r"LOAD_TRUNCATED_IMAGES\s*=",
    ):
        assert not re.search(banned, text), f"{path} holds {banned}"
    for call in re.findall(r"(?<![.\w])torch\.load\([^)]*\)", text):
        assert "weights_only=True" in call, f"{path}: {call}"


def test_every_module_lists_what_is_public() -> None:
    for path in FILES:
        if path.name in ("__init__.py", "__main__.py"):
            continue
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = importlib.import_module(name)
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.{public} is listed and not there"


def test_the_public_names_are_there_and_sorted() -> None:
    assert ci2p_cache.__all__ == sorted(ci2p_cache.__all__)
    for name in ci2p_cache.__all__:
        assert getattr(ci2p_cache, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        ci2p_cache.no_such_name  # noqa: B018


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and the public methods and properties of public classes, inherited too."""
    for name in ci2p_cache.__all__:
        value = getattr(ci2p_cache, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for member in filter(lambda each: not each.startswith("_"), dir(value)):
                found = inspect.getattr_static(value, member)
                found = getattr(found, "__func__", getattr(found, "fget", found))
                function = inspect.unwrap(found) if callable(found) else None
                if inspect.isfunction(function) and function.__module__.startswith("ci2p_cache"):
                    yield f"{name}.{member}", function


def test_every_public_name_is_documented() -> None:
    for name in ci2p_cache.__all__:
        value = getattr(ci2p_cache, name)
        if name == "__version__":
            continue
        told = vars(value)["__doc__"] if inspect.isclass(value) else value.__doc__
        # Without one a dataclass gets its own signature for a docstring.
        assert told, name
        assert not told.startswith(f"{name}("), name
    for name, function in public_functions():
        assert inspect.getdoc(function), name


def test_public_functions_document_what_they_take() -> None:
    for name, function in public_functions():
        told = inspect.getdoc(function) or ""
        taken = [
            each for each in inspect.signature(function).parameters if each not in ("self", "cls")
        ]
        if "." in name and len(taken) <= 1:
            # One argument of a method may stand in its sentence.
            continue
        missing = [each for each in taken if not re.search(rf"^ +{each}: ", told, re.M)]
        assert not missing, f"{name} says nothing of {missing}"


def test_public_functions_document_the_errors_that_they_raise_themselves() -> None:
    errors = vars(ci2p_cache.errors)
    for name, function in public_functions():
        source = textwrap.dedent(inspect.getsource(function))
        raised = {
            node.exc.func.id
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and isinstance(node.exc.func, ast.Name)
            and node.exc.func.id in errors
        }
        told = (inspect.getdoc(function) or "").partition("Raises:")[2]
        missing = [each for each in sorted(raised) if each not in told]
        assert not missing, f"{name} raises {missing} and does not say so"


# What a command may need when it works; typer itself is the floor.
HEAVY = {
    *("torch", "torchvision", "compressai", "numpy", "zarr", "numcodecs", "zstandard", "pyarrow"),
    *("google_crc32c", "webdataset", "PIL", "timm", "safetensors", "tensorboard", "matplotlib"),
    *("yaml", "packaging", "rich.console", "fsspec", "ray", "onnx", "asyncio", "multiprocessing"),
}

ALL_HELP = """
import contextlib, io, sys
import ci2p_cache
from ci2p_cache.cli.app import app, run_command
import typer

def commands(part, *path):
    yield path
    for name, inner in getattr(part, "commands", {}).items():
        yield from commands(inner, *path, name)

told = list(commands(typer.main.get_command(app)))
for path in told:
    sys.argv = ["ci2p-cache", *path, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run_command()
    assert "Usage: ci2p-cache" in text.getvalue(), path
    loaded = sorted(HEAVY & set(sys.modules))
    assert not loaded, f"{sys.argv} loads {loaded}"
print(len(told))
"""


def test_importing_the_package_and_every_help_load_nothing_heavy() -> None:
    code = f"HEAVY = {HEAVY!r}\n{ALL_HELP}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    shown = subprocess.run(command, check=False, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    # The root, the commands, and those of `bench`: none was left out.
    assert int(shown.stdout) >= 19
