"""Lines for the user."""

from __future__ import annotations

from rich.console import Console


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: without markup, and wrapped by the terminal alone, so that a command can be copied."""
    console.print(line, markup=False, soft_wrap=True)
