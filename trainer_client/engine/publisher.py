"""Publishes deliveries: numbers, requests and messages, in an order in which no worker finds half of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.messages import Failure
from tasks.outcomes import ClientOutcomes
from tasks.payloads import MAX_REQUEST_BYTES, PayloadStore
from trainer_client.engine.broker import Broker
from trainer_client.engine.model import Awaited, Delivery
from trainer_client.engine.requests import Composed, Message, RequestWriter, Times


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of deliveries that were to be published.

    Attributes:
        numbers: Of their messages; of a chord that of the last part; 0 if nothing of the delivery can be sent.
        digests: Of their requests, by name.
        refused: Outcomes whose sample cannot be sent, and why.
    """

    numbers: dict[Delivery, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    refused: dict[Awaited, Failure] = field(default_factory=dict)


class Publisher:
    """Sends messages on behalf of one client. Each call may run twice: a message that is sent twice is scored once.

    Args:
        writer: Composes the requests.
        payload_ttl_s: How long a request lives in the payload store.
        result_ttl_s: After so long nobody waits for the outcomes of a message any more.
        max_request_bytes: A request of more is not sent.
    """

    def __init__(  # noqa: PLR0913  (wires parts)
        self,
        outcomes: ClientOutcomes,
        store: PayloadStore,
        broker: Broker,
        writer: RequestWriter,
        payload_ttl_s: float,
        result_ttl_s: float,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._max_request_bytes = max_request_bytes
        self._outcomes, self._store, self._broker = outcomes, store, broker
        self._writer = writer
        self._payload_ttl_s, self._result_ttl_s = payload_ttl_s, result_ttl_s
        self._composed: dict[Delivery, Composed] = {}
        """What is being published: a call that is made again sends the same bytes, whose digest a worker may have."""

    def publish(self, deliveries: Sequence[Delivery]) -> Sent:
        """Number the messages, store their requests, put them into their queues.

        In that order: no worker finds a message without its request, and none that is newer than the last number.

        A sample that cannot be packed, and a request that the store would not take, are not sent.
        """
        self._compose(deliveries)
        sent = Sent(dict.fromkeys(deliveries, 0))
        messages: dict[Delivery, Message] = {}
        requests: dict[str, bytes] = {}
        for delivery in deliveries:
            composed = self._composed[delivery]
            sent.refused.update(composed.refused)
            if composed.message is None:
                continue
            num_bytes = max(map(len, composed.requests.values()))
            if num_bytes > self._max_request_bytes:
                failure = self._too_large(delivery, num_bytes)
                sent.refused.update(dict.fromkeys(delivery.awaited_when_sent, failure))
                continue
            messages[delivery] = composed.message
            requests.update(composed.requests)

        if messages:
            to_send = list(messages.values())
            self._number(to_send)
            self._store.put(requests, self._payload_ttl_s)
            self._broker.publish(to_send, self._store.identity())

        for delivery, message in messages.items():
            last = message.header[-1] if message.header else message
            sent.numbers[delivery] = last.number
            for one in (message, *message.header):
                sent.digests[one.request] = one.digest
        for delivery in deliveries:
            del self._composed[delivery]
        return sent

    def _compose(self, deliveries: Sequence[Delivery]) -> None:
        new = [one for one in deliveries if one not in self._composed]
        if not new:
            return
        now_ms = self._outcomes.now_ms()
        times = Times(now_ms, now_ms + round(1000 * self._result_ttl_s))
        for delivery in new:
            self._composed[delivery] = self._writer.compose(delivery, times)

    def _too_large(self, delivery: Delivery, num_bytes: int) -> Failure:
        whole = "group" if delivery.spec.is_groupwise else "chunk"
        words = (
            f"the request of its {whole} has {num_bytes} bytes, and the payload store takes "
            f"{self._max_request_bytes} bytes; give its prompts and metadata fewer"
        )
        return Failure(kind="invalid", message=words)

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
            first = self._outcomes.number(queue, len(numbered), self._writer.run)
            for number, message in enumerate(numbered, first):
                message.number = number
