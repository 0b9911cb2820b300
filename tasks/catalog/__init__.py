"""Built-in reward models by name: where each lives, its queue, fields and options. Data only; nothing is imported."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Literal

from tasks.catalog.clip_models import CLIPS
from tasks.catalog.entry import GPU, IMAGE_OR_VIDEO, VLM, ModelEntry, Option
from tasks.catalog.judges import JUDGES
from tasks.catalog.remote import REMOTES
from tasks.errors import UnknownRewardError, nearest

__all__ = ["ALIASES", "CATALOG", "GPU", "VLM", "ModelEntry", "Option", "find"]

_POINTWISE: dict[str, ModelEntry] = {
    "OCR": ModelEntry(
        path="workers.models.ocr:OCR",
        queue=GPU,
        required=(("prompt",), IMAGE_OR_VIDEO),
        optional=("metadata",),
        version="2",
        extra="ocr",
        options={
            "lang": Option(
                Literal[
                    "",
                    "latin",
                    "eslav",
                    "cyrillic",
                    "korean",
                    "el",
                    "th",
                    "devanagari",
                    "ta",
                    "te",
                ],
                "",
                "which PP-OCRv5 recognition model RapidOCR fetches; empty for the one in its wheel (Chinese, Japanese, "
                "English and most Latin letters)",
            ),
            "rec_model_path": Option(
                str,
                "",
                "a recognition model in ONNX on the worker, in the place of those",
            ),
            "rec_keys_path": Option(
                str,
                "",
                "that model's characters, one a line, where the model does not have them",
            ),
            "several_texts": Option(
                Literal["invalid", "mean"],
                "invalid",
                "what becomes of several texts in metadata: invalid, or their mean",
            ),
        },
        doc="1 - edit distance / length between the quoted text of the prompt and the text read, in [0, 1]",
    ),
    "jpeg_compressibility": ModelEntry(
        path="workers.models.jpeg:JpegCompressibility",
        queue=GPU,
        required=(IMAGE_OR_VIDEO,),
        version="1",
        doc="minus the kilobytes (1000 bytes) of the image as JPEG at quality 95: higher is more compressible",
    ),
    "jpeg_incompressibility": ModelEntry(
        path="workers.models.jpeg:JpegIncompressibility",
        queue=GPU,
        required=(IMAGE_OR_VIDEO,),
        version="1",
        doc="kilobytes (1000 bytes) of the image as JPEG at quality 95",
    ),
    **CLIPS,
    **{
        name: entry for name, entry in (JUDGES | REMOTES).items() if entry.how == "each"
    },
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


CATALOG: dict[str, ModelEntry] = {
    **_POINTWISE,
    **{f"{name}_Rank": _rank_of(name, entry) for name, entry in _POINTWISE.items()},
    **{
        name: entry for name, entry in (JUDGES | REMOTES).items() if entry.how != "each"
    },
}

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
    if may_be_unknown and not difflib.get_close_matches(
        name.lower(), _BY_LOWER, n=1, cutoff=SLIP
    ):
        return None
    raise UnknownRewardError(
        f"unknown reward model {name!r}{nearest(name, CATALOG)}; built in: "
        f"{', '.join(sorted(n for n, e in CATALOG.items() if not e.part))}, and <name>_Rank of the pointwise "
        "ones; a class of your own is named by its dotted path, my_rewards.MyReward"
    )
