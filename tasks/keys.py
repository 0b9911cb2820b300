"""Every Redis key of this pipeline. All but queues, their counters and the identity of a store have a TTL."""

from __future__ import annotations

ROOT = "rewardq:"

BROKER = f"{ROOT}queue:"
"""Prefix of all that Celery keeps in the broker's Redis: queues, bindings, mailboxes and channels. The messages of the
queue `gpu` are in `rewardq:queue:gpu`. A queue `gpu` of another Celery application in the same Redis has other keys."""

PRIORITY_SEPARATOR = "\x06\x16"
PRIORITY_STEPS = ("", "3", "6", "9")
"""Kombu's: it makes a list for each of four steps of priority, and names the first one like the queue."""


def queue_lists(queue: str) -> tuple[str, ...]:
    """The lists that have the messages of a queue, those that go first first."""
    first, *others = PRIORITY_STEPS
    name = f"{BROKER}{queue}{first}"
    return (name, *(f"{name}{PRIORITY_SEPARATOR}{step}" for step in others))


def outcome(address: str) -> str:
    """The outcome at `address` (run, fingerprint, sample key). Written by workers, read by clients."""
    return f"{ROOT}outcome:{address}"


def claim(address: str) -> str:
    """The token of the task that is scoring `address` now; its TTL is kept alive by the worker's heartbeat."""
    return f"{ROOT}claim:{address}"


def starts(address: str) -> str:
    """How often scoring `address` was started without an answer so far: its delivery count (a hash)."""
    return f"{ROOT}starts:{address}"


def note(request_id: str) -> str:
    """A worker's note to the client about a request that the worker could not read; no outcome."""
    return f"{ROOT}note:{request_id}"


def sent_number(queue: str) -> str:
    """Counter: the number of the last message that a client sent to `queue`."""
    return f"{ROOT}sent:{queue}"


def consumed_offset(queue: str) -> str:
    """The highest number of a message that a worker took from `queue`."""
    return f"{ROOT}taken:{queue}"


def senders(queue: str) -> str:
    """Sorted set: which run has sent which messages of `queue`, `<first number>|<run>` by the last number."""
    return f"{ROOT}senders:{queue}"


def worker(node: str) -> str:
    """The heartbeat of one worker: what it serves and its state."""
    return f"{ROOT}worker:{node}"


def group(
    run: str, launch: str, split: str, step: int, fingerprint: str, group: str
) -> str:
    """The slots of one group across ranks (a hash): keys and members, and the digest once it is complete."""
    return f"{ROOT}group:{run}:{launch}:{split}:{step}:{fingerprint}:{group}"


def answer(run: str, launch: str, topic: str, count: int, rank: int) -> str:
    """What one rank tells the other ranks about a topic of a step."""
    return f"{ROOT}answer:{run}:{launch}:{topic}:{count}:{rank}"


def trainer(run: str, launch: str, rank: int) -> str:
    """The rank lock: which trainer process is this rank. The process keeps it alive."""
    return f"{ROOT}trainer:{run}:{launch}:{rank}"


def run(run: str) -> str:
    """The registry of a run (a hash): its rewards by fingerprint, and the code of each. Written by clients."""
    return f"{ROOT}run:{run}"


def ranks(run: str, launch: str) -> str:
    """The hashes of the user's code that each rank of a launch has read (a hash)."""
    return f"{ROOT}ranks:{run}:{launch}"


def judge_permits(endpoint: str) -> str:
    """Sorted set: requests in flight at a judge's endpoint, of all workers, by expiry (Redis's clock, ms)."""
    return f"{ROOT}judge:{endpoint}"


WORKERS = f"{ROOT}workers"
"""Sorted set of worker node names by the time (Redis's clock, ms) at which their heartbeat expires."""

ROOM = f"{ROOT}room"
"""Written to learn whether a server takes writes. Its value means nothing."""

PROBE = f"{ROOT}probe:"
"""Prefix of keys that live for seconds, and are written to learn which commands a server allows."""

STORE_IDENTITY = f"{ROOT}store"
"""In the payload store's Redis: its identity, a random text."""

PAYLOAD_LEDGER = f"{ROOT}ledger"
"""In the payload store's Redis: sorted set of `<num_bytes>|<payload key>` by expiry (Redis's clock, ms)."""

PAYLOAD_BYTES = f"{ROOT}ledger_bytes"
"""In the payload store's Redis: the sum over the ledger."""


def payload(name: str) -> str:
    """Media bytes, or a request; `name` is `<client id>.<digest or request id>`."""
    return f"{ROOT}payload:{name}"
