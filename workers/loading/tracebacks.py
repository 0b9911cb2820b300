"""What a reward class raised, for people: the line in the user's own code, and a traceback in the worker's log."""

from __future__ import annotations

import importlib
import logging
import site
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tasks.catalog import CATALOG
from workers.texts import cut_middle, encodable

log = logging.getLogger(__name__)

REPEAT_S = 60.0
"""An error that was logged is not logged again for so long; how often it came meanwhile is said then."""

MAX_CHARS = 20_000
"""Of one traceback in the log."""

MAX_KEPT = 1000
"""Distinct errors that are remembered."""


def _folders(*names: str) -> Iterator[str]:
    """Files and folders of this package as frames name them: where it lies, or by an editable install's links."""
    file = Path(__file__)
    for root in {file.parents[2], file.resolve().parents[2]}:
        for name in names:
            yield f"{root}/{name}"


_OURS = tuple(_folders("tasks/", "workers/"))
_CALLERS = (
    *_folders("workers/loading/"),
    *_folders("workers/scoring/batches.py", "workers/process/preloading.py"),
    str(Path(importlib.__file__).parent),
    "<frozen importlib",
)
"""What calls models and imports modules: in a traceback it says nothing to the user."""


def _library_folders() -> Iterator[str]:
    """Folders whose code is a library's, or Python's own."""
    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [paths[name] for name in names]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    for folder in dict.fromkeys(folders):
        yield f"{Path(folder).resolve()}/"


_LIBRARIES = tuple(_library_folders())


@dataclass(slots=True)
class _Seen:
    logged_at_s: float
    num_since: int = 0


class TracebackLog:
    """Logs each distinct error once in a while. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[tuple[object, ...], _Seen] = {}

    def write(self, event: str, reward: str, error: BaseException) -> None:
        """Log the traceback of an error, unless the same was logged lately: of one type, raised at the same lines.

        Args:
            event: What happened, `raised` or `load failed`.
            reward: The reward model.
        """
        trace = _of_the_model(error.__traceback__)
        lines = []
        for frame, line in traceback.walk_tb(trace):
            lines.append((frame.f_code.co_filename, line))
        num_before = self._count((event, reward, type(error), *lines))
        if num_before is None:
            return
        again = f" num_since_last_logged={num_before}" if num_before else ""
        log.error(
            "%s reward=%s error=%s%s\n%s",
            event,
            reward,
            type(error).__name__,
            again,
            _text_of(error, trace),
        )

    def _count(self, key: tuple[object, ...]) -> int | None:
        """How often the error came since it was logged last; None if it is not to be logged now."""
        now_s = time.monotonic()
        with self._lock:
            seen = self._seen.get(key)
            if seen is not None and now_s - seen.logged_at_s < REPEAT_S:
                seen.num_since += 1
                return None
            if seen is None and len(self._seen) >= MAX_KEPT:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = _Seen(now_s)
            return seen.num_since if seen is not None else 0


tracebacks = TracebackLog()
"""The one of this process."""


def user_line(error: BaseException, reward: str) -> str:
    """` (my_rewards.py:9 in helper)`: the innermost line of the user's own code that an error came by; else empty.

    Code of the class's own package or folder is the user's; where none is on the way, any that is no library's. Of a
    built-in the line says nothing to the user, and is empty.

    Args:
        reward: The dotted path of the user's class, or the name of a built-in.
    """
    if reward in CATALOG:
        return ""
    package, folder = _package_of(reward)
    in_package = elsewhere = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(("<", *_OURS)):
            continue
        words = f" ({Path(file).name}:{line} in {frame.f_code.co_name})"
        if package and file.startswith(package):
            in_package = words
        elif _is_library(file):
            continue
        elif folder and file.startswith(folder):
            in_package = words
        else:
            elsewhere = words
    return in_package or elsewhere


def words_of(error: BaseException) -> str:
    """The type of an error and what it says, in one text."""
    try:
        said = str(error)
    except Exception as other:  # an error of the user's is the user's code
        said = f"(its text cannot be made: {type(other).__name__})"
    return f"{type(error).__name__}: {said}" if said.strip() else type(error).__name__


def _text_of(error: BaseException, trace: TracebackType | None) -> str:
    """The traceback, its middle left out where it is long."""
    try:
        text = "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    except Exception:  # an error of the user's is the user's code
        text = "".join([*traceback.format_tb(trace), words_of(error)])
    return cut_middle(encodable(text), MAX_CHARS)


def _of_the_model(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from where a model or its module begins; None where that is never come to (a SyntaxError)."""
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_CALLERS):
            return trace
        trace = trace.tb_next
    return None


def _is_library(file: str) -> bool:
    path = Path(file).resolve()
    if not {"site-packages", "dist-packages"}.isdisjoint(path.parts):
        return True
    return str(path).startswith(_LIBRARIES)


def _package_of(reward: str) -> tuple[str, str]:
    """The package's folder or the module's file that a dotted path is in, and the folder around; empty if unknown."""
    module = sys.modules.get(reward.partition(".")[0]) if "." in reward else None
    file = getattr(module, "__file__", None)
    if not file:
        return "", ""
    path = Path(file)
    if path.name == "__init__.py":
        return f"{path.parent}/", f"{path.parent.parent}/"
    return str(path), f"{path.parent}/"
