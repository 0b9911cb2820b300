"""A progress bar for each reward while `collect()` waits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping

Report = Callable[[Mapping[str, int]], None]
"""Takes, by reward name, how many samples have their outcome."""


@contextlib.contextmanager
def bars(names: tuple[str, ...], num_samples: int, show: bool | None) -> Iterator[Report | None]:
    """Bars on standard error; none if `show` is False, or None where it is no terminal."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {name: progress.add_task(name, total=num_samples) for name in names}

        def report(counts: Mapping[str, int]) -> None:
            for name, num_done in counts.items():
                progress.update(tasks[name], completed=num_done)

        yield report
