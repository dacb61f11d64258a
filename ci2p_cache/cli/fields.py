"""The options of a command: made from a settings record, shown in panels, taken by old names."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ci2p_cache.cli import choices, render
from ci2p_cache.fields import Option, declared_options

__all__ = ["PanelCommand", "takes_options"]

_COMPLETIONS = {
    "arch": choices.archs,
    "device": choices.devices,
    "model": choices.models,
    "views": choices.views,
}

_OLD_NAMES = {
    "demo": {"folder": "out"},
    "encode": {"devices": "device"},
    "export": {"to": "format"},
    "report": {"samples": "count"},
    "run": {"changes": "set"},
    "train": {"compile_model": "compile", "online": "from_images", "runs": "out"},
}
"""Command -> earlier name of an option -> its name. They work until 0.2."""


class PanelCommand(TyperCommand):
    """A command whose help has a section for each `rich_help_panel`, after the everyday options.

    Typer itself makes sections only where rich draws the help, which ours does not. An option may
    also be given by its earlier name, on the command line and as an environment variable; a notice
    on stderr then says the new one.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments, the everyday options, then each panel in order of appearance.

        Args:
            ctx: click's context; typer brings its own click or takes the installed one.
            formatter: click's formatter.
        """
        panels: dict[str, list[Any]] = {"Arguments": [], "Everyday": []}
        for parameter in self.get_params(ctx):
            panel = getattr(parameter, "rich_help_panel", None) or "Everyday"
            if parameter.param_type_name == "argument":
                panel = "Arguments"
            record = parameter.get_help_record(ctx)
            if record is not None:
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            if records:
                is_only = panel == "Everyday" and len(panels) == 2
                with formatter.section("Options" if is_only else panel):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words of a command line, earlier names of options among them.

        Args:
            ctx: As for `format_options`.
            args: The words behind the command.
        """
        if ctx.resilient_parsing:
            # A shell asks for completions, where a notice would be in the way.
            return super().parse_args(ctx, args)
        own = {parameter.name: parameter for parameter in self.params}
        names = {old: new for old, new in _OLD_NAMES.get(self.name or "", {}).items() if new in own}
        # click asks these after the command line and the new variables.
        ctx.default_map = {**(ctx.default_map or {})}
        for old, new in names.items():
            before, now = (f"{ctx.auto_envvar_prefix}_{each.upper()}" for each in (old, new))
            if value := os.environ.get(before):
                is_list = getattr(own[new], "multiple", False)
                ctx.default_map[new] = value.split() if is_list else value
                _say_new_name(before, now)
        words = list(args)
        for number, word in enumerate(words[: (*words, "--").index("--")]):
            flag, equals, value = word.partition("=")
            old = flag.removeprefix("--")
            if flag != old and old in names:
                now = f"--{names[old].replace('_', '-')}"
                words[number] = f"{now}{equals}{value}"
                _say_new_name(flag, now)
        return super().parse_args(ctx, words)


def _say_new_name(before: str, now: str) -> None:
    # Of torchrun's processes, only rank 0 prints.
    if os.environ.get("RANK", "0") == "0":
        render.notice(f"{before} is now {now}; the old name works until 0.2")


def takes_options(
    record: type, *, only: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds an option to a command for each field that `record` declares, in their order.

    They take the place of the command's own parameter `options`, which then receives the record.
    Where the command's `config` is such a record, what is not given is as there.

    Args:
        record: A dataclass whose fields `option` made.
        only: Fields to take; empty: all that are flags.
    """
    fields = {
        name: declared
        for name, declared in declared_options(record).items()
        if (name in only if only else declared[2].is_flag)
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            own = {
                name: values.pop(declared.flag or name) for name, (*_, declared) in fields.items()
            }
            made: Any = values.get("config")
            options = record(**own) if made is None else replace(made, **own)
            command(options=options, **values)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == "options":
                parameters += [
                    _parameter(name, *declared, in_panel=not only)
                    for name, declared in fields.items()
                ]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameter(
    field: str, kind: Any, default: Any, declared: Option, *, in_panel: bool
) -> inspect.Parameter:
    name = declared.flag or field
    flags = [f"--{name.replace('_', '-')}"] if kind is bool else []
    shown = typer.Option(
        *flags,
        help=declared.help,
        rich_help_panel=declared.panel if in_panel else None,
        metavar=declared.metavar,
        autocompletion=_COMPLETIONS.get(name),
        # typer would check paths itself; the code that opens one says more.
        readable=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, shown],
    )
