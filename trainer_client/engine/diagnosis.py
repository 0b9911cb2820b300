"""What Redis can say about why something is late: queues without workers, loads, samples that ended their workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from tasks.catalog import VLM
from tasks.messages import WIRE_VERSION, Heartbeat, Note
from tasks.outcomes import USUAL_STARTS, ClientOutcomes
from tasks.payloads import PayloadStore
from tasks.rewards import RewardSpec
from tasks.servers.connections import FULL, is_nearly_full
from trainer_client.engine.losses import loaders_of
from trainer_client.engine.queue_pace import WINDOW_S, Pace, QueuePaces
from trainer_client.engine.tracking import Queued
from trainer_client.texts import in_words

RUNS_SHOWN = 3
"""Runs that are named, of those whose messages or bytes are in our way."""


class Diagnosis:
    """Asks on behalf of whoever waits. Each call may raise what Redis does; none changes anything."""

    def __init__(self, outcomes: ClientOutcomes, store: PayloadStore) -> None:
        self._outcomes, self._store = outcomes, store

    def idle_queues(
        self, queues: Iterable[str], ended: Mapping[str, Note]
    ) -> str | None:
        """Which of these queues no worker serves that could read our messages, and what to start; None if all are.

        Args:
            ended: By queue, what a worker of it said that ended since its code was outdated.
        """
        self._outcomes.check_room()  # where a worker cannot write, its heartbeat is missing too
        workers = self._outcomes.workers()
        store = self._store.identity()
        reasons = []
        for queue in sorted(queues):
            why = _why_idle(queue, workers, store, ended.get(queue))
            if why is not None:
                reasons.append(why)
        if reasons and is_nearly_full(self._outcomes.redis):
            reasons.insert(0, FULL)  # it may have refused the heartbeats alone
        return "; ".join(reasons) or None

    def ahead(
        self, queued: Mapping[str, Queued], paces: QueuePaces, run: str, now: float
    ) -> str | None:
        """How many messages of others come before ours, of which runs, and how long they take; None if none do.

        Args:
            queued: By queue, our messages that wait there.
            run: Of this client.
            now: On the clock by which `paces` were seen.
        """
        words = []
        for queue, ours in sorted(queued.items()):
            found = self._outcomes.ahead(queue, ours.last)
            others = dict(found.num_of)
            # What waits of ours comes before the last of ours, too.
            others[run] = max(0, others.get(run, 0) - (ours.num_messages - 1))
            num_ahead = sum(others.values())
            if num_ahead:
                pace = paces.of(queue, found.consumed, now)
                whose = _by_run(others, run, _messages)
                verb = "is" if num_ahead == 1 else "are"
                words.append(
                    f"{whose} {verb} ahead in queue {queue!r}{_at_pace(num_ahead, pace)}"
                )
        return "; ".join(words) or None

    def stored(self, run: str) -> str | None:
        """Whose bytes the payload store holds; None if it holds none."""
        by_run = self._store.bytes_by_run()
        if not sum(by_run.values()):
            return None
        return f"in the payload store are {_by_run(by_run, run, _megabytes)}"

    def loads(self, specs: Iterable[RewardSpec]) -> str | None:
        """Which workers still load the models of these rewards; None if none does."""
        by_fingerprint = {spec.fingerprint: spec for spec in specs}
        workers = self._outcomes.workers()
        words = []
        for spec in by_fingerprint.values():
            for node in loaders_of(spec, workers):
                words.append(f"{node} is still loading {spec.part.reward_model}")
        return "; ".join(words) or None

    def suspects(self, addresses: Sequence[str]) -> str | None:
        """What is said of outcomes that were begun again and again without an answer; None if none was."""
        starts = self._outcomes.num_starts(addresses)
        num = sum(one > USUAL_STARTS for one in starts)
        if not num:
            return None
        return (
            f"{num} were begun more than {USUAL_STARTS} times and never answered: they, or what they need, may be what "
            "ends their worker (its log may tell); one that does is given up once its reward's timeout_s has passed"
        )


def _messages(num: int) -> str:
    return f"{num:,} message{'' if num == 1 else 's'}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _by_run(num_of: Mapping[str, int], own: str, count: Callable[[int], str]) -> str:
    """`3,120 messages of run 'a', 5 messages of this run`: the most first, and how many other runs there are."""
    sizes = Counter({run: num for run, num in num_of.items() if num})
    words = []
    for run, num in sizes.most_common(RUNS_SHOWN):
        name = f"run {run!r}" if run else "clients of no named run"
        words.append(f"{count(num)} of {'this run' if run == own else name}")
    num_more = len(sizes) - len(words)
    if num_more:
        rest = sum(num for _, num in sizes.most_common()[RUNS_SHOWN:])
        words.append(f"{count(rest)} of {num_more} more")
    return ", ".join(words)


def _at_pace(num_messages: int, pace: Pace | None) -> str:
    """How long messages take, and by what that is known."""
    if pace is None:
        return ""
    window = "minute" if pace.seconds >= WINDOW_S else f"{pace.seconds:.0f} s"
    seconds = pace.seconds_for(num_messages)
    if seconds is None:
        return f", and none was taken in the last {window}"
    return f"; {in_words(seconds)} at the rate of the last {window}"


def _why_idle(
    queue: str, workers: Sequence[Heartbeat], store: str, ended: Note | None
) -> str | None:
    """Why a queue gets nowhere, or None if some worker serves it."""
    own = [w for w in workers if queue in w.queues]
    if not own:
        return _nobody(queue, ended)
    if all(w.wire != WIRE_VERSION for w in own):
        return _of_other_versions(queue, own)
    if all(w.stuck for w in own):
        return _all_stuck(queue, own)
    if all(w.store != store for w in own):
        nodes = ", ".join(w.node for w in own)
        return f"no worker of queue {queue!r} uses this client's payload store ({nodes}); set REWARDQ_PAYLOAD_URL alike"
    return None


def _of_other_versions(queue: str, own: Sequence[Heartbeat]) -> str:
    versions = ", ".join(f"{w.node} speaks wire version {w.wire}" for w in own)
    nobody = f"queue {queue!r} has no worker that understands this client"
    return f"{nobody} (wire version {WIRE_VERSION}): {versions}; install the same rewardq on both and restart them"


def _all_stuck(queue: str, own: Sequence[Heartbeat]) -> str:
    stuck = "; ".join(f"{w.node}: {w.stuck}" for w in own)
    return (
        f"queue {queue!r} has no worker that takes messages ({stuck}); a stuck worker ends by itself soon; "
        "start it again, unless its supervisor does"
    )


def _nobody(queue: str, ended: Note | None) -> str:
    """A queue has no worker: what to start."""
    concurrency = " --concurrency 32" if queue == VLM else ""
    start = f"celery -A tasks worker -Q {queue}{concurrency}"
    if ended is None:
        return f"queue {queue!r} has no worker; start one: {start}"
    supervised = "start it again, unless its supervisor does"
    return f"queue {queue!r} has no worker: {ended.worker} ended: {ended.detail}; {supervised}: {start}"
