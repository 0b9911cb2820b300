"""Outcomes in Redis: look up, claim, write once, poll. The heart of delivery.

An outcome lives under its address (run, reward fingerprint, sample key). Whoever is about to score claims the address
first, so that a message may arrive twice, late, regrouped or never: the answer is the same.

* A reward stays for good (its TTL): no later twin replaces it. It replaces a failure.
* A failure carries its attempt number and answers requests up to that attempt.
* A claim holds a task's token and lives `claim_ttl_s` on Redis's clock unless it is extended.

Workers have `WorkerOutcomes`, which may claim and write. Clients have `ClientOutcomes`, which may look up only, so that
no code of a trainer can make an answer of its own.
"""

from tasks.outcomes.addresses import address, key_of
from tasks.outcomes.for_clients import Ahead, ClientOutcomes, QueueState
from tasks.outcomes.for_workers import Claim, WorkerOutcomes
from tasks.outcomes.shared import USUAL_STARTS

__all__ = [
    "USUAL_STARTS",
    "Ahead",
    "Claim",
    "ClientOutcomes",
    "QueueState",
    "WorkerOutcomes",
    "address",
    "key_of",
]
