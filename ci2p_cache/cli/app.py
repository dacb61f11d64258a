"""The `ci2p-cache` command: puts the commands together and turns errors into exit codes."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from ci2p_cache import __version__
from ci2p_cache.cli import render
from ci2p_cache.cli.bench import bench
from ci2p_cache.cli.caches import convert, inspect, status, verify
from ci2p_cache.cli.complexity import complexity
from ci2p_cache.cli.demo import demo
from ci2p_cache.cli.doctor import doctor
from ci2p_cache.cli.encode import encode
from ci2p_cache.cli.ending import advice, reported_errors
from ci2p_cache.cli.fields import PanelCommand
from ci2p_cache.cli.run import run
from ci2p_cache.cli.runs import evaluate, export, predict, report
from ci2p_cache.cli.train import train
from ci2p_cache.errors import command, without_overwrite
from ci2p_cache.process import put_off_compiler

__all__ = ["app", "command_tree", "run_command"]


app = typer.Typer(
    name="ci2p-cache",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "auto_envvar_prefix": "CI2P_CACHE",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        render.line(f"ci2p-cache {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Cache a frozen CompressAI encoder's latents once, then train CI2P ViTs straight from them.

    \b
      ci2p-cache demo                                try it, on drawn pictures
      ci2p-cache doctor                              is this machine ready?
      ci2p-cache encode imagenet/ --out shards/      stage one: images to latents
      ci2p-cache status shards/                      how far is encoding?
      ci2p-cache verify shards/                      is every byte intact?
      ci2p-cache inspect shards/ --picture look.png  what is in there?
      ci2p-cache train shards/ --model vitds         stage two: a classifier
      ci2p-cache evaluate runs/vitds-1a2b3c4d        how good is it?
      ci2p-cache predict runs/vitds-1a2b3c4d a.jpg   what does a picture show?
      ci2p-cache run pipelines/flowers.py            whole recipes, both stages
      ci2p-cache report runs/mine shards/            all of it on one page

    Each command continues where it stopped when it is run again. Every option can also be set by an
    environment variable: CI2P_CACHE_ENCODE_QUALITY=5 stands for `encode --quality 5`.

    Exit codes: 0 ok, 1 bug, 2 usage, 3 input data, 4 refused, 5 integrity, 6 resources,
    129, 130 and 143 interrupted and resumable. They describe the work: a closed stream or
    `| head -1` does not change them. Results lost to a full disk give 6, after the work is done.
    """


# In the list of commands a docstring's first sentence would be cut off.
for each, summary in (
    (encode, "Stage one: run the encoder over images, once."),
    (status, "How far encoding is, and who works on it."),
    (verify, "Check every byte of a cache; repair it."),
    (inspect, "Show a cache, a sample, or reconstructions."),
    (convert, "Write a cache in another format."),
    (train, "Stage two: train a model from the latents."),
    (evaluate, "Accuracy, calibration and confusions of a run."),
    (predict, "Classify pictures with a run folder alone."),
    (export, "Write encoder and model as ONNX or torch."),
    (report, "One HTML page about runs and caches."),
    (run, "A whole recipe: encode, train, evaluate, report."),
    (complexity, "Count parameters and MACs of the models."),
    (demo, "Try both stages on generated pictures."),
    (doctor, "Check whether this machine is ready."),
):
    app.command(cls=PanelCommand, short_help=summary)(each)
app.add_typer(bench)


def _hide_variables(part: Any) -> None:
    """Takes the environment variables out of a command's help, and out of all below it.

    They are named once in the root's text; on every option they would drown the rest.

    Args:
        part: A command or group of click's; typer brings its own click or takes the installed one.
    """
    for option in part.params:
        option.show_envvar = False
    for inner in getattr(part, "commands", {}).values():
        _hide_variables(inner)


@functools.cache
def command_tree() -> Any:
    """Returns click's group of all commands; to build it takes a tenth of a second."""
    root = typer.main.get_command(app)
    _hide_variables(root)
    return root


def run_command() -> None:
    """Runs the command line; the exit code is the error's own."""
    # OpenMP threads that wait for each other spin, and lose tenfold when the reading threads or
    # another program take a core: 4.4 against 15.8 images/s for vitds_tiny on two shared cores.
    # Read when torch is first imported, which is later.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # numpy's products need no threads of their own here, and a process with one thread may fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    put_off_compiler()
    # CompressAI still compiles a function with torch.jit when it is imported; no one here can act
    # on torch's warning about that.
    warnings.filterwarnings("ignore", message=r"`torch\.jit")
    root = command_tree()
    words = sys.argv[1:]
    names = _command_names(root)
    go_on = command(*without_overwrite(words))
    with reported_errors(go_on=go_on, advise=lambda error: advice(error, words, names)):
        root()


def _command_names(group: Any) -> list[str]:
    """Returns the names of all commands; those of a group with its name before them."""
    names = []
    for name, part in group.commands.items():
        names.append(name)
        names += [f"{name} {each}" for each in getattr(part, "commands", ())]
    return names
