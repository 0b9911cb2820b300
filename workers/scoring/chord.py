"""Counts a header task of a chord, where an error of Redis costs no slot.

Celery would count it after the task, outside of its body: an exception there leaves Celery's tracer, and the worker
never gets the slot back. A header that is not counted is no loss: its samples are answered, and the client sends the
group again.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import states

from tasks.servers.connections import LOST, why_away
from workers.scoring.context import context_of
from workers.scoring.retry import retry

log = logging.getLogger(__name__)

AWAY_S = 5.0
"""How long a header task waits for a Redis that is away before it ends uncounted. The task has had its own wait."""


def count_header(task: Any) -> None:
    """Count the running task in its chord, if it is a header of one; the last to be counted sends the body.

    Every header is counted, also one that failed: the body looks at the outcomes themselves.
    """
    request = task.request
    if not request.chord:
        return

    context = context_of(task.app)
    try:
        retry(
            lambda: task.backend.on_chord_part_return(request, states.SUCCESS, None),
            AWAY_S,
            context.clock,
            context.rng,
        )
    except LOST as error:
        log.warning(
            "a chord is left to the client group=%s why=%s",
            request.group,
            why_away(error),
        )
    except Exception:
        log.exception("a chord is left to the client group=%s", request.group)
    finally:
        request.chord = None  # Celery is not to count it again
