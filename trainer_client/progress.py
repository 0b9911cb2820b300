"""A progress bar for each reward while `collect()` waits, red where samples fail."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Report = Callable[[Mapping[str, tuple[int, int]]], None]
"""Takes, by reward name, how many samples have their outcome, and how many of these have failed."""

FAILED_STYLE = "bold red"


def is_terminal() -> bool:
    """Whether standard error is one, for bars to be drawn on."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def bars(names: tuple[str, ...], num_samples: int, show: bool | None) -> Iterator[Report | None]:
    """Bars on standard error; none if `show` is False, or None where it is no terminal."""
    if show is False or (show is None and not is_terminal()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), _bar_column(), _count_column(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {name: progress.add_task(name, total=num_samples, num_failed=0) for name in names}

        def report(counts: Mapping[str, tuple[int, int]]) -> None:
            for name, (num_done, num_failed) in counts.items():
                progress.update(tasks[name], completed=num_done, num_failed=num_failed)

        yield report


def _bar_column() -> Any:
    """A bar that is red once samples of its reward have failed."""
    from rich.progress import BarColumn

    failing = BarColumn(style="red", complete_style=FAILED_STYLE, finished_style=FAILED_STYLE)

    class Bar(BarColumn):
        def render(self, task: Any) -> Any:
            return failing.render(task) if task.fields["num_failed"] else super().render(task)

    return Bar()


def _count_column() -> Any:
    """`5/8`, or `8/8, 8 failed` in red."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Any) -> Text:
            words = f"{int(task.completed)}/{int(task.total)}"
            num_failed = task.fields["num_failed"]
            return Text(f"{words}, {num_failed} failed", style=FAILED_STYLE) if num_failed else Text(words)

    return Count()
