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
    """Whether standard error is a terminal, on which bars can be drawn.

    Standard error may be closed, or replaced by an object without `isatty`: then it is no terminal.
    """
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError, OSError):
        return False


class _LossyStream:
    """A stream that ignores failed writes: a terminal may hang up while a step is collected."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def bars(
    names: tuple[str, ...], num_samples: int, show: bool | None
) -> Iterator[Report | None]:
    """Bars on standard error.

    Args:
        show: Whether to show them; None shows them if standard error is a terminal.

    Yields:
        What sets the bars, or None if they are not shown.
    """
    if show is False or (show is None and not is_terminal()):
        yield None
        return
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        _bar_column(),
        _count_column(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_console()) as progress:
        tasks = {}
        for name in names:
            tasks[name] = progress.add_task(name, total=num_samples, num_failed=0)

        def report(counts: Mapping[str, tuple[int, int]]) -> None:
            for name, (num_done, num_failed) in counts.items():
                progress.update(tasks[name], completed=num_done, num_failed=num_failed)

        yield report


def _console() -> Any:
    """Standard error as rich draws on it."""
    from rich.console import Console

    stream: Any = _LossyStream(sys.stderr)
    return Console(file=stream)


def _bar_column() -> Any:
    """A bar that is red once samples of its reward have failed."""
    from rich.progress import BarColumn

    failing = BarColumn(
        style="red", complete_style=FAILED_STYLE, finished_style=FAILED_STYLE
    )

    class Bar(BarColumn):
        def render(self, task: Any) -> Any:
            if task.fields["num_failed"]:
                return failing.render(task)
            return super().render(task)

    return Bar()


def _count_column() -> Any:
    """`5/8`, or `8/8, 8 failed` in red."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Any) -> Text:
            words = f"{int(task.completed)}/{int(task.total)}"
            num_failed = task.fields["num_failed"]
            if num_failed:
                return Text(f"{words}, {num_failed} failed", style=FAILED_STYLE)
            return Text(words)

    return Count()
