"""Patience with servers: what background threads call again and again while one is away or full, until they end."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kombu.exceptions import BatchPublishError, OperationalError

from tasks.servers.connections import LOST, why_away
from trainer_client.board import Board

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LAST_PAUSE_S = 0.1, 5.0
"""Pauses between tries while a server is away."""

SAY_EVERY_S = 60.0
"""How often the log says that senders wait."""

AWAY: tuple[type[Exception], ...] = (*LOST, OperationalError, BatchPublishError)
"""A server that is away or full: wait and try again."""

T = TypeVar("T")


class EndedError(Exception):
    """The sender was closed while a thread waited."""


class Patience:
    """Waits for servers on behalf of a client's background threads; what for is on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._say_at = 0.0
        self._ended = threading.Event()

    @property
    def is_ended(self) -> bool:
        """Whether nothing is waited for any more."""
        return self._ended.is_set()

    def end(self) -> None:
        """End every wait."""
        self._ended.set()

    def pause(self, seconds: float) -> None:
        """Wait so long. Raises `EndedError`."""
        if self._ended.wait(seconds):
            raise EndedError

    def insist(self, call: Callable[[], T]) -> T:
        """`call()`, again and again with growing pauses while a server is away or full. Raises `EndedError`."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                result = call()
            except AWAY as error:
                self._board.trouble = f"sending waits: {why_away(error)}"
                self._say_that_it_waits(error)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._board.trouble = (
                    f"sending waits for room in the payload store: {error}"
                )
            else:
                if pause_s > FIRST_PAUSE_S:
                    self._board.trouble = None
                return result
            self.pause(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _say_that_it_waits(self, error: BaseException) -> None:
        """In the log, now and then: a Redis that is nearly full refuses some calls and takes others."""
        if time.monotonic() >= self._say_at:
            log.warning("sending waits for redis error=%s", type(error).__name__)
            self._say_at = time.monotonic() + SAY_EVERY_S
