from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

import pytest
import redis

from tasks import app, keys
from tasks.errors import BusyError, ModelLoadError
from tasks.media import digest
from tasks.messages import (
    WIRE_VERSION,
    Failure,
    GroupRequest,
    MediaRef,
    Outcome,
    RewardCall,
    SampleRequest,
    ScoreRequest,
    pack,
)
from tasks.outcomes import address
from tasks.payloads import FileStore, RedisStore
from tests.servers import wait_until
from workers.scoring.chunk import score
from workers.scoring.context import ScoringContext, set_context
from workers.scoring.group import score_group

CALL = RewardCall(
    name="size",
    model="my_rewards.Size",
    fingerprint="f" * 16,
    version="1",
    dtype="bfloat16",
    batch_size=16,
    timeout_s=30.0,
    image_format="raw",
    options={},
)


class FakeRunner:
    """Scores each sample by the length of its image; notes what it was asked."""

    def __init__(self) -> None:
        self.loads = 0
        self.ran: list[list[str]] = []
        self.load_error: Exception | None = None
        self.busy = False
        self.before = lambda samples: None
        self.outcome_of = lambda sample, payloads: Outcome(reward=float(len(payloads[sample.media["image"].name])))

    def is_loaded(self, call) -> bool:
        return self.loads > 0 and self.load_error is None

    @contextlib.contextmanager
    def lend(self, call) -> Iterator[str]:
        self.loads += 1
        if self.load_error is not None:
            raise self.load_error
        yield "the model"

    def admit(self, model) -> None:
        if self.busy:
            raise BusyError("the judge has enough to do")

    def run(self, model, call, samples, payloads) -> Iterator[dict[str, Outcome]]:
        assert (model, call) == ("the model", CALL)
        if not samples:
            return
        self.ran.append([s.prompt for s in samples])
        self.before(samples)
        for sample in samples:
            yield {sample.address: self.outcome_of(sample, payloads)}


class FakeClaims:
    """Notes which claims are held."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.ever: list[str] = []

    def hold(self, addresses: Iterable[str], token: str) -> None:
        addresses = list(addresses)
        self.ever += addresses
        self.held.update(dict.fromkeys(addresses, token))

    def drop(self, addresses: Iterable[str], token: str) -> None:
        for where in list(addresses):
            if self.held.get(where) == token:
                del self.held[where]


class Bench:
    """A worker's scoring with a fake runner on a real Redis, and a client that sends requests to it."""

    def __init__(self, outcomes, store) -> None:
        self.outcomes, self.store = outcomes, store
        self.runner, self.claims = FakeRunner(), FakeClaims()
        self.context = ScoringContext("gpu.1@h", outcomes, store, self.claims, self.runner)
        set_context(app, self.context)

    def sample(self, name: str, attempt: int = 1, image: bytes | None = None) -> SampleRequest:
        data = image or b"x" * ord(name[0])
        self.store.put({f"c.{name}": data}, ttl_s=60)
        ref = MediaRef(name=f"c.{name}", digest=digest(data), shape=(len(data),), format="raw")
        return SampleRequest(address=at(name), prompt=name, media={"image": ref}, attempt=attempt)

    def request(self, *samples: SampleRequest, deadline_ms: int = 2**43, **fields) -> str:
        request = ScoreRequest(
            id="c.request",
            run="run",
            label="size x 2",
            sent_ms=self.outcomes.now_ms(),
            deadline_ms=deadline_ms,
            reward=CALL,
            samples=samples,
            **fields,
        )
        self.store.put({request.id: pack(request)}, ttl_s=60)
        return request.id

    def run(self, request_id: str = "c.request", wire: int = WIRE_VERSION, number: int = 1, store=None) -> str:
        arguments = ["size x 2", request_id, wire, number, self.store.identity() if store is None else store]
        return score.apply(arguments).get()

    def request_group(self, *members: SampleRequest, how: str = "rank") -> None:
        request = GroupRequest(
            id="c.request",
            run="run",
            label="ranks of size x 2",
            sent_ms=self.outcomes.now_ms(),
            deadline_ms=2**43,
            reward=CALL,
            how=how,
            address=at("group"),
            members=members,
        )
        self.store.put({request.id: pack(request)}, ttl_s=60)

    def run_group(self) -> str:
        arguments = ["size x 2", "c.request", WIRE_VERSION, 1, self.store.identity()]
        return score_group.apply(arguments).get()

    def send(self, *samples: SampleRequest, **how) -> str:
        self.request(*samples)
        return self.run(**how)

    def rewards(self, *names: str) -> list:
        found = self.outcomes.look_up([at(n) for n in names])
        return [o and (o.reward if o.reward is not None else o.failure.message) for o in found]

    def note(self):
        return self.outcomes.notes(["c.request"])[0]

    def assert_nothing_is_claimed(self, *names: str) -> None:
        assert not any(self.outcomes.claimed([at(n) for n in names]))
        assert self.claims.held == {}
        assert [self.outcomes.redis.exists(keys.starts(at(n))) for n in names] == [0] * len(names)


def at(name: str) -> str:
    return address("run", CALL.fingerprint, name)


@pytest.fixture
def bench(outcomes, settings):
    store = RedisStore(settings.payloads)
    yield Bench(outcomes, store)
    store.close()


def test_a_chunk_becomes_outcomes(bench):
    assert bench.send(bench.sample("a"), bench.sample("b")) == "2 scored"
    assert bench.rewards("a", "b") == [97.0, 98.0]
    bench.assert_nothing_is_claimed("a", "b")
    assert bench.note() is None


def test_an_outcome_says_where_it_was_computed_and_how_long_it_took(bench):
    bench.send(bench.sample("a", attempt=3).model_copy(update={"shared_key": "its slots"}))
    (outcome,) = bench.outcomes.look_up([at("a")])
    assert outcome.attempt == 3
    assert outcome.shared_key == "its slots"
    assert outcome.origin["worker"] == "gpu.1@h"
    assert 0 <= outcome.origin["queued_s"] < 5
    assert 0 <= outcome.origin["fetch_s"] < 5


def test_the_message_counts_as_taken(bench):
    bench.outcomes.number("gpu", 7, "run")
    bench.send(bench.sample("a"), number=7)
    assert bench.outcomes.queue_state("gpu", 0).consumed == 7


def test_claims_are_held_while_samples_are_scored(bench):
    seen = {}
    bench.runner.before = lambda samples: seen.update(bench.claims.held)
    bench.send(bench.sample("a"), bench.sample("b"))
    assert set(seen) == {at("a"), at("b")}
    assert len(set(seen.values())) == 1


def test_a_sample_is_held_no_longer_than_until_it_is_written(bench):
    """Else a Redis emptied while its neighbours are scored would have it claimed, by whom nobody scores it."""
    held = []
    usual = bench.runner.outcome_of

    def note_what_is_held(sample, payloads):
        held.append(sorted(bench.claims.held))
        return usual(sample, payloads)

    bench.runner.outcome_of = note_what_is_held
    bench.send(*[bench.sample(n) for n in "abc"])
    assert held == [[at("a"), at("b"), at("c")], [at("b"), at("c")], [at("c")]]


def test_two_tasks_have_two_tokens(bench):
    tokens = set()
    bench.runner.before = lambda samples: tokens.update(bench.claims.held.values())
    bench.send(bench.sample("a"))
    bench.send(bench.sample("b"))
    assert len(tokens) == 2


def test_tokens_differ_between_processes_of_one_name(bench):
    """Two containers on one host may both be process 1 of the same host name."""
    import subprocess
    import sys

    tokens = []
    bench.runner.before = lambda samples: tokens.extend(bench.claims.held.values())
    bench.send(bench.sample("a"))
    code = (
        "from workers.scoring.context import ScoringContext as Context; "
        "print(Context('gpu.1@h', None, None, None, None).new_token())"
    )
    from tests.servers import ROOT, clean_env

    env = {**clean_env(), "PYTHONPATH": str(ROOT)}
    twins = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True) for _ in range(2)]
    tokens += [twin.stdout.strip() for twin in twins]
    assert all(token.startswith("gpu.1@h/") for token in tokens)
    assert len(set(tokens)) == 3


def test_the_same_message_again_does_nothing(bench):
    bench.send(bench.sample("a"))
    assert "answered" in bench.run()
    assert bench.runner.ran == [["a"]]


def test_a_model_is_not_loaded_for_what_is_answered(bench):
    bench.outcomes.write({at("a"): Outcome(reward=1.0), at("b"): Outcome(reward=2.0)}, "before")
    assert bench.send(bench.sample("a"), bench.sample("b")) == "answered already"
    assert bench.runner.loads == 0


@pytest.mark.parametrize(("asked", "loads"), [(1, 0), (2, 1)])
def test_a_failure_is_an_answer_for_its_attempt_and_no_later_one(bench, asked, loads):
    bench.outcomes.write({at("a"): Outcome(failure=Failure(kind="failed", message="m"), attempt=1)}, "before")
    bench.send(bench.sample("a", attempt=asked))
    assert bench.runner.loads == loads
    assert bench.rewards("a") == (["m"] if asked == 1 else [97.0])


def test_answered_and_claimed_samples_are_skipped(bench):
    bench.outcomes.write({at("a"): Outcome(reward=1.0)}, "before")
    bench.outcomes.claim([at("b")], [1], "another", 2**43)
    assert bench.send(*[bench.sample(n) for n in "abc"]) == "1 scored"
    assert bench.runner.ran == [["c"]]
    assert bench.rewards("a", "b", "c") == [1.0, None, 99.0]
    assert bench.outcomes.claimed([at("b")]) == [True]
    assert at("b") not in bench.claims.ever


def test_an_equal_sample_twice_in_a_chunk_is_scored_once(bench):
    assert bench.send(bench.sample("a"), bench.sample("a"), bench.sample("b")) == "2 scored"
    assert bench.runner.ran == [["a", "b"]]


def test_an_expired_message_is_dropped_without_a_trace(bench):
    bench.request(bench.sample("a"), deadline_ms=bench.outcomes.now_ms() - 1)
    assert bench.run() == "expired"
    assert bench.runner.loads == 0
    assert bench.rewards("a") == [None]
    assert bench.note() is None
    bench.assert_nothing_is_claimed("a")


def test_a_request_that_is_gone_is_noted(bench):
    assert bench.run() == "not read: gone"
    note = bench.note()
    assert (note.reason, note.worker) == ("gone", "gpu.1@h")
    assert "request" in note.detail


def test_a_payload_that_is_gone_is_noted_and_its_claims_are_given_back(bench):
    samples = [bench.sample("a"), bench.sample("b")]
    bench.store.free(["c.b"])
    assert bench.send(*samples) == "not read: gone"
    assert bench.note().reason == "gone"
    assert "c.b" in bench.note().detail
    assert bench.runner.ran == []
    assert bench.rewards("a", "b") == [None, None]
    bench.assert_nothing_is_claimed("a", "b")


def test_a_payload_of_other_bytes_is_gone_and_no_reward(bench):
    sample = bench.sample("a")
    bench.store.put({"c.a": b"other bytes"}, ttl_s=60)
    assert bench.send(sample) == "not read: gone"
    assert bench.store.get(["c.a"]) == [None], "its client would find it there, and send the same again"
    assert bench.rewards("a") == [None]
    bench.assert_nothing_is_claimed("a")


def test_claims_are_free_again_when_the_client_reads_the_note(bench, monkeypatch):
    sample = bench.sample("a")
    bench.store.free(["c.a"])
    claimed_at_note = []
    leave_note = bench.outcomes.leave_note

    def look_and_leave(request_id, note):
        claimed_at_note.extend(bench.outcomes.claimed([at("a")]))
        leave_note(request_id, note)

    monkeypatch.setattr(bench.outcomes, "leave_note", look_and_leave)
    bench.send(sample)
    assert claimed_at_note == [False]


def test_a_worker_with_another_store_says_so(bench, tmp_path):
    bench.request(bench.sample("a"))
    theirs = bench.store.identity()
    ours = FileStore(tmp_path / "shm")
    set_context(app, ScoringContext("gpu.1@h", bench.outcomes, ours, bench.claims, bench.runner))
    assert bench.run(store=theirs) == "not read: store"
    note = bench.note()
    assert note.reason == "store"
    assert theirs in note.detail
    assert ours.identity() in note.detail
    assert "REWARDQ_PAYLOAD_URL" in note.detail


@pytest.mark.parametrize("wire", [WIRE_VERSION + 1, 0])
def test_a_message_of_another_wire_version_is_noted(bench, wire):
    bench.request(bench.sample("a"))
    assert bench.run(wire=wire) == "not read: wire"
    assert bench.note().reason == "wire"
    assert f"wire version {WIRE_VERSION}" in bench.note().detail
    assert f"of {wire}" in bench.note().detail
    assert bench.rewards("a") == [None]


def test_a_request_of_another_wire_version_is_noted(bench):
    bench.request(bench.sample("a"), wire=WIRE_VERSION + 1)
    assert bench.run() == "not read: wire"
    assert bench.note().reason == "wire"


def test_a_request_that_is_no_request_is_noted(bench):
    bench.store.put({"c.request": b"junk"}, ttl_s=60)
    assert bench.run() == "not read: wire"


def test_a_later_client_may_send_more_arguments(bench):
    bench.request(bench.sample("a"))
    arguments = ["size x 2", "c.request", WIRE_VERSION, 1, bench.store.identity(), "", "more", {"and": "more"}]
    assert score.apply(arguments).get() == "1 scored"


def test_a_model_that_cannot_be_loaded_fails_every_sample_with_the_reason(bench):
    bench.runner.load_error = ModelLoadError("no weights")
    assert bench.send(bench.sample("a"), bench.sample("b")) == "0 scored, 2 failed"
    assert bench.rewards("a", "b") == ["no weights", "no weights"]
    assert bench.outcomes.look_up([at("a")])[0].failure.kind == "failed"
    bench.assert_nothing_is_claimed("a", "b")


def test_a_model_that_cannot_be_loaded_fails_nothing_that_another_task_scores(bench):
    bench.runner.load_error = ModelLoadError("no weights")
    bench.outcomes.claim([at("a")], [1], "another", 2**43)
    bench.send(bench.sample("a"), bench.sample("b"))
    assert bench.rewards("a", "b") == [None, "no weights"]


def test_a_model_that_cannot_be_asked_now_is_noted_and_nothing_is_claimed(bench):
    bench.runner.busy = True
    assert bench.send(bench.sample("a")) == "not read: busy"
    assert (bench.note().reason, bench.note().detail) == ("busy", "the judge has enough to do")
    assert bench.claims.ever == []
    bench.runner.busy = False
    assert bench.run() == "1 scored"


def test_what_a_model_did_not_come_to_is_given_back_and_the_rest_is_kept(bench):
    usual = bench.runner.outcome_of

    def score_or_be_busy(sample, payloads):
        if sample.prompt == "b":
            raise BusyError("the judge has enough to do")
        return usual(sample, payloads)

    bench.runner.outcome_of = score_or_be_busy
    assert bench.send(bench.sample("a"), bench.sample("b")) == "not read: busy"
    assert bench.note().reason == "busy"
    assert bench.rewards("a", "b") == [97.0, None]
    bench.assert_nothing_is_claimed("a", "b")


def test_failures_are_written_beside_rewards(bench):
    usual = bench.runner.outcome_of
    bad = Outcome(failure=Failure(kind="invalid", message="no text"))
    bench.runner.outcome_of = lambda sample, payloads: bad if sample.prompt == "b" else usual(sample, payloads)
    assert bench.send(*[bench.sample(n) for n in "abc"]) == "2 scored, 1 failed"
    assert bench.rewards("a", "b", "c") == [97.0, "no text", 99.0]
    bench.assert_nothing_is_claimed("a", "b", "c")


@pytest.mark.parametrize("error", [SystemExit(1), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("task", ["a chunk", "a group in one task"])
def test_what_would_leak_the_pools_slot_becomes_an_ordinary_error(bench, error, task):
    def fail(samples):
        raise error

    bench.runner.before = fail
    run = bench.run
    if task == "a chunk":
        bench.request(bench.sample("a"))
    else:
        bench.request_group(bench.sample("a"), bench.sample("b"))
        run = bench.run_group
    with pytest.raises(RuntimeError, match=f"{type(error).__name__} while scoring size x 2"):
        run()
    bench.assert_nothing_is_claimed("a", "b")
    assert bench.note().reason == "error"


def test_what_a_task_raises_is_noted_with_its_words(bench):
    def fail(samples):
        raise ValueError("a bug of ours \udcff" + 5000 * "!")

    bench.runner.before = fail
    bench.request(bench.sample("a"))
    with pytest.raises(ValueError, match="a bug of ours"):
        bench.run()
    note = bench.note()
    assert (note.reason, note.worker) == ("error", "gpu.1@h")
    assert note.detail.startswith("the task raised ValueError: a bug of ours ?!!!")
    assert len(note.detail) <= 1000


def test_what_a_task_raises_is_raised_though_no_note_can_be_left(bench, monkeypatch):
    def refuse(*_):
        raise redis.ConnectionError("away")

    def fail(samples):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(bench.outcomes, "leave_note", refuse)
    bench.runner.before = fail
    bench.request(bench.sample("a"))
    with pytest.raises(ValueError, match="a bug of ours"):
        bench.run()


def test_a_part_of_a_group_that_ends_its_process_each_time_is_run_alone_and_given_up(bench):
    for _ in range(2):
        die(bench, "b")
    bench.request_group(*[bench.sample(n) for n in "abc"])
    for dead in ("one", "two", "three"):
        bench.outcomes.claim([at("b")], [1], dead, 2**43)
        bench.outcomes.start_alone(at("b"), 3, dead)
        bench.outcomes.redis.delete(keys.claim(at("b")))
    let_its_time_pass(bench, "b")
    assert bench.run_group() == "2 scored, 1 failed; combined"
    assert bench.runner.ran == [["a", "c"]]
    members = bench.outcomes.look_up([at("group")])[0].members
    assert [m.reward for m in members] == [0.0, None, 0.5]
    assert "ended without an answer each of the 3 times" in members[1].failure.message


@pytest.mark.parametrize("how", ["rank", "wins"])
def test_a_group_without_a_part_to_score_says_so_of_each_member(bench, how):
    unfit = Failure(kind="invalid", message="192 values are NaN")
    bad = bench.sample("a").model_copy(update={"failure": unfit})
    lonely = bench.sample("b").model_copy(update={"failure": unfit if how == "rank" else None})
    bench.request_group(bad, lonely, how=how)
    assert bench.run_group() == "nothing to score; combined"
    first, second = bench.outcomes.look_up([at("group")])[0].members
    assert "192 values are NaN" in first.failure.message
    assert second.failure.kind == ("invalid" if how == "rank" else "abstained")
    assert bench.runner.ran == []


def test_what_was_written_before_a_crash_stays_and_the_rest_is_given_back(bench):
    usual = bench.runner.outcome_of

    def score_or_break(sample, payloads):
        if sample.prompt == "b":
            raise RuntimeError("a bug of ours")
        return usual(sample, payloads)

    bench.runner.outcome_of = score_or_break
    bench.request(*[bench.sample(n) for n in "abc"])
    with pytest.raises(RuntimeError, match="a bug of ours"):
        bench.run()
    assert bench.rewards("a", "b", "c") == [97.0, None, None]
    bench.assert_nothing_is_claimed("a", "b", "c")


def test_a_twin_that_was_faster_keeps_its_reward(bench):
    def twin_answers(samples):
        bench.outcomes.write({at("a"): Outcome(reward=1.0)}, "twin")

    bench.runner.before = twin_answers
    bench.send(bench.sample("a"))
    assert bench.rewards("a") == [1.0]


def die(bench, name: str) -> None:
    """As if a worker had claimed a sample and been killed."""
    bench.outcomes.claim([at(name)], [1], f"dead{time.monotonic_ns()}", 2**43)
    bench.outcomes.redis.delete(keys.claim(at(name)))


def let_its_time_pass(bench, name: str) -> None:
    """As if the reward's `timeout_s` had passed since the sample's first start alone."""
    bench.outcomes.redis.hincrby(keys.starts(at(name)), "first_alone_ms", -round(1000 * CALL.timeout_s))


def test_a_sample_that_survived_its_worker_once_is_run_as_usual(bench):
    die(bench, "b")
    bench.send(*[bench.sample(n) for n in "abc"])
    assert bench.runner.ran == [["a", "b", "c"]]


def test_a_suspect_is_run_alone_after_the_others(bench):
    for _ in range(2):
        die(bench, "b")
    bench.send(*[bench.sample(n) for n in "abc"])
    assert bench.runner.ran == [["a", "c"], ["b"]]
    assert bench.rewards("a", "b", "c") == [97.0, 98.0, 99.0]
    bench.assert_nothing_is_claimed("a", "b", "c")


def test_one_suspect_at_a_time_runs_in_a_process(bench):
    for name in "ab":
        for _ in range(2):
            die(bench, name)
    inside, go_on = threading.Event(), threading.Event()

    def wait(samples):
        inside.set()
        assert go_on.wait(10)

    bench.runner.before = wait
    bench.request(bench.sample("a"))
    first = threading.Thread(target=bench.run)
    first.start()
    assert inside.wait(10)
    bench.send(bench.sample("b"))
    assert bench.runner.ran == [["a"]]
    assert bench.outcomes.claimed([at("b")]) == [False]
    go_on.set()
    first.join()
    bench.send(bench.sample("b"))
    assert bench.rewards("a", "b") == [97.0, 98.0]


def test_a_sample_that_ends_its_process_each_time_is_given_up_after_its_time(bench):
    for _ in range(2):
        die(bench, "a")
    for dead in ("one", "two", "three"):
        bench.outcomes.claim([at("a")], [1], dead, 2**43)
        bench.outcomes.start_alone(at("a"), 3, dead)
        bench.outcomes.redis.delete(keys.claim(at("a")))
    bench.send(bench.sample("a"), bench.sample("b"))
    assert bench.rewards("a", "b") == [None, 98.0]
    let_its_time_pass(bench, "a")
    bench.send(bench.sample("a"))
    assert "ended without an answer each of the 3 times" in bench.rewards("a")[0]
    assert bench.runner.ran == [["b"]]
    bench.assert_nothing_is_claimed("a", "b")


def test_a_redis_that_is_away_for_a_while_loses_no_reward(private_redis, settings):
    from tasks.servers.connections import connect
    from tests.outcomes import Outcomes

    server = private_redis()
    store = RedisStore(f"{settings.broker[:-1]}2")
    with connect(server.url) as client:
        bench = Bench(Outcomes(client, 10, 60), store)
        bench.request(bench.sample("a"))

        bench.runner.before = lambda samples: server.stop()
        later: list[str] = []
        scoring = threading.Thread(target=lambda: later.append(bench.run()))
        scoring.start()
        wait_until(lambda: server.is_stopped)
        time.sleep(0.3)
        server.start()
        scoring.join()
        assert later == ["1 scored"]
        assert bench.rewards("a") == [97.0]
    store.close()
