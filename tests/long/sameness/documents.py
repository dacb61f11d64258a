"""Units on what commands print, and on which commands, options and public names there are."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.long.sameness.bench import Bench, Unit
from tests.long.sameness.caches import ENCODE

__all__ = ["commands_with_json", "units"]

_RECIPE = '''"""Recipes of this check."""

import ci2p_cache as cc


def tiny() -> cc.Experiment:
    """A small one, on pictures that it draws."""
    return cc.Experiment(
        name="tiny",
        claim="nothing",
        generate=4,
        encode=cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.3),
        train=cc.TrainSpec(model="vitds_tiny", epochs=1, batch_size=8),
    )


def other() -> cc.Experiment:
    """Another one, on images that are named in the command."""
    return cc.Experiment(name="other", encode=cc.EncodeOptions(encoder="bundled", size=64))
'''


def units() -> list[Unit]:
    """Returns the units of the groups documents, surface and demo."""
    found = [Unit("documents", name, work) for name, work in _DOCUMENTS.items()]
    found += [Unit("surface", name, work) for name, work in _SURFACE.items()]
    return [*found, Unit("demo", "demo", _demo)]


def _demo(bench: Bench) -> None:
    bench.document("demo", "demo", "--folder", "tryout")
    bench.files("pictures", "tryout/pictures")
    bench.files("shards", "tryout/shards")


def _recipes(bench: Bench) -> None:
    (bench.folder / "recipes.py").write_text(_RECIPE)
    bench.document("list", "run", "recipes.py")
    bench.text("list, text", "run", "recipes.py")
    bench.document("plan", "run", "recipes.py:other", bench.inputs["few"], "--dry-run",
                   "--set", "train.epochs=2")  # fmt: skip
    bench.text("plan, text", "run", "recipes.py:tiny", "--dry-run")
    tiny = ("run", "recipes.py:tiny", "--out", "made", "--device", "cpu")
    bench.document("run until encode", *tiny, "--until", "encode")
    bench.document("run", *tiny)
    bench.document("run again", *tiny)
    bench.file("experiment.json", "made/experiment.json")
    bench.files("shards", "made/shards")
    bench.ended("another", *tiny, "--set", "train.epochs=3")


def _own_recipes(bench: Bench) -> None:
    for path in sorted((bench.tree.root / "pipelines").glob("*.py")):
        bench.document(f"list {path.name}", "run", path, codes=(0, 2))
        for name in sorted(
            set(re.findall(r"^def ([a-z]\w*)\(\) -> .*Experiment", path.read_text(), re.M))
        ):
            images = [] if "generate=" in path.read_text() else ["IMAGES"]
            bench.document(f"plan {path.name}:{name}", "run", f"{path}:{name}", *images,
                           "--dry-run", "--out", "nowhere", codes=(0, 2, 3))  # fmt: skip


def _looking(bench: Bench) -> None:
    encode = ("encode", bench.inputs["folder"], "--out", "shards", *ENCODE, "--shard-samples", 4)
    bench.document("dry run", *encode, "--dry-run")
    bench.note("a dry run writes nothing", (bench.folder / "shards").exists())
    bench.document("encode", *encode)
    bench.document("dry run of nothing left", *encode, "--dry-run")
    for name, words in {
        "card": ("inspect", "shards"),
        "row": ("inspect", "shards", "--row", 3),
        "key": ("inspect", "shards", "--key", "ant/004.jpg"),
        "val row": ("inspect", "shards", "--split", "val", "--row", 0),
        "tree": ("inspect", "shards", "--tree"),
        "status": ("status", "shards"),
        "verify": ("verify", "shards"),
        "quick": ("verify", "shards", "--quick"),
    }.items():
        bench.document(name, *words)
        bench.text(f"{name}, text", *words)
    bench.text("picture, text", "inspect", "shards", "--picture", "look.png", "--count", 3)
    bench.file("picture", "look.png")
    bench.document("picture of a row", "inspect", "shards", "--row", 1, "--picture", "row.png")
    bench.file("picture of a row, file", "row.png")


def _odd_looking(bench: Bench) -> None:
    bench.run("encode", bench.inputs["odd"], "--out", "shards", *ENCODE, "--max-errors", "100%")
    bench.document("dry run", "encode", bench.inputs["odd"], "--out", "other", *ENCODE,
                   "--dry-run", codes=(3,))  # fmt: skip
    bench.text("card, text", "inspect", "shards")
    for row in range(4):
        bench.document(f"row {row}", "inspect", "shards", "--row", row)
        bench.text(f"row {row}, text", "inspect", "shards", "--row", row)


def _doctor(bench: Bench) -> None:
    found = bench.document("doctor", "doctor", codes=(0, 6), types_only=True)
    bench.note("subjects", [each.get("subject") for each in found])


def _benches(bench: Bench) -> None:
    bench.run("encode", bench.inputs["parts"], "--out", "shards", *ENCODE)
    bench.document("encode", "bench", "encode", bench.inputs["folder"], *ENCODE, "--seconds",
                   0.2, types_only=True)  # fmt: skip
    bench.document("loader", "bench", "loader", "shards", "--seconds", 0.05, "--batch-size", 8,
                   types_only=True)  # fmt: skip
    bench.document("train", "bench", "train", "shards", "--model", "vitds_tiny", "--batch-size",
                   2, "--seconds", 0.2, "--encode-rate", 40, types_only=True)  # fmt: skip


_DOCUMENTS: dict[str, Callable[[Bench], None]] = {
    "benches": _benches,
    "recipes": _recipes,
    "own recipes": _own_recipes,
    "looking": _looking,
    "looking at odd images": _odd_looking,
    "doctor": _doctor,
}


def _commands(bench: Bench) -> None:
    """Every command with its options and their defaults, and which of them have `--json`."""
    shown = {" ".join(words): _options(text) for words, text in _helps(bench)}
    bench.note("commands", shown)
    bench.text("version", "--version")


def _helps(bench: Bench, *words: str) -> Iterator[tuple[tuple[str, ...], str]]:
    text = bench.run(*words, "--help").out
    yield words, text
    _, _, listed = text.partition("\nCommands:\n")
    for name in re.findall(r"^  ([a-z][\w-]*)", listed, re.M):
        yield from _helps(bench, *words, name)


def _options(text: str) -> dict[str, str]:
    """Options of a help page with their choices and default, in one form for any layout."""
    found: dict[str, str] = {}
    pages = re.split(r"^ +(?:-\w, )?(--[a-z][a-z-]*)", text, flags=re.M)[1:]
    for name, rest in zip(pages[::2], pages[1::2], strict=True):
        choices = re.search(r"\[([\w.:-]+(?:\|[\w.:-]+)+)\]", "".join(rest.split()))
        default = re.search(r"\[default:\s+([^\]]*)\]", rest)
        shown = [choices[1] if choices else "", " ".join(default[1].split()) if default else ""]
        found[name] = " = ".join(shown)
    return found


def commands_with_json(notes: dict[str, object]) -> set[str]:
    """Returns the names of all commands that have `--json`, from what `commands` noted."""
    shown = notes.get("commands", {})
    assert isinstance(shown, dict)
    return {name for name, options in shown.items() if "--json" in options}


def _names(bench: Bench) -> None:
    bench.call("public names", "public_names")


def _module(bench: Bench) -> None:
    """`python -m` in a fresh process, as people start it; all else here is a fork."""
    for item, words in {"version": ["--version"], "status": ["status", "nowhere"]}.items():
        ended = subprocess.run(
            [sys.executable, "-m", "ci2p_cache", *words], check=False, cwd=bench.folder,
            env={"PYTHONPATH": str(bench.tree.root), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True,
        )  # fmt: skip
        bench.note(item, [ended.returncode, ended.stdout, ended.stderr])


def _files_of_the_tree(bench: Bench) -> None:
    """Data files that ship with the package: the bundled encoder above all."""
    for path in sorted((bench.tree.root / "ci2p_cache").rglob("*")):
        if path.suffix in (".safetensors", ".typed"):
            bench.note(path.name, path.stat().st_size)
    script = Path(bench.tree.root, "pyproject.toml").read_text()
    bench.note("scripts", re.findall(r"^\[project\.scripts\]\n(.*)$", script, re.M)[0].split()[0])


_SURFACE: dict[str, Callable[[Bench], None]] = {
    "commands": _commands,
    "public": _names,
    "python -m": _module,
    "data": _files_of_the_tree,
}
