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
from tasks.masking import without_password
from tasks.rewards import OnFailure, RewardConfig, Split
from tasks.samples import Sample
from tasks.settings import Settings
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
from trainer_client.session.client_process import ClientProcess
from trainer_client.session.client_steps import ClientSteps
from trainer_client.session.collection import (
    Collected,
    Collection,
    CollectOptions,
    Wanted,
)
from trainer_client.steps.client_log import ClientLog
from trainer_client.steps.grouping import are_compared
from trainer_client.steps.open_steps import check_group_size
from trainer_client.steps.submission import Submission
from trainer_client.ticket import Ticket

COLLECT_TIMEOUT_S = 480.0
"""How long `collect()` waits unless told otherwise. With what `advantages()` and `metrics()` may wait for other ranks
it is within the 10 minutes of an NCCL collective, in which ranks that are done wait for the others."""


class RewardClient:
    """Submits samples and collects their rewards.

    Use it as a context manager, or call `close()`.

    Safe between threads. A thread that waits in `collect()` or `flush()` holds no lock, so others can submit meanwhile.
    A forked child can use it too: its client has submitted nothing, and makes threads and connections of its own.

    Args:
        config: The rewards.
        run: Name of the training run. Equal samples of one run are scored once.
        rank, world_size: Rank of this process in [0, world_size), and number of the trainer's processes.
        launch: Name of one start of the job, the same on all its ranks. By default TORCHELASTIC_RUN_ID with its restart
            count, if torchrun was given a --rdzv-id or is --standalone; else a new name, on one rank only.
        settings: Where the servers are. By default REWARDQ_* variables say it.
        max_failure_rate: Share in [0, 1] of a step's (sample, reward) pairs, over all ranks. If more of them have no
            reward, `collect()` raises `ScoringError`, whatever the rewards' `on_failure` says. 1.0 never raises. A
            share that is given here counts in every call. By default the share is 0.5, and does not count in a
            `collect(on_failure="nan")`, whose caller looks at the failures. Of a ticket, only its own samples count.

    Raises:
        RedisUnreachableError: A server does not answer; says which, and what to start.
        RedisRefusalError: A server refuses this user or this configuration; says which right or variable to set.
        EvictionError: A Redis drops keys when it is full; names the setting to change.
        RankTakenError: Another live process is this rank of this launch; names that process.
        ConfigError: The run's name, rank, world size or `max_failure_rate` is wrong. Or several ranks have no launch in
            common, or have different code of a class of the user's.
        UnknownRewardError: A training reward is not built here. (The log warns of an evaluation reward that is not
            built here, and `submit(split="eval")` refuses it.)
    """

    _steps: ClientSteps
    _log: ClientLog
    """Both are of this process: a forked child gets new ones."""

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
        self._process = ClientProcess(
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
            f"broker {without_password(self.settings.broker)}\n  rewards: {rewards})"
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
        """End the threads and give back the connections. Outcomes not collected stay in Redis until their TTL.

        Samples that nobody can collect any more are given up, and their media freed: those of the open steps whose
        ticket nobody holds, and that was never pickled. What another rank's group may need is kept until its TTL.
        """
        forks.forget(self)
        self._log.end()
        self._process.close(self._steps.abandoned())

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
            samples: `N` samples. Media are kept by reference and must not be changed before `flush()` or `collect()`;
                a sample whose media were changed before they were sent is `invalid`, as far as a torch tensor's version
                and REWARDQ_CHECK_MEDIA tell. All else of a sample is copied.
            group_size: Number of samples of each group, over all ranks. Samples beyond that are refused. The log warns
                of groups that lack samples when the step is collected; they have no groupwise reward.
            split: `train`, or `eval`, which uses `eval_rewards` if the config has any, else the training rewards.
            step: Number of the training step. On one rank the client counts its `collect()`s unless a number is given;
                with `world_size > 1` it is required, and the same on all ranks.

        Returns:
            A picklable claim for `collect`, which answers in the order of `samples`. Nothing is scored yet.

        Raises:
            InvalidSampleError: A field that a reward requires is missing, media have a wrong shape or dtype, a group
                would have more than `group_size` samples, or another step than `step` is open. Nothing was sent. Faults
                that only a pass over the pixels finds (range, NaN, truncation) become `invalid` outcomes instead.
            CollectTimeoutError: Earlier samples were not sent in time, more of them than REWARDQ_MAX_BACKLOG allows.
                Nothing was queued; says what sending waits for.
        """
        started = time.monotonic()
        samples = list(samples)
        check_group_size(group_size)
        rewards = self.config.of(split)
        engine = self._engine
        number = self._steps.new_ticket_number()
        submission = Submission(
            split,
            rewards,
            samples,
            group_size,
            number,
            started,
            checks_media=self.settings.check_media,
        )
        first = self._steps.num_submitted(split)
        submission.check(first, self.rank, self.world_size, self.settings.max_pixels)

        engine.wait_for_backlog(
            self.settings.max_backlog, self.settings.submit_timeout_s
        )
        added = self._steps.add(submission, step)
        engine.submit(added.slots)
        if added.mixed_group is not None and are_compared(split, rewards):
            self._log.warn_of_mixed_group(added.mixed_group)
        return self._steps.issue(submission, added, self._process, engine.client_id)

    def flush(self, timeout_s: float = 600.0) -> None:
        """Wait until everything submitted has been encoded and sent. Media may be changed afterwards.

        Raises:
            CollectTimeoutError: Not everything was sent within `timeout_s`; says what sending waits for.
        """
        self._engine.flush(timeout_s)

    def pending(self, split: Split = "train") -> int:
        """How many submitted samples of the open step still miss an outcome."""
        return self._steps.num_pending(split)

    def cancel(self, split: Split = "train") -> None:
        """Give up the open step: its samples cannot be collected any more, and those not sent yet are not sent."""
        self._engine.give_up(self._steps.give_up(split))

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
        """Wait for the rewards of everything submitted in the open step, or of a ticket, and close it.

        Args:
            timeout_s: The call returns or raises within so many seconds.
            ticket: Collect the samples of this ticket only. The process that made it may be gone.
            on_failure: `nan` returns a batch with NaN and its `failures` instead of raising. The number of failures
                does not matter then, unless the client or this call was given a `max_failure_rate`.
            progress: Whether standard error shows a bar for each reward. None shows bars on a terminal. Where there is
                no terminal, rank 0 tells the log in a line how the step went, and every 30 s what it waits for. False
                does neither.
            split: Whose open step is collected.
            step: Number of the step. With `world_size > 1` a rank that submitted nothing needs it, to be in the step in
                which the others are.
            max_failure_rate: As for the client, for this call only.

        Returns:
            The rewards in the order of `submit()`. With `on_failure="nan"`, samples without an answer at the deadline
            are NaN with kind `timeout`, and are not waited for any more.

        Raises:
            ScoringError: Samples have no reward, or more of them than `max_failure_rate` allows. Names each reward and
                the reasons, and carries the batch. The step is closed.
            CollectTimeoutError: The deadline passed; says why as far as is known (a queue without a worker, a Redis
                that is away). Or, at once and with one rank, a group has fewer members than its `group_size`, and a
                reward needs whole groups; names the group. The step stays open: call again, or `cancel()`.
            TicketError: The ticket is of another run, of other rewards, or of other code of a class of the user's.
            InvalidSampleError: Another step than `step` is open.
            ConfigError: `timeout_s`, `on_failure`, `max_failure_rate` or `split` has a wrong value.
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
            method: `gdpo`, `sum`, or a function of the user's. By default the config's `train:` block says it, else
                `gdpo`.
            noise_floor: Whether a reward that differs within a group by rounding only counts as constant. False is
                Flow-Factory's way. A function of the user's does not get it.
            gather: Exchanges objects between ranks, for example by `torch.distributed`. By default, with
                `world_size > 1`, they go through Redis; all ranks must make this call then.
            timeout_s: Seconds that other ranks are waited for, through Redis.

        Raises:
            ValueError: The method is unknown, or a function of the user's raises, or returns no advantages; on all
                ranks.
            RanksMissingError: Other ranks did not make this call in time.
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

        `gather`, `timeout_s` and the errors are as for `advantages`.
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
        """By group and reward, the share of samples without a reward, over all ranks.

        See `trainer_client.advantages.metrics`. `gather`, `timeout_s` and the errors are as for `advantages`.
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
