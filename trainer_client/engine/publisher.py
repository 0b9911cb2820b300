"""Publishes deliveries: numbers, requests and messages, in an order in which no worker finds half of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.messages import Failure
from tasks.outcomes import ClientOutcomes
from tasks.payloads import PayloadStore
from trainer_client.engine.broker import Broker
from trainer_client.engine.model import Awaited, Delivery
from trainer_client.engine.requests import Message, RequestWriter, Times


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of deliveries that were to be published."""

    numbers: dict[Delivery, int]
    """Of each delivery's message; of a chord, that of the last part; 0 if nothing of it could be packed."""
    refused: dict[Awaited, Failure]
    """Outcomes whose sample cannot be packed, and why."""


class Publisher:
    """Sends messages on behalf of one client. Each call may run twice: a message that is sent twice is scored once.

    Args:
        writer: Composes the requests.
        payload_ttl_s: How long a request lives in the payload store.
        result_ttl_s: After so long nobody waits for the outcomes of a message any more.
    """

    def __init__(
        self,
        outcomes: ClientOutcomes,
        store: PayloadStore,
        broker: Broker,
        writer: RequestWriter,
        payload_ttl_s: float,
        result_ttl_s: float,
    ) -> None:
        self._outcomes, self._store, self._broker = outcomes, store, broker
        self._writer = writer
        self._payload_ttl_s, self._result_ttl_s = payload_ttl_s, result_ttl_s

    def publish(self, deliveries: Sequence[Delivery]) -> Sent:
        """Number the messages, store their requests, put them into their queues.

        In that order: no worker finds a message without its request, and none that is newer than the last number.
        """
        now_ms = self._outcomes.now_ms()
        times = Times(now_ms, now_ms + round(1000 * self._result_ttl_s))
        messages: dict[Delivery, Message] = {}
        requests: dict[str, bytes] = {}
        refused: dict[Awaited, Failure] = {}
        for delivery in deliveries:
            composed = self._writer.compose(delivery, times)
            refused.update(composed.refused)
            requests.update(composed.requests)
            if composed.message is not None:
                messages[delivery] = composed.message

        if messages:
            to_send = list(messages.values())
            self._number(to_send)
            self._store.put(requests, self._payload_ttl_s)
            self._broker.publish(to_send, self._store.identity())

        numbers = dict.fromkeys(deliveries, 0)
        for delivery, message in messages.items():
            last = message.header[-1] if message.header else message
            numbers[delivery] = last.number
        return Sent(numbers, refused)

    def publish_again(self, delivery: Delivery, request: str) -> int:
        """Put the message of one of a delivery's requests into its queue again, as it was; returns its new number."""
        message = self._writer.again(delivery, request)
        self._number([message])
        self._broker.publish([message], self._store.identity())
        return message.number

    def _number(self, messages: Sequence[Message]) -> None:
        """Give every message but the bodies of chords its number, in the order in which they go."""
        by_queue: dict[str, list[Message]] = {}
        for message in messages:
            numbered = message.header or [message]
            by_queue.setdefault(message.queue, []).extend(numbered)
        for queue, numbered in by_queue.items():
            first = self._outcomes.number(queue, len(numbered))
            for number, message in enumerate(numbered, first):
                message.number = number
