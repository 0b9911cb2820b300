"""What a reward is: its model, its options, and what it takes of a sample."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from tasks.catalog import CATALOG
from tasks.catalog.entry import How, ModelEntry
from tasks.messages import (
    MAX_BATCH,
    MAX_TIMEOUT_S,
    Dtype,
    ImageFormat,
    RewardCall,
)
from tasks.rewards.fields import SAMPLE_FIELDS
from tasks.rewards.fingerprint import fingerprint_of, instance_of
from tasks.rewards.numerals import in_exponent_form
from tasks.source.code import Code

DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "float32": "float32",
}
"""Names of dtypes as configs write them, to the name that travels."""

RAW, JPEG = "raw", "jpeg"
"""How pixels travel to a local model: uint8 as they are (lossless), or as JPEG at quality 95."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, found true or false")
    return value


def _text_of_number(value: Any) -> Any:
    """`version: 1` as YAML reads it is a number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _number_of_text(value: Any) -> Any:
    """`batch_size: 1e1` as YAML 1.1 reads it is a text."""
    found = in_exponent_form(value)
    return value if found is None else found


def _word_of_nan(value: Any) -> Any:
    """`on_failure: .nan`, the number as YAML writes it, means the word."""
    return "nan" if isinstance(value, float) and math.isnan(value) else value


Number = Annotated[float, BeforeValidator(_no_bool)]
FiniteNumber = Annotated[Number, Field(allow_inf_nan=False)]
Count = Annotated[
    int,
    BeforeValidator(_no_bool),
    BeforeValidator(_number_of_text),
    Field(ge=1, le=MAX_BATCH),
]


OnFailure = Literal["raise", "nan"]
"""What `collect()` makes of a sample without a reward: an error, or NaN in the batch."""


class ConstantOnFailure(BaseModel):
    """`on_failure: {value: x}`: a failed sample gets `x` in the rewards and is still listed as failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: FiniteNumber


class RewardSpec(BaseModel):
    """One entry of a `rewards:` block, checked. `fingerprint` names the computation, `name` is the user's."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    name: Annotated[str, Field(min_length=1, max_length=100)]
    reward_model: str
    """A built-in's canonical name, or the dotted path of a class in a module the worker allows."""
    weight: Number = 1.0
    dtype: str = "bfloat16"
    device: str = "cuda"
    """A wish; the worker's REWARDQ_DEVICE decides."""
    batch_size: Count = 16
    async_reward: bool = True
    """False holds the samples until `collect()`, for workers that share the trainer's GPU."""
    num_workers: Count = 1
    """Accepted for Flow-Factory's configs; concurrency is the workers'."""
    queue: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
    version: Annotated[str, BeforeValidator(_text_of_number), Field(max_length=500)] = (
        ""
    )
    """Of your own class: change it when its code changes, and old rewards are no answer any more."""
    on_failure: Annotated[
        OnFailure | ConstantOnFailure | None,
        BeforeValidator(_word_of_nan),
    ] = None
    timeout_s: Annotated[FiniteNumber, Field(gt=0, le=MAX_TIMEOUT_S)] = 600.0
    """Seconds for scoring one sample."""
    cache: bool = False
    """With a sampling judge: share its answer among equal samples instead of asking for each slot."""
    image_format: str = RAW
    """How pixels travel to a local model (`raw` is lossless, `jpeg` quality 95), or reach a judge."""
    options: dict[str, Any] = {}
    how: How = "each"
    """Sample by sample, or how a group's reward is computed."""
    required: tuple[tuple[str, ...], ...] = ()
    """Alternatives a sample must have; empty for a class of which only the worker knows what it needs."""
    fields: tuple[str, ...] = SAMPLE_FIELDS
    """What travels."""
    absent: str = ""
    """What is wrong where source on this host has no such class: told when the reward is used."""
    launch: str = ""
    """Set where edited code must not be answered with old rewards: `counts_launch`."""
    code: Code = ()
    """Of a class of the user's: its source when the config was parsed; empty where this host cannot read it."""

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("must be one line of printable characters")
        return name

    @field_validator("weight")
    @classmethod
    def _finite(cls, weight: float) -> float:
        if not math.isfinite(weight):
            raise ValueError(f"must be a finite number, found {weight}")
        return weight

    @property
    def is_builtin(self) -> bool:
        """Whether the model is in the catalog."""
        return self._entry is not None

    @property
    def is_built(self) -> bool:
        """Whether it can be used: false for a name, of Flow-Factory's or a fork's, that means nothing here."""
        return self.is_builtin or "." in self.reward_model

    @property
    def is_local(self) -> bool:
        """Whether the worker's own device computes it; a class of the user's counts as such."""
        return self._entry is None or self._entry.is_local

    @property
    def counts_launch(self) -> bool:
        """Whether it is another computation in each launch: the user's own code, without `version`."""
        is_users_code = self._entry is None or self._entry.is_yours
        return is_users_code and not self.version

    @property
    def is_groupwise(self) -> bool:
        """Whether it needs whole groups."""
        return self.how != "each"

    @property
    def is_combined(self) -> bool:
        """Whether a group's reward is computed from the answers for its parts, not by a model that sees the group."""
        return self.how in ("rank", "wins")

    @property
    def part(self) -> RewardSpec:
        """The reward whose outcomes this reward is made of, for a rank the reward that is ranked; else itself."""
        if self.how != "rank":
            return self
        scored = CATALOG[self.reward_model].part
        options = {
            name: value for name, value in self.options.items() if name != "ties"
        }
        return self.model_copy(
            update={
                "name": scored,
                "reward_model": scored,
                "how": "each",
                "options": options,
            }
        )

    @property
    def is_judge(self) -> bool:
        """Whether it asks an API, in the image format it names."""
        return self._entry is not None and self._entry.is_judge

    @property
    def model_version(self) -> str:
        """The catalog's version of a built-in, with the user's `version`."""
        ours = self._entry.version if self._entry is not None else ""
        return "/".join(version for version in (ours, self.version) if version)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name the computation: equal for two rewards whose outcomes are the same."""
        return fingerprint_of(self)

    @property
    def instance(self) -> str:
        """Cache key of the model on a worker: the fingerprint without the code."""
        return instance_of(self)

    @property
    def _entry(self) -> ModelEntry | None:
        """The catalog's entry of a built-in."""
        return CATALOG.get(self.reward_model)

    @property
    def counts_slot(self) -> bool:
        """Whether equal samples in different slots are different computations (a judge that samples)."""
        sampled = self._entry.sampled if self._entry is not None else None
        if sampled is None or self.cache:
            return False
        return bool(self.options.get(sampled, 0) > 0)

    @property
    def call(self) -> RewardCall:
        """The computation as workers are told it."""
        return RewardCall(
            name=self.name,
            model=self.reward_model,
            fingerprint=self.fingerprint,
            instance=self.instance,
            code=self.code,
            version=self.model_version,
            dtype=cast(Dtype, self.dtype),
            batch_size=self.batch_size,
            timeout_s=self.timeout_s,
            image_format=cast(ImageFormat, self.image_format),
            options=self.options,
        )

    def for_launch(self, launch: str) -> RewardSpec:
        """This reward as it stands in `launch`."""
        if not self.counts_launch:
            return self
        return self.model_copy(update={"launch": launch})
