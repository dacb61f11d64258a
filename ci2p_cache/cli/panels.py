"""`PanelCommand`: a command whose help shows options under the panel that they name."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

__all__ = ["PanelCommand"]


class PanelCommand(TyperCommand):
    """Shows options that have a `rich_help_panel` in a section of that name, after all others.

    Typer itself does so only where rich draws the help, which ours does not.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments and options as typer does, then each panel in order of appearance.

        Args:
            ctx: click's context; typer brings a click of its own or takes the installed one.
            formatter: click's formatter.
        """
        everything = self.params
        panels: dict[str, list[Any]] = {}
        for parameter in everything:
            panel = getattr(parameter, "rich_help_panel", None)
            if panel is not None:
                panels.setdefault(panel, []).append(parameter)
        self.params = [each for each in everything if not any(each in p for p in panels.values())]
        try:
            super().format_options(ctx, formatter)
        finally:
            self.params = everything
        for panel, parameters in panels.items():
            records = [each.get_help_record(ctx) for each in parameters]
            with formatter.section(panel):
                formatter.write_dl([record for record in records if record is not None])
