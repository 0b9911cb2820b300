"""The simulated Redis answers as the real one: the same random calls on both, every answer and all keys compared.

Nothing sleeps: time passes on the real server by taking it off the expiry of every key.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from tasks import groups, keys, outcomes, payloads
from tasks.celery_app import COMBINE, PRIORITY_FIRST, PRIORITY_USUAL, SCORE, make_app
from tasks.messages import WIRE_VERSION, Failure, Heartbeat, Note, Outcome, SampleRequest, unpack, unpack_outcome
from tasks.servers.connections import connect
from tests.simulation import redis as simulated
from tests.simulation.network import Server
from tests.simulation.queues import Message, Queues
from tests.simulation.world import World
from trainer_client.engine.broker import CeleryBroker

CLAIM_TTL_S, RESULT_TTL_S, PAYLOAD_TTL_S = 100.0, 1000.0, 500.0
STEP_MS = 30_000
"""Time passes in such steps: no expiry falls within 10 s of one, so a slow machine changes nothing."""

NEAR_MS = 5_000
"""Times on the two clocks that differ by less are equal."""

ADDRESSES = tuple(outcomes.address("run", f"f{i % 2}", f"key{i}") for i in range(5))
TOKENS = ("a", "b", "c")
REQUESTS = ("request-1", "request-2")
NAMES = tuple(f"client.{i}" for i in range(5))
NODES = ("gpu.1@host", "vlm.2@host")
QUEUES = ("gpu", "vlm")
RUNS = ("run-a", "run-b")
GROUP_NAMES = ("one", "two")
SIZE = 3


class BothFaces(outcomes.WorkerOutcomes, outcomes.ClientOutcomes):
    """The simulated one is both as well."""


def is_of_numbers(key: str) -> bool:
    """Whether the scores of a sorted set are numbers of messages, and not times."""
    return key.startswith(keys.senders(""))


class Pair:
    """The real and the simulated servers, to which the same happens."""

    def __init__(
        self, results: redis.Redis, media: redis.Redis, store: payloads.RedisStore, rng: random.Random
    ) -> None:
        self.results, self.media, self.rng = results, media, rng
        self.offset_ms = 0
        self.keyspace, self.media_keyspace = simulated.Keyspace(self.now_ms), simulated.Keyspace(self.now_ms)
        self.outcomes = (
            BothFaces(results, CLAIM_TTL_S, RESULT_TTL_S),
            simulated.Outcomes(self.keyspace, CLAIM_TTL_S, RESULT_TTL_S),
        )
        self.store = (store, simulated.PayloadStore(self.media_keyspace, "identity"))
        self.slots = (
            groups.GroupSlots(results, "run", "launch", RESULT_TTL_S),
            simulated.GroupSlots(self.keyspace, "run", "launch", RESULT_TTL_S),
        )

    def real_ms(self) -> int:
        seconds, microseconds = self.results.time()
        return seconds * 1000 + microseconds // 1000

    def now_ms(self) -> int:
        return self.real_ms() + self.offset_ms

    def call(self, pair: tuple[Any, Any], name: str, *args: Any, **kwargs: Any) -> None:
        """The same call on both; the answers are the same."""
        real, ours = (getattr(one, name)(*args, **kwargs) for one in pair)
        assert self.is_same(real, ours), f"{name}{args}{kwargs}: {real} is not {ours}"

    def is_same(self, real: Any, ours: Any) -> bool:
        if isinstance(real, tuple) and len(real) == 2 and isinstance(real[1], float):  # of `start_alone`
            return real[0] == ours[0] and abs(real[1] - ours[1]) < NEAR_MS / 1000
        if isinstance(real, list) and real and isinstance(real[0], Heartbeat):  # of one ms they come in any order
            return sorted(real, key=by_node) == sorted(ours, key=by_node)
        return bool(real == ours)

    def let_pass(self, milliseconds: int) -> None:
        """Time passes, on both."""
        self.offset_ms += milliseconds
        for client in (self.results, self.media):
            for key in client.keys("rewardq:*"):
                self._age(client, key, milliseconds)

    def _age(self, client: redis.Redis, key: bytes, milliseconds: int) -> None:
        kind, left_ms = client.type(key), client.pttl(key)
        if 0 <= left_ms <= milliseconds:
            client.delete(key)
            return
        if left_ms > 0:
            client.pexpire(key, left_ms - milliseconds)
        if kind == b"zset" and not is_of_numbers(key.decode()):
            for member, at_ms in client.zrange(key, 0, -1, withscores=True):
                client.zadd(key, {member: at_ms - milliseconds})
        if kind == b"hash" and client.hexists(key, "first_alone_ms"):
            client.hincrby(key, "first_alone_ms", -milliseconds)

    def compare_keys(self) -> None:
        """The same keys are there, each with the same value and about as long to live."""
        for client, keyspace in ((self.results, self.keyspace), (self.media, self.media_keyspace)):
            real = {key.decode() for key in client.keys("rewardq:*")} - {keys.ROOM}
            assert real == set(keyspace.names()) - {keys.ROOM}
            for key in sorted(real):
                assert abs(client.pttl(key) - keyspace.ttl_ms(key)) < NEAR_MS, key
                if key != keys.STORE_IDENTITY:
                    self._compare_value(client, key, keyspace.get(key))

    def _compare_value(self, client: redis.Redis, key: str, ours: Any) -> None:
        kind = client.type(key)
        if kind == b"zset":
            offset_ms = 0 if is_of_numbers(key) else self.offset_ms
            real = {member.decode(): at_ms + offset_ms for member, at_ms in client.zrange(key, 0, -1, withscores=True)}
            assert real == pytest.approx(ours, rel=0, abs=NEAR_MS), key
        elif kind == b"hash":
            self._compare_hash(key, client.hgetall(key), ours)
        else:
            self._compare_text(key, client.get(key), ours)

    @staticmethod
    def _compare_text(key: str, real: bytes, ours: Any) -> None:
        if key.startswith(keys.outcome("")):
            assert unpack_outcome(real) == ours, key
        elif key.startswith((keys.note(""), keys.worker(""))):
            assert unpack(type(ours), real) == ours, key
        elif key.startswith(keys.payload("")):
            assert real == ours, key
        else:
            assert real.decode() == str(ours), key

    def _compare_hash(self, key: str, real: dict[bytes, bytes], ours: dict[str, Any]) -> None:
        assert {field.decode() for field in real} == set(ours), key
        for field, value in ours.items():
            found = real[field.encode()]
            if isinstance(value, SampleRequest):
                assert unpack(SampleRequest, found) == value, (key, field)
            elif field == "first_alone_ms":
                assert abs(int(found) + self.offset_ms - value) < NEAR_MS, key
            else:
                assert found.decode() == str(value), (key, field)


def some(rng: random.Random, of: tuple[str, ...]) -> list[str]:
    return rng.sample(of, rng.randint(1, len(of)))


def outcome(rng: random.Random) -> Outcome:
    attempt = rng.randint(1, 3)
    if rng.random() < 0.4:
        return Outcome(reward=rng.randint(0, 9) / 4, attempt=attempt)
    failure = Outcome(failure=Failure(kind="failed", message="bad luck"), attempt=attempt)
    if rng.random() < 0.3:
        return Outcome(members=(failure, Outcome(reward=1.0)), attempt=attempt)
    return failure


def by_node(heartbeat: Heartbeat) -> str:
    return heartbeat.node


def heartbeat(node: str) -> Heartbeat:
    return Heartbeat(wire=WIRE_VERSION, node=node, queues=("gpu",), host="host", pid=1, store="s", state="ready")


def tokens_of(rng: random.Random) -> dict[str, str]:
    return {address: rng.choice(TOKENS) for address in some(rng, ADDRESSES)}


def claim(pair: Pair, rng: random.Random) -> None:
    chosen = some(rng, ADDRESSES)
    attempts = [rng.randint(1, 3) for _ in chosen]
    token, is_late = rng.choice(TOKENS), rng.random() < 0.1
    real, ours = (
        one.claim(chosen, attempts, token, one.now_ms() + (-NEAR_MS if is_late else NEAR_MS)) for one in pair.outcomes
    )
    assert real == ours


def let_key_expire(pair: Pair, rng: random.Random) -> None:
    found = pair.keyspace.names()
    if found:
        key = rng.choice(found)
        pair.results.delete(key)
        pair.keyspace.delete(key)


def flush(pair: Pair, _rng: random.Random) -> None:
    pair.results.flushdb()
    pair.keyspace.flush()


def clock(pair: Pair, rng: random.Random) -> None:
    number, queue = rng.randint(1, 20), rng.choice(QUEUES)
    real, ours = (one.take(queue, number) for one in pair.outcomes)
    assert abs(real + pair.offset_ms - ours) < NEAR_MS


OF_WORKERS: tuple[Callable[[Pair, random.Random], None], ...] = (
    claim,
    claim,
    claim,
    lambda p, r: p.call(p.outcomes, "write", {a: outcome(r) for a in some(r, ADDRESSES)}, r.choice(TOKENS)),
    lambda p, r: p.call(
        p.outcomes, "write", {r.choice(ADDRESSES): outcome(r)}, r.choice(TOKENS), only_claimed=r.random() < 0.7
    ),
    lambda p, r: p.call(p.outcomes, "start_alone", r.choice(ADDRESSES), 3, r.choice(TOKENS)),
    lambda p, r: p.call(p.outcomes, "release", some(r, ADDRESSES), r.choice(TOKENS)),
    lambda p, r: p.call(p.outcomes, "extend", tokens_of(r)),
    clock,
    lambda p, r: p.call(p.outcomes, "leave_note", r.choice(REQUESTS), Note(reason="gone", worker="w", detail="d")),
    lambda p, r: p.call(p.outcomes, "beat", heartbeat(r.choice(NODES)), CLAIM_TTL_S),
    lambda p, r: p.call(p.outcomes, "end_beat", r.choice(NODES)),
)

OF_CLIENTS: tuple[Callable[[Pair, random.Random], None], ...] = (
    lambda p, r: p.call(p.outcomes, "look_up", some(r, ADDRESSES)),
    lambda p, r: p.call(p.outcomes, "put_back", r.choice(ADDRESSES), outcome(r)),
    lambda p, r: p.call(p.outcomes, "are_there", some(r, ADDRESSES)),
    lambda p, r: p.call(p.outcomes, "notes", some(r, REQUESTS)),
    lambda p, r: p.call(p.outcomes, "drop_notes", some(r, REQUESTS)),
    lambda p, r: p.call(p.outcomes, "claimed", some(r, ADDRESSES)),
    lambda p, r: p.call(p.outcomes, "num_starts", some(r, ADDRESSES)),
    lambda p, r: p.call(p.outcomes, "queue_state", r.choice(QUEUES), 3),
    lambda p, r: p.call(p.outcomes, "number", r.choice(QUEUES), r.randint(1, 5), r.choice(RUNS)),
    lambda p, r: p.call(p.outcomes, "ahead", r.choice(QUEUES), r.randint(1, 40)),
    lambda p, r: p.call(p.outcomes, "check_room"),
    lambda p, r: p.call(p.outcomes, "workers"),
)

OF_STORE: tuple[Callable[[Pair, random.Random], None], ...] = (
    lambda p, r: p.call(p.store, "put", {n: n.encode() * r.randint(0, 3) for n in some(r, NAMES)}, PAYLOAD_TTL_S),
    lambda p, r: p.call(p.store, "get", some(r, NAMES)),
    lambda p, r: p.call(p.store, "renew", some(r, NAMES), PAYLOAD_TTL_S),
    lambda p, r: p.call(p.store, "free", some(r, NAMES)),
    lambda p, r: p.call(p.store, "bytes_in_use"),
)


def register(pair: Pair, rng: random.Random) -> None:
    key = group_key(rng)
    slot, member_key = (rng.randint(0, 1), rng.randint(0, 1)), f"member{rng.randint(0, 2)}"
    size = SIZE if rng.random() < 0.9 else SIZE - 1
    member = SampleRequest(address=f"run:f0:{member_key}", prompt="a cat", media={})
    pair.call(pair.slots, "register", key, slot, member_key, member, size, "f0")


def ask(pair: Pair, rng: random.Random) -> None:
    key = group_key(rng)
    digest = rng.choice([pair.slots[1].digests([key])[0] or "none", "other"])
    asker = rng.randint(0, 1), rng.choice(TOKENS)
    attempt, first = rng.randint(2, 3), rng.choice([None, 1])
    pair.call(pair.slots, "ask", key, digest, *asker, attempt, rng.choice("xy"), first)


def score_group(pair: Pair, rng: random.Random) -> None:
    """The group's outcome is there: no other sample may come into its slots."""
    digest = pair.slots[1].digests([group_key(rng)])[0]
    if digest:
        pair.call(pair.outcomes, "write", {f"run:f0:{digest}": outcome(rng)}, "a")


def group_key(rng: random.Random) -> str:
    return keys.group("run", "launch", "train", 0, "f0", rng.choice(GROUP_NAMES))


OF_GROUPS: tuple[Callable[[Pair, random.Random], None], ...] = (
    register,
    register,
    register,
    ask,
    score_group,
    lambda p, r: p.call(p.slots, "put_back", group_key(r), "digest", r.randint(0, 1), r.choice(TOKENS), 2),
    lambda p, r: p.call(p.slots, "digests", [group_key(r)]),
    lambda p, r: p.call(p.slots, "filled_slots", [group_key(r)]),
    lambda p, r: p.call(p.slots, "set_number", group_key(r), r.randint(1, 9)),
    lambda p, r: p.call(p.slots, "members", group_key(r)),
)

PASSES = (lambda p, r: p.let_pass(STEP_MS * r.randint(1, 4)), let_key_expire)


@pytest.fixture
def pair(settings) -> Iterator[Pair]:
    store = payloads.RedisStore(settings.payloads)
    with connect(settings.results) as results, connect(settings.payloads) as media:
        yield Pair(results, media, store, random.Random(0))
    store.close()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "calls", [OF_WORKERS + OF_CLIENTS, OF_STORE, OF_GROUPS], ids=["outcomes", "payloads", "groups"]
)
def test_the_same_calls_have_the_same_answers_and_leave_the_same_keys(calls, seed, pair):
    rng = random.Random(seed)
    for number in range(120):
        rng.choice((*calls, *calls, *PASSES))(pair, rng)
        if rng.random() < 0.01:
            flush(pair, rng)
        if number % 10 == 0:
            pair.compare_keys()
    pair.compare_keys()


def test_an_emptied_store_has_another_identity(pair):
    before = [store.identity() for store in pair.store]
    assert [store.identity() for store in pair.store] == before
    pair.media.flushdb()
    pair.media_keyspace.flush()
    after = [store.identity() for store in pair.store]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_messages_are_taken_by_priority_and_in_order_and_counted_alike(settings):
    rng = random.Random(1)
    app = make_app(settings)
    world = World(seed=1)
    queues = Queues(world, Server(world, "broker"))
    broker = CeleryBroker(app)
    with app.connection_for_write() as connection:
        sent = 0
        for _ in range(60):
            queue = rng.choice(QUEUES)
            if rng.random() < 0.6:
                priority, sent = rng.choice([PRIORITY_FIRST, PRIORITY_USUAL]), sent + 1
                task = COMBINE if priority == PRIORITY_FIRST else SCORE
                app.send_task(task, args=[str(sent)], queue=queue, priority=priority, ignore_result=True)
                queues.put(Message(task, "", queue, str(sent), 2, "", priority=priority))
            else:
                real = connection.default_channel.basic_get(queue, no_ack=True)
                ours = queues._pop((queue,))
                assert (real is None) == (ours is None)
                if real is not None:
                    real.accept = {"application/x-msgpack"}
                    assert real.decode()[0][0] == ours.request
            for name in QUEUES:
                assert broker.num_waiting(name) == queues.num_waiting(name)
    broker.disconnect()
    app.close()
