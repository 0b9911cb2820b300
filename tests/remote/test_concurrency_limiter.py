"""The concurrency limiter of a server: which request may go out, and when."""

from __future__ import annotations

import asyncio

from workers.network.limiter import ConcurrencyLimiter


class Asking:
    """Requests that stay at a server until they are told to leave; `order` is that in which they came in."""

    def __init__(self, limiter):
        self.limiter, self.order, self.leave = limiter, [], {}
        self.tasks = {}

    def start(self, name, ends_at):
        self.leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.ensure_future(self._ask(name, ends_at))

    async def _ask(self, name, ends_at):
        async with self.limiter.entered(ends_at):
            self.order.append(name)
            await self.leave[name].wait()

    async def end(self, *names):
        for name in names:
            self.leave[name].set()
            await self.tasks[name]
        await settled()


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def test_all_may_ask_a_server_that_refused_nobody():
    async def run():
        asking = Asking(ConcurrencyLimiter())
        for i in range(50):
            asking.start(i, ends_at=0)
        await settled()
        assert asking.order == list(range(50))
        await asking.end(*range(50))

    asyncio.run(run())


def test_after_a_refusal_fewer_may_and_those_whose_time_ends_first():
    async def run():
        limiter = ConcurrencyLimiter()
        asking = Asking(limiter)
        for name in "abc":
            asking.start(name, ends_at=0)
        await settled()
        limiter.refused()
        assert limiter.limit == 2
        await asking.end("a")
        for name, ends_at in (("later", 9), ("first", 1), ("soon", 5)):
            asking.start(name, ends_at)
        await settled()
        assert asking.order == ["a", "b", "c"]
        await asking.end("b", "c")
        assert asking.order[3:] == ["first", "soon"]
        await asking.end("first")
        assert asking.order[5:] == ["later"]
        await asking.end("soon", "later")
        assert limiter.num_inside == 0

    asyncio.run(run())


def test_a_server_that_answers_is_asked_by_more_again():
    limiter = ConcurrencyLimiter()
    limiter.limit = 1
    for _ in range(3):
        limiter.answered()
    assert limiter.limit > 2


def test_one_always_may():
    limiter = ConcurrencyLimiter()
    for _ in range(3):
        limiter.refused()
    assert limiter.limit == 1


def test_who_gives_up_while_waiting_or_inside_leaves_no_place_taken():
    async def run():
        limiter = ConcurrencyLimiter()
        limiter.limit = 1
        asking = Asking(limiter)
        for name in "abc":
            asking.start(name, ends_at=0)
        await settled()
        asking.tasks["b"].cancel()
        asking.tasks["a"].cancel()
        await settled()
        assert asking.order == ["a", "c"]
        asking.start("d", ends_at=0)
        await settled()
        asking.leave["c"].set()
        await asyncio.sleep(0)  # now it leaves, and d is let in
        asking.tasks["d"].cancel()  # before it has noticed
        await settled()
        assert limiter.num_inside == 0

    asyncio.run(run())
