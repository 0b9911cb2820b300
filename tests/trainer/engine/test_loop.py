"""The loop with real threads: calls that fail are made again, a bug ends every wait, nobody waits for a lane."""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
import time
from collections import Counter

import pytest
import redis

from tasks.errors import CollectTimeoutError, RankTakenError, RedisRefusalError, RewardError
from tasks.messages import Outcome
from tests.trainer.engine.by_hand import SINGLE, EngineByHand
from trainer_client.engine import actions as do
from trainer_client.engine import engine as engine_module
from trainer_client.engine import events as ev
from trainer_client.engine import loop as loop_module
from trainer_client.engine.backlog import Backlog
from trainer_client.engine.engine import Engine
from trainer_client.engine.loop import Chore, Loop
from trainer_client.engine.why_late import Source

LONG_S = 10.0
"""Longer than anything takes here, however slow the machine."""


def eventually(is_so, timeout_s: float = LONG_S) -> None:
    """Wait until something is so."""
    ends_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < ends_at, "it did not come to that"
        time.sleep(0.002)


class FakeBackend:
    """Servers that answer as `EngineByHand` says; a test makes kinds of calls fail, or hang."""

    def __init__(self) -> None:
        self.by_hand = EngineByHand(SINGLE)
        self.raises: dict[type, BaseException] = {}
        self.hangs: dict[type, threading.Event] = {}
        self.started: Counter[type] = Counter()
        self.times: list[tuple[type, float]] = []
        self._lock = threading.Lock()

    def perform(self, action):
        kind = type(action)
        with self._lock:
            self.started[kind] += 1
            self.times.append((kind, time.monotonic()))
        if kind in self.hangs:
            assert self.hangs[kind].wait(LONG_S)
        if kind in self.raises:
            raise self.raises[kind]
        with self._lock:
            return self.by_hand.result_of(action)

    def times_of(self, kind: type) -> list[float]:
        """When calls of this kind began."""
        return [at for other, at in list(self.times) if other is kind]


@contextlib.contextmanager
def loop_of(backend: FakeBackend, announce=lambda _: None, chores=()):
    """A loop on this backend; closed in the end, and with it all its threads."""
    state = backend.by_hand.state
    loop = Loop(state, backend, 2, announce, chores)
    try:
        yield loop
    finally:
        for event in backend.hangs.values():
            event.set()
        loop.close()
        assert not [thread for thread in loop._threads if thread.is_alive()]


@pytest.fixture
def backend():
    """Servers that answer."""
    return FakeBackend()


@pytest.fixture
def quick(monkeypatch):
    """Short pauses between two tries."""
    monkeypatch.setattr(loop_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(loop_module, "LAST_PAUSE_S", 0.1)
    monkeypatch.setattr(loop_module, "LAST_POLL_PAUSE_S", 0.05)


def submit(loop, backend, content=1):
    slot = backend.by_hand.new_slot(content)
    loop.put(ev.Submitted([slot]))
    return slot


def is_in_flight(loop):
    with loop.lock:
        deliveries = loop.state.core.deliveries.values()
        return bool(deliveries) and all(d.number for d in deliveries)


def test_a_sample_goes_from_submit_to_its_outcome_and_whoever_waits_is_woken(backend):
    announced = []
    with loop_of(backend, announced.append) as loop:
        slot = submit(loop, backend)
        eventually(lambda: is_in_flight(loop))
        backend.by_hand.outcomes[slot.awaited["PickScore"].address] = Outcome(reward=0.75)
        loop.put(ev.WaitBegan(1, frozenset({("train", 0)})))
        started = time.monotonic()
        with loop.changed:
            assert loop.changed.wait_for(lambda: slot.is_done, LONG_S)
        assert time.monotonic() - started < LONG_S / 2, "it was woken"
        assert slot.outcome_for("PickScore").reward == 0.75
        eventually(lambda: announced)
    assert [(one.spec, one.outcome.reward) for one in announced] == [(SINGLE[0], 0.75)]
    assert not backend.by_hand.stored, "what nobody needs is freed"


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("refused"),
        redis.TimeoutError("slow"),
        redis.BusyLoadingError("loading"),
        redis.OutOfMemoryError("full"),
        redis.ReadOnlyError("failing over"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=lambda error: f"{type(error).__name__}{getattr(error, 'errno', '') or ''}",
)
def test_a_call_whose_server_is_away_or_full_is_made_again_until_it_answers(backend, quick, error):
    backend.raises[do.Store] = error
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[do.Store] >= 3)
        assert loop.state.why_late.words(Source.SENDING)
        del backend.raises[do.Store]
        eventually(lambda: is_in_flight(loop))
        eventually(lambda: loop.state.why_late.words() is None)
        assert loop.broken is None


def test_pauses_between_tries_grow_up_to_a_bound(backend, quick):
    backend.raises[do.Store] = redis.ConnectionError("refused")
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[do.Store] >= 6)
    times = backend.times_of(do.Store)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for pause_s, at_least_s in zip(pauses[:5], [0.02, 0.04, 0.08, 0.1, 0.1], strict=True):
        assert pause_s >= at_least_s


def test_pauses_of_what_somebody_may_wait_for_stay_short(backend, monkeypatch):
    monkeypatch.setattr(loop_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(loop_module, "LAST_PAUSE_S", 60.0)
    monkeypatch.setattr(loop_module, "LAST_POLL_PAUSE_S", 0.02)
    backend.raises[do.LookUp] = redis.ConnectionError("refused")
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[do.LookUp] >= 12)  # doubled each time that would be 40 s


def test_a_server_that_is_away_is_said_to_the_log_once_however_often_a_call_fails(backend, quick, caplog):
    backend.raises[do.Store] = redis.ConnectionError("refused")
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[do.Store] >= 4)
    assert [record.message for record in caplog.records] == ["sending waits for redis error=ConnectionError"]


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EACCES, "Permission denied")])
@pytest.mark.parametrize("kind", [do.Encode, do.LookUp, do.Store, do.Publish], ids=lambda kind: kind.__name__)
def test_any_other_error_ends_every_wait_and_is_what_waiters_are_told(backend, kind, error, caplog):
    backend.raises[kind] = error
    with loop_of(backend) as loop:
        slot = submit(loop, backend)
        with loop.changed:
            assert loop.changed.wait_for(lambda: slot.is_done or loop.broken is not None, LONG_S)
        assert loop.broken is error
        eventually(lambda: not loop.is_alive)
    assert "a call of the engine failed" in caplog.messages


def test_a_rank_that_another_process_has_taken_ends_every_wait_and_needs_no_traceback(backend, caplog):
    def lose():
        raise RankTakenError("another process is rank 0", "host:1")

    with loop_of(backend, chores=[Chore(60.0, lose, is_due_at_once=True)]) as loop:
        eventually(lambda: loop.broken is not None)
        assert isinstance(loop.broken, RankTakenError)
    assert not caplog.records


def test_an_event_that_the_state_cannot_take_ends_every_wait(backend, caplog):
    with loop_of(backend) as loop:
        loop.put("no event")
        eventually(lambda: loop.broken is not None)
        eventually(lambda: not loop.is_alive)
        assert isinstance(loop.broken, KeyError)
    assert "the engine's loop ended" in caplog.messages


def test_a_listener_that_raises_ends_every_wait(backend, caplog):
    def announce(_):
        raise ValueError("the listener's bug")

    with loop_of(backend, announce) as loop:
        submit(loop, backend)
        eventually(lambda: is_in_flight(loop))
        (at,) = loop.state.core.awaited
        loop.put(ev.OutcomesFound({at: Outcome(reward=1.0)}, do.Purpose.EVERYTHING))
        eventually(lambda: isinstance(loop.broken, ValueError))


def test_the_first_error_is_the_one_that_is_told(backend, caplog):
    first, second = ValueError("first"), ValueError("second")
    with loop_of(backend) as loop:
        loop._break_with(first)
        loop._break_with(second)
        assert loop.broken is first


# --- lanes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [do.Encode, do.LookUp, do.Store, do.Publish], ids=lambda kind: kind.__name__)
def test_put_returns_at_once_while_a_lane_hangs(backend, kind):
    backend.hangs[kind] = threading.Event()
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[kind])
        started = time.monotonic()
        for number in range(100):
            submit(loop, backend, 2 + number)
        assert time.monotonic() - started < 1.0


def test_while_the_broker_hangs_outcomes_are_still_polled(backend):
    with loop_of(backend) as loop:
        first = submit(loop, backend, 1)
        eventually(lambda: is_in_flight(loop))
        backend.hangs[do.Publish] = threading.Event()
        submit(loop, backend, 2)
        eventually(lambda: backend.started[do.Publish] == 2)
        backend.by_hand.outcomes[first.awaited["PickScore"].address] = Outcome(reward=0.75)
        loop.put(ev.WaitBegan(1))
        eventually(lambda: first.is_done)


def test_while_the_payload_store_hangs_the_rank_lock_is_still_extended(backend):
    extended = []
    chore = Chore(0.01, lambda: extended.append(1))
    backend.hangs[do.Store] = backend.hangs[do.MeasureStore] = threading.Event()
    with loop_of(backend, chores=[chore]) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[do.MeasureStore])
        num_before = len(extended)
        eventually(lambda: len(extended) > num_before + 3)


def test_calls_of_one_lane_are_made_one_by_one_in_order(backend):
    order = []
    with loop_of(backend) as loop:
        for number in range(50):
            loop.do_once(do.Lane.POLL, lambda number=number: order.append((number, threading.current_thread().name)))
        eventually(lambda: len(order) == 50)
    assert order == [(number, "rewardq-poll") for number in range(50)]


def test_an_outage_of_a_day_ends_no_loop(backend):
    with loop_of(backend) as loop:
        call = loop_module._Call(do.Renew([]), num_failures=20_000)
        loop._inbox.put(loop_module._Failed(call, redis.ConnectionError("refused")))
        eventually(lambda: loop.state.why_late.words(Source.POLLING))
        eventually(lambda: not loop.state.why_late.words(Source.POLLING))
        assert loop.broken is None


def test_a_call_that_waits_for_its_server_does_not_hold_up_those_behind_it(backend):
    num_made = []

    def fail():
        raise redis.ConnectionError("refused")

    with loop_of(backend) as loop:
        loop.do_once(do.Lane.POLL, fail)
        loop.do_once(do.Lane.POLL, lambda: num_made.append(1))
        eventually(lambda: num_made)
        assert loop.state.why_late.words(Source.POLLING), "the first call still waits"


def test_a_lane_waits_for_its_server_until_the_last_of_its_calls_is_made(backend, monkeypatch):
    monkeypatch.setattr(loop_module, "LAST_POLL_PAUSE_S", 60.0)
    num_tries = Counter()

    def fail(name, num_failures):
        num_tries[name] += 1
        if num_tries[name] <= num_failures:
            raise redis.ConnectionError("refused")

    with loop_of(backend) as loop:
        monkeypatch.setattr(loop_module, "FIRST_PAUSE_S", 60.0)
        loop.do_once(do.Lane.POLL, lambda: fail("waits long", 2))
        eventually(lambda: loop._retries)
        monkeypatch.setattr(loop_module, "FIRST_PAUSE_S", 0.01)
        loop.do_once(do.Lane.POLL, lambda: fail("waits shortly", 1))
        eventually(lambda: num_tries["waits shortly"] == 2)
        loop.do_once(do.Lane.POLL, lambda: num_tries.update(["afterwards"]))
        eventually(lambda: num_tries["afterwards"])
        assert loop.state.why_late.words(Source.POLLING)


# --- chores ---------------------------------------------------------------------------------------


def test_a_chore_is_done_regularly_and_at_once_if_it_says_so(backend):
    at_once, later = [], []
    chores = [
        Chore(0.01, lambda: at_once.append(1), is_due_at_once=True),
        Chore(60.0, lambda: later.append(1)),
    ]
    with loop_of(backend, chores=chores):
        eventually(lambda: len(at_once) >= 3)
    assert not later


def test_a_chore_whose_server_is_away_is_done_again_and_not_twice_at_a_time(backend, quick):
    num_running, most = [0], [0]
    tries = []

    def chore():
        num_running[0] += 1
        most[0] = max(most[0], num_running[0])
        tries.append(1)
        num_running[0] -= 1
        if len(tries) < 3:
            raise redis.ConnectionError("refused")

    with loop_of(backend, chores=[Chore(0.005, chore, is_due_at_once=True)]) as loop:
        eventually(lambda: len(tries) >= 6)
        assert loop.broken is None
    assert most == [1]


# --- the end --------------------------------------------------------------------------------------


def test_close_ends_all_threads_and_frees_what_nobody_needs_any_more(backend):
    with loop_of(backend) as loop:
        slot = submit(loop, backend)
        eventually(lambda: is_in_flight(loop))
        assert backend.by_hand.stored
        loop.put(ev.SlotsGivenUp([slot]))
    assert not backend.by_hand.stored
    assert not loop.is_alive


def test_what_is_freed_in_the_last_turn_is_freed(backend):
    """The loop is in the middle of a turn when the end comes."""
    is_in_turn, may_go_on = threading.Event(), threading.Event()

    def announce(_):
        is_in_turn.set()
        assert may_go_on.wait(LONG_S)

    with loop_of(backend, announce) as loop:
        slot = submit(loop, backend)
        eventually(lambda: is_in_flight(loop))
        loop.put(ev.OutcomesFound({slot.awaited["PickScore"].address: Outcome(reward=1.0)}, do.Purpose.EVERYTHING))
        assert is_in_turn.wait(LONG_S)
        threading.Timer(0.1, may_go_on.set).start()
        loop.close()
    assert not backend.by_hand.stored


def test_what_was_given_up_before_the_end_is_freed_though_the_loop_had_not_taken_it_up(backend):
    is_in_turn, may_go_on = threading.Event(), threading.Event()

    def announce(_):
        is_in_turn.set()
        assert may_go_on.wait(LONG_S)

    with loop_of(backend, announce) as loop:
        first, second = submit(loop, backend, 1), submit(loop, backend, 2)
        eventually(lambda: len(loop.state.core.deliveries) == 2 and is_in_flight(loop))
        loop.put(ev.OutcomesFound({first.awaited["PickScore"].address: Outcome(reward=1.0)}, do.Purpose.EVERYTHING))
        assert is_in_turn.wait(LONG_S)
        loop.put(ev.SlotsGivenUp([second]))
        threading.Timer(0.1, may_go_on.set).start()
        loop.close()
    assert not backend.by_hand.stored


def test_what_is_not_sent_at_the_end_stays_unsent(backend):
    backend.hangs[do.LookUp] = threading.Event()
    with loop_of(backend) as loop:
        for number in range(20):
            submit(loop, backend, number)
        eventually(lambda: backend.started[do.LookUp])
        threading.Timer(0.05, backend.hangs[do.LookUp].set).start()
        loop.close()
    assert backend.started[do.Publish] == 0


def test_calls_that_wait_for_their_lane_at_the_end_are_not_made(backend):
    may_go_on, made = threading.Event(), []
    with loop_of(backend) as loop:
        loop.do_once(do.Lane.POLL, lambda: may_go_on.wait(LONG_S))
        for number in range(20):
            loop.do_once(do.Lane.POLL, lambda number=number: made.append(number))
        eventually(lambda: loop._inbox.empty())
        threading.Timer(0.05, may_go_on.set).start()
        loop.close()
    assert made == []


def test_the_end_is_not_held_up_for_ever_by_a_call_that_hangs(backend, monkeypatch):
    monkeypatch.setattr(loop_module, "CLOSE_S", 0.1)
    backend.hangs[do.LookUp] = threading.Event()
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: backend.started[do.LookUp])
        started = time.monotonic()
        loop.close()
        assert time.monotonic() - started < LONG_S
        assert not loop.is_alive


def test_a_store_that_is_away_at_the_end_keeps_nobody_waiting(backend):
    backend.raises[do.Free] = redis.ConnectionError("refused")
    with loop_of(backend) as loop:
        slot = submit(loop, backend)
        eventually(lambda: is_in_flight(loop))
        loop.put(ev.SlotsGivenUp([slot]))
    assert loop.broken is None


def test_a_store_that_hangs_at_the_end_keeps_nobody_waiting(backend, monkeypatch):
    monkeypatch.setattr(loop_module, "CLOSE_S", 0.1)
    with loop_of(backend) as loop:
        slots = [submit(loop, backend, number) for number in range(2)]
        eventually(lambda: len(loop.state.core.deliveries) == 2 and is_in_flight(loop))
        backend.hangs[do.Free] = threading.Event()
        for slot in slots:
            loop.put(ev.SlotsGivenUp([slot]))
        eventually(lambda: backend.started[do.Free])
        started = time.monotonic()
        loop.close()
        assert time.monotonic() - started < LONG_S / 2
        assert backend.started[do.Free] == 1, "the second is not called for by whoever closes"


def test_seconds_are_summed_by_what_they_were_spent_on_until_they_are_taken(backend):
    with loop_of(backend) as loop:
        submit(loop, backend)
        eventually(lambda: is_in_flight(loop))
        eventually(lambda: loop._seconds["send_s"] > 0)
        taken = loop.take_seconds()
        assert set(taken) == {"encode_s", "store_s", "send_s"}
        assert all(seconds > 0 for seconds in taken.values())
        assert set(loop.take_seconds().values()) == {0.0}


def test_the_log_says_a_warning_once(backend, caplog):
    with loop_of(backend) as loop:
        loop.warn_once("a queue has no worker")
        loop.warn_once("a queue has no worker")
    assert caplog.messages == ["a queue has no worker"]


# --- waiters --------------------------------------------------------------------------------------


class NothingToSay:
    """In the place of a `Diagnosis`: no server says why anything is late."""

    def idle_queues(self, _queues, _ended):
        return None

    def loads(self, _specs):
        return None

    def suspects(self, _addresses):
        return None

    def ahead(self, _queued, _paces, _run, _now):
        return None

    def stored(self, _run):
        return None


def engine_on(loop: Loop) -> Engine:
    """What callers have of an engine, on a loop without servers."""
    engine = Engine.__new__(Engine)
    engine._loop, engine._state, engine._run = loop, loop.state, "run"
    engine._backlog = Backlog(loop, engine.why_unsent)
    engine._slots_over_ranks, engine._positions_seen = None, {}
    engine._is_asking_of_idle_queues = False
    engine._diagnosis = NothingToSay()
    return engine


def submit_by(engine, backend, content=1):
    slot = backend.by_hand.new_slot(content)
    engine.submit([slot])
    return slot


def wait(engine, slot, timeout_s=LONG_S):
    return engine.wait([slot], time.monotonic() + timeout_s, progress=False)


WAITS = {
    "collect": lambda engine, slot: wait(engine, slot),
    "flush": lambda engine, _: engine.flush(LONG_S),
    "submit": lambda engine, _: engine.wait_for_backlog(0, LONG_S),
}


@pytest.mark.parametrize("waits_in", WAITS)
def test_whoever_waits_is_told_of_a_bug_at_once(backend, waits_in, caplog):
    bug = ValueError("a bug")
    backend.hangs[do.LookUp] = threading.Event()
    backend.raises[do.LookUp] = bug
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        slot = submit_by(engine, backend)
        threading.Timer(0.05, backend.hangs[do.LookUp].set).start()
        with pytest.raises(RewardError, match="ended by a bug: ValueError") as error:
            WAITS[waits_in](engine, slot)
        assert error.value.__cause__ is bug


@pytest.mark.parametrize("waits_in", WAITS)
def test_whoever_waits_is_told_that_another_process_took_the_rank(backend, waits_in):
    taken = RankTakenError("rank 0", "host:1")

    def lose():
        raise taken

    backend.hangs[do.Encode] = threading.Event()
    with loop_of(backend, chores=[Chore(0.05, lose)]) as loop:
        engine = engine_on(loop)
        slot = submit_by(engine, backend)
        with pytest.raises(RankTakenError) as error:
            WAITS[waits_in](engine, slot)
        assert error.value is taken


def test_whoever_waits_is_told_what_a_redis_refuses(backend, caplog):
    backend.raises[do.LookUp] = redis.ResponseError("NOPERM this user has no permissions")
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        with pytest.raises(RedisRefusalError, match="NOPERM"):
            wait(engine, submit_by(engine, backend))


@pytest.mark.parametrize("waits_in", WAITS)
def test_whoever_waits_notices_that_the_engine_was_closed(backend, waits_in):
    backend.hangs[do.LookUp] = threading.Event()
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        slot = submit_by(engine, backend)
        eventually(lambda: backend.started[do.LookUp])
        threading.Timer(0.05, backend.hangs[do.LookUp].set).start()
        loop.close()
        with pytest.raises(RewardError, match="this client was closed"):
            WAITS[waits_in](engine, slot)


def test_a_wait_ends_at_its_deadline_and_the_samples_are_still_awaited(backend):
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        slot = submit_by(engine, backend)
        assert not wait(engine, slot, timeout_s=0.1)
        assert not slot.is_done
        backend.by_hand.outcomes[slot.awaited["PickScore"].address] = Outcome(reward=1.0)
        assert wait(engine, slot)


def test_flush_waits_until_everything_is_in_its_queue(backend):
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        for number in range(20):
            submit_by(engine, backend, number)
        engine.flush(LONG_S)
        assert engine.num_unsent == 0
        assert len([None for kind, _ in backend.times if kind is do.Store]) == 20


def test_flush_names_at_its_deadline_what_keeps_samples_from_being_sent(backend, quick):
    backend.raises[do.Store] = redis.ConnectionError("refused")
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        submit_by(engine, backend)
        with pytest.raises(CollectTimeoutError, match=r"1 samples were not sent within 0\.3 s: sending waits: "):
            engine.flush(0.3)


def test_submit_waits_only_while_its_backlog_is_above_the_bound(backend):
    backend.hangs[do.Store] = threading.Event()
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        for number in range(3):
            submit_by(engine, backend, number)
        engine.wait_for_backlog(3, 0.0)
        with pytest.raises(CollectTimeoutError, match="more than REWARDQ_MAX_BACKLOG=2"):
            engine.wait_for_backlog(2, 0.1)
        threading.Timer(0.05, backend.hangs[do.Store].set).start()
        engine.wait_for_backlog(0, LONG_S)


def test_samples_count_as_unsent_from_submit_on_though_the_loop_has_not_taken_them_up(backend):
    may_go_on = threading.Event()
    with loop_of(backend, announce=lambda _: may_go_on.wait(LONG_S)) as loop:
        engine = engine_on(loop)
        first = submit_by(engine, backend, 1)
        engine.flush(LONG_S)
        loop.put(ev.OutcomesFound({first.awaited["PickScore"].address: Outcome(reward=1.0)}, do.Purpose.EVERYTHING))
        eventually(lambda: first.is_done)
        submit_by(engine, backend, 2)
        assert engine.num_unsent == 1
        may_go_on.set()
        engine.flush(LONG_S)


class Says(NothingToSay):
    """A `Diagnosis` that knows of a worker that loads, or that raises."""

    def __init__(self, loading=None, error=None):
        self.loading, self.error = loading, error

    def idle_queues(self, _queues, _ended):
        if self.error is not None:
            raise self.error

    def loads(self, _specs):
        return self.loading


def test_what_was_loading_at_the_last_collect_is_no_reason_of_samples_that_are_not_sent(backend):
    backend.hangs[do.Store] = threading.Event()
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        engine._diagnosis = Says(loading="worker is still loading PickScore")
        slot = submit_by(engine, backend)
        assert "is still loading" in engine.why_late([slot], 1.0).message
        engine._diagnosis = NothingToSay()
        with pytest.raises(CollectTimeoutError, match=r"were not sent within 0\.1 s$"):
            engine.flush(0.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_question_that_fails_is_no_server_that_is_away(backend):
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        engine._diagnosis = Says(error=ValueError("a bug"))
        assert engine.why_unsent() is None
        # The error of its thread is told by pytest: of this test, which expects it, and not of the next.
        eventually(lambda: not any(thread.name == "rewardq-ask" for thread in threading.enumerate()))


def test_waits_during_an_outage_ask_for_workers_once_in_all(backend, monkeypatch):
    monkeypatch.setattr(engine_module, "NO_WORKER_AFTER_S", 0.0)
    with loop_of(backend) as loop:
        engine = engine_on(loop)
        slot = submit_by(engine, backend)
        engine._diagnosis = Says(error=redis.ConnectionError("refused"))
        for _ in range(3):
            assert not wait(engine, slot, timeout_s=0.3)
        with loop.lock:
            assert len(loop._failing[do.Lane.UPKEEP]) == 1
        engine._diagnosis = NothingToSay()
        eventually(lambda: not loop._failing[do.Lane.UPKEEP])
        assert not engine._is_asking_of_idle_queues, "the next outage is asked about again"


def test_a_redis_that_refuses_at_the_end_keeps_no_connection_open(backend):
    """An error of `close()` would hide the error that ended the `with` block of the client, which says what to do."""
    ended = []

    class Refused:
        def compare(self, _registry):
            raise redis.ResponseError("NOPERM this user has no permissions")

    class Server:
        def disconnect(self):
            ended.append("broker")

        def close(self):
            ended.append("store")

    with loop_of(backend) as loop:
        engine = engine_on(loop)
        engine._code_versions, engine._registry = Refused(), None
        engine._brokers, engine.store = [Server()], Server()
        engine.close()
    assert ended == ["broker", "store"]
