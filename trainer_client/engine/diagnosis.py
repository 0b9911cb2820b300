"""What Redis can say about why something is late: queues without workers, loads, samples that ended their workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tasks.catalog import VLM
from tasks.messages import WIRE_VERSION, Heartbeat, Note
from tasks.outcomes import USUAL_STARTS, ClientOutcomes
from tasks.payloads import PayloadStore
from tasks.rewards import RewardSpec
from tasks.servers.connections import FULL, is_nearly_full
from trainer_client.engine.losses import loaders_of


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


def _why_idle(
    queue: str, workers: Sequence[Heartbeat], store: str, ended: Note | None
) -> str | None:
    """Why a queue gets nowhere, or None if some worker serves it."""
    own = [w for w in workers if queue in w.queues]
    if not own:
        return _nobody(queue, ended)
    if all(w.wire != WIRE_VERSION for w in own):
        versions = ", ".join(f"{w.node} speaks wire version {w.wire}" for w in own)
        nobody = f"queue {queue!r} has no worker that understands this client"
        return f"{nobody} (wire version {WIRE_VERSION}): {versions}; install the same rewardq on both and restart them"
    if all(w.stuck for w in own):
        stuck = "; ".join(f"{w.node}: {w.stuck}" for w in own)
        return (
            f"queue {queue!r} has no worker that takes messages ({stuck}); a stuck worker ends by itself soon; "
            "start it again, unless its supervisor does"
        )
    if all(w.store != store for w in own):
        nodes = ", ".join(w.node for w in own)
        return f"no worker of queue {queue!r} uses this client's payload store ({nodes}); set REWARDQ_PAYLOAD_URL alike"
    return None


def _nobody(queue: str, ended: Note | None) -> str:
    """A queue has no worker: what to start."""
    concurrency = " --concurrency 32" if queue == VLM else ""
    start = f"celery -A tasks worker -Q {queue}{concurrency}"
    if ended is None:
        return f"queue {queue!r} has no worker; start one: {start}"
    supervised = "start it again, unless its supervisor does"
    return f"queue {queue!r} has no worker: {ended.worker} ended: {ended.detail}; {supervised}: {start}"
