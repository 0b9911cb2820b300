"""The trainer's client: submit samples while sampling, collect their rewards when the step is finalized."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Hashable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from tasks import app as default_app
from tasks.celery_app import make_app
from tasks.rewards import OnFailure, RewardConfig, Split
from tasks.samples import Sample
from tasks.settings import Settings, without_password
from trainer_client.advantages.exchange import Gather
from trainer_client.advantages.formulas import Advantages, Method, advantages_of
from trainer_client.advantages.metrics import Detail, failure_rate_by_group, metrics
from trainer_client.engine.engine import Engine
from trainer_client.ranks.verdict import (
    MAX_FAILURE_RATE,
    check_call,
    check_max_failure_rate,
    max_failure_rate_of,
)
from trainer_client.results import RewardBatch
from trainer_client.runs.launch import launch_name
from trainer_client.runs.start_checks import (
    check_names,
    check_rewards,
    check_trainer_servers,
)
from trainer_client.session import forks
from trainer_client.session.client_steps import ClientSteps
from trainer_client.session.collection import (
    Collected,
    Collection,
    CollectOptions,
    Wanted,
)
from trainer_client.session.rank_process import RankProcess
from trainer_client.session.tickets import ticket_of
from trainer_client.steps.client_log import ClientLog
from trainer_client.steps.grouping import are_compared
from trainer_client.steps.open_steps import check_group_size
from trainer_client.steps.submission import Submission
from trainer_client.ticket import Ticket

COLLECT_TIMEOUT_S = 480.0
"""How long `collect()` waits unless told otherwise. With what `advantages()` and `metrics()` may wait for other ranks
it is within the 10 minutes of an NCCL collective, in which ranks that are done wait for the others."""


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

    _steps: ClientSteps
    _log: ClientLog

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
        check_names(run, rank, world_size)
        if max_failure_rate is not None:
            check_max_failure_rate(max_failure_rate)
        self.run, self.rank, self.world_size = run, rank, world_size
        self.launch = launch or launch_name(world_size)
        self.config = config.for_launch(self.launch)
        check_rewards(self.config)
        self._given_failure_rate = max_failure_rate
        self._app = default_app if settings is None else make_app(settings)
        self.settings: Settings = self._app.settings
        check_trainer_servers(self.settings, self.config.queues)
        self._process = RankProcess(
            self._app,
            self.config,
            run=run,
            launch=self.launch,
            rank=rank,
            world_size=world_size,
        )
        self._start_steps()
        forks.restart_in_children(self, RewardClient._restart)
        # The engine extends the rank lock, however long the first submit() is away.
        self._process.open_engine()

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
        forks.forget(self)
        self._log.end()
        self._process.close()

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
        engine = self._engine
        number = self._steps.new_ticket_number()
        submission = Submission(split, rewards, samples, group_size, number, started)
        first = self._steps.num_submitted(split)
        submission.check(first, self.rank, self.world_size, self.settings.max_pixels)

        engine.wait_for_backlog(
            self.settings.max_backlog, self.settings.submit_timeout_s
        )
        added = self._steps.add(submission, step)
        engine.submit(added.slots)
        if added.mixed_group is not None and are_compared(split, rewards):
            self._log.warn_of_mixed_group(added.mixed_group)
        return ticket_of(submission, added, self._process, engine.client_id)

    def flush(self, timeout_s: float = 600.0) -> None:
        """Wait until everything submitted has been encoded and sent; media may be changed after it.

        Raises:
            CollectTimeoutError: The deadline passed; says what sending waits for.
        """
        self._engine.flush(timeout_s)

    def pending(self, split: Split = "train") -> int:
        """How many submitted samples of the open step still miss an outcome."""
        return self._steps.num_pending(split)

    def cancel(self, split: Split = "train") -> None:
        """Give the open step up: its samples are collected no more, and what is not yet sent is not sent."""
        self._engine.give_up(self._steps.give_up(split))

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
        options = CollectOptions(
            started=time.monotonic(),
            timeout_s=timeout_s,
            on_failure=on_failure,
            max_failure_rate=max_failure_rate_of(
                max_failure_rate, self._given_failure_rate, on_failure
            ),
            progress=progress,
            rank=self.rank,
        )
        wanted = self._wanted(split, step, ticket)
        # A ticket is collected by the rank that has it; a step by all ranks, which come to one verdict.
        is_shared = self.world_size > 1 and ticket is None
        ranks = self._process.ranks if is_shared else None
        collected = Collection(wanted, options, ranks).run()

        if not collected.is_late:
            self._steps.close(wanted)
            self._tell(wanted, collected)
        if collected.error is not None:
            raise collected.error
        return collected.batch

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
        return advantages_of(
            batch,
            batch.weights,
            chosen,
            global_std=self.config.global_std,
            gather=gather,
            noise_floor=noise_floor,
            on_counts=functools.partial(self._log.warn_if_all_are_alone, batch),
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

    @property
    def max_failure_rate(self) -> float:
        """The share of (sample, reward) pairs without a reward above which `collect()` raises."""
        if self._given_failure_rate is None:
            return MAX_FAILURE_RATE
        return self._given_failure_rate

    # --- private -----------------------------------------------------------------------------------

    @property
    def _engine(self) -> Engine:
        return self._process.open_engine()

    def _start_steps(self) -> None:
        self._steps = ClientSteps(self.world_size)
        self._log = ClientLog(self.rank)

    def _restart(self) -> None:
        """In a forked child: as in a new process, nothing is submitted."""
        self._process.start_fresh()
        self._start_steps()

    def _wanted(self, split: Split, step: int | None, ticket: Ticket | None) -> Wanted:
        if ticket is None:
            return self._steps.wanted_of_step(self._engine, self.config, split, step)
        return self._steps.wanted_of_ticket(self._engine, self.config, self.run, ticket)

    def _tell(self, wanted: Wanted, collected: Collected) -> None:
        batch, summary = collected.batch, collected.summary
        if wanted.ticket is not None:
            self._log.tell_ticket(batch, summary)
        else:
            has_line = collected.has_log_lines
            self._log.tell_step(batch, summary, wanted.prompts, has_line=has_line)

    def _gather(
        self, what: str, batch: RewardBatch, given: Gather | None, timeout_s: float
    ) -> Gather | None:
        if given is not None or self.world_size == 1:
            return given
        topic = f"{what} of {batch.split} step {batch.step}"
        return self._process.gatherer(topic, timeout_s)
