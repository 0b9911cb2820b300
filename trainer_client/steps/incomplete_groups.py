"""Groups that lack members when their step is collected: on one rank nobody else can submit what is missing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from tasks.rewards import OnFailure, RewardSpec
from trainer_client.steps.open_steps import OpenStep

GROUPS_SHOWN = 3
"""So many incomplete groups are named in an error."""

WHAT_TO_DO = "submit() what is missing before collect(), or give the group_size= that the groups have"


def incomplete_groups(step: OpenStep) -> dict[Hashable, str]:
    """The groups of a step with fewer members than their `group_size`, and what to say of each."""
    found: dict[Hashable, str] = {}
    for group, size in step.group_sizes.items():
        num_members = step.members[group]
        if size is not None and num_members < size:
            there = f"has {num_members} of {size} members, {size - num_members} missing"
            found[group] = f"group {group!r} of step {step.number} {there}"
    return found


def why_not_to_wait(
    incomplete: Mapping[Any, str], rewards: Sequence[RewardSpec], on_failure: OnFailure
) -> str | None:
    """What `collect()` raises at once, without a wait; None if it has to wait.

    It need not wait if it will raise in any case: a groupwise reward of an incomplete group fails, and its failures
    raise.
    """
    raising = []
    for reward in rewards:
        if reward.is_groupwise and (reward.on_failure or on_failure) == "raise":
            raising.append(reward.name)
    if not incomplete or not raising or on_failure != "raise":
        return None

    shown = list(incomplete.values())[:GROUPS_SHOWN]
    num_more = len(incomplete) - len(shown)
    more = f"; and {num_more} more groups" if num_more else ""
    return f"not waited for: {'; '.join(shown)}{more}; {WHAT_TO_DO} ({', '.join(raising)} needs whole groups)"
