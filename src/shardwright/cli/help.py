"""How a command explains itself: plain text in the terminal's width, options in groups, examples line by line.

typer's boxes cut long flags short in a narrow terminal, and a flag that cannot be read cannot be typed.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

FIRST_PANEL = "Options"


class Command(TyperCommand):
    """A command whose help shows each `rich_help_panel` of its options as a section."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], FIRST_PANEL: []}
        for param in self.get_params(ctx):
            if (row := param.get_help_record(ctx)) is not None:
                panel = "Arguments" if param.param_type_name == "argument" else None
                panel = panel or getattr(param, "rich_help_panel", None) or FIRST_PANEL
                panels.setdefault(panel, []).append(row)
        for name, rows in panels.items():
            if rows:
                with formatter.section(name):
                    formatter.write_dl(rows)


def examples(*lines: str) -> str:
    """The end of a command's help, its lines kept as they are."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))
