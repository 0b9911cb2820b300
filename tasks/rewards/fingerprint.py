"""The fingerprint of a reward: what makes two rewards the same computation, and so one's outcomes the other's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks.catalog import CATALOG
from tasks.catalog.entry import ModelEntry
from tasks.hashing import canonical, hash_of
from tasks.source.code import digest_of

if TYPE_CHECKING:
    from tasks.rewards.spec import RewardSpec

FINGERPRINT_DIGITS = 16


def fingerprint_of(spec: RewardSpec) -> str:
    """16 hex digits of what makes two rewards the same computation: not name, weight, batch size, timeouts.

    Code of the user's counts as far as its source can be read: outcomes of two codes never mix.
    """
    if not spec.code:
        return instance_of(spec)
    return hash_of([*_computation(spec), digest_of(spec.code)], FINGERPRINT_DIGITS)


def instance_of(spec: RewardSpec) -> str:
    """Cache key of the model on a worker: the fingerprint without the code, of which a process has only one."""
    return hash_of(_computation(spec), FINGERPRINT_DIGITS)


def answer_options(builtin: ModelEntry, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a built-in on which a reward may depend."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name not in builtin.options or builtin.options[name].is_answer:
            found[name] = value
    return found


# --- private -------------------------------------------------------------------------------------


def _computation(spec: RewardSpec) -> list[Any]:
    """The parts of a fingerprint. Their order and form are part of it: another one makes old rewards no answer."""
    builtin = CATALOG.get(spec.reward_model)
    uses_dtype = builtin is None or builtin.uses_dtype
    options = spec.options if builtin is None else answer_options(builtin, spec.options)
    of_groups = " of groups" if spec.how == "model" else ""
    return [
        f"{spec.reward_model}{of_groups}",
        spec.model_version,
        spec.dtype if uses_dtype else "",
        canonical(options),
        spec.image_format,
        spec.launch,
    ]
