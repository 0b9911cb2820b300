"""Everything this pipeline raises.

RewardError
|-- SettingsError           the operator's: a REWARDQ_* variable is unknown or wrong; nothing was started
|-- ConfigError             the caller's: a rewards block is wrong; nothing was sent
|   |-- UnknownRewardError  no reward model of that name; names the nearest
|   `-- UnknownOptionError  a built-in has no such option; names the nearest
|-- InvalidSampleError      the caller's: wrong shape, dtype, missing field; nothing was sent
|-- MissingExtraError       the operator's: an optional dependency is not installed
|-- ModelLoadError          the worker's: a reward model cannot be loaded; every sample of the chunk gets the reason
|-- StaleCodeError          the worker's: the user's code changed since it was loaded; it ends, the chunk is sent again
|-- RedisUnreachableError   the operator's: no server answers; trying again helps once it does
|   `-- RedisRefusalError   the operator's: it answers, and refuses what we need; names the right or the variable
|-- BusyError               the worker's: not now; nothing was asked, and the chunk is sent again after a pause
|-- PayloadGoneError        media or a request left the store before they were read; the client uploads again
|-- WireError               a message of another wire version, or not one of ours
|-- TicketError             the caller's: a ticket of another run or of other rewards
|-- RankTakenError          the caller's: another live process is this rank of this launch
|-- RanksMissingError       late: other ranks of this step have not come as far; names them
|-- EvictionError           the operator's: a Redis would drop keys when it is full; names the setting
|-- StartError              the operator's: a process that `rewardq up` starts did not come up
`-- ScoringError            some samples have no reward; carries every reason and the batch
    `-- CollectTimeoutError late, not lost: the ticket stays valid; carries what is there
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

from tasks.installing import install_command

if TYPE_CHECKING:
    from collections.abc import Sequence

FailureKind = Literal["failed", "timeout", "unparsable", "invalid", "abstained"]
"""Why there is no reward: the model or a part on its way broke; a deadline passed; a judge's answer
could not be read; the sample is unfit for this reward; the reward model chose not to score it."""

FAILURE_KINDS: tuple[str, ...] = get_args(FailureKind)


class RewardError(Exception):
    """Whatever this pipeline raises; catch it to catch all."""


class SettingsError(RewardError, ValueError):
    """A `REWARDQ_*` variable is unknown or has a wrong value."""


class ConfigError(RewardError, ValueError):
    """A `rewards:` block is wrong. The message names the entry and key, what was found and what is needed."""


class UnknownRewardError(ConfigError):
    """No reward model has this name."""


class UnknownOptionError(ConfigError):
    """A built-in reward model has no option of this name."""


class InvalidSampleError(RewardError, ValueError):
    """A sample's field is missing or of a wrong shape, dtype or range. Nothing was sent."""


class MissingExtraError(RewardError, ImportError):
    """An optional dependency is missing.

    Args:
        what: The feature that needs it.
        module: The module that cannot be imported.
        extra: The extra of `rewardq` that brings it.
        worker_host: The host of the worker that lacks it; empty where the process that raises lacks it.
    """

    def __init__(
        self, what: str, module: str, extra: str, worker_host: str = ""
    ) -> None:
        super().__init__(what, module, extra, worker_host)
        self.what, self.module, self.extra = what, module, extra
        self.worker_host = worker_host

    def __str__(self) -> str:
        where, then = "here", ""
        if self.worker_host:
            where = f"in the worker's environment on {self.worker_host}"
            then = ", there, then restart the worker"
        return (
            f"{self.what} needs the module {self.module!r}, which is not installed {where}: "
            f"{install_command(self.extra)}{then}"
        )


class ModelLoadError(RewardError):
    """A reward model cannot be loaded on this worker."""


class StaleCodeError(RewardError):
    """The user's code changed since this worker loaded it; only a new process can load the code that is asked for.

    Args:
        files: The changed files, as names for people.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__(files)
        self.files = tuple(files)

    def __str__(self) -> str:
        it = "it" if len(self.files) == 1 else "them"
        return f"{' and '.join(self.files)} changed since this worker loaded {it}"


class BusyError(RewardError):
    """A reward model cannot be asked now (its fleet's budget is in use). The samples without a score are sent again."""


class RedisUnreachableError(RewardError, ConnectionError):
    """No Redis answers at the URL in the message (its password left out)."""


class RedisRefusalError(RedisUnreachableError):
    """A server answers and refuses what this pipeline needs; the message says what to set. Waiting would not help."""


class PayloadGoneError(RewardError):
    """Payloads were not in the store (expired, evicted, flushed) or not what was stored.

    Args:
        missing: Their store keys.
    """

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(missing)
        self.missing = tuple(missing)

    def __str__(self) -> str:
        return f"{len(self.missing)} payload(s) are not in the store, the first is {self.missing[0]}"


class WireError(RewardError):
    """Bytes that are no message of this wire version."""


class TicketError(RewardError, ValueError):
    """A ticket does not belong to this client's run or rewards."""


class RankTakenError(RewardError):
    """Another live process is this rank.

    Args:
        rank_name: The run, launch and rank.
        holder: The process and host that has the rank lock.
    """

    def __init__(self, rank_name: str, holder: str) -> None:
        super().__init__(rank_name, holder)
        self.rank_name, self.holder = rank_name, holder

    def __str__(self) -> str:
        return (
            f"{self.rank_name} is taken by {self.holder}, which is alive; stop it, or give this start of the job "
            "a launch= of its own"
        )


class RanksMissingError(RewardError, TimeoutError):
    """Other ranks have not answered at the deadline.

    Args:
        topic: What they were asked.
        missing: The ranks.
    """

    def __init__(self, topic: str, missing: list[int]) -> None:
        super().__init__(topic, missing)
        self.topic, self.missing = topic, missing

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.missing))
        return f"rank {ranks} did not report on {self.topic} in time; did it stop, or is its timeout_s longer?"


class EvictionError(RewardError):
    """A Redis drops keys when it is full; rewards and claims would vanish unseen."""


class StartError(RewardError):
    """A child process did not come up; the message says how it ended and where its log is."""


class ScoringError(RewardError):
    """Some samples have no reward.

    Args:
        message: Every reward that fails, with its first reasons.
        batch: The `RewardBatch` with what is there; its `failures` has every reason.
    """

    def __init__(self, message: str, batch: Any) -> None:
        super().__init__(message, batch)
        self.message, self.batch = message, batch

    def __str__(self) -> str:
        return self.message


class CollectTimeoutError(ScoringError, TimeoutError):
    """The deadline of `collect` passed with samples still out. The step stays open: collect again, or cancel."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty text."""
    by_lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
