"""The trainer's client: submit samples while sampling, collect their rewards when the step is finalized."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import platform
import re
import threading
import time
import uuid
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tasks import app as default_app
from tasks import media
from tasks.celery_app import client_outcomes, make_app
from tasks.errors import (
    CollectTimeoutError,
    ConfigError,
    RedisUnreachableError,
    ScoringError,
    TicketError,
    UnknownRewardError,
)
from tasks.messages import Failure
from tasks.payloads import open_store
from tasks.rewards import OnFailure, RewardConfig, RewardSpec, Split
from tasks.samples import MEDIA_FIELDS, Sample
from tasks.servers.connections import LOST, connect, why_away
from tasks.servers.needs import check_servers
from tasks.settings import Settings, without_password
from tasks.source.code import changed_files
from trainer_client.advantages.exchange import Gather
from trainer_client.advantages.formulas import Advantages, Method, advantages_of
from trainer_client.advantages.metrics import Detail, failure_rate_by_group, metrics
from trainer_client.engine.engine import ASK_S, Engine
from trainer_client.engine.loop import Chore
from trainer_client.engine.model import Slot
from trainer_client.progress import is_terminal
from trainer_client.ranks.gather import OnWaiting, RankGather
from trainer_client.ranks.rank_lock import EXTEND_EVERY_S, RankLock
from trainer_client.ranks.verdict import (
    Verdict,
    agree,
    check_call,
    check_max_failure_rate,
    error_for,
    error_for_rate,
)
from trainer_client.results import Late, RewardBatch, batch_of, step_name
from trainer_client.runs.registry import RunRegistry
from trainer_client.steps.grouping import groups_of
from trainer_client.steps.incomplete_groups import incomplete_groups, why_not_to_wait
from trainer_client.steps.open_steps import (
    OpenStep,
    OpenSteps,
    check_group_size,
    check_groups,
)
from trainer_client.steps.sample_checks import check
from trainer_client.steps.step_log import (
    TicketWarnings,
    WaitLog,
    tell_step,
    warn_of_failures,
)
from trainer_client.steps.step_summary import (
    StepSummary,
    group_digest,
    group_size_words,
    mixed_groups,
    summary_of,
)
from trainer_client.texts import shorten
from trainer_client.ticket import Ticket

log = logging.getLogger(__name__)

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,99}")

UNNAMED = "none"
"""TORCHELASTIC_RUN_ID of every job that torchrun was given no name for: no two starts must share it."""

COLLECT_TIMEOUT_S = 480.0
"""How long `collect()` waits unless told otherwise. With what `advantages()` and `metrics()` may wait for other ranks
it is within the 10 minutes of an NCCL collective, in which ranks that are done wait for the others."""

MAX_FAILURE_RATE = 0.5
"""Where more than half of the rewards are missing, something is broken that `on_failure: nan` was not meant for."""

MAX_GROUP_CHARS = 80
"""Of a group's id, which may be a prompt, in a warning."""

RANKS_MARGIN_S = 5.0
"""With several ranks a rank stops waiting for its own samples so long before the deadline of `collect()` (a quarter of
the time at most), and the ranks use the rest to come to one verdict."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What one `collect()` is to bring."""

    engine: Engine
    split: Split
    step: int
    rewards: tuple[RewardSpec, ...]
    slots: Sequence[Slot]
    open_step: OpenStep | None
    """The open step of its split, of which a ticket's samples may be a part."""
    ticket: Ticket | None
    prompts: Mapping[Hashable, tuple[str, ...]]
    """The different prompts of each group, where other ranks may have samples of it."""


class RewardClient:
    """Submits samples and collects their rewards. Safe between threads, and usable in a forked child.

    Use it as a context manager, or call `close()`.

    Args:
        config: The rewards.
        run: Name of the training run; equal samples of one run are scored once.
        rank, world_size: This process among the trainer's.
        launch: One start of the job, the same on all its ranks. Unless given it is made of TORCHELASTIC_RUN_ID (if
            torchrun was given a --rdzv-id, or is --standalone) and its restart count; else new, on one rank.
        settings: Where the servers are; from REWARDQ_* variables unless given.
        max_failure_rate: A step of which a larger share of (sample, reward) pairs has no reward, over all ranks, raises
            `ScoringError`, whatever the rewards' `on_failure` says. 1.0 never raises; a share that is given here counts
            in every call. Unless given it is 0.5, but for a `collect(on_failure="nan")`: who says so looks at the
            failures. Of a ticket its samples count.

    Raises:
        RedisUnreachableError: No server answers; says which, and what to start.
        RedisRefusalError: One will not serve this user or this configuration; says which right or variable to set.
        EvictionError: A Redis drops keys when it is full; names the setting to change.
        RankTakenError: Another live process is this rank of this launch; names it.
        ConfigError: The run's name, rank, world size or `max_failure_rate` is wrong, or several ranks have no launch in
            common, or not the same code of a class of the user's.
        UnknownRewardError: One of the training rewards is not built here. (One of the evaluation's is said in the log,
            and refused by `submit(split="eval")`.)
    """

    _engine: Engine | None
    _steps: OpenSteps
    _warned: set[str]
    """What was warned of once."""
    _ticket_warnings: TicketWarnings
    _resumed: dict[tuple[Any, ...], list[Slot]]
    """Slots of tickets of processes that are gone, by the ticket's place."""

    def __init__(  # noqa: PLR0913  (keywords of users)
        self,
        config: RewardConfig,
        run: str,
        *,
        rank: int = 0,
        world_size: int = 1,
        launch: str | None = None,
        settings: Settings | None = None,
        max_failure_rate: float | None = None,
    ) -> None:
        if not RUN_NAME.fullmatch(run):
            raise ConfigError(
                f"run must be letters, digits, '.', '_' or '-', at most 100 of them; found {run!r}"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank must be in [0, world_size), found rank={rank}, world_size={world_size}"
            )
        if max_failure_rate is not None:
            check_max_failure_rate(max_failure_rate)
        self.run, self.rank, self.world_size = run, rank, world_size
        self.launch = launch or _launch(world_size)
        self.config = config.for_launch(self.launch)
        self.config.of("train")
        self._say_what_evaluation_lacks()
        self._given_failure_rate = max_failure_rate
        self._app = default_app if settings is None else make_app(settings)
        self.settings: Settings = self._app.settings
        _check_servers(self.settings, self.config.queues)
        self._rank_lock = RankLock(
            client_outcomes(self._app).redis, run, self.launch, rank
        )
        try:
            self._rank_lock.acquire()
            self._check_ranks()
        except LOST as error:
            raise RedisUnreachableError(
                f"{without_password(self.settings.results)}: {why_away(error)}"
            ) from None
        self._start_fresh()
        _live_clients.add(self)
        self._open_engine()  # whose watcher extends the rank lock, however long the first submit() is away

    def _say_what_evaluation_lacks(self) -> None:
        """A reward that only evaluation uses does not keep a run from training."""
        try:
            self.config.of("eval")
        except UnknownRewardError as error:
            log.warning(
                "evaluation cannot run, submit(split='eval') will refuse it: %s", error
            )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], run: str, **options: Any) -> Self:
        """A client for the `rewards:` block of a YAML file; `options` as for the constructor."""
        return cls(RewardConfig.from_yaml(path), run, **options)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], run: str, **options: Any) -> Self:
        """A client for a parsed config; `options` as for the constructor."""
        return cls(RewardConfig.from_dict(config), run, **options)

    def __repr__(self) -> str:
        rewards = ", ".join(
            f"{r.name} ({r.reward_model}, queue {r.queue})" for r in self.config.rewards
        )
        rank = f"rank {self.rank} of {self.world_size}, " if self.world_size > 1 else ""
        return (
            f"RewardClient(run={self.run!r}, {rank}launch={self.launch!r}, "
            f"broker {without_password(self.settings.broker_url)}\n  rewards: {rewards})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give back connections. What was not collected stays in Redis until its TTL."""
        _live_clients.discard(self)
        with self._lock:
            engine = self._engine
            self._engine = None
        if engine is not None and engine.pid == os.getpid():
            engine.close()
        self._ticket_warnings.end()
        with contextlib.suppress(*LOST):
            self._rank_lock.release()
        self._ranks.close()
        # Else the garbage collector may come to its sockets first, which warn. Another client may be using the rest.
        client_outcomes(self._app).redis.connection_pool.disconnect(
            inuse_connections=False
        )

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
            group_size: How many samples each group has in all, over all ranks. One more is refused; groups that lack
                some are told in the log when the step is collected, and have no groupwise reward.
            split: `eval` uses `eval_rewards`, else the training rewards.
            step: The training step; on one rank it counts `collect()`s unless given.

        Returns:
            A picklable claim for `collect`, which answers in this order; nothing is scored yet.

        Raises:
            InvalidSampleError: A field that a reward requires is missing, media have a wrong shape or dtype, or a group
                would have more than `group_size` samples. Nothing was sent. What needs a pass over the pixels (range,
                NaN, truncation) becomes an `invalid` outcome instead.
        """
        started = time.monotonic()
        samples = list(samples)
        check_group_size(group_size)
        rewards = self.config.of(split)
        fields = {name for spec in rewards for name in spec.fields}
        with self._lock:
            engine = self._open_engine()
            open_step = self._steps.get(split)
            first = open_step.num_submitted if open_step is not None else 0
            self._num_tickets += 1
            number = self._num_tickets
        for i, sample in enumerate(samples):
            check(sample, rewards, f"sample {first + i}", self.settings.max_pixels)
        groups = groups_of(samples, f"{self.rank}.{number}")
        groupwise = next((spec for spec in rewards if spec.is_groupwise), None)
        if groupwise is not None:
            check_groups(groups, group_size, groupwise, self.world_size, first)
        engine.wait_for_backlog(
            self.settings.max_backlog, self.settings.submit_timeout_s
        )
        with self._lock:
            open_step = self._steps.open(split, step)
            start = open_step.num_submitted
            slots = [
                Slot(
                    split=split,
                    step=open_step.number,
                    index=start + i,
                    group=groups[i],
                    sample=sample,
                    held=_hold(sample, fields),
                    rewards=rewards,
                    submitted_at=started,
                    group_size=group_size,
                    ticket=number,
                )
                for i, sample in enumerate(samples)
            ]
            open_step.count_members(slots, group_size, is_strict=groupwise is not None)
            mixed = open_step.find_mixed_group(slots)
            open_step.add(slots, time.monotonic() - started)
            ticket = self._ticket(engine, split, open_step.number, start, slots, number)
        engine.submit(slots)
        if mixed is not None and self.rank == 0 and _are_compared(split, rewards):
            self._warn_once("mixed", _mixed_words(mixed))
        return ticket

    def flush(self, timeout_s: float = 600.0) -> None:
        """Wait until everything submitted has been encoded and sent; media may be changed after it.

        Raises:
            CollectTimeoutError: The deadline passed; says what sending waits for.
        """
        with self._lock:
            engine = self._open_engine()
        engine.flush(timeout_s)

    def pending(self, split: Split = "train") -> int:
        """How many submitted samples of the open step still miss an outcome."""
        with self._lock:
            step = self._steps.get(split)
            return sum(not slot.is_done for slot in step.slots) if step else 0

    def cancel(self, split: Split = "train") -> None:
        """Give the open step up: its samples are collected no more, and what is not yet sent is not sent."""
        with self._lock:
            engine, step = self._open_engine(), self._steps.give_up(split)
        if step is not None:
            engine.give_up(step.slots)

    # --- collect ---------------------------------------------------------------------------------

    def collect(  # noqa: PLR0913  (keywords of users)
        self,
        timeout_s: float = COLLECT_TIMEOUT_S,
        *,
        ticket: Ticket | None = None,
        on_failure: OnFailure = "raise",
        progress: bool | None = None,
        split: Split = "train",
        step: int | None = None,
        max_failure_rate: float | None = None,
    ) -> RewardBatch:
        """Wait for the rewards of everything submitted in the open step (or of a ticket), and close it.

        Args:
            timeout_s: Returns or raises at this deadline.
            ticket: Collect its samples only; also one of a process that is gone.
            on_failure: `nan` returns a batch with NaN and its `failures` instead of raising, however many there are
                unless the client or this call was given a `max_failure_rate`.
            progress: A bar for each reward on standard error. None shows them on a terminal; where there is none, rank
                0 tells the log in a line how the step went, and every 30 s what is waited for. False does neither.
            split: Which open step.
            step: Its number; with `world_size > 1` a rank that submitted nothing says so in which step the others are.
            max_failure_rate: Of this call; the client's unless given.

        Returns:
            The rewards in submit order. At the deadline with `on_failure="nan"`, what is missing is NaN with kind
            `timeout`, and is not waited for any more.

        Raises:
            ScoringError: Some samples have no reward; names each reward and the reasons, carries the batch. Or more
                than `max_failure_rate` have none. The step is closed.
            CollectTimeoutError: The deadline passed; says why as far as is known (a queue without a worker, a Redis
                that is away). Or, at once, a group of one rank has fewer members than its `group_size`, and a reward
                needs whole groups: it names the group. The step stays open: call again, or `cancel()`.
            TicketError: The ticket is of another run, of other rewards, or of other code of a class of yours.
            InvalidSampleError: Another step than `step` is open.
            ConfigError: `timeout_s`, `on_failure`, `max_failure_rate` or `split` is none.
        """
        check_call(timeout_s, on_failure)
        limit = self._failure_limit(on_failure, max_failure_rate)
        started = time.monotonic()
        wanted = self._wanted(split, step, ticket)
        is_told = progress is None and self.rank == 0 and not is_terminal()
        waiting = WaitLog(step_name(wanted.split, wanted.step)) if is_told else None
        bars = progress if progress is not None or self.rank == 0 else False
        late = self._wait(wanted, started, timeout_s, on_failure, bars, waiting)
        batch = self._batch(wanted, late, started)
        error, summary = self._verdict(
            wanted, batch, late, on_failure, started + timeout_s, waiting
        )
        error = error or error_for_rate(summary, limit, batch)
        if not isinstance(error, CollectTimeoutError):
            self._close_step(wanted)
            self._tell(wanted, batch, summary, is_told)
        if error is not None:
            raise error
        return batch

    def advantages(
        self,
        batch: RewardBatch,
        method: Method | None = None,
        *,
        noise_floor: bool = True,
        gather: Gather | None = None,
        timeout_s: float = 60.0,
    ) -> Advantages:
        """The advantages of a batch, float32 `(N,)` in its order, never NaN; see `trainer_client.advantages.formulas`.

        Args:
            method: `gdpo`, `sum`, or a function of one's own; as the config's `train:` block says, else `gdpo`.
            noise_floor: Count a reward that differs in a group by rounding only as constant; False is Flow-Factory's
                way. A function of one's own does not get it.
            gather: Exchanges objects between ranks, `torch.distributed`'s for example. With `world_size > 1` they go
                through Redis unless given; all ranks must call this then.
            timeout_s: How long the other ranks are waited for, through Redis.

        Raises:
            ValueError: The method is unknown, or one's own raises, or returns what are no advantages; on all ranks.
            RanksMissingError: Other ranks did not call this in time.
        """
        gather = self._gather("advantages", batch, gather, timeout_s)
        chosen = self.config.advantage_aggregation if method is None else method

        def look(num_samples: int, num_groups: int) -> None:
            if (
                num_samples
                and num_groups == num_samples
                and batch.split == "train"
                and self.rank == 0
            ):
                self._warn_once("alone", _alone_words(batch.name, num_samples))

        return advantages_of(
            batch,
            batch.weights,
            chosen,
            global_std=self.config.global_std,
            gather=gather,
            noise_floor=noise_floor,
            on_counts=look,
        )

    def metrics(
        self,
        batch: RewardBatch,
        advantages: Any = None,
        *,
        prefix: str | None = None,
        detail: Detail = "full",
        gather: Gather | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, float]:
        """A batch in numbers for a logger, over all ranks; see `trainer_client.advantages.metrics`.

        The rest is as for `advantages`.
        """
        gather = self._gather("metrics", batch, gather, timeout_s)
        return metrics(batch, advantages, prefix=prefix, detail=detail, gather=gather)

    def failure_rate_by_group(
        self,
        batch: RewardBatch,
        *,
        gather: Gather | None = None,
        timeout_s: float = 60.0,
    ) -> dict[Hashable, dict[str, float]]:
        """What fails in which group, over all ranks; see `trainer_client.advantages.metrics`.

        The rest is as for `advantages`.
        """
        return failure_rate_by_group(
            batch, gather=self._gather("failures", batch, gather, timeout_s)
        )

    def _gather(
        self, what: str, batch: RewardBatch, given: Gather | None, timeout_s: float
    ) -> Gather | None:
        if given is not None or self.world_size == 1:
            return given
        with self._lock:
            self._open_engine()  # which extends the rank lock, without which an answer does not count
        return self._ranks.gatherer(
            f"{what} of {batch.split} step {batch.step}", timeout_s
        )

    # --- private: what is told -------------------------------------------------------------------

    def _tell(
        self, wanted: _Wanted, batch: RewardBatch, summary: StepSummary, is_told: bool
    ) -> None:
        """What the log is to say of a ticket, or of a step that is closed; of several ranks the first says it."""
        if wanted.ticket is not None:
            self._ticket_warnings.add(batch.name, summary)
            return
        if self.rank != 0:
            return
        warn_of_failures(batch.name, summary)
        words = group_size_words(summary)
        if words:
            self._warn_once("size", f"{batch.name}: {words}")
        mixed = mixed_groups(summary)
        if mixed:
            named = [group for group in wanted.prompts if group_digest(group) in mixed]
            self._warn_once(
                "mixed",
                _mixed_over_ranks_words(
                    batch.name, len(mixed), len(summary.groups), named
                ),
            )
        if is_told:
            tell_step(batch.name, summary, batch.timings["ranks_s"])

    def _warn_once(self, topic: str, words: str) -> None:
        """A warning that this client gives once."""
        with self._lock:
            is_new = topic not in self._warned
            self._warned.add(topic)
        if is_new:
            log.warning("%s (said once a run)", words)

    # --- private: the engine -----------------------------------------------------------------------

    def _start_fresh(self) -> None:
        """As in a new process: no threads, no connections, nothing submitted. Runs in a forked child too."""
        self._lock = threading.Lock()
        self._engine = None
        self._steps = OpenSteps(self.world_size)
        self._resumed = {}
        self._warned = set()
        self._ticket_warnings = TicketWarnings()
        self._num_tickets = 0
        in_bounds = {"socket_timeout": ASK_S, "socket_connect_timeout": ASK_S}
        ranks = connect(self.settings.results, self.settings.sentinels, **in_bounds)
        self._ranks = RankGather(
            ranks, self.run, self.launch, self.rank, self.world_size
        )

    def _check_ranks(self) -> None:
        """Ranks whose hosts have different files of a class of the user's are told so, before they wait for each other.

        Raises:
            ConfigError: Names the ranks, their hosts and the files.
        """
        if self.world_size == 1:
            return
        registry = RunRegistry(
            client_outcomes(self._app).redis, self.run, self.settings.result_ttl_s
        )
        try:
            registry.check_ranks(
                self.launch, self.rank, self.world_size, self.config, platform.node()
            )
        except ConfigError:
            self._rank_lock.release()
            raise

    def _open_engine(self) -> Engine:
        if self._engine is None:
            with contextlib.suppress(*LOST):  # else it is acquired once Redis is back
                self._rank_lock.acquire()
            self._engine = Engine(
                self._app,
                run=self.run,
                launch=self.launch,
                rank=self.rank,
                world_size=self.world_size,
                config=self.config,
                chores=[Chore(EXTEND_EVERY_S, self._rank_lock.extend)],
            )
        return self._engine

    # --- private: submit -------------------------------------------------------------------------

    def _ticket(
        self,
        engine: Engine,
        split: Split,
        step: int,
        start: int,
        slots: Sequence[Slot],
        number: int,
    ) -> Ticket:
        return Ticket(
            run=self.run,
            launch=self.launch,
            split=split,
            step=step,
            rank=self.rank,
            start=start,
            stop=start + len(slots),
            fingerprints=_fingerprints(self.config.of(split)),
            codes=tuple(
                (spec.name, spec.code) for spec in self.config.of(split) if spec.code
            ),
            slots=tuple(slots),
            client=engine.client_id,
            number=number,
        )

    # --- private: collect ------------------------------------------------------------------------

    def _wanted(self, split: Split, step: int | None, ticket: Ticket | None) -> _Wanted:
        """The samples to collect: those of a ticket, else all of the open step, which gets the number `step`."""
        if ticket is not None:
            split = ticket.split
        config = (
            self.config if ticket is None else self.config.for_launch(ticket.launch)
        )
        rewards = config.of(split)
        with self._lock:
            engine = self._open_engine()
            if step is not None and ticket is None:
                self._steps.open(split, step)
            open_step = self._steps.get(split)
            if ticket is not None:
                slots = self._slots_of(engine, ticket, config)
            else:
                slots = list(open_step.slots) if open_step is not None else []
            number = self._steps.number(split) if ticket is None else ticket.step
            prompts: dict[Hashable, tuple[str, ...]] = {}
            if (
                open_step is not None
                and ticket is None
                and self.world_size > 1
                and _are_compared(split, rewards)
            ):
                prompts = dict(open_step.prompts)
        return _Wanted(
            engine, split, number, rewards, slots, open_step, ticket, prompts
        )

    def _is_shared(self, wanted: _Wanted) -> bool:
        """Whether all ranks collect this together, and come to one verdict."""
        return self.world_size > 1 and wanted.ticket is None

    def _wait(
        self,
        wanted: _Wanted,
        started: float,
        timeout_s: float,
        on_failure: OnFailure,
        bars: bool | None,
        waiting: WaitLog | None,
    ) -> Failure | None:
        """Wait for the samples; the reason of those that have no answer at the deadline, None if all have."""
        engine = wanted.engine
        incomplete = self._incomplete(wanted.open_step) if wanted.ticket is None else {}
        in_vain = why_not_to_wait(incomplete, wanted.rewards, on_failure)
        if in_vain is not None:
            return Failure(kind="timeout", message=in_vain)
        engine.give_up_groups(wanted.split, wanted.step, incomplete)
        # Of several ranks each leaves the others a little time to say how they fared, before the same deadline.
        margin_s = (
            min(RANKS_MARGIN_S, timeout_s / 4) if self._is_shared(wanted) else 0.0
        )
        tell_waiting = None if waiting is None else waiting.tell
        is_complete = engine.wait(
            wanted.slots, started + timeout_s - margin_s, bars, tell_waiting
        )
        return None if is_complete else engine.why_late(wanted.slots, timeout_s)

    def _batch(
        self, wanted: _Wanted, late: Failure | None, started: float
    ) -> RewardBatch:
        """The batch of the samples, which were waited for since `started`."""
        engine = wanted.engine
        times = {
            "submit_s": wanted.open_step.submit_s
            if wanted.open_step is not None
            else 0.0,
            "wait_s": time.monotonic() - started,
            "ranks_s": 0.0,
            **engine.take_seconds(),
        }
        return batch_of(
            wanted.slots,
            wanted.rewards,
            None if late is None else Late(late, engine.why_open),
            times,
            wanted.split,
            wanted.step,
        )

    @property
    def max_failure_rate(self) -> float:
        """The share of (sample, reward) pairs without a reward above which `collect()` raises."""
        return (
            MAX_FAILURE_RATE
            if self._given_failure_rate is None
            else self._given_failure_rate
        )

    def _failure_limit(
        self, on_failure: OnFailure, of_this_call: float | None
    ) -> float:
        """The share above which this call raises. Who asks for NaN in the call itself is given all of them, unless a
        share was named; a policy in the config is no such word, since nobody may be looking."""
        if of_this_call is not None:
            check_max_failure_rate(of_this_call)
            return of_this_call
        if self._given_failure_rate is None and on_failure == "nan":
            return 1.0
        return self.max_failure_rate

    def _verdict(
        self,
        wanted: _Wanted,
        batch: RewardBatch,
        late: Failure | None,
        on_failure: OnFailure,
        deadline: float,
        waiting: WaitLog | None,
    ) -> tuple[ScoringError | None, StepSummary]:
        """What `collect()` raises for the failures themselves, or None, and the step in numbers; on all ranks alike."""
        error = error_for(
            batch, late, on_failure, {r.name: r.on_failure for r in wanted.rewards}
        )
        sizes = {
            slot.group: slot.group_size
            for slot in wanted.slots
            if slot.group_size is not None
        }
        summary = summary_of(
            batch, sizes if wanted.ticket is None else None, wanted.prompts
        )
        if self._is_shared(wanted):
            done_at = time.monotonic()
            verdict = agree(
                self._ranks,
                f"{wanted.split} step {wanted.step}",
                Verdict(error, summary),
                batch,
                deadline,
                _wait_for_ranks(waiting),
            )
            error, summary = verdict.error, verdict.summary
            # After the batch was made: what the error carries is to have it too.
            batch.timings["ranks_s"] = time.monotonic() - done_at
        return error, summary

    def _slots_of(
        self, engine: Engine, ticket: Ticket, config: RewardConfig
    ) -> Sequence[Slot]:
        """The samples of a ticket; `config` is this client's as it stands in the ticket's launch."""
        rewards = config.of(ticket.split)
        if ticket.run != self.run:
            raise TicketError(
                f"this ticket is of run {ticket.run!r}, this client of {self.run!r}"
            )
        if ticket.fingerprints != _fingerprints(rewards):
            _check_code(ticket, rewards)
            raise TicketError(
                f"this ticket is for the rewards {dict(ticket.fingerprints)}, "
                f"this client has {dict(_fingerprints(rewards))}"
            )
        if ticket.client == engine.client_id:
            live = [
                slot for slot in ticket.slots if isinstance(slot, Slot)
            ] or self._steps.slots_of(ticket)
            if len(live) == len(ticket.slots):
                return live
        if ticket.place not in self._resumed:
            # A copy is as if pickled: a forked child has slots that only its parent's threads look after.
            self._resumed[ticket.place] = engine.resume(copy.copy(ticket), config)
        return self._resumed[ticket.place]

    def _incomplete(self, step: OpenStep | None) -> dict[Hashable, str]:
        """The groups that nobody else can complete; of several ranks another one may."""
        if step is None or self.world_size > 1:
            return {}
        with self._lock:
            return incomplete_groups(step)

    def _close_step(self, wanted: _Wanted) -> None:
        wanted.engine.give_up(wanted.slots)
        with self._lock:
            if wanted.ticket is None:
                self._steps.close(wanted.split, wanted.slots)
            else:
                self._steps.take_out(wanted.split, wanted.slots)
                self._resumed.pop(wanted.ticket.place, None)


_live_clients: weakref.WeakSet[RewardClient] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has none of the parent's threads, and must not touch its connections or locks."""
    for client in list(_live_clients):
        client._start_fresh()


os.register_at_fork(after_in_child=_after_fork)


def _check_servers(settings: Settings, queues: Sequence[str]) -> None:
    """Raises `RedisUnreachableError` or `EvictionError` unless every server and folder of `settings` can be used."""
    check_servers(settings, "trainer", queues)
    if settings.payloads.startswith("file:"):
        with contextlib.closing(open_store(settings)) as store:
            store.check()


def _launch(world_size: int) -> str:
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic and elastic != UNNAMED:
        return f"{elastic}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if world_size > 1:
        unnamed = f"; torchrun calls every start {UNNAMED!r} unless it is given --rdzv-id or --standalone"
        raise ConfigError(
            "with world_size > 1 give launch=, one text for this start of the job, the same on all ranks"
            f"{unnamed if elastic else ''}"
        )
    return uuid.uuid4().hex[:12]


def _fingerprints(rewards: Sequence[RewardSpec]) -> tuple[tuple[str, str], ...]:
    return tuple((spec.name, spec.fingerprint) for spec in rewards)


def _check_code(ticket: Ticket, rewards: Sequence[RewardSpec]) -> None:
    """Raises `TicketError` where the code of a reward is another than when the ticket was made."""
    codes = dict(ticket.codes)
    for spec in rewards:
        files = changed_files(codes.get(spec.name, ()), spec.code)
        if files and spec.name in codes and spec.code:
            raise TicketError(
                f"{' and '.join(files)} changed since this ticket was made: what it asked for of reward {spec.name!r} "
                "are rewards by other code; submit its samples again, or collect it where the old files are"
            )


def _wait_for_ranks(waiting: WaitLog | None) -> OnWaiting:
    """Tells the log which ranks are waited for."""

    def tell(missing: list[int]) -> None:
        if waiting is not None:
            waiting.tell(
                lambda: (
                    f"rank {', '.join(map(str, missing))}; this rank has its rewards"
                )
            )

    return tell


def _mixed_words(group: Hashable) -> str:
    return (
        f"group {_cut(group)} has samples of several prompts: advantages and ranks compare the samples of a group, "
        "which should be of one prompt; give each prompt a group= of its own, or none, and equal prompts are a group"
    )


def _mixed_over_ranks_words(
    name: str, num_mixed: int, num_groups: int, named: Sequence[Hashable]
) -> str:
    example = f", {_cut(named[0])} for example," if named else ""
    return (
        f"{name}: {num_mixed} of {num_groups} groups{example} have samples of several prompts, over all ranks: "
        "advantages and ranks compare the samples of a group, which should be of one prompt; group= is an id over all "
        "ranks, not one that each rank counts from 0: add the rank to it, or give none, and equal prompts are a group"
    )


def _are_compared(split: Split, rewards: Sequence[RewardSpec]) -> bool:
    """Whether the samples of a group are: by advantages, or by a reward."""
    return split == "train" or any(spec.is_groupwise for spec in rewards)


def _alone_words(name: str, num_samples: int) -> str:
    return (
        f"{name}: each of the {num_samples} samples is a group of its own, so that every advantage is 0 and nothing is "
        "learned; give the samples of one prompt the same group=, or the same prompt"
    )


def _cut(group: Hashable) -> str:
    return shorten(repr(group), MAX_GROUP_CHARS)


def _hold(sample: Sample, fields: set[str]) -> dict[str, Any]:
    """The media of a sample that travel, by reference."""
    values = {name: getattr(sample, name) for name in MEDIA_FIELDS if name in fields}
    return {
        name: media.hold(value) for name, value in values.items() if value is not None
    }
