"""The catalog's entries of the built-in judges: their options, defaults and bounds. Data only.

The `version` of an entry counts our question or rubric and how its answer is read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tasks.catalog.entry import IMAGE_OR_VIDEO, VLM, ModelEntry, Option
from tasks.servers.http_urls import DEFAULT_JUDGE_URL, ApiUrls
from tasks.settings import Seconds

T2I_ASPECTS = ("text_faithfulness", "physical_quality", "text_rendering")
"""What the rubric for generated images scores, in its order."""

EDIT_ASPECTS = (
    "text_faithfulness",
    "image_faithfulness",
    "physical_quality",
    "text_rendering",
)
"""What the rubric for edited images scores, in its order."""

_T2IAspect = Literal["text_faithfulness", "physical_quality", "text_rendering"]
_EditAspect = Literal[
    "text_faithfulness", "image_faithfulness", "physical_quality", "text_rendering"
]
_Count = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Positive = Annotated[int, Field(ge=1)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _asking(model: str, temperature: float, timeout: float) -> dict[str, Option]:
    """Options of every judge."""
    return {
        "api_base_url": Option(
            ApiUrls,
            DEFAULT_JUDGE_URL,
            "URL of the OpenAI-compatible API with its /v1, or a list: the least busy is asked",
        ),
        "vlm_model": Option(
            str,
            model,
            "model name as the server takes it; empty for the only one it lists",
        ),
        "api_key": Option(
            str,
            "EMPTY",
            "EMPTY or empty; a real key is named by api_key_env",
            is_answer=False,
        ),
        "api_key_env": Option(
            str,
            "",
            "OPENAI_API_KEY or REWARDQ_KEY_*: the variable on the worker that holds the key",
            is_answer=False,
        ),
        "temperature": Option(
            Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)],
            temperature,
            "sampling temperature; above 0 each slot is asked anew unless cache: true",
        ),
        "timeout": Option(
            Seconds,
            timeout,
            "seconds for one request; timeout_s is for all of a sample",
            is_answer=False,
        ),
        "max_retries": Option(
            _Count,
            5,
            "repeats of a request that 408, 409, 429, 5xx or no connection ended",
            is_answer=False,
        ),
        "max_concurrent": Option(
            _Count,
            0,
            "samples of a chunk asked at once; 0 asks one after another",
            is_answer=False,
        ),
        "fleet_max_concurrent": Option(
            _Count,
            0,
            "requests in flight at one endpoint over all workers; 0 is no bound",
            is_answer=False,
        ),
        "frames": Option(
            _Positive,
            1,
            "frames of a video that the judge sees, evenly spaced; 1 is the first",
        ),
        "extra_body": Option(
            dict[str, Any],
            {},
            "further fields of the request, vLLM's chat_template_kwargs for example",
        ),
    }


def _rubric(doc: str) -> dict[str, Option]:
    """Options of a judge whose instructions can be replaced."""
    return {
        "rubric": Option(str, "", doc),
        "rubric_file": Option(
            str,
            "",
            "a text file with such a rubric, relative to the rewards file",
            reads="rubric",
        ),
    }


def _rational(aspect: Any, aspects: tuple[str, ...], model: str) -> dict[str, Option]:
    """Options of a rubric judge."""
    return {
        **_asking(model, temperature=0.1, timeout=180.0),
        "max_tokens": Option(
            _Positive, 2048, "longest reply; one that is cut is unparsable"
        ),
        "aspects": Option(
            Annotated[list[aspect], Field(min_length=1)],
            list(aspects),
            "the aspects that count for the reward",
        ),
        "aspect_weights": Option(
            dict[aspect, _Weight],
            {},
            "weights of aspects in the mean; 1 where none is given",
        ),
        "missing_aspects": Option(
            Literal["unparsable", "skip"],
            "unparsable",
            "what a reply without one of the aspects is; skip takes the mean of the others, as Flow-Factory does",
        ),
        **_rubric(
            "instructions with {prompt} and an <image> for each image; ours unless given"
        ),
    }


def _judge(**fields: Any) -> ModelEntry:
    """A judge that sees an image or video with its prompt, unless `fields` say otherwise."""
    usual: dict[str, Any] = {
        "queue": VLM,
        "required": (("prompt",), IMAGE_OR_VIDEO),
        "extra": "judge",
        "batch_size": 1,
        "max_batch_size": 4,
        "timeout_s": 600.0,
        "sampled": "temperature",
    }
    return ModelEntry(**{**usual, **fields})


VLLM_EVALUATE = _judge(
    path="workers.judges.yes_no:YesNoJudge",
    version="3",
    image_format="jpeg",
    timeout_s=300.0,
    options={
        **_asking("", temperature=0.0, timeout=60.0),
        "question": Option(
            str,
            "",
            "a yes/no question, a template with {prompt}; ours unless given",
        ),
        "top_logprobs": Option(
            Annotated[int, Field(ge=1, le=20)],
            20,
            "candidates of the first token that are looked at",
        ),
        "canonicalize": Option(
            bool,
            True,
            "sum Yes, yes, '**YES' and the like; false takes exactly Yes and No, as Flow-Factory does",
        ),
        "min_answer_mass": Option(
            _Share,
            0.25,
            "P(Yes) + P(No) below which a sample is unparsable; 0 takes any, as Flow-Factory does",
        ),
        "max_cache_size": Option(
            _Count,
            0,
            "accepted for Flow-Factory's configs; not used",
            is_answer=False,
        ),
    },
    doc="P(Yes) / (P(Yes) + P(No)) of the first token of a judge's answer, in [0, 1]",
)

RATIONAL_T2I = _judge(
    path="workers.judges.rational:RationalT2I",
    version="2",
    image_format="png",
    options=_rational(_T2IAspect, T2I_ASPECTS, "RationalRewards-8B-T2I"),
    doc="(mean - 1) / 3 of aspect scores in [1, 4] that a judge gives an image by a rubric, in [0, 1]",
)

RATIONAL_EDIT = _judge(
    path="workers.judges.rational:RationalEdit",
    required=(("prompt",), IMAGE_OR_VIDEO, ("condition_images",)),
    version="2",
    image_format="png",
    options=_rational(_EditAspect, EDIT_ASPECTS, "RationalRewards-8B-Edit"),
    doc="the same for an edit: the first condition image is its source; one more aspect, image_faithfulness",
)

PAIRWISE_JUDGE = _judge(
    path="workers.judges.pairwise:PairwiseJudge",
    version="2",
    how="wins",
    image_format="jpeg",
    options={
        **_asking("", temperature=0.0, timeout=120.0),
        "max_tokens": Option(_Positive, 512, "longest reply; one that is cut abstains"),
        "opponents": Option(
            Literal["all"] | _Positive,
            "all",
            "how many others each member is compared with, in both orders",
        ),
        **_rubric("instructions with {prompt} and two <image>; ours unless given"),
    },
    doc="share of comparisons with members of its group that a judge lets it win, tie = half, in [0, 1]",
)
