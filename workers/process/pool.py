"""Celery's pools, with one promise more: whatever is raised around a task's body, its slot is free afterwards.

Celery frees a slot in a callback of the task. An exception that leaves its tracer (a result backend that is away, a
`MemoryError`, an event that cannot be sent) passes the callback by. The request then stays reserved for good, and the
worker, which takes a message only when a slot is free, takes one less.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.concurrency import get_implementation, solo, thread
from celery.concurrency.base import apply_target
from celery.worker.state import task_ready

from tasks.servers.connections import LOST

log = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
"""How often the log shows the traceback of what was raised around a task's body."""


class _Guarded:
    """What both pools add to Celery's. The look for lost slots (`workers.process.slots`) reads `running`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running: set[Any] = set()
        """Requests that a thread is working on. One addition or removal at a time, by the interpreter's lock."""
        self._traceback_from_s = 0.0

    def _run(
        self,
        target: Any,
        args: Any = None,
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> None:
        """Run one task from its acceptance to its callback, and free its slot whatever comes of that."""
        request = callback.__self__
        self.running.add(request)
        try:
            apply_target(target, args, kwargs, callback, accept_callback)
        except Exception as error:
            self._log(request, error)
        finally:
            self.running.discard(request)
            _free(request)

    def _log(self, request: Any, error: Exception) -> None:
        words = "a task broke outside of its body, its slot is free again task=%s id=%s error=%s: %s"
        now_s = time.monotonic()
        shows_traceback = (
            not isinstance(error, LOST) and now_s >= self._traceback_from_s
        )
        if shows_traceback:
            self._traceback_from_s = now_s + LOG_EVERY_S
        log.error(
            words,
            request.name,
            request.id,
            type(error).__name__,
            error,
            exc_info=shows_traceback,
        )


def _free(request: Any) -> None:
    """Free the slot of a request, and acknowledge its message, unless that was done: both are counted by Celery."""
    task_ready(request)
    try:
        request.acknowledge()
    except Exception:
        log.exception("a message could not be acknowledged id=%s", request.id)


class ThreadsPool(_Guarded, thread.TaskPool):  # type: ignore[misc]
    """Celery's threads."""

    def on_apply(self, target: Any, *args: Any, **kwargs: Any) -> thread.ApplyResult:
        """Hand a task to a thread."""
        future = self.executor.submit(self._run, target, *args, **kwargs)
        return thread.ApplyResult(future)


class SoloPool(_Guarded, solo.TaskPool):  # type: ignore[misc]
    """Celery's pool without threads: tasks run on the main thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_apply = self._run


_GUARDED = {thread.TaskPool: ThreadsPool, solo.TaskPool: SoloPool}


def guarded(pool: Any) -> Any:
    """Our pool for one of Celery's, given by name or class; a pool that we have none for stays what it is."""
    implementation = get_implementation(pool)
    return _GUARDED.get(implementation, implementation)
