"""The trainer's client: submit samples while sampling, collect their rewards when the step is finalized."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from tasks import app as default_app
from tasks import media
from tasks.celery_app import make_app, outcomes_of
from tasks.connections import LOST, check_eviction, check_reachable, connect, why_away
from tasks.errors import (
    CollectTimeoutError,
    ConfigError,
    InvalidSampleError,
    RanksMissingError,
    RedisUnreachableError,
    RewardError,
    ScoringError,
    TicketError,
)
from tasks.groups import GroupSlots
from tasks.messages import Failure, GroupRequest, Outcome, ScoreRequest, unpack
from tasks.outcomes import Outcomes
from tasks.payloads import PayloadStore, open_store
from tasks.rewards import ConstantOnFailure, RewardConfig, RewardSpec, Split
from tasks.samples import MEDIA_FIELDS, Sample, check
from tasks.settings import Settings, without_password
from trainer_client.advantages import Advantages, Method, advantages_of
from trainer_client.board import Board, Chunk, Entry, Payload, Slot
from trainer_client.groups import Groups
from trainer_client.lease import KEEP_EVERY_S, Lease
from trainer_client.outgoing import Outgoing
from trainer_client.progress import bars
from trainer_client.ranks import Ranks
from trainer_client.reconcile import Reconciler
from trainer_client.results import Failed, RewardBatch
from trainer_client.sender import Sender
from trainer_client.table import Gather
from trainer_client.ticket import SlotRecord, Ticket
from trainer_client.watcher import Watcher

OnFailure = Literal["raise", "nan"]

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,99}")

RANKS_MARGIN_S = 5.0
"""With several ranks a rank stops waiting for its own samples so long before the deadline of `collect()` (a quarter of
the time at most), and the ranks use the rest to come to one verdict."""

NO_WORKER_AFTER_S = 2.0
"""Heartbeats are asked for when `collect()` has waited for this long, to say early that a queue has no worker."""


@dataclass(slots=True)
class _Step:
    """What was submitted and not yet collected in one split."""

    number: int
    slots: list[Slot] = field(default_factory=list)
    num_submitted: int = 0
    submit_s: float = 0.0
    members: Counter[Any] = field(default_factory=Counter)
    """Samples of each group that this rank has submitted."""
    group_sizes: dict[Any, int | None] = field(default_factory=dict)

    def count_members(self, samples: Sequence[Sample], group_size: int | None) -> None:
        """Count samples into their groups.

        Raises:
            InvalidSampleError: A group would have more members than its size, or is given two sizes.
        """
        members = self.members + Counter(sample.group for sample in samples)
        for group in {sample.group: None for sample in samples}:
            size = self.group_sizes.get(group, group_size)
            if size != group_size:
                raise InvalidSampleError(f"group {group!r} has group_size={size}, found group_size={group_size}")
            if size is not None and members[group] > size:
                raise InvalidSampleError(
                    f"group {group!r} of step {self.number} would have {members[group]} members, group_size={size}"
                )
        self.members = members
        self.group_sizes.update({sample.group: group_size for sample in samples})


class _Session:
    """What a client has in one process: connections, threads, and the board. A forked child gets its own."""

    def __init__(self, app: Any, run: str, launch: str, rank: int, world_size: int, lease: Lease) -> None:
        settings: Settings = app.settings
        with contextlib.suppress(*LOST):  # else the watcher takes it once Redis is back
            lease.take()
        self.pid = os.getpid()
        self.outcomes: Outcomes = outcomes_of(app)
        self.store: PayloadStore = open_store(settings)
        self.board = Board(client_id=uuid.uuid4().hex[:12])
        slots = GroupSlots(self.outcomes.redis, run, launch, settings.result_ttl_s) if world_size > 1 else None
        self.groups = Groups(self.board, run, rank, slots)
        outgoing = Outgoing(app, settings, self.store, self.outcomes, self.board, run)
        self.sender = Sender(
            settings, self.store, self.outcomes, self.board, run, rank, groups=self.groups, outgoing=outgoing
        )
        self.reconciler = Reconciler(
            app, settings, self.store, self.outcomes, self.board, self.sender, groups=self.groups
        )
        self.lease = lease
        self.watcher = Watcher(settings, self.store, self.board, self.reconciler, lease.keep, KEEP_EVERY_S)

    def close(self) -> None:
        self.sender.close()
        self.watcher.close()
        self.store.close()


class RewardClient:
    """Submits samples and collects their rewards. Safe between threads, and usable in a forked child.

    Use it as a context manager, or call `close()`.

    Args:
        config: The rewards.
        run: Name of the training run; equal samples of one run are scored once.
        rank, world_size: This process among the trainer's.
        launch: One start of the job, the same on all its ranks; from TORCHELASTIC_RUN_ID and its restart count, else
            new, unless given.
        settings: Where the servers are; from REWARDQ_* variables unless given.
        max_failure_rate: A batch with a larger share of failures raises `ScoringError` whatever `on_failure` says.

    Raises:
        RedisUnreachableError: No server answers; says which, and what to start.
        EvictionError: A Redis drops keys when it is full; names the setting to change.
        RankTakenError: Another live process is this rank of this launch; names it.
        ConfigError: The run's name, rank or world size is wrong.
    """

    _session: _Session | None
    _steps: dict[Split, _Step]
    _numbers: dict[Split, int]
    """The number of each split's next step."""
    _adopted: dict[tuple[Any, ...], list[Slot]]
    """Slots of tickets of processes that are gone, by ticket."""

    def __init__(
        self,
        config: RewardConfig,
        run: str,
        *,
        rank: int = 0,
        world_size: int = 1,
        launch: str | None = None,
        settings: Settings | None = None,
        max_failure_rate: float = 1.0,
    ) -> None:
        if not RUN_NAME.fullmatch(run):
            raise ConfigError(f"run must be letters, digits, '.', '_' or '-', at most 100 of them; found {run!r}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be in [0, world_size), found rank={rank}, world_size={world_size}")
        self.run, self.rank, self.world_size = run, rank, world_size
        self.launch = launch or _launch(world_size)
        self.config = config.for_launch(self.launch)
        self.max_failure_rate = max_failure_rate
        self._app = default_app if settings is None else make_app(settings)
        self.settings: Settings = self._app.settings
        self._check_servers()
        self._lease = Lease(outcomes_of(self._app).redis, run, self.launch, rank)
        try:
            self._lease.take()
        except LOST as error:
            raise RedisUnreachableError(f"{without_password(self.settings.results)}: {why_away(error)}") from None
        self._start_fresh()
        _live_clients.add(self)
        self._open_session()  # whose watcher keeps the lease, however long the first submit() is away

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], run: str, **options: Any) -> Self:
        """A client for the `rewards:` block of a YAML file; `options` as for the constructor."""
        return cls(RewardConfig.from_yaml(path), run, **options)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], run: str, **options: Any) -> Self:
        """A client for a parsed config; `options` as for the constructor."""
        return cls(RewardConfig.from_dict(config), run, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give back connections. What was not collected stays in Redis until its TTL."""
        _live_clients.discard(self)
        with self._lock:
            session = self._session
            self._session = None
        if session is not None and session.pid == os.getpid():
            session.close()
        with contextlib.suppress(*LOST):
            self._lease.leave()

    # --- submit ----------------------------------------------------------------------------------

    def submit(
        self,
        samples: Iterable[Sample],
        group_size: int | None = None,
        *,
        split: Split = "train",
        step: int | None = None,
    ) -> Ticket:
        """Queue samples for every configured reward and return at once.

        Args:
            samples: `N` samples. Media are kept by reference and must not be changed before `flush()` or `collect()`.
            group_size: How many samples each group has in all, for groupwise rewards.
            split: `eval` uses `eval_rewards`, else the training rewards.
            step: The training step; on one rank it counts `collect()`s unless given.

        Returns:
            A picklable claim for `collect`, which answers in this order; nothing is scored yet.

        Raises:
            InvalidSampleError: A field that a reward requires is missing, or media have a wrong shape or dtype.
                Nothing was sent. What needs a pass over the pixels (range, NaN, truncation) becomes an `invalid`
                outcome instead.
        """
        started = time.monotonic()
        samples = list(samples)
        rewards = self.config.of(split)
        fields = {name for spec in rewards for name in spec.fields}
        with self._lock:
            session = self._open_session()
            first = self._steps[split].num_submitted if split in self._steps else 0
        for i, sample in enumerate(samples):
            check(sample, rewards, f"sample {first + i}", self.settings.max_pixels)
        groupwise = next((spec for spec in rewards if spec.is_groupwise), None)
        if groupwise is not None:
            self._check_groups(samples, group_size, groupwise, first)
        self._wait_for_backlog(session)
        with self._lock:
            open_step = self._step(split, step)
            if groupwise is not None:
                open_step.count_members(samples, group_size)
            start = open_step.num_submitted
            slots = [
                Slot(
                    split=split,
                    step=open_step.number,
                    index=start + i,
                    group=sample.group,
                    sample=sample,
                    held=_hold(sample, fields),
                    rewards=rewards,
                    submitted_at=started,
                    group_size=group_size,
                )
                for i, sample in enumerate(samples)
            ]
            open_step.slots += slots
            open_step.num_submitted += len(slots)
            open_step.submit_s += time.monotonic() - started
            ticket = self._ticket(split, open_step.number, start, slots)
        session.sender.submit(slots)
        return ticket

    def flush(self, timeout_s: float = 600.0) -> None:
        """Wait until everything submitted has been encoded and sent; media may be changed after it.

        Raises:
            CollectTimeoutError: The deadline passed; says what sending waits for.
        """
        with self._lock:
            session = self._open_session()
        board = session.board
        with session.sender.hurry(held=False), board.changed:
            done = board.changed.wait_for(lambda: board.broken or board.num_unsent == 0, timeout_s)
        self._raise_if_broken(session)
        if not done:
            raise CollectTimeoutError(
                f"{board.num_unsent} samples were not sent within {timeout_s:g} s{_because(board.trouble)}", None
            )

    def pending(self, split: Split = "train") -> int:
        """How many submitted samples of the open step still miss an outcome."""
        with self._lock:
            step = self._steps.get(split)
            return sum(not slot.is_done for slot in step.slots) if step else 0

    def cancel(self, split: Split = "train") -> None:
        """Give the open step up: its samples are collected no more, and what is not yet sent is not sent."""
        with self._lock:
            session, step = self._open_session(), self._steps.pop(split, None)
            self._numbers[split] = self._numbers.get(split, 0) + 1
        if step is not None:
            session.board.abandon(step.slots)
            session.groups.forget(step.slots)

    # --- collect ---------------------------------------------------------------------------------

    def collect(
        self,
        timeout_s: float = 600.0,
        *,
        ticket: Ticket | None = None,
        on_failure: OnFailure = "raise",
        progress: bool | None = None,
        split: Split = "train",
        step: int | None = None,
    ) -> RewardBatch:
        """Wait for the rewards of everything submitted in the open step (or of a ticket), and close it.

        Args:
            timeout_s: Returns or raises at this deadline.
            ticket: Collect its samples only; also one of a process that is gone.
            on_failure: `nan` returns a batch with NaN and its `failures` instead of raising.
            progress: A bar for each reward on standard error; None shows them on a terminal.
            split: Which open step.
            step: Its number; with `world_size > 1` a rank that submitted nothing says so in which step the others are.

        Returns:
            The rewards in submit order. At the deadline with `on_failure="nan"`, what is missing is NaN with kind
            `timeout`, and is not waited for any more.

        Raises:
            ScoringError: Some samples have no reward; names each reward and the reasons, carries the batch. The step
                is closed.
            CollectTimeoutError: The deadline passed; says why as far as is known (a queue without a worker, a Redis
                that is away). The step stays open: call again, or `cancel()`.
            TicketError: The ticket is of another run or of other rewards.
            InvalidSampleError: Another step than `step` is open.
        """
        started = time.monotonic()
        with self._lock:
            session = self._open_session()
            if step is not None and ticket is None:
                self._step(split, step)
            slots, open_step = self._slots_to_collect(session, ticket, split)
        # Of several ranks each leaves the others a little time to say how they fared, before the same deadline.
        margin_s = min(RANKS_MARGIN_S, timeout_s / 4) if self.world_size > 1 and ticket is None else 0.0
        is_complete = self._wait(session, slots, started + timeout_s - margin_s, progress)
        self._raise_if_broken(session)
        failure = None if is_complete else self._why_late(session, slots, timeout_s)
        submit_s = open_step.submit_s if open_step else 0.0
        batch = self._batch(session, slots, failure, split, submit_s, time.monotonic() - started)
        error = self._error_for(batch, slots, on_failure, failure)
        if self.world_size > 1 and ticket is None:
            error = self._verdict_of_ranks(session, split, open_step, error, batch, started + timeout_s)
        if not isinstance(error, CollectTimeoutError):
            self._close_step(session, slots, ticket, split)
        if error is not None:
            raise error
        return batch

    def advantages(
        self,
        batch: RewardBatch,
        method: Method | None = None,
        *,
        gather: Gather | None = None,
        timeout_s: float = 60.0,
    ) -> Advantages:
        """The advantages of a batch, float32 `(N,)` in its order, never NaN; see `trainer_client.advantages`.

        Args:
            method: `gdpo`, `sum`, or a function of one's own; as the config's `train:` block says, else `gdpo`.
            gather: Exchanges objects between ranks, `torch.distributed`'s for example. With `world_size > 1` they go
                through Redis unless given; all ranks must call this then.
            timeout_s: How long the other ranks are waited for, through Redis.

        Raises:
            ValueError: The method is unknown, or one's own returns what are no advantages; on all ranks.
            RanksMissingError: Other ranks did not call this in time.
        """
        if gather is None and self.world_size > 1:
            gather = self._ranks.gatherer("advantages", timeout_s)
        chosen = self.config.advantage_aggregation if method is None else method
        return advantages_of(batch, batch.weights, chosen, global_std=self.config.global_std, gather=gather)

    # --- private: sessions -----------------------------------------------------------------------

    def _start_fresh(self) -> None:
        """As in a new process: no threads, no connections, nothing submitted. Runs in a forked child too."""
        self._lock = threading.Lock()
        self._session = None
        self._steps = {}
        self._numbers = {}
        self._adopted = {}
        self._ranks = Ranks(outcomes_of(self._app).redis, self.run, self.launch, self.rank, self.world_size)

    def _open_session(self) -> _Session:
        if self._session is None:
            self._session = _Session(self._app, self.run, self.launch, self.rank, self.world_size, self._lease)
        return self._session

    def _check_servers(self) -> None:
        results = outcomes_of(self._app).redis
        check_reachable(results, self.settings.results, "Redis for results")
        check_eviction(results, self.settings.results)
        if self.settings.results != self.settings.broker_url:
            broker = connect(self.settings.broker_url, self.settings.sentinel_master)
            check_reachable(broker, self.settings.broker_url, "Redis for queues")
            check_eviction(broker, self.settings.broker_url)
            broker.close()
        store = open_store(self.settings)
        store.check()
        store.close()

    @staticmethod
    def _raise_if_broken(session: _Session) -> None:
        if isinstance(session.board.broken, RewardError):  # none of ours: another process took this rank
            raise session.board.broken
        if session.board.broken is not None:
            raise RewardError(f"a background thread ended by a bug: {session.board.broken!r}") from session.board.broken

    # --- private: submit -------------------------------------------------------------------------

    def _step(self, split: Split, number: int | None) -> _Step:
        open_step = self._steps.get(split)
        if open_step is None:
            if number is None and self.world_size > 1:
                raise InvalidSampleError("with world_size > 1 submit() needs step=, the same on all ranks")
            open_step = self._steps[split] = _Step(self._numbers.get(split, 0) if number is None else number)
            self._numbers[split] = open_step.number
        elif number is not None and number != open_step.number:
            raise InvalidSampleError(
                f"step={number}, but step {open_step.number} of split {split!r} is still open; collect() it first"
            )
        return open_step

    def _check_groups(self, samples: Sequence[Sample], group_size: int | None, reward: RewardSpec, first: int) -> None:
        """What a groupwise reward needs of `submit()`."""
        needed_by = f"reward {reward.name!r} ({reward.reward_model}) compares the samples of a group"
        if group_size is None and self.world_size > 1:
            raise InvalidSampleError(f"{needed_by}: with world_size > 1 submit() needs group_size=")
        if group_size is not None and group_size < 1:
            raise InvalidSampleError(f"group_size must be at least 1, found {group_size}")
        for i, sample in enumerate(samples):
            if sample.group is None:
                raise InvalidSampleError(f"sample {first + i}: {needed_by}: it needs group=, found None")
            if self.world_size > 1 and not isinstance(sample.group, str | int):
                raise InvalidSampleError(
                    f"sample {first + i}: with world_size > 1 group= must be text or an integer, the same on all "
                    f"ranks; found a {type(sample.group).__name__}"
                )

    def _ticket(self, split: Split, step: int, start: int, slots: Sequence[Slot]) -> Ticket:
        return Ticket(
            run=self.run,
            launch=self.launch,
            split=split,
            step=step,
            rank=self.rank,
            start=start,
            stop=start + len(slots),
            fingerprints=self._fingerprints(split),
            slots=tuple(slots),
        )

    def _fingerprints(self, split: Split) -> tuple[tuple[str, str], ...]:
        return tuple((spec.name, spec.fingerprint) for spec in self.config.of(split))

    def _wait_for_backlog(self, session: _Session) -> None:
        board = session.board
        with board.changed:
            if board.num_unsent <= self.settings.max_backlog:
                return
        with session.sender.hurry(held=True), board.changed:
            board.changed.wait_for(lambda: board.broken or board.num_unsent <= self.settings.max_backlog)
        self._raise_if_broken(session)

    # --- private: collect ------------------------------------------------------------------------

    def _slots_to_collect(
        self, session: _Session, ticket: Ticket | None, split: Split
    ) -> tuple[Sequence[Slot], _Step | None]:
        if ticket is None:
            step = self._steps.get(split)
            return (list(step.slots) if step else []), step
        if ticket.run != self.run:
            raise TicketError(f"this ticket is of run {ticket.run!r}, this client of {self.run!r}")
        if ticket.fingerprints != self._fingerprints(ticket.split):
            raise TicketError(
                f"this ticket is for the rewards {dict(ticket.fingerprints)}, "
                f"this client has {dict(self._fingerprints(ticket.split))}"
            )
        step = self._steps.get(ticket.split)
        live = [slot for slot in ticket.slots if isinstance(slot, Slot)]
        return (live if len(live) == len(ticket.slots) else self._adopt(session, ticket)), step

    def _adopt(self, session: _Session, ticket: Ticket) -> list[Slot]:
        """Slots for a ticket of a process that is gone."""
        key = (ticket.launch, ticket.split, ticket.step, ticket.rank, ticket.start, ticket.stop)
        if key in self._adopted:
            return self._adopted[key]
        specs = {spec.name: spec for spec in self.config.of(ticket.split)}
        entries: dict[str, Entry] = {}
        slots = []
        for record in ticket.slots:
            assert isinstance(record, SlotRecord)
            slots.append(_adopted_slot(record, ticket, specs, entries))
        chunks = []
        for sent in ticket.chunks:
            spec = next(s for s in specs.values() if s.fingerprint == sent.fingerprint)
            own = [entries[a] for a in sent.addresses if a in entries]
            now = time.monotonic()
            pause_s = self.settings.reconcile_s
            chunks.append(
                Chunk(sent.request, sent.label, spec, sent.number, own, now, now + pause_s, pause_s, is_adopted=True)
            )
            _adopt_payloads(session.store, sent.request, spec, entries)
        session.board.adopt(slots, chunks)
        self._adopted[key] = slots
        return slots

    def _wait(self, session: _Session, slots: Sequence[Slot], deadline: float, progress: bool | None) -> bool:
        """Wait until all slots are done or the deadline; whether they are."""
        board = session.board
        names = tuple(dict.fromkeys(spec.name for slot in slots for spec in slot.rewards))
        left = list(slots)
        look_for_workers_at = time.monotonic() + NO_WORKER_AFTER_S
        with session.sender.hurry(held=True), _watching(session.watcher), bars(names, len(slots), progress) as report:
            while True:
                with board.changed:
                    left_s = deadline - time.monotonic()
                    board.changed.wait_for(lambda: _are_done(left) or board.broken, max(0.0, min(left_s, 0.25)))
                    is_complete = not left
                if report is not None:
                    report({name: sum(slot.is_done_for(name) for slot in slots) for name in names})
                if is_complete or board.broken is not None or left_s <= 0:
                    return is_complete
                if time.monotonic() > look_for_workers_at:
                    look_for_workers_at = float("inf")
                    session.watcher.ask_about_workers()

    def _why_late(self, session: _Session, slots: Sequence[Slot], timeout_s: float) -> Failure:
        """The client's own reason for what is missing at the deadline; never stored."""
        late = sum(not slot.is_done for slot in slots)
        queues = {spec.queue for slot in slots for spec in slot.rewards if not slot.is_done_for(spec.name)}
        why = session.reconciler.idle_queues(queues) or session.board.trouble
        return Failure(
            kind="timeout", message=f"{late} of {len(slots)} samples had no answer after {timeout_s:g} s{_because(why)}"
        )

    def _batch(
        self,
        session: _Session,
        slots: Sequence[Slot],
        late: Failure | None,
        split: Split,
        submit_s: float,
        wait_s: float,
    ) -> RewardBatch:
        specs = slots[0].rewards if slots else self.config.of(split)
        rewards: dict[str, Any] = {}
        valid: dict[str, Any] = {}
        info: dict[str, Any] = {}
        failures: list[Failed] = []
        hits: dict[str, int] = {}
        last_answer = max((e.answered_at for s in slots for e in (s.entries or {}).values()), default=0.0)
        for spec in specs:
            outcomes = [_outcome(slot, spec, late, session.groups.why_open) for slot in slots]
            constant = spec.on_failure.value if isinstance(spec.on_failure, ConstantOnFailure) else np.nan
            rewards[spec.name] = np.array(
                [constant if o.reward is None else o.reward for o in outcomes], dtype=np.float32
            )
            valid[spec.name] = np.array([o.reward is not None for o in outcomes], dtype=bool)
            info[spec.name] = tuple({**o.info, "origin": o.origin} for o in outcomes)
            failures += [
                Failed(i, spec.name, o.failure.kind, o.failure.message, o.attempt)
                for i, o in enumerate(outcomes)
                if o.failure is not None
            ]
            hits[spec.name] = sum(e.is_hit for s in slots if (e := (s.entries or {}).get(spec.name)) is not None)
        times = session.sender.times
        span_s = max(0.0, last_answer - min((s.submitted_at for s in slots), default=0.0)) if last_answer else 0.0
        timings = {
            "submit_s": submit_s,
            "wait_s": wait_s,
            "span_s": span_s,
            "hidden_s": max(0.0, span_s - wait_s),
            "encode_s": times.encode_s,
            "store_s": times.store_s,
            "send_s": times.send_s,
        }
        return RewardBatch(
            rewards,
            valid,
            tuple(failures),
            info,
            tuple(s.group for s in slots),
            timings,
            hits,
            weights={spec.name: spec.weight for spec in specs},
            latency_s={spec.name: np.array([_latency_s(s, spec.name) for s in slots], np.float32) for spec in specs},
        )

    def _close_step(self, session: _Session, slots: Sequence[Slot], ticket: Ticket | None, split: Split) -> None:
        session.board.abandon([slot for slot in slots if not slot.is_done])
        session.groups.forget(slots)
        with self._lock:
            if ticket is None:
                step = self._steps.get(split)
                if step is not None:
                    collected = set(slots)
                    step.slots = [s for s in step.slots if s not in collected]
                    if step.slots:  # submitted by another thread meanwhile: the next collect()
                        step.submit_s = 0.0
                        return
                    del self._steps[split]
                self._numbers[split] = self._numbers.get(split, 0) + 1
            else:
                step = self._steps.get(ticket.split)
                if step is not None:
                    collected = set(slots)
                    step.slots = [s for s in step.slots if s not in collected]

    def _error_for(
        self, batch: RewardBatch, slots: Sequence[Slot], on_failure: OnFailure, late: Failure | None
    ) -> ScoringError | None:
        """What `collect()` raises for this rank's own samples, or None."""
        if late is not None and on_failure == "raise":
            return CollectTimeoutError(f"{late.message}\n{batch.describe_failures()}", batch)
        policies = {spec.name: spec.on_failure for spec in (slots[0].rewards if slots else ())}
        if any((policies.get(f.reward) or on_failure) == "raise" for f in batch.failures):
            return ScoringError(batch.describe_failures(), batch)
        if batch.failures and batch.failure_rate > self.max_failure_rate:
            rate = f"{batch.failure_rate:.1%} failed, more than max_failure_rate={self.max_failure_rate:.1%}"
            return ScoringError(f"{rate}\n{batch.describe_failures()}", batch)
        return None

    def _verdict_of_ranks(
        self,
        session: _Session,
        split: Split,
        step: _Step | None,
        error: ScoringError | None,
        batch: RewardBatch,
        deadline: float,
    ) -> ScoringError | None:
        """All ranks of a step return, or all raise: one that raised alone would hang the next collective.

        Deadlines weigh more than failures: after them the step stays open, on every rank.
        """
        number = step.number if step is not None else self._numbers.get(split, 0)
        mine = ["late" if isinstance(error, CollectTimeoutError) else "failed", str(error)] if error else ["ok", ""]
        try:
            verdicts = self._ranks.gather(f"{split} step {number}", mine, deadline)
        except RanksMissingError as missing:
            return CollectTimeoutError(f"{missing}\n{error or ''}".rstrip(), batch)
        others = [f"rank {r}: {words}" for r, (kind, words) in enumerate(verdicts) if kind != "ok" and r != self.rank]
        if any(kind == "late" for kind, _ in verdicts):
            return CollectTimeoutError("\n".join([str(error or "this rank has all its rewards"), *others]), batch)
        if others:
            return ScoringError("\n".join([str(error or "this rank has all its rewards"), *others]), batch)
        return error


_live_clients: weakref.WeakSet[RewardClient] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has none of the parent's threads, and must not touch its connections or locks."""
    for client in list(_live_clients):
        client._start_fresh()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _watching(watcher: Watcher) -> Iterator[None]:
    watcher.hurry(is_waiting=True)
    try:
        yield
    finally:
        watcher.hurry(is_waiting=False)


def _launch(world_size: int) -> str:
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic:
        return f"{elastic}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if world_size > 1:
        raise ConfigError("with world_size > 1 give launch=, one text for this start of the job, the same on all ranks")
    return uuid.uuid4().hex[:12]


def _latency_s(slot: Slot, reward: str) -> float:
    """Seconds from the submit to the outcome; NaN where there is none."""
    entry = (slot.entries or {}).get(reward)
    return entry.answered_at - slot.submitted_at if entry is not None and entry.outcome is not None else float("nan")


def _hold(sample: Sample, fields: set[str]) -> dict[str, Any]:
    """The media of a sample that travel, by reference."""
    values = {name: getattr(sample, name) for name in MEDIA_FIELDS if name in fields}
    return {name: media.hold(value) for name, value in values.items() if value is not None}


def _are_done(left: list[Slot]) -> bool:
    """Whether every slot has its outcomes; takes those from the end that have, so that no slot is looked at in vain.

    The board changes with every sample: to look at all of them each time would take the square of their number.
    """
    while left and left[-1].is_done:
        left.pop()
    return not left


def _outcome(
    slot: Slot, spec: RewardSpec, late: Failure | None, why_open: Callable[[Slot, RewardSpec], str | None]
) -> Outcome:
    """The outcome of a slot for a reward as its caller sees it; of a group's, its own place."""
    if slot.problem is not None:
        return Outcome(failure=slot.problem)
    entry = (slot.entries or {}).get(spec.name)
    if entry is not None and entry.outcome is not None:
        whole = entry.outcome
        if not whole.members:
            return whole
        own = whole.members[slot.places[spec.name]]
        return own.model_copy(update={"attempt": whole.attempt, "origin": {**own.origin, **whole.origin}})
    assert late is not None, "a complete batch has an outcome for every sample"
    reason = why_open(slot, spec) if spec.is_groupwise and entry is None else None
    return Outcome(failure=Failure(kind="timeout", message=reason) if reason else late)


def _adopted_slot(
    record: SlotRecord, ticket: Ticket, specs: Mapping[str, RewardSpec], entries: dict[str, Entry]
) -> Slot:
    slot = Slot(
        split=ticket.split,
        step=ticket.step,
        index=record.index,
        group=record.group,
        sample=None,
        held={},
        rewards=tuple(specs.values()),
        submitted_at=time.monotonic(),
        problem=record.problem,
    )
    if record.addresses is None:
        slot.problem = record.problem or Failure(
            kind="failed", message="the process that submitted it ended before it was sent"
        )
        return slot
    slot.entries = {}
    for name, (address, attempt, place) in record.addresses.items():
        slot.entries[name] = entries.setdefault(address, Entry(address, specs[name], attempt=attempt))
        if place >= 0:
            slot.places[name] = place
    return slot


def _adopt_payloads(store: PayloadStore, request: str, spec: RewardSpec, entries: Mapping[str, Entry]) -> None:
    """Know the payloads of a request that another process sent, so that they live on and are freed in the end."""
    data = store.get([request])[0]
    if data is None:
        return
    if spec.how in ("rank", "wins"):
        group = unpack(GroupRequest, data)
        samples = [(group.address, member) for member in group.members]
    else:
        samples = [(s.address, one) for s in unpack(ScoreRequest, data).samples for one in s.members or (s,)]
    for address, sample in samples:
        entry = entries.get(address)
        if entry is None:
            continue
        for refs in sample.media.values():
            for ref in refs if isinstance(refs, tuple) else (refs,):
                payload = Payload(ref.name, ref.digest, num_users=1)
                payload.stored.set()
                entry.payloads.append(payload)


def _because(why: str | None) -> str:
    return f": {why}" if why else ""
