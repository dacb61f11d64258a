"""Turns the options that a settings record declares into the options of a command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from ci2p_cache.cli import choices
from ci2p_cache.fields import Option, declared_options

__all__ = ["takes_options"]

_COMPLETIONS = {
    "arch": choices.archs,
    "devices": choices.devices,
    "model": choices.models,
    "views": choices.views,
}


def takes_options(
    record: type, *, only: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each field that `record` declares, in their order.

    They take the place of the command's own parameter `options`, which then receives the record.

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
            own = {name: values.pop(name) for name in fields}
            command(options=record(**own), **values)

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == "options":
                parameters += [_parameter(name, *declared) for name, declared in fields.items()]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def _parameter(name: str, kind: Any, default: Any, declared: Option) -> inspect.Parameter:
    flags = [f"--{name.replace('_', '-')}"] if kind is bool else []
    shown = typer.Option(
        *flags,
        help=declared.help,
        rich_help_panel=declared.panel,
        metavar=declared.metavar,
        autocompletion=_COMPLETIONS.get(name),
        # Of a path; whoever opens it says what is wrong with it.
        readable=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, shown],
    )
