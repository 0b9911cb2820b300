"""From an outcome whose media are stored to a message in its queue, and from an answer to those who wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tasks.messages import Failure, Outcome
from trainer_client.engine import actions as do
from trainer_client.engine import events as ev
from trainer_client.engine.chunk_accumulator import Accumulator
from trainer_client.engine.core import Core
from trainer_client.engine.judge_permits import Throttle
from trainer_client.engine.losses import LossPolicy
from trainer_client.engine.model import (
    Awaited,
    Delivery,
)
from trainer_client.engine.states import (
    SentBy,
    State,
)
from trainer_client.engine.why_late import Source

REFERENCE_BYTES = 4096
"""Of a sample in a request, beside its prompt and metadata: where its media are, and its address."""

HEADER_BYTES = 65_536
"""Of a request, beside its samples: the reward and its options."""


class Sending:
    """Fills chunks, makes deliveries of them, and takes what ends an awaited outcome: its answer, or nobody's interest.

    Args:
        run: Of the client; for the words that people see of a message.
        max_request_bytes: A request is smaller.
    """

    def __init__(
        self,
        core: Core,
        run: str,
        losses: LossPolicy,
        throttle: Throttle,
        max_request_bytes: int,
    ) -> None:
        self._core, self._run = core, run
        self._max_request_bytes = max_request_bytes
        self._losses, self._throttle = losses, throttle
        self.accumulator = Accumulator()
        self._is_publishing = False
        self._to_publish: list[Delivery] = []

    def accumulate(self, awaited: Awaited) -> None:
        """Its media are stored: it waits for its chunk."""
        if not awaited.slots:
            self.give_up(awaited)
            return
        self._core.move(awaited, self.accumulator.add(awaited, self._core.now))

    def go_alone(self, carried: Iterable[Awaited]) -> None:
        """Outcomes that waited for a group go by themselves."""
        for awaited in carried:
            if awaited.state is State.WITH_GROUP:
                self.accumulate(awaited)

    def send_chunks(self) -> None:
        """Make deliveries of the chunks that go now, and publish them (while a `Publish` is under way, after it)."""
        chunks = self.accumulator.take(
            self._core.now,
            self._core.released,
            is_flushing=self._core.has_waits and self._core.is_quiet,
        )
        for chunk in chunks:
            for part in within_bytes(chunk, self._max_request_bytes):
                self._to_publish.append(self._delivery_of(part))
        if self._is_publishing:
            return
        # Of what waited for the last `Publish` some may be given up, or answered.
        deliveries = [one for one in self._to_publish if one.awaited]
        self._to_publish = []
        if deliveries:
            self._is_publishing = True
            self._core.act(do.Publish(deliveries))

    def _delivery_of(self, chunk: list[Awaited]) -> Delivery:
        first = chunk[0]
        awaited = list(chunk)
        num_samples = len(awaited)
        if first.group is not None:
            num_samples = len(first.group.members)
            carried, first.group.carried = first.group.carried, []
            awaited += [a for a in carried if a.state is State.WITH_GROUP]
        request = self._core.new_name("request")
        model = first.spec.reward_model.rpartition(".")[2]
        step = first.slots[0].step
        delivery = Delivery(
            request=request,
            label=f"{model} x {num_samples}, run {self._run} step {step}",
            spec=first.spec,
            sent_by=SentBy.US,
            awaited=awaited,
            pause_s=self._losses.first_pause_s(awaited),
            part_requests=_part_requests(request, first),
        )
        self._core.take_up(delivery, State.PUBLISHING)
        for one in awaited:
            one.num_sends += 1
        return delivery

    def on_published(self, event: ev.Published) -> None:
        """Messages are in their queues. What could not be packed is in none."""
        for awaited, failure in event.refused.items():
            if not awaited.is_ended:
                self.fail(awaited, failure)
        for delivery, number in event.numbers.items():
            delivery.number = number
            own = {
                name: event.digests[name]
                for name in delivery.requests
                if name in event.digests
            }
            delivery.digests = {**delivery.digests, **own}
            if delivery.state is State.PUBLISHING:
                self._is_publishing = False
                self._core.set_delivery_state(delivery, State.IN_FLIGHT)
                self._losses.sent(delivery, self._core.now)
            self._core.renumbered(delivery)
            if not delivery.awaited:  # answered, or given up, while it was on its way
                self._core.payloads.free_later(delivery.requests)

    def answer(
        self, awaited: Awaited, outcome: Outcome, *, is_hit: bool = False
    ) -> None:
        """An outcome is there."""
        fingerprint = awaited.spec.fingerprint
        self._forget(awaited)
        self._core.answer(awaited, outcome, is_hit=is_hit)
        self._throttle.count_answer(fingerprint)
        self._core.why_late.withdraw(Source.NOTE, fingerprint)

    def fail(self, awaited: Awaited, problem: Failure) -> None:
        """The client itself knows that there will be no reward."""
        self.answer(awaited, Outcome(failure=problem, attempt=awaited.attempt))

    def give_up(self, awaited: Awaited) -> None:
        """Nobody wants an outcome any more."""
        if not awaited.is_ended:
            self._forget(awaited)
            self._core.give_up(awaited)

    def _forget(self, awaited: Awaited) -> None:
        """Nothing is to be done about it any more."""
        self.accumulator.discard(awaited)
        if awaited.group is not None and not awaited.is_ended:
            carried, awaited.group.carried = awaited.group.carried, []
            self.go_alone(carried)

    def take_answers(self, outcomes: Mapping[str, Outcome | None]) -> int:
        """Outcomes that were asked for; returns how many were awaited."""
        num_new = 0
        for address, outcome in outcomes.items():
            awaited = self._core.awaited.get(address)
            if outcome is None or awaited is None or not awaited.accepts(outcome):
                continue
            # Asked for by an earlier step, perhaps: which attempt this one asks for is not known yet.
            if awaited.state is State.LOOKING_UP and not outcome.is_final:
                continue
            self.answer(awaited, outcome)
            num_new += 1
        return num_new


def within_bytes(chunk: list[Awaited], max_bytes: int) -> list[list[Awaited]]:
    """A chunk in as few parts as have requests within a bound. What is alone too large for it is a part by itself."""
    parts: list[list[Awaited]] = [[]]
    num_bytes = 0
    for awaited in chunk:
        own = awaited.text_bytes + REFERENCE_BYTES
        if parts[-1] and num_bytes + own > max_bytes - HEADER_BYTES:
            parts.append([])
            num_bytes = 0
        parts[-1].append(awaited)
        num_bytes += own
    return parts


def _part_requests(request: str, first: Awaited) -> tuple[str, ...]:
    """Names of the requests of a chord's parts, for a group that is larger than a chunk."""
    plan, spec = first.group, first.spec
    if plan is None or not spec.is_combined:
        return ()
    num_parts = plan.num_scored(spec.how)
    if num_parts <= spec.batch_size:
        return ()
    return tuple(f"{request}.{at}" for at in range(0, num_parts, spec.batch_size))
