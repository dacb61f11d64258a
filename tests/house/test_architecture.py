"""The rules of the house: who may import whom, who prints, what is banned, what is documented, how
long files and functions are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

import ci2p_cache
import ci2p_cache.errors

PACKAGE = Path(ci2p_cache.__file__).parent
MAX_CODE_LINES = 400
"""Docstrings, imports and blank lines do not count."""
MAX_BODY_LINES = 60
"""From the first statement behind the docstring to the end: options and their help do not count."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "fields": {"errors"},
    "machine": {"errors"},
    "record": {"errors"},
    "parquet": set(),
    "process": set(),
    "specs": {"errors", "fields", "record"},
    "remote": {"errors"},
    "outputs": {"errors", "remote"},
    "images": {"errors", "parquet", "process", "record", "remote", "specs"},
    "gdn": set(),
    "imported": {"errors"},
    "encoder": {"machine", "errors", "fields", "record", "specs", "gdn"},
    "cache": {"errors", "parquet", "record", "remote", "specs"},
    "models": {"errors", "record", "specs", "gdn", "imported"},
    "encoding": {
        *("machine", "errors", "outputs", "record", "remote", "specs", "images", "encoder"),
        *("cache", "fields", "parquet", "process"),
    },
    "loader": {"machine", "errors", "record", "specs", "cache"},
    "runs": {"errors", "parquet", "record", "specs", "cache", "models"},
    "training": {
        *("machine", "errors", "fields", "outputs", "record", "specs", "cache", "loader", "models"),
        "runs",
    },
    "inference": {
        *("machine", "errors", "record", "specs", "images", "encoder", "cache", "loader", "models"),
        *("training", "outputs", "runs"),
    },
    "pictures": {
        *(
            "errors",
            "machine",
            "outputs",
            "record",
            "remote",
            "specs",
            "cache",
            "images",
            "encoder",
        ),
    },
    "report": {
        *("errors", "outputs", "parquet", "record", "remote", "specs", "cache", "runs"),
        "pictures",
    },
    "experiment": {
        *("errors", "outputs", "record", "specs", "cache", "encoding", "pictures", "training"),
        *("imported", "inference", "report", "runs"),
    },
}
"""Room -> rooms it may import. Rooms not named here (the cli) stand on top of all."""

EXCEPTIONS = {
    # Loading from the source images needs images, and the encoder where it is in the loop.
    ("loader/pixels.py", "encoder"),
    ("loader/pixels.py", "images"),
    # The command that made a run has the settings that are no defaults.
    ("report/data.py", "training"),
    ("report/data.py", "fields"),
}


@dataclass(frozen=True)
class Source:
    """One file of the project, read and parsed once."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Its path from the project's root."""
        return self.path.relative_to(PACKAGE.parent).as_posix()

    @property
    def room(self) -> str:
        return self.path.relative_to(PACKAGE).parts[0].removesuffix(".py")

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def listed(self) -> list[str]:
        """What its `__all__` lists; empty where it has none."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return list(ast.literal_eval(node.value))
        return []

    @property
    def imports_on_import(self) -> set[str]:
        """The modules that importing it imports: those named outside functions."""
        return {
            name
            for node in self.tree.body
            if isinstance(node, ast.ImportFrom) and node.module
            for name in (node.module, *(f"{node.module}.{each.name}" for each in node.names))
        }

    @property
    def code_lines(self) -> int:
        """Its lines without docstrings, strings that describe a field, imports and blank lines."""
        left_out: set[int] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom) or (
                isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            ):
                left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = enumerate(self.text.splitlines(), start=1)
        return sum(bool(line.strip()) and number not in left_out for number, line in lines)

    @functools.cached_property
    def imports(self) -> set[str]:
        """The modules that it imports, wherever in the file."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: relative import"
                found.add(node.module or "")
        return found


def read(root: Path) -> list[Source]:
    paths = sorted(root.rglob("*.py"))
    texts = [path.read_text("utf-8") for path in paths]
    return [Source(path, text, ast.parse(text)) for path, text in zip(paths, texts, strict=True)]


@pytest.fixture(scope="module")
def package() -> list[Source]:
    return read(PACKAGE)


@pytest.fixture(scope="module")
def pipelines() -> list[Source]:
    return read(PACKAGE.parent / "pipelines")


def test_imports_point_down_only(package: list[Source]) -> None:
    offenders = []
    for source in package:
        if source.room not in MAY_IMPORT:
            continue
        allowed = {source.room, *MAY_IMPORT[source.room]}
        name = source.path.relative_to(PACKAGE).as_posix()
        for module in source.imports:
            root, _, rest = module.partition(".")
            target = rest.split(".")[0]
            beside = target in allowed or (name, target) in EXCEPTIONS
            if root == "ci2p_cache" and rest and not beside:
                offenders.append(f"{source.name} imports {module}")
    assert not offenders


def test_only_the_encoder_imports_compressai_and_only_the_cli_prints(
    package: list[Source],
) -> None:
    offenders = []
    for source in package:
        roots = {module.split(".")[0] for module in source.imports}
        if source.room != "encoder" and "compressai" in roots:
            offenders.append(f"{source.name} imports compressai")
        prints = r"^\s*print\(|sys\.std(out|err)\.write|sys\.exit\("
        if source.room != "cli" and re.search(prints, source.text, re.M):
            offenders.append(f"{source.name} prints or exits")
    assert not offenders


def test_files_are_short_and_open_with_a_sentence(
    package: list[Source], pipelines: list[Source]
) -> None:
    sources = package + pipelines
    assert not {each.name: each.code_lines for each in sources if each.code_lines > MAX_CODE_LINES}
    assert not [source.name for source in sources if not ast.get_docstring(source.tree)]


def test_no_imports_run_in_a_circle(package: list[Source]) -> None:
    modules = {each.module: each for each in package}
    above: dict[str, set[str]] = {
        name: {module for module in each.imports_on_import if module in modules}
        for name, each in modules.items()
    }
    while free := [name for name, imports in above.items() if not imports & above.keys()]:
        for name in free:
            del above[name]
    assert not above, "these import one another, or what does"


def test_a_public_name_has_one_definition(package: list[Source]) -> None:
    # A command may have the name of the library function that it calls.
    homes: dict[str, list[str]] = {}
    for source in package:
        if source.room != "cli":
            for node in source.tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in source.listed:
                    homes.setdefault(node.name, []).append(source.name)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_no_file_is_only_passed_through(package: list[Source]) -> None:
    # Commands are found by the names of their files.
    readers: dict[str, set[str]] = {}
    for source in package:
        for module in source.imports:
            readers.setdefault(module, set()).add(source.name)
    small = [each for each in package if each.code_lines < 50 and each.room != "cli"]
    assert not [
        source.name
        for source in small
        if not source.path.name.startswith("__") and len(readers.get(source.module, ())) < 2
    ]


def test_functions_are_short(package: list[Source], pipelines: list[Source]) -> None:
    offenders = []
    for source in package + pipelines:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            lines = 1 + (body[-1].end_lineno or 0) - body[0].lineno if body else 0
            if lines > MAX_BODY_LINES:
                offenders.append(f"{source.name}: {node.name} has {lines} lines")
    assert not offenders


def test_only_commands_and_workers_change_the_whole_process(package: list[Source]) -> None:
    mains = {
        *("ci2p_cache/encoding/worker.py", "ci2p_cache/encoding/ray_actors.py"),
        "ci2p_cache/images/decoder_process.py",
    }
    callers = {each.name for each in package if "ci2p_cache.process" in each.imports}
    assert {name for name in callers if not name.startswith("ci2p_cache/cli/")} == {
        *mains, "ci2p_cache/__init__.py",
    }  # fmt: skip


def test_nothing_runs_code_from_data(package: list[Source]) -> None:
    banned = (
        r"\bimport pickle\b",
        r"allow_pickle\s*=\s*True",
        r"shell\s*=\s*True",
        r"\bextractall\b",
        r"(?<![.\w])eval\(",
        r"(?<![.\w])exec\(",
        r"LOAD_TRUNCATED_IMAGES\s*=",
        # torch.load without weights_only=True.
        r"(?<![.\w])torch\.load\((?![^)]*weights_only=True)",
    )
    assert not [
        f"{source.name} holds {each}"
        for source in package
        for each in banned
        if re.search(each, source.text)
    ]


def top_level_names(tree: ast.Module) -> set[str]:
    """The names that a module defines or imports outside functions and classes."""
    found: set[str] = set()
    nodes = list(tree.body)
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for target in targets for each in ast.walk(target)
                      if isinstance(each, ast.Name)}  # fmt: skip
        elif isinstance(node, ast.If | ast.Try):
            nodes += [*node.body, *node.orelse]
    return found


def test_every_module_lists_what_is_public(package: list[Source]) -> None:
    offenders = []
    for source in package:
        if source.path.name in ("__init__.py", "__main__.py"):
            continue
        listed = [
            ast.literal_eval(node.value)
            for node in source.tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        assert len(listed) == 1, f"{source.name} has no list of its public names"
        missing = set(listed[0]) - top_level_names(source.tree)
        offenders += [f"{source.name} lists {name}, which is not there" for name in missing]
    assert not offenders


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


COLD = """
import contextlib, io, json, sys

told = {}
for words in COMMANDS:
    from ci2p_cache.cli.app import run_command
    sys.argv = ["ci2p-cache", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        run_command()
    told[words[0]] = sorted(ABSENT & set(sys.modules))
print(json.dumps(told))
"""
# What `encode` has no use for in its own process: the decoders' process has torchvision.
ABSENT = {
    *("compressai", "torchvision", "timm", "tensorboard", "torch.utils.tensorboard", "scipy"),
    *("torch._dynamo.convert_frame", "sympy", "matplotlib", "webdataset"),
}


def loaded_by(commands: list[list[str]], absent: set[str]) -> dict[str, list[str]]:
    """Runs commands one after another in a new process; returns what each has loaded by its end."""
    code = f"ABSENT = {absent!r}\nCOMMANDS = {commands!r}\n{COLD}"
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True
    )
    return cast("dict[str, list[str]]", json.loads(shown.stdout))


@pytest.mark.slow
def test_a_cold_encode_loads_only_what_it_uses(image_folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "shards")
    words = ["encode", str(image_folder), "--out", out, "--encoder", "bundled", "--size", "32"]
    told = loaded_by([words, ["verify", out], ["inspect", out]], ABSENT)
    assert Path(out, "cache.json").is_file()
    assert told == {"encode": [], "verify": [], "inspect": []}
    looks: list[list[str]] = [["status", out], ["inspect", out], ["verify", out]]
    assert loaded_by(looks, {"torch"}) == {"status": [], "inspect": [], "verify": []}


@pytest.mark.slow
def test_a_cold_training_loads_no_compressai(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    ci2p_cache.encode(image_folder, out, ci2p_cache.EncodeOptions(encoder="bundled", size=32))
    words = ["train", str(out), "--model", "vitds_tiny", "--epochs", "1"]
    runs = tmp_path / "runs"
    # torchvision is there: timm imports it.
    absent = {"compressai", "scipy", "torch._dynamo.convert_frame"}
    loaded = loaded_by([[*words, "--out", str(runs)]], absent)
    assert loaded == {"train": []}
    assert list(runs.iterdir())
