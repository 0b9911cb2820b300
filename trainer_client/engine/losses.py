"""Loss detection: when a delivery is looked after, when it counts as lost, and how its pauses grow."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.messages import Heartbeat
from tasks.rewards import RewardSpec
from trainer_client.engine.model import Awaited, Delivery

MAX_PAUSE_S = 30.0
"""A message that was sent several times is looked after at least this often."""


class LossPolicy:
    """Decides what a look at a delivery means.

    Args:
        look_every_s: REWARDQ_RECONCILE_S.
    """

    def __init__(self, look_every_s: float) -> None:
        self.look_every_s = look_every_s

    def sent(self, delivery: Delivery, now: float) -> None:
        """A message of it went just now."""
        delivery.sent_at = now
        delivery.look_at = now + self.look_every_s

    def first_pause_s(self, awaited: Sequence[Awaited]) -> float:
        """The pause of a new delivery: what was lost before keeps its grown pause."""
        pauses = [a.delivery.pause_s for a in awaited if a.delivery is not None]
        return max(pauses, default=self.look_every_s)

    def seen_in_hand(self, delivery: Delivery) -> None:
        """A worker has some of it in hand. (Not so of a group: its parts come and go.)"""
        if not delivery.spec.is_combined:
            delivery.was_claimed = True

    def is_lost(self, delivery: Delivery, num_missing: int, now: float) -> bool:
        """Whether it is to be sent again, if so much of it is neither answered, claimed nor queued.

        What was claimed at an earlier look and is no more goes at once: its worker died, or gave it back. Else it must
        be missed twice: a message may be between its queue and its claims.
        """
        has_paused = now >= delivery.sent_at + delivery.pause_s
        if num_missing and (
            delivery.was_claimed or (delivery.is_missed and has_paused)
        ):
            return True
        delivery.is_missed = num_missing > 0
        delivery.look_at = now + self.look_every_s
        return False

    def grow_pause(self, delivery: Delivery, now: float) -> None:
        """It is lost. Pauses grow where messages lead nowhere; where a worker took one and died, the next is looked
        after as soon."""
        if delivery.was_claimed:
            delivery.pause_s = self.look_every_s
        else:
            delivery.pause_s = min(2 * delivery.pause_s, MAX_PAUSE_S)
        delivery.is_missed = delivery.was_claimed = False
        self.sent(delivery, now)

    def not_read(self, delivery: Delivery, now: float) -> None:
        """A worker could not read it. Another may do better; not at once, or the two play ball."""
        delivery.is_missed = True
        delivery.look_at = now + delivery.pause_s


def loaders_of(spec: RewardSpec, workers: Sequence[Heartbeat]) -> list[str]:
    """Which workers load the model of a reward that waits for them; none does where another worker has it: a load that
    hangs is no reason to wait where somebody else could score."""
    own = [w for w in workers if spec.queue in w.queues]
    fingerprint = spec.part.fingerprint
    if any(fingerprint in w.loaded for w in own):
        return []
    return [w.node for w in own if fingerprint in w.loading]
