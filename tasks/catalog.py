"""Built-in reward models by name: where each lives, its queue, fields and options. Data only; nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.errors import UnknownRewardError, nearest

GPU = "gpu"
"""Queue of models that run in the worker."""

VLM = "vlm"
"""Queue of whatever waits on the network."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a built-in: its type (as pydantic checks it), default, and a line for the user."""

    type: Any
    default: Any
    doc: str


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What a trainer must know of a reward model without importing it.

    `required` is a list of alternatives: each inner tuple needs at least one of its fields.
    `version` changes whenever the same sample would get another reward, and is part of the fingerprint.
    """

    path: str
    queue: str
    required: tuple[tuple[str, ...], ...]
    version: str
    doc: str
    optional: tuple[str, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    extra: str | None = None
    kind: Literal["pointwise", "groupwise"] = "pointwise"
    batch_size: int = 16
    timeout_s: float = 600.0
    uses_dtype: bool = False
    sampled: str | None = None
    """Name of the option that makes answers random when above 0 (a judge's temperature)."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of a sample that travels for this model."""
        return (*(name for group in self.required for name in group), *self.optional)


_IMAGE_OR_VIDEO = ("image", "video")

_JUDGE_OPTIONS: dict[str, Option] = {
    "api_base_url": Option(str, "http://localhost:8000/v1", "URL of the OpenAI-compatible API, with its /v1"),
    "vlm_model": Option(str, "default", "model name as the server lists it"),
    "api_key": Option(str, "EMPTY", "EMPTY or empty; a real key is named by api_key_env"),
    "api_key_env": Option(str, "", "OPENAI_API_KEY or REWARDQ_KEY_*: the variable on the worker that holds the key"),
    "temperature": Option(float, 0.0, "sampling temperature; above 0 each slot is asked anew"),
    "timeout": Option(float, 60.0, "seconds for one request"),
    "max_retries": Option(int, 5, "retries of one request by the SDK"),
}

CATALOG: dict[str, ModelEntry] = {
    "OCR": ModelEntry(
        path="workers.models.ocr:OCR",
        queue=GPU,
        required=(("prompt",), _IMAGE_OR_VIDEO),
        optional=("metadata",),
        version="1",
        extra="ocr",
        doc="1 - edit distance / length between the quoted text of the prompt and the text read, in [0, 1]",
    ),
    "jpeg_compressibility": ModelEntry(
        path="workers.models.jpeg:JpegCompressibility",
        queue=GPU,
        required=(_IMAGE_OR_VIDEO,),
        version="1",
        doc="minus the kilobytes (1000 bytes) of the image as JPEG at quality 95: higher is more compressible",
    ),
    "jpeg_incompressibility": ModelEntry(
        path="workers.models.jpeg:JpegIncompressibility",
        queue=GPU,
        required=(_IMAGE_OR_VIDEO,),
        version="1",
        doc="kilobytes (1000 bytes) of the image as JPEG at quality 95",
    ),
    "vllm_evaluate": ModelEntry(
        path="workers.judges.yes_no:YesNoJudge",
        queue=VLM,
        required=(("prompt",), _IMAGE_OR_VIDEO),
        version="1",
        extra="judge",
        batch_size=1,
        timeout_s=300.0,
        sampled="temperature",
        options={
            **_JUDGE_OPTIONS,
            "question": Option(str, "", "template with {prompt}; ours covers naturalness, artifacts, aesthetics"),
            "top_logprobs": Option(int, 20, "candidates of the first token looked at, at most 20"),
        },
        doc="P(Yes) / (P(Yes) + P(No)) of the first token of a judge's answer, in [0, 1]",
    ),
}

ALIASES: dict[str, str] = {
    "flow_factory.rewards.vllm_evaluate.VLLMEvaluateRewardModel": "vllm_evaluate",
}
"""Dotted paths of Flow-Factory's built-ins to ours."""

_BY_LOWER = {name.lower(): name for name in CATALOG} | {path.lower(): name for path, name in ALIASES.items()}


def find(name: str) -> tuple[str, ModelEntry] | None:
    """The canonical name and entry of a built-in (case does not count), or None for a dotted path.

    Raises:
        UnknownRewardError: Neither a built-in nor a dotted path; the nearest built-in is named.
    """
    canonical = _BY_LOWER.get(name.lower())
    if canonical is not None:
        return canonical, CATALOG[canonical]
    if "." in name.strip("."):
        return None
    raise UnknownRewardError(
        f"unknown reward model {name!r}{nearest(name, CATALOG)}; built in: {', '.join(sorted(CATALOG))}; "
        "a class of your own is named by its dotted path, my_rewards.MyReward"
    )
