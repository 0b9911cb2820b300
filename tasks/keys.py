"""Every Redis key of this pipeline, in one place; all but the counters of queues and a store's identity carry a TTL."""

from __future__ import annotations

ROOT = "rewardq:"


def outcome(address: str) -> str:
    """The outcome at `address` (run, fingerprint, sample key). Written by workers, read by clients."""
    return f"{ROOT}outcome:{address}"


def claim(address: str) -> str:
    """The token of the task that is scoring `address` now; its TTL is kept alive by the worker's heartbeat."""
    return f"{ROOT}claim:{address}"


def starts(address: str) -> str:
    """How often a claim on `address` started without an answer so far (a hash)."""
    return f"{ROOT}starts:{address}"


def note(request_id: str) -> str:
    """What a worker tells the client about a request it could not read (no outcome)."""
    return f"{ROOT}note:{request_id}"


def sent_number(queue: str) -> str:
    """Counter: the number of the last message sent to `queue`."""
    return f"{ROOT}sent:{queue}"


def taken_number(queue: str) -> str:
    """The highest message number a worker took from `queue`."""
    return f"{ROOT}taken:{queue}"


def worker(node: str) -> str:
    """The heartbeat of one worker: what it serves and its state."""
    return f"{ROOT}worker:{node}"


def group(
    run: str, launch: str, split: str, step: int, fingerprint: str, group: str
) -> str:
    """The slots of one group across ranks (a hash): keys and members, and the digest once it is complete."""
    return f"{ROOT}group:{run}:{launch}:{split}:{step}:{fingerprint}:{group}"


def answer(run: str, launch: str, topic: str, count: int, rank: int) -> str:
    """What one rank tells the others about a topic of a step."""
    return f"{ROOT}answer:{run}:{launch}:{topic}:{count}:{rank}"


def trainer(run: str, launch: str, rank: int) -> str:
    """Which trainer process is this rank; kept alive by it."""
    return f"{ROOT}trainer:{run}:{launch}:{rank}"


def run(run: str) -> str:
    """What is known of a run (a hash): its rewards by fingerprint, and the code that answered each. By clients."""
    return f"{ROOT}run:{run}"


def ranks(run: str, launch: str) -> str:
    """What each rank of a launch has read of the user's code (a hash)."""
    return f"{ROOT}ranks:{run}:{launch}"


def judge_permits(endpoint: str) -> str:
    """Sorted set: requests in flight at a judge's endpoint, of all workers, by expiry (Redis's clock, ms)."""
    return f"{ROOT}judge:{endpoint}"


WORKERS = f"{ROOT}workers"
"""Sorted set of worker node names by the time (Redis's clock, ms) at which their heartbeat expires."""

ROOM = f"{ROOT}room"
"""Written to learn whether a server takes writes; means nothing."""

PROBE = f"{ROOT}probe:"
"""Begins keys that live for seconds, to learn what a server lets us do."""

STORE_IDENTITY = f"{ROOT}store"
"""In the payload store's Redis: its identity, a random text."""

PAYLOAD_LEDGER = f"{ROOT}ledger"
"""In the payload store's Redis: sorted set of `<num_bytes>|<payload key>` by expiry (Redis's clock, ms)."""

PAYLOAD_BYTES = f"{ROOT}ledger_bytes"
"""In the payload store's Redis: the sum over the ledger."""


def payload(name: str) -> str:
    """Media bytes, or a request; `name` is `<client id>.<digest or request id>`."""
    return f"{ROOT}payload:{name}"
