"""What is published of a delivery, also when its call is made a second time."""

from __future__ import annotations

import time

import pytest
import redis

from tasks.celery_app import COMBINE, GROUP, SCORE
from tasks.media import digest
from tasks.payloads import RedisStore
from tests.trainer.engine.parts import new_delivery
from trainer_client.engine.publisher import Publisher
from trainer_client.engine.requests import RequestWriter, TaskNames


class Broker:
    """Keeps what it is given; loses the connection after the first message, the first time."""

    def __init__(self):
        self.given = []
        self._has_failed = False

    def publish(self, messages, store_id):
        if not self._has_failed:
            self._has_failed = True
            self._keep(messages[:1])
            raise redis.ConnectionError("lost")
        self._keep(messages)

    def _keep(self, messages):
        self.given += [(message.request, message.digest) for message in messages]


def test_a_call_that_is_made_again_sends_the_requests_that_messages_of_the_first_one_name(outcomes, redis_url):
    store, broker = RedisStore(redis_url), Broker()
    publisher = Publisher(outcomes, store, broker, RequestWriter("run", TaskNames(SCORE, GROUP, COMBINE)), 60, 600)
    deliveries = [new_delivery("one"), new_delivery("two")]
    with pytest.raises(redis.ConnectionError):
        publisher.publish(deliveries)
    time.sleep(0.01)  # Redis's clock, which a request tells, has gone on
    sent = publisher.publish(deliveries)

    stored = {name: digest(data) for name, data in zip(("one", "two"), store.get(["one", "two"]), strict=True)}
    assert broker.given == [("one", stored["one"]), ("one", stored["one"]), ("two", stored["two"])]
    assert sent.digests == stored
    assert sorted(sent.numbers.values()) == [3, 4]
    again = publisher.publish([deliveries[0]])
    assert again.digests["one"] != stored["one"], "what was published is not kept"
    store.close()
