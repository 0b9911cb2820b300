"""What a reward class raised, for people: the place in the user's own code, and a traceback in the worker's log."""

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

log = logging.getLogger(__name__)

REPEAT_S = 60.0
"""An error that was logged is not logged again for so long; how often it came meanwhile is said then."""

MAX_CHARS = 20_000
"""Of one traceback in the log."""

MAX_KEPT = 1000
"""Distinct errors that are remembered."""

_ROOTS = {Path(__file__).parents[2], Path(__file__).resolve().parents[2]}
"""Where this package lies, and the folder of links by which an editable install imports it: frames have either."""
_OURS = tuple(
    f"{root / package}/" for root in _ROOTS for package in ("tasks", "workers")
)
_ON_THE_WAY = (
    *(
        str(root / "workers" / name)
        for root in _ROOTS
        for name in (
            "scoring/runner.py",
            "process/loading.py",
            "process/preloading.py",
            "process/code.py",
        )
    ),
    str(Path(importlib.__file__).parent),
    "<frozen importlib",
)
"""What calls models and imports modules: in a traceback it says nothing to the user."""
_LIBRARIES = tuple(
    f"{Path(folder).resolve()}/"
    for folder in {
        *(
            sysconfig.get_paths()[name]
            for name in ("stdlib", "platstdlib", "purelib", "platlib")
        ),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


@dataclass(slots=True)
class _Seen:
    logged_at: float
    num_since: int = 0


class TracebackLog:
    """Logs each distinct error once in a while. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[tuple[object, ...], _Seen] = {}

    def write(self, event: str, reward: str, error: BaseException) -> None:
        """Log the traceback of an error, unless the same was logged lately: of one type, raised at one place.

        Args:
            event: What happened, `raised` or `load failed`.
            reward: The reward model.
        """
        trace = _of_the_model(error.__traceback__)
        places = tuple(
            (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(trace)
        )
        num_before = self._count((event, reward, type(error), places))
        if num_before is None:
            return
        again = f" num_since_last_logged={num_before}" if num_before else ""
        text = _text_of(error, trace)
        log.error(
            "%s reward=%s error=%s%s\n%s",
            event,
            reward,
            type(error).__name__,
            again,
            text,
        )

    def _count(self, key: tuple[object, ...]) -> int | None:
        """How often the error came since it was logged last; None if it is not to be logged now."""
        now = time.monotonic()
        with self._lock:
            seen = self._seen.get(key)
            if seen is not None and now - seen.logged_at < REPEAT_S:
                seen.num_since += 1
                return None
            if seen is None and len(self._seen) >= MAX_KEPT:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = _Seen(now)
            return seen.num_since if seen is not None else 0


tracebacks = TracebackLog()
"""The one of this process."""


def place_in(error: BaseException, reward: str) -> str:
    """` (my_rewards.py:9 in helper)`: the innermost line of the user's own code that an error came by; else empty.

    That is code of the class's own package or folder; where none is on the way, any that is no library's.

    Args:
        reward: The dotted path of the user's class.
    """
    home, folder = _home_of(reward)
    places = {"home": "", "elsewhere": ""}
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(("<", *_OURS)):
            continue
        is_home = bool(home) and file.startswith(home)
        is_library = not is_home and _is_library(file)
        if not is_library:
            is_home = is_home or bool(folder and file.startswith(folder))
            places["home" if is_home else "elsewhere"] = (
                f" ({Path(file).name}:{line} in {frame.f_code.co_name})"
            )
    return places["home"] or places["elsewhere"]


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
    text = text.encode("utf-8", "replace").decode()
    half = MAX_CHARS // 2
    return (
        text
        if len(text) <= MAX_CHARS
        else f"{text[:half]}\n... ({len(text)} characters) ...\n{text[-half:]}"
    )


def _of_the_model(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from where a model or its module begins; None where that is never come to (a SyntaxError)."""
    for part in _parts(trace):
        if not part.tb_frame.f_code.co_filename.startswith(_ON_THE_WAY):
            return part
    return None


def _parts(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _is_library(file: str) -> bool:
    path = Path(file).resolve()
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or str(
        path
    ).startswith(_LIBRARIES)


def _home_of(reward: str) -> tuple[str, str]:
    """The package's folder or the module's file that a dotted path is in, and the folder around; empty if unknown."""
    module = sys.modules.get(reward.partition(".")[0]) if "." in reward else None
    file = getattr(module, "__file__", None)
    if not file:
        return "", ""
    path = Path(file)
    home = path.parent if path.name == "__init__.py" else path
    return f"{home}/" if home != path else str(path), f"{home.parent}/"
