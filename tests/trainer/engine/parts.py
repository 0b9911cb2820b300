"""Awaited outcomes, slots and deliveries for tests of a single policy, which no engine has seen."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.rewards import RewardSpec
from tests.trainer.engine.by_hand import NOTHING_BESIDE, POINT
from trainer_client.engine.model import Awaited, Delivery, GroupPlan, Member, Slot
from trainer_client.engine.states import SentBy


def new_slot(index: int = 0, *, step: int = 0, group: object = "g", size: int | None = None) -> Slot:
    """A submitted sample."""
    return Slot(
        split="train",
        step=step,
        index=index,
        group=group,
        sample=None,
        held={},
        rewards=(POINT,),
        submitted_at=0.0,
        group_size=size,
    )


def new_awaited(
    address: str, spec: RewardSpec = POINT, *, steps: Sequence[int] = (0,), is_group: bool = False
) -> Awaited:
    """An outcome that a slot of each of these steps awaits."""
    group = GroupPlan(members=(), index_of={}) if is_group else None
    return Awaited(address, spec, group=group, slots=[new_slot(step=step) for step in steps])


def new_delivery(
    request: str, spec: RewardSpec = POINT, *, num_awaited: int = 1, parts: Sequence[str] = (), pause_s: float = 1.0
) -> Delivery:
    """A message."""
    awaited = [new_awaited(f"{request}/{number}", spec) for number in range(num_awaited)]
    return Delivery(request, "label", spec, SentBy.US, awaited, pause_s, part_requests=tuple(parts))


def new_member(spec: RewardSpec, slot: Slot, key: str = "") -> Member:
    """A member of a group."""
    key = key or f"key{slot.index}"
    return Member(slot, spec, key=key, address=f"address of {key}", prompt="prompt", beside=NOTHING_BESIDE)
