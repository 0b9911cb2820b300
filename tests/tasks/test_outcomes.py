from __future__ import annotations

import threading
import time

import msgpack
import pytest

from tasks import keys
from tasks.messages import WIRE_VERSION, Failure, Heartbeat, Note, Outcome, pack
from tasks.outcomes import Ahead, ClientOutcomes, QueueState, WorkerOutcomes, address
from tests.outcomes import Outcomes
from tests.servers import wait_until

A, B, C = (address("run", "f" * 16, key) for key in ("a", "b", "c"))
LATER_MS = 2**43
"""A deadline in 2248."""


def reward(value: float) -> Outcome:
    return Outcome(reward=value)


def failure(message: str = "bad luck", attempt: int = 1) -> Outcome:
    return Outcome(failure=Failure(kind="failed", message=message), attempt=attempt)


def states(outcomes: Outcomes, addresses, token: str, attempt: int = 1) -> list[str]:
    claims = outcomes.claim(addresses, [attempt] * len(addresses), token, LATER_MS)
    return [c.state for c in claims]


def starts(outcomes: Outcomes, where: str, token: str) -> int:
    (claim,) = outcomes.claim([where], [1], token, LATER_MS)
    assert claim.state == "claimed"
    return claim.starts


def found(outcomes: Outcomes, where: str) -> Outcome | None:
    return outcomes.look_up([where])[0]


def test_an_address_is_run_reward_and_sample():
    assert A == "run:ffffffffffffffff:a"


def test_what_nobody_scores_is_claimed_and_others_find_it_busy(outcomes):
    assert states(outcomes, [A, B], "mine") == ["claimed", "claimed"]
    assert states(outcomes, [A, B, C], "yours") == ["claimed by another", "claimed by another", "claimed"]
    assert outcomes.claimed([A, B, C, "run:f:none"]) == [True, True, True, False]


def test_only_one_of_many_claims_at_once(outcomes, settings):
    start, claimed = threading.Barrier(8), []

    def go(token):
        start.wait()
        for i in range(20):
            if states(outcomes, [f"run:f:{i}"], token) == ["claimed"]:
                claimed.append(i)

    threads = [threading.Thread(target=go, args=(f"token{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(20))


def test_a_claim_may_be_repeated_with_its_token_and_counts_one_start(outcomes):
    assert [starts(outcomes, A, "mine") for _ in range(3)] == [1, 1, 1]


def test_an_answered_sample_is_not_claimed(outcomes):
    states(outcomes, [A, B], "mine")
    outcomes.write({A: reward(0.5)}, "mine")
    assert states(outcomes, [A, B, C], "mine") == ["answered", "claimed", "claimed"]
    assert states(outcomes, [A], "yours") == ["answered"]


def test_a_claim_after_the_deadline_is_none(outcomes):
    assert outcomes.claim([A], [1], "mine", outcomes.now_ms() - 1) is None
    assert outcomes.claimed([A]) == [False]
    assert outcomes.claim([A], [1], "mine", outcomes.now_ms() + 60_000) is not None


def test_a_claim_expires_on_redis_clock_unless_it_is_extended(outcomes, settings):
    short = Outcomes(outcomes.redis, claim_ttl_s=0.4, result_ttl_s=60)
    states(short, [A, B], "mine")
    for _ in range(8):
        assert short.extend({A: "mine"}) == 1
        time.sleep(0.05)
    assert outcomes.extend({A: "mine"}) == 1
    wait_until(lambda: short.claimed([A, B]) == [True, False])
    assert states(short, [A, B], "yours") == ["claimed by another", "claimed"]
    wait_until(lambda: short.claimed([A]) == [False])


def test_a_claim_is_extended_only_with_its_own_token(outcomes):
    states(outcomes, [A, B], "mine")
    states(outcomes, [C], "yours")
    outcomes.redis.pexpire(keys.claim(C), 60_000)
    assert outcomes.extend({A: "mine", B: "mine", C: "mine"}) == 2
    assert outcomes.redis.get(keys.claim(C)) == b"yours"
    assert outcomes.redis.pttl(keys.claim(C)) > 30_000, "its life is not changed"
    assert outcomes.extend({}) == 0


def test_a_claim_that_expired_while_its_worker_was_stopped_is_its_own_again_unless_another_was_faster(outcomes):
    states(outcomes, [A, B, C], "mine")
    outcomes.redis.delete(keys.claim(A), keys.claim(B), keys.claim(C))  # as if they had expired
    states(outcomes, [B], "yours")
    outcomes.write({C: reward(1.0)}, "another's")
    assert outcomes.extend({A: "mine", B: "mine", C: "mine"}) == 1
    assert outcomes.claimed([A, B, C]) == [True, True, False]
    assert states(outcomes, [A, B, C], "mine") == ["claimed", "claimed by another", "answered"]
    assert starts(outcomes, A, "mine") == 1


def test_a_claim_whose_worker_died_counts_a_start_each_time(outcomes):
    for start in (1, 2, 3):
        assert starts(outcomes, A, f"token{start}") == start
        outcomes.redis.delete(keys.claim(A))  # as if it had expired


def test_a_released_claim_is_free_and_its_start_does_not_count(outcomes):
    states(outcomes, [A, B], "mine")
    outcomes.release([A, B], "yours")
    assert outcomes.claimed([A, B]) == [True, True]
    outcomes.release([A], "mine")
    assert outcomes.claimed([A, B]) == [False, True]
    assert starts(outcomes, A, "yours") == 1
    outcomes.release([], "mine")


def test_releasing_twice_gives_one_start_back(outcomes):
    starts(outcomes, A, "one")
    outcomes.redis.delete(keys.claim(A))
    assert starts(outcomes, A, "two") == 2
    outcomes.release([A], "two")
    outcomes.release([A], "two")
    assert starts(outcomes, A, "three") == 2


def test_a_start_alone_that_is_repeated_with_its_token_counts_once(outcomes):
    for token, earlier in (("one", 0), ("two", 1), ("three", 2), ("four", 3), ("five", 3)):
        for _ in range(2):
            assert outcomes.start_alone(A, 3, token)[0] == earlier


def test_a_start_alone_that_is_given_back_does_not_count(outcomes):
    for _ in range(3):
        states(outcomes, [A], "mine")
        assert [outcomes.start_alone(A, 3, "mine")[0] for _ in range(2)] == [0, 0]
        outcomes.release([A], "mine")


def test_a_start_alone_in_a_redis_that_was_emptied_has_a_time_to_live(outcomes, settings):
    states(outcomes, [A], "mine")
    outcomes.redis.flushdb()
    outcomes.start_alone(A, 3, "mine")
    assert 0 < outcomes.redis.pttl(keys.starts(A)) <= 1000 * settings.result_ttl_s


def test_an_answer_takes_its_starts_back(outcomes):
    starts(outcomes, A, "one")
    outcomes.redis.delete(keys.claim(A))
    starts(outcomes, A, "two")
    outcomes.write({A: failure()}, "two")
    (claim,) = outcomes.claim([A], [2], "three", LATER_MS)
    assert (claim.state, claim.starts) == ("claimed", 1)


def test_writing_ends_ones_own_claim_and_no_other(outcomes):
    states(outcomes, [A], "mine")
    states(outcomes, [B], "yours")
    assert outcomes.write({A: reward(1.0), B: reward(2.0)}, "mine") == 2
    assert outcomes.claimed([A, B]) == [False, True]
    assert found(outcomes, B).reward == 2.0


def test_what_a_token_may_only_write_while_it_claims_it_is_passed_over_once_another_claims_it_or_nobody(outcomes):
    states(outcomes, [A, B, C], "mine")
    outcomes.redis.delete(keys.claim(B), keys.claim(C))  # as if they had expired
    assert starts(outcomes, C, "yours") == 2
    assert outcomes.write({A: failure(), B: failure(), C: failure()}, "mine", only_claimed=True) == 1
    assert [o is not None for o in outcomes.look_up([A, B, C])] == [True, False, False]
    assert outcomes.claimed([A, B, C]) == [False, False, True]
    outcomes.redis.delete(keys.claim(C))
    assert starts(outcomes, C, "another's") == 3


def test_the_first_reward_stays(outcomes):
    assert outcomes.write({A: reward(0.25)}, "one") == 1
    assert outcomes.write({A: reward(0.75), B: reward(1.0)}, "two") == 1
    assert outcomes.write({A: failure(attempt=9)}, "three") == 0
    assert found(outcomes, A).reward == 0.25


def test_a_reward_replaces_a_failure(outcomes):
    outcomes.write({A: failure(attempt=4)}, "one")
    assert outcomes.write({A: reward(0.5)}, "two") == 1
    assert found(outcomes, A).reward == 0.5


@pytest.mark.parametrize(
    ("first", "second", "stays"), [(1, 2, 2), (2, 1, 2), (1, 1, 1), (9, 10, 10), (10, 9, 10), (2, 11, 11)]
)
def test_the_failure_of_a_later_attempt_stays(outcomes, first, second, stays):
    outcomes.write({A: failure("first", first)}, "one")
    is_new = outcomes.write({A: failure("second", second)}, "two")
    assert is_new == (second > first)
    assert found(outcomes, A).attempt == stays
    assert found(outcomes, A).failure.message == ("second" if second > first else "first")


@pytest.mark.parametrize(("failed", "asked", "state"), [(1, 1, "answered"), (1, 2, "claimed"), (10, 9, "answered")])
def test_a_failure_answers_requests_up_to_its_attempt(outcomes, failed, asked, state):
    outcomes.write({A: failure(attempt=failed)}, "one")
    assert states(outcomes, [A], "two", attempt=asked) == [state]


def test_a_reward_answers_every_attempt(outcomes):
    outcomes.write({A: reward(0.5)}, "one")
    assert states(outcomes, [A], "two", attempt=99) == ["answered"]


def test_outcomes_are_found_in_the_order_asked_for(outcomes):
    outcomes.write({A: reward(1.0), C: failure("late")}, "one")
    assert [o and (o.reward, o.failure and o.failure.message) for o in outcomes.look_up([C, B, A, C])] == [
        (None, "late"),
        None,
        (1.0, None),
        (None, "late"),
    ]
    assert outcomes.look_up([]) == []
    assert outcomes.write({}, "one") == 0


def test_thousands_are_found_as_well(outcomes):
    many = {f"run:f:{i}": reward(float(i)) for i in range(2500)}
    assert outcomes.write(many, "one") == 2500
    assert [o.reward for o in outcomes.look_up(list(many))] == list(map(float, range(2500)))
    assert states(outcomes, list(many), "two") == ["answered"] * 2500


def test_what_is_no_outcome_is_none_and_does_not_keep_others_from_being_found(outcomes):
    outcomes.write({B: reward(1.0)}, "one")
    for junk in (b"junk", b"R;junk", b"", b"R;" + msgpack.packb({"reward": "high"})):
        outcomes.redis.set(keys.outcome(A), junk)
        assert [o and o.reward for o in outcomes.look_up([A, B])] == [None, 1.0]


def test_an_outcome_of_a_newer_worker_is_read_without_what_it_adds(outcomes):
    outcomes.redis.set(keys.outcome(A), b"R;" + msgpack.packb({"reward": 1.5, "of_the_future": 1}))
    assert [o and o.reward for o in outcomes.look_up([A])] == [1.5]


def test_outcomes_claims_and_starts_have_a_time_to_live(outcomes, settings):
    states(outcomes, [A, B], "one")
    outcomes.write({A: reward(1.0)}, "one")
    outcomes.leave_note("c.1", Note(reason="gone", worker="w", detail="d"))
    left_ms = {name: outcomes.redis.pttl(name) for name in outcomes.redis.scan_iter()}
    assert len(left_ms) == 4
    assert all(0 < ms <= 1000 * settings.result_ttl_s for ms in left_ms.values())
    assert 0 < left_ms[keys.claim(B).encode()] <= 1000 * settings.claim_ttl_s


def test_the_number_taken_only_grows(outcomes):
    assert outcomes.number("gpu", 3, "run") == 1
    assert outcomes.number("gpu", 1, "run") == 4
    assert outcomes.number("vlm", 1, "run") == 1
    for number, taken in ((2, 2), (1, 2), (4, 4), (3, 4), (0, 4)):
        outcomes.take("gpu", number)
        assert outcomes.queue_state("gpu", 5) == QueueState(sent=4, consumed=taken, num_waiting=5)
    assert outcomes.queue_state("vlm", 0) == QueueState(sent=1, consumed=0, num_waiting=0)


def test_a_number_that_no_client_has_counted_moves_nothing(outcomes):
    outcomes.number("gpu", 4, "run")
    outcomes.take("gpu", 2)
    for number in (5, 10, 2**53, 2**62):
        outcomes.take("gpu", number)
        assert outcomes.queue_state("gpu", 5).consumed == 2
    outcomes.take("never sent to", 3)
    assert outcomes.redis.keys("rewardq:taken:never*") == []


def test_a_queue_that_was_told_a_number_beyond_its_own_recovers_with_the_next_message(outcomes):
    outcomes.number("gpu", 4, "run")
    outcomes.redis.set(keys.consumed_offset("gpu"), 2**62)
    outcomes.take("gpu", 3)
    assert outcomes.queue_state("gpu", 5).consumed == 3


def test_what_is_ahead_of_a_message_is_known_by_run(outcomes, settings):
    for num, run in ((3, "a"), (2, "a"), (4, "b"), (1, "a"), (5, "b")):
        outcomes.number("gpu", num, run)
    outcomes.number("vlm", 7, "c")
    assert outcomes.ahead("gpu", 16) == Ahead(consumed=0, num_of={"a": 6, "b": 9})
    assert outcomes.ahead("gpu", 8) == Ahead(consumed=0, num_of={"a": 5, "b": 2})
    assert outcomes.ahead("gpu", 1) == Ahead(consumed=0, num_of={})
    outcomes.take("gpu", 4)
    assert outcomes.ahead("gpu", 8) == Ahead(consumed=4, num_of={"a": 1, "b": 2})
    outcomes.take("gpu", 9)
    assert outcomes.ahead("gpu", 8) == Ahead(consumed=9, num_of={})
    outcomes.number("gpu", 1, "c")
    senders = outcomes.redis.zrange(keys.senders("gpu"), 0, -1, withscores=True)
    assert senders == [(b"10|a", 10), (b"11|b", 15), (b"16|c", 16)], "what was taken is forgotten"
    assert 0 < outcomes.redis.pttl(keys.senders("gpu")) <= 1000 * settings.result_ttl_s


def test_taking_tells_the_time_on_redis_clock(outcomes):
    before = outcomes.now_ms()
    assert before <= outcomes.take("gpu", 1) <= outcomes.now_ms()


@pytest.mark.parametrize(
    ("state", "number", "holds"),
    [
        (QueueState(sent=9, consumed=4, num_waiting=3), 5, True),
        (QueueState(sent=9, consumed=4, num_waiting=3), 4, False),
        (QueueState(sent=9, consumed=4, num_waiting=0), 5, False),
        (QueueState(sent=3, consumed=0, num_waiting=3), 5, False),
        (QueueState(sent=9, consumed=4, num_waiting=3), 9, True),
    ],
)
def test_a_message_is_in_the_backlog_while_its_number_was_not_taken_and_something_waits(state, number, holds):
    assert state.holds(number) == holds


def test_notes_are_found_in_order_and_dropped(outcomes):
    note = Note(reason="gone", worker="w", detail="d")
    outcomes.leave_note("c.1", note)
    assert outcomes.notes(["c.2", "c.1"]) == [None, note]
    outcomes.drop_notes(["c.1", "c.2"])
    outcomes.drop_notes([])
    assert outcomes.notes(["c.1"]) == [None]


def test_a_note_of_another_wire_version_says_so(outcomes):
    outcomes.redis.set(keys.note("c.1"), msgpack.packb({"reason": "of the future", "worker": "w"}))
    (note,) = outcomes.notes(["c.1"])
    assert note.reason == "wire"


def heartbeat(node: str, **fields) -> Heartbeat:
    given = {"wire": WIRE_VERSION, "queues": ("gpu",), "host": "h", "pid": 7, "store": "s", "state": "ready"}
    return Heartbeat(node=node, **{**given, **fields})


def test_live_workers_are_listed_and_those_that_ended_or_died_are_not(outcomes):
    outcomes.beat(heartbeat("gpu.1@h"), ttl_s=60)
    outcomes.beat(heartbeat("gpu.2@h"), ttl_s=60)
    outcomes.beat(heartbeat("gpu.3@h", state="loading", loading=("f",), models=("OCR",)), ttl_s=60)
    assert {w.node for w in outcomes.workers()} == {"gpu.1@h", "gpu.2@h", "gpu.3@h"}
    assert {w.node: w for w in outcomes.workers()}["gpu.3@h"].loading == ("f",)
    outcomes.beat(heartbeat("gpu.2@h"), ttl_s=0.2)  # its last one
    wait_until(lambda: {w.node for w in outcomes.workers()} == {"gpu.1@h", "gpu.3@h"})
    outcomes.end_beat("gpu.1@h")
    assert [w.node for w in outcomes.workers()] == ["gpu.3@h"]
    outcomes.beat(heartbeat("gpu.4@h"), ttl_s=60)
    assert outcomes.redis.zcard(keys.WORKERS) == 2


def test_a_worker_that_beats_again_lives_on(outcomes):
    for ttl_s in (0.3, 60):
        outcomes.beat(heartbeat("gpu.1@h"), ttl_s=ttl_s)
    time.sleep(0.4)
    assert len(outcomes.workers()) == 1, "the first beat's time is over, the second one's is not"
    outcomes.beat(heartbeat("gpu.1@h", queues=("vlm",)), ttl_s=60)
    assert [w.queues for w in outcomes.workers()] == [("vlm",)]


def put_raw_heartbeat(outcomes, node: str, data: bytes) -> None:
    outcomes.redis.set(keys.worker(node), data, ex=60)
    outcomes.redis.zadd(keys.WORKERS, {node: outcomes.now_ms() + 60_000})


def test_a_worker_of_another_wire_version_is_listed_with_it(outcomes):
    future = {**heartbeat("new@h").model_dump(), "wire": WIRE_VERSION + 1, "mood": "fine", "state": "thinking"}
    put_raw_heartbeat(outcomes, "new@h", msgpack.packb(future))
    past = {"wire": 0, "node": "old@h", "queues": ["gpu"]}
    put_raw_heartbeat(outcomes, "old@h", msgpack.packb(past))
    outcomes.beat(heartbeat("gpu.1@h"), ttl_s=60)
    workers = {w.node: w for w in outcomes.workers()}
    assert {node: w.wire for node, w in workers.items()} == {
        "new@h": WIRE_VERSION + 1,
        "old@h": 0,
        "gpu.1@h": WIRE_VERSION,
    }
    assert all("gpu" in w.queues and w.loading == () and w.models == () for w in workers.values())
    assert workers["old@h"].store == ""


@pytest.mark.parametrize("junk", [b"", b"junk", msgpack.packb([1]), msgpack.packb({"wire": 1})])
def test_what_is_no_heartbeat_does_not_hide_the_workers(outcomes, junk):
    put_raw_heartbeat(outcomes, "junk@h", junk)
    outcomes.beat(heartbeat("gpu.1@h"), ttl_s=60)
    assert "gpu.1@h" in {w.node for w in outcomes.workers()}


def test_everything_starts_anew_after_redis_was_emptied(outcomes):
    states(outcomes, [A], "mine")
    outcomes.beat(heartbeat("gpu.1@h"), ttl_s=60)
    outcomes.redis.flushall()
    outcomes.redis.script_flush()
    assert outcomes.workers() == []
    outcomes.beat(heartbeat("gpu.1@h"), ttl_s=60)
    assert len(outcomes.workers()) == 1
    assert outcomes.extend({A: "mine"}) == 1
    assert states(outcomes, [A], "yours") == ["claimed by another"]
    assert outcomes.write({A: reward(1.0)}, "mine") == 1
    assert found(outcomes, A).reward == 1.0


def test_an_outcome_is_small(outcomes):
    outcomes.write({A: Outcome(reward=0.5, info={"judge": "x" * 100}, origin={"worker": "gpu.1@h"})}, "one")
    assert outcomes.redis.strlen(keys.outcome(A)) < 300
    assert len(pack(heartbeat("gpu.1@h"))) < 300


def test_a_client_puts_back_an_outcome_and_replaces_no_better_one(outcomes, settings):
    client = ClientOutcomes(outcomes.redis, settings.result_ttl_s)
    client.put_back(A, failure(attempt=2))
    client.put_back(A, failure("an older one", attempt=1))
    assert found(outcomes, A).failure.message == "bad luck"
    client.put_back(A, reward(1.0))
    client.put_back(A, reward(2.0))
    assert found(outcomes, A).reward == 1.0
    assert 0 < outcomes.redis.pttl(keys.outcome(A)) <= 1000 * settings.result_ttl_s


def test_a_client_that_puts_an_outcome_back_ends_no_claim(outcomes, settings):
    states(outcomes, [A], "a worker's")
    ClientOutcomes(outcomes.redis, settings.result_ttl_s).put_back(A, reward(1.0))
    assert outcomes.claimed([A]) == [True]


def test_a_client_has_no_way_to_claim_or_to_write():
    changes = {"claim", "write", "start_alone", "release", "extend", "take", "leave_note", "beat", "end_beat"}
    assert {name for name in changes if hasattr(ClientOutcomes, name)} == set()
    assert {name for name in changes if not hasattr(WorkerOutcomes, name)} == set()
