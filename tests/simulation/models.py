"""The simulated reward models: what each sample gets is a function of its address, so that an oracle knows it.

Also the record of what was computed, and in which process: nothing may be computed twice without a fault that explains
it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tasks.messages import Failure, Outcome, SampleRequest
from tests.simulation.network import Server
from tests.simulation.world import BrokenPropertyError, Process, World

Behaviour = Literal["fine", "raises", "fails once", "kills", "hangs"]
"""What a call does for a sample: answers, raises, raises at the first attempt, ends its process, never returns."""

MESSAGES: Mapping[Behaviour, str] = {"raises": "bad luck"}

BEFORE_S = 3.0
"""A fault shortly before a payment counts too: a claim whose reply was lost is held late."""

PERMIT_S = 5.0
"""A permit of a judge's budget that its process does not give back is free after this long."""


def score_of(address: str) -> float:
    """The reward at an address: 257 values, so that some are equal."""
    return (zlib.crc32(address.encode()) % 257) / 256


def win_of(address: str) -> float:
    """What a comparison at an address says: the first member wins, neither, the second."""
    return (zlib.crc32(address.encode()) % 3) / 2


@dataclass(slots=True)
class Payment:
    """A call of a model for one sample."""

    at: float
    process: Process


@dataclass
class Models:
    """All reward models, as every worker has them."""

    world: World
    results: Server
    behaviours: dict[tuple[str, str], Behaviour] = field(default_factory=dict)
    """By fingerprint and key of a sample; fine unless named."""
    budgets: dict[str, int] = field(default_factory=dict)
    """By fingerprint of a judge: how many calls its fleet may make at once."""
    unloadable: set[str] = field(default_factory=set)
    """Fingerprints that no worker can load."""
    comparing: set[str] = field(default_factory=set)
    """Fingerprints of judges that compare two samples."""
    payments: dict[tuple[str, int], list[Payment]] = field(default_factory=dict)
    hung_with: set[str] = field(default_factory=set)
    """Addresses whose call hung, each with all that were in the same call."""
    _permits: dict[str, list[Payment]] = field(default_factory=dict)

    def behaviour(self, sample: SampleRequest) -> Behaviour:
        """What a call does for a sample, or for a group: what it does for the worst of its members."""
        found = [self._behaviour_at(one.address) for one in sample.members or (sample,) if one.failure is None]
        for worst in ("kills", "hangs", "raises"):
            if worst in found:
                return worst
        return "raises" if "fails once" in found and sample.attempt == 1 else "fine"

    def _behaviour_at(self, address: str) -> Behaviour:
        _run, fingerprint, key = address.split(":")
        return self.behaviours.get((fingerprint, key), "fine")

    def outcome(self, sample: SampleRequest, fingerprint: str) -> Outcome:
        """What a call that returns gives for a sample or a group."""
        if sample.members:
            return Outcome(members=tuple(self._of_member(sample, m) for m in sample.members))
        if self.behaviour(sample) == "raises":
            return Outcome(failure=Failure(kind="failed", message=MESSAGES["raises"]))
        of = win_of if fingerprint in self.comparing else score_of
        return Outcome(reward=of(sample.address))

    def _of_member(self, group: SampleRequest, member: SampleRequest) -> Outcome:
        if member.failure is not None:
            return Outcome(failure=member.failure)
        if self.behaviour(group) == "raises":
            return Outcome(failure=Failure(kind="failed", message=MESSAGES["raises"]))
        return Outcome(reward=score_of(f"{group.address} {member.address}"))

    # --- what it costs -----------------------------------------------------------------------------------------------

    def pay(self, samples: list[SampleRequest], process: Process) -> None:
        """A model is called for these samples.

        Raises:
            BrokenPropertyError: It was called for one of them before, and no fault has hit that call.
        """
        for sample in samples:
            earlier = self.payments.setdefault((sample.address, sample.attempt), [])
            for payment in earlier:
                since = payment.at - BEFORE_S
                if not payment.process.hit_since(since) and not self.results.hit_since(since):
                    raise BrokenPropertyError(
                        "paid twice",
                        f"{sample.address} (attempt {sample.attempt}) by {payment.process.name} at {payment.at:.3f} "
                        f"and by {process.name} at {self.world.now:.3f}, without a fault",
                    )
            earlier.append(Payment(self.world.now, process))

    def has_permit(self, fingerprint: str) -> bool:
        """Whether a judge can be asked now."""
        budget = self.budgets.get(fingerprint)
        return budget is None or len(self._in_use(fingerprint)) < budget

    def take_permit(self, fingerprint: str, process: Process) -> Payment | None:
        """A permit to ask a judge, if there is one left."""
        if not self.has_permit(fingerprint):
            return None
        permit = Payment(self.world.now, process)
        self._in_use(fingerprint).append(permit)
        return permit

    def give_back(self, fingerprint: str, permit: Payment) -> None:
        """A judge has answered."""
        self._in_use(fingerprint).remove(permit)

    def _in_use(self, fingerprint: str) -> list[Payment]:
        permits = self._permits.setdefault(fingerprint, [])
        permits[:] = [p for p in permits if not p.process.is_dead or p.at + PERMIT_S > self.world.now]
        return permits
