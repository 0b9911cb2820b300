"""Groups that lack members when their step is collected: on one rank nobody else can submit what is missing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from tasks.rewards import RewardSpec
from trainer_client.ranks.verdict import OnFailure
from trainer_client.steps.open_steps import Step

GROUPS_SHOWN = 3
"""So many of them are named."""

WHAT_TO_DO = "submit() what is missing before collect(), or give the group_size= that the groups have"


def incomplete_groups(step: Step) -> dict[Hashable, str]:
    """The groups of a step with fewer members than their `group_size`, and what to say of each."""
    found: dict[Hashable, str] = {}
    for group, size in step.group_sizes.items():
        num_members = step.members[group]
        if size is not None and num_members < size:
            there = f"has {num_members} of {size} members, {size - num_members} missing"
            found[group] = f"group {group!r} of step {step.number} {there}"
    return found


def why_in_vain(
    incomplete: Mapping[Any, str], rewards: Sequence[RewardSpec], on_failure: OnFailure
) -> str | None:
    """What `collect()` raises at once: a groupwise reward whose failures raise cannot be had. None if it need not."""
    raising = [
        r.name
        for r in rewards
        if r.is_groupwise and (r.on_failure or on_failure) == "raise"
    ]
    if not incomplete or not raising or on_failure != "raise":
        return None
    shown = list(incomplete.values())[:GROUPS_SHOWN]
    more = (
        f"; and {len(incomplete) - len(shown)} more groups"
        if len(incomplete) > len(shown)
        else ""
    )
    return f"not waited for: {'; '.join(shown)}{more}; {WHAT_TO_DO} ({', '.join(raising)} needs whole groups)"
