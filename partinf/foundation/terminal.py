"""Consoles and tables as commands print them: no lines, and as wide as the terminal. What does not print does not import rich by this."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 140


def wide_console() -> Console:
    """The terminal as wide as it is; a pipe or a file as wide as the tables want."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)


def plain_table(*headings: str, title: str | None = None, show_header: bool = True) -> Table:
    """A table without lines. A heading that begins with `>` has its column at the right; one that begins with `>!` also on one line."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", show_header=show_header)
    for heading in headings:
        text, whole = heading.removeprefix(">"), heading.startswith(">!")
        table.add_column(text.removeprefix("!") if whole else text, justify="left" if text == heading else "right", no_wrap=whole)
    return table
