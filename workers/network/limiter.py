"""How many requests of this process a server takes at once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ConcurrencyLimiter:
    """Lets as many requests to a server at once as it takes, the request whose time ends first before the others.

    Without a limiter the requests that a server refused come back in random order, and some of them never in time.
    The limit follows the server's answers (additive increase, decrease at a refusal), since no server says how much
    it takes. Used on the event loop only.
    """

    def __init__(self) -> None:
        self.limit = math.inf
        """How many requests are let in: after a refusal one fewer than there were, after as many answers one more."""
        self.num_inside = 0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @asynccontextmanager
    async def entered(self, ends_at: float) -> AsyncIterator[None]:
        """Wait for room, then count as inside. `ends_at` is when the request's time ends, on the loop's clock."""
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (ends_at, next(self._numbers), turn))
        self._let_in()
        try:
            await turn
            yield
        finally:
            self.num_inside -= turn.done() and not turn.cancelled()
            self._let_in()

    def answered(self) -> None:
        """The server took a request and answered: it may take more."""
        self.limit += 1 / self.limit

    def refused(self) -> None:
        """The server refused a request that is inside now."""
        self.limit = max(1, self.num_inside - 1)

    def _let_in(self) -> None:
        while self._waiting and self.num_inside + 1 <= self.limit:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():  # given up while it waited
                self.num_inside += 1
                turn.set_result(None)
