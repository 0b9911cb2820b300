"""Hears what libraries say while a reward model loads: warnings that they log, and Python's, in this thread only."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_SAID = 4
"""How many warnings an outcome's origin says at most; the worker's log has all."""

MAX_SAID_CHARS = 240
"""A longer warning is cut, since every outcome of the model carries it."""

LIBRARIES = (
    "transformers",
    "huggingface_hub",
    "open_clip",
    "timm",
    "tokenizers",
    "torch",
    "py.warnings",
    "diffusers",
    "accelerate",
    "peft",
    "safetensors",
    "RapidOCR",
)
"""Loggers that may not pass on what they log (`propagate = False`), as transformers' does, or whose level may be set
above a warning (TRANSFORMERS_VERBOSITY=error)."""

PRINTED = "celery.redirected"
"""Celery's logger of what is printed in a worker, progress bars too. It logs all of it as warnings."""


@dataclass(frozen=True, slots=True)
class Said:
    """One warning."""

    source: str
    """The name of its logger, or the category of Python's warning."""
    text: str


@contextlib.contextmanager
def listening() -> Iterator[list[Said]]:
    """Within, warnings of this thread are heard, also those that this process was given before.

    Warnings that are logged are shown as ever. Python's warnings are not: whoever listens logs them. If two are nested,
    the inner one hears first. When it ends, the outer one hears what is left in the inner one's list.
    """
    heard: list[Said] = []
    stack = _stack()
    _ears.put_on()
    stack.append(heard)
    try:
        yield heard
    finally:
        stack.pop()
        _ears.take_off()
        if stack:
            stack[-1].extend(heard)


def note(text: str) -> None:
    """Add a remark of ours on what is loading, for its outcomes' origin."""
    stack = _stack()
    if stack:
        stack[-1].append(Said("rewardq", text))


def in_short(heard: Iterable[Said]) -> tuple[str, ...]:
    """What was heard, each once, in short, for an outcome's origin."""
    texts = tuple(dict.fromkeys(one_line(said.text) for said in heard))
    num_more = len(texts) - MAX_SAID
    if num_more <= 0:
        return texts
    return (*texts[:MAX_SAID], f"and {num_more} more, in the worker's log")


def one_line(text: str) -> str:
    """The text in one line, without a terminal's colours, cut where it is long."""
    line = " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())
    return line if len(line) <= MAX_SAID_CHARS else f"{line[: MAX_SAID_CHARS - 3]}..."


# --- private -------------------------------------------------------------------------------------

_thread = threading.local()


def _stack() -> list[list[Said]]:
    """The lists that this thread's warnings go to, the innermost last."""
    if not hasattr(_thread, "stack"):
        _thread.stack = []
    stack: list[list[Said]] = _thread.stack
    return stack


class _Hearing(logging.Handler):
    """Notes what this thread logs. A record that comes by two loggers is noted once."""

    def emit(self, record: logging.LogRecord) -> None:
        stack = _stack()
        if not stack or record.name == PRINTED:
            return
        if getattr(record, "rewardq_heard", False):
            return
        record.rewardq_heard = True
        stack[-1].append(Said(record.name, record.getMessage()))


class _AsBefore(logging.Filter):
    """Keeps from the other handlers what their logger would not have logged at its own level."""

    def __init__(self, told: dict[str, int]) -> None:
        super().__init__()
        self._told = told

    def filter(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.level == logging.NOTSET:
            logger = logger.parent
        return logger is None or record.levelno >= self._told.get(
            logger.name, logging.NOTSET
        )


class _Repeat(Warning):
    """Never raised. Adding a filter, which this class is for, makes Python forget which warnings it has shown."""


class _Ears:
    """What is global in a process while some thread listens: a handler at the loggers, and Python's `showwarning`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_listening = 0
        self._handler = _Hearing(logging.WARNING)
        self._levels: dict[str, int] = {}
        """The own level of each logger that was set above a warning."""
        self._as_before = _AsBefore(self._levels)
        self._heard_at: list[logging.Logger] = []
        self._filtered: list[logging.Handler] = []
        self._show: Any = warnings.showwarning

    def put_on(self) -> None:
        with self._lock:
            self._num_listening += 1
            for logger in _loggers():
                self._hear(logger)
            if warnings.showwarning is not _show:
                self._show, warnings.showwarning = warnings.showwarning, _show
            warnings.simplefilter("default", _Repeat, append=True)
            _forget_what_was_said_once()

    def take_off(self) -> None:
        with self._lock:
            self._num_listening -= 1
            if self._num_listening:
                return
            for logger in self._heard_at:
                logger.removeHandler(self._handler)
                if logger.name in self._levels and logger.level == logging.WARNING:
                    logger.setLevel(self._levels[logger.name])
            for handler in self._filtered:
                handler.removeFilter(self._as_before)
            self._heard_at, self._filtered = [], []
            self._levels.clear()
            if warnings.showwarning is _show:
                warnings.showwarning = self._show

    def _hear(self, logger: logging.Logger) -> None:
        if logger.level > logging.WARNING:
            self._levels[logger.name] = logger.level
            logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            if handler is not self._handler and self._as_before not in handler.filters:
                handler.addFilter(self._as_before)
                self._filtered.append(handler)
        if self._handler not in logger.handlers:
            logger.addHandler(self._handler)
            self._heard_at.append(logger)

    def show(self, *warning: Any) -> None:
        """Note a warning of a thread that listens; pass on the warning of another thread."""
        stack = _stack()
        if stack:
            message, category = warning[:2]
            stack[-1].append(Said(category.__name__, str(message)))
        else:
            self._show(*warning)


_ears = _Ears()


def _show(
    message: Any,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Replaces `warnings.showwarning` while some thread listens."""
    _ears.show(message, category, filename, lineno, file, line)


def _loggers() -> list[logging.Logger]:
    """Loggers at which all is heard: the root, known libraries, and every logger that does not pass on to the root."""
    loggers = [logging.getLogger(), *map(logging.getLogger, LIBRARIES)]
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and not logger.propagate:
            loggers.append(logger)
    return loggers


def _forget_what_was_said_once() -> None:
    """Make a second load hear what the first one heard: transformers logs some warnings once a process."""
    for name in ("warning_once", "info_once"):
        forget = getattr(getattr(logging.Logger, name, None), "cache_clear", None)
        if forget is not None:
            forget()
