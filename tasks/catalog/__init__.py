"""Built-in reward models by name: where each lives, its queue, fields and options. Data only; nothing is imported.

An explicit table, so that a trainer checks names and options without importing torch. A new reward model is a line here
and an entry in one of the files beside.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Literal

from tasks.catalog.clip_models import AESTHETIC, CLIP, HPSV2, PICKSCORE
from tasks.catalog.entry import GPU, VLM, ModelEntry, Option
from tasks.catalog.jpeg import JPEG_COMPRESSIBILITY, JPEG_INCOMPRESSIBILITY
from tasks.catalog.judges import (
    PAIRWISE_JUDGE,
    RATIONAL_EDIT,
    RATIONAL_T2I,
    VLLM_EVALUATE,
)
from tasks.catalog.ocr import OCR
from tasks.catalog.remote import REMOTE_GROUPWISE, REMOTE_POINTWISE
from tasks.errors import UnknownRewardError, nearest

__all__ = [
    "ALIASES",
    "CATALOG",
    "GPU",
    "NOT_BUILT",
    "VLM",
    "ModelEntry",
    "Option",
    "find",
]

_POINTWISE: dict[str, ModelEntry] = {
    "OCR": OCR,
    "jpeg_compressibility": JPEG_COMPRESSIBILITY,
    "jpeg_incompressibility": JPEG_INCOMPRESSIBILITY,
    "PickScore": PICKSCORE,
    "CLIP": CLIP,
    "HPSv2": HPSV2,
    "aesthetic": AESTHETIC,
    "vllm_evaluate": VLLM_EVALUATE,
    "rational_rewards_t2i": RATIONAL_T2I,
    "rational_rewards_edit": RATIONAL_EDIT,
    "RemotePointwiseRewardModel": REMOTE_POINTWISE,
}
"""Each has a `<name>_Rank` as well."""

_GROUPWISE: dict[str, ModelEntry] = {
    "pairwise_judge": PAIRWISE_JUDGE,
    "RemoteGroupwiseRewardModel": REMOTE_GROUPWISE,
}

_TIES = Option(
    Literal["mean", "ordinal"],
    "mean",
    "equal scores share their mean rank, or rank in their order as in Flow-Factory",
)


def _rank_of(name: str, entry: ModelEntry) -> ModelEntry:
    """The entry of `<name>_Rank`."""
    return replace(
        entry,
        how="rank",
        part=name,
        options={**entry.options, "ties": _TIES},
        doc=f"rank of {name} within the group divided by the members ranked, in [0, (n - 1) / n]",
    )


_RANKS = {f"{name}_Rank": _rank_of(name, entry) for name, entry in _POINTWISE.items()}

CATALOG: dict[str, ModelEntry] = {**_POINTWISE, **_RANKS, **_GROUPWISE}
"""Every built-in by its canonical name."""

ALIASES: dict[str, str] = {
    "flow_factory.rewards.pick_score.PickScoreRewardModel": "PickScore",
    "flow_factory.rewards.pick_score.PickScoreRankRewardModel": "PickScore_Rank",
    "flow_factory.rewards.clip.CLIPRewardModel": "CLIP",
    "flow_factory.rewards.hpsv2_reward.HPSv2RewardModel": "HPSv2",
    "flow_factory.rewards.ocr.OCRRewardModel": "OCR",
    "flow_factory.rewards.vllm_evaluate.VLMEvaluateRewardModel": "vllm_evaluate",
    "flow_factory.rewards.rational_rewards_t2i.RationalRewardsT2IRewardModel": "rational_rewards_t2i",
    "flow_factory.rewards.rational_rewards_edit.RationalRewardsEditRewardModel": "rational_rewards_edit",
    "flow_factory.rewards.my_reward_remote.RemotePointwiseRewardModel": "RemotePointwiseRewardModel",
    "flow_factory.rewards.my_reward_remote.RemoteGroupwiseRewardModel": "RemoteGroupwiseRewardModel",
    "flow_factory.rewards.remote.RemotePointwiseRewardModel": "RemotePointwiseRewardModel",
    "flow_factory.rewards.remote.RemoteGroupwiseRewardModel": "RemoteGroupwiseRewardModel",
}
"""Dotted paths of Flow-Factory's built-ins to ours."""

NOT_BUILT = (
    "aesthetic_score", "clap", "consistent_editing", "geneval", "geneval2_soft_tifa", "geneval_ascend", "hpsv3",
    "imagebind", "image_reward", "imagereward", "ocr_v27", "qwen_image_bench", "sudoku", "unifiedreward", "unireward",
    "videoalign", "vision_reward", "visionreward",
)  # fmt: skip
"""Names of Flow-Factory's and of its forks whose configs load; a reward of that name is refused when it is used."""

SLIP = 0.8
"""From this likeness on an unknown name is taken for a built-in's, misspelt."""

_BY_LOWER = {name.lower(): name for name in CATALOG} | {
    path.lower(): name for path, name in ALIASES.items()
}


def find(name: str, *, may_be_unknown: bool = False) -> tuple[str, ModelEntry] | None:
    """The canonical name and entry of a built-in (case does not count); None for a dotted path and for `NOT_BUILT`.

    Args:
        name: As the config says it.
        may_be_unknown: None for other names as well, unless it is a built-in's misspelt: only evaluation uses it, and
            a name that it cannot use there is no reason to refuse the training's.

    Raises:
        UnknownRewardError: Neither a built-in nor a dotted path; the nearest built-in is named.
    """
    canonical = _BY_LOWER.get(name.lower())
    if canonical is not None:
        return canonical, CATALOG[canonical]
    if "." in name.strip(".") or name.lower() in NOT_BUILT:
        return None
    if may_be_unknown and not _is_misspelt(name):
        return None
    built_in = ", ".join(sorted((*_POINTWISE, *_GROUPWISE)))
    raise UnknownRewardError(
        f"unknown reward model {name!r}{nearest(name, CATALOG)}; built in: {built_in}, and <name>_Rank of the "
        "pointwise ones; a class of your own is named by its dotted path, my_rewards.MyReward"
    )


def _is_misspelt(name: str) -> bool:
    """Whether an unknown name is nearly a built-in's."""
    close = difflib.get_close_matches(name.lower(), _BY_LOWER, n=1, cutoff=SLIP)
    return bool(close)
