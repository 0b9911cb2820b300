"""Rewards as configured: YAML to validated specs; fingerprints, queues and weights."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgpack
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from tasks import catalog
from tasks.catalog.entry import How, ModelEntry
from tasks.errors import ConfigError, UnknownRewardError, nearest
from tasks.messages import RewardCall
from tasks.numerals import in_exponent_form
from tasks.rewards import yaml_file as rewards_file
from tasks.rewards.options import answer_options, check_options
from tasks.rewards.yaml_keys import (
    KEYS,
    check_blocks,
    check_not_built,
    check_own_options,
    split_keys,
)
from tasks.source.class_names import check_class
from tasks.source.code import Code, code_of, digest_of
from tasks.source.declared import Declared, declared_by
from tasks.source.modules import why_not_read

log = logging.getLogger(__name__)

Split = Literal["train", "eval"]

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
"""Names of dtypes as configs write them, to the one that travels."""

RAW, JPEG = "raw", "jpeg"
SAMPLE_FIELDS = (
    "prompt", "image", "video", "audio", "condition_images", "condition_videos", "metadata", "fps", "sample_rate",
)  # fmt: skip
GENERATED = ("image", "video", "audio")
CONDITIONS = ("condition_images", "condition_videos")
THEIR_NAMES = {"audio_sample_rate": "sample_rate", "frame_rate": "fps"}
"""Fields as Flow-Factory calls them, to ours."""
BY_NAME = ("metadata", "fps", "sample_rate", *THEIR_NAMES)
"""What a class takes by naming it in its `__call__`, without declaring it, as in Flow-Factory: it is small."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, found true or false")
    return value


def _text_of_number(value: Any) -> Any:
    """`version: 1` as YAML reads it is a number."""
    return (
        str(value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else value
    )


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
    int, BeforeValidator(_no_bool), BeforeValidator(_number_of_text), Field(ge=1)
]


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
    version: Annotated[str, BeforeValidator(_text_of_number)] = ""
    """Of your own class: change it when its code changes, and old rewards are no answer any more."""
    on_failure: Annotated[
        Literal["raise", "nan"] | ConstantOnFailure | None,
        BeforeValidator(_word_of_nan),
    ] = None
    timeout_s: Annotated[FiniteNumber, Field(gt=0)] = 600.0
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
        return self.reward_model in catalog.CATALOG

    @property
    def is_built(self) -> bool:
        """Whether it can be used: false for a name, of Flow-Factory's or a fork's, that means nothing here."""
        return self.is_builtin or "." in self.reward_model

    @property
    def is_local(self) -> bool:
        """Whether the worker's own device computes it; a class of the user's counts as such."""
        return not self.is_builtin or catalog.CATALOG[self.reward_model].is_local

    @property
    def counts_launch(self) -> bool:
        """Whether it is another computation in each launch: the user's own code, without `version`."""
        return not self.version and (
            not self.is_builtin or catalog.CATALOG[self.reward_model].is_yours
        )

    @property
    def is_groupwise(self) -> bool:
        """Whether it needs whole groups."""
        return self.how != "each"

    @property
    def part(self) -> RewardSpec:
        """The reward whose outcomes this one is made of: what a rank ranks; else itself."""
        if self.how != "rank":
            return self
        entry = catalog.CATALOG[self.reward_model]
        options = {
            name: value for name, value in self.options.items() if name != "ties"
        }
        return self.model_copy(
            update={
                "name": entry.part,
                "reward_model": entry.part,
                "how": "each",
                "options": options,
            }
        )

    @property
    def is_judge(self) -> bool:
        """Whether it asks an API, in the image format it names."""
        return self.is_builtin and catalog.CATALOG[self.reward_model].is_judge

    @property
    def model_version(self) -> str:
        """The catalog's version of a built-in, with the user's `version`."""
        ours = catalog.CATALOG[self.reward_model].version if self.is_builtin else ""
        return "/".join(v for v in (ours, self.version) if v)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what makes two rewards the same computation: not name, weight, batch size, timeouts.

        Code of the user's counts as far as its source can be read: outcomes of two codes never mix.
        """
        return _hash(
            [*self._computation, digest_of(self.code)]
            if self.code
            else self._computation
        )

    @property
    def instance(self) -> str:
        """The fingerprint but for the code, of which a worker's process has only one: what its model is kept under."""
        return _hash(self._computation)

    @property
    def _computation(self) -> list[Any]:
        uses_dtype = (
            not self.is_builtin or catalog.CATALOG[self.reward_model].uses_dtype
        )
        return [
            self.reward_model
            if self.how != "model"
            else f"{self.reward_model} of groups",
            self.model_version,
            self.dtype if uses_dtype else "",
            _canonical(self._answer_options),
            self.image_format,
            self.launch,
        ]

    @property
    def _answer_options(self) -> Mapping[str, Any]:
        return (
            answer_options(catalog.CATALOG[self.reward_model], self.options)
            if self.is_builtin
            else self.options
        )

    @property
    def counts_slot(self) -> bool:
        """Whether equal samples in different slots are different computations (a judge that samples)."""
        sampled = (
            catalog.CATALOG[self.reward_model].sampled if self.is_builtin else None
        )
        return bool(sampled and self.options.get(sampled, 0) > 0 and not self.cache)

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
            dtype=self.dtype,
            batch_size=self.batch_size,
            timeout_s=self.timeout_s,
            image_format=self.image_format,
            options=self.options,
        )

    def for_launch(self, launch: str) -> RewardSpec:
        """This reward as it stands in `launch`."""
        return (
            self.model_copy(update={"launch": launch}) if self.counts_launch else self
        )


class RewardConfig(BaseModel):
    """The rewards of a run: for training, and for evaluation (the training rewards unless given)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    rewards: tuple[RewardSpec, ...]
    eval_rewards: tuple[RewardSpec, ...] = ()
    advantage_aggregation: Literal["gdpo", "sum"] = "gdpo"
    """From `train:`; how `client.advantages()` makes one advantage of several rewards."""
    global_std: bool = True
    """From `train:`; `sum` divides by the deviation of the whole batch, or else by that of each group."""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> RewardConfig:
        """Read the `rewards:` and `eval_rewards:` blocks of a YAML file.

        Its other blocks are the trainer's, but for `advantage_aggregation` and `global_std` in `train:`.

        Raises:
            ConfigError: The file cannot be read, is no YAML, a key is given twice, or a block is wrong.
        """
        return cls.from_dict(rewards_file.read(path), Path(path).parent)

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], folder: Path = Path()
    ) -> RewardConfig:
        """Check the `rewards` and `eval_rewards` of a parsed file (each a list, or one reward as a mapping).

        Relative file names in it start from `folder`.

        Raises:
            ConfigError: Says which reward and key is wrong, what was found and what is needed.
        """
        check_blocks(config)
        return cls(
            rewards=_parse_block(config["rewards"], "rewards", folder),
            eval_rewards=(
                ()
                if config.get("eval_rewards") in (None, [], {}, ())
                else _parse_block(
                    config["eval_rewards"], "eval_rewards", folder, for_evaluation=True
                )
            ),
            **_parse_train(config.get("train")),
        )

    def of(self, split: Split) -> tuple[RewardSpec, ...]:
        """The rewards of a split, for use.

        Raises:
            UnknownRewardError: One has a name that loads but is not built here, or is a class that its module does not
                have.
            ConfigError: There is no such split.
        """
        if split not in get_args(Split):
            raise ConfigError(f"split must be 'train' or 'eval', found {split!r}")
        specs = (self.eval_rewards or self.rewards) if split == "eval" else self.rewards
        for spec in specs:
            if spec.absent:
                raise UnknownRewardError(spec.absent)
            if not spec.is_built:
                raise UnknownRewardError(
                    f"reward {spec.name!r}: {spec.reward_model} is not built here"
                    f"{nearest(spec.reward_model, catalog.CATALOG)}; bring a class of your own and name it by its "
                    "dotted path, reward_model: my_rewards.MyReward"
                )
        return specs

    def for_launch(self, launch: str) -> RewardConfig:
        """This config as it stands in `launch`."""
        return self.model_copy(
            update={
                "rewards": tuple(r.for_launch(launch) for r in self.rewards),
                "eval_rewards": tuple(r.for_launch(launch) for r in self.eval_rewards),
            }
        )

    @property
    def queues(self) -> tuple[str, ...]:
        """Every queue that serves this config, in order of first use."""
        return tuple(
            dict.fromkeys(
                r.queue for r in (*self.rewards, *self.eval_rewards) if r.is_built
            )
        )


def _parse_block(
    block: Any, where: str, folder: Path, *, for_evaluation: bool = False
) -> tuple[RewardSpec, ...]:
    entries = [block] if isinstance(block, Mapping) else block
    if not isinstance(entries, list | tuple) or not entries:
        raise ConfigError(
            f"{where}: needs a list of rewards or one reward, found {_kind(block)}"
        )
    specs = tuple(
        _parse_reward(entry, f"{where}[{i}]", folder, for_evaluation)
        for i, entry in enumerate(entries)
    )
    names = [s.name for s in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(
            f"{where}: two rewards of the name {twice[0]!r}; give each its own"
        )
    return specs


def _parse_train(block: Any) -> dict[str, Any]:
    """What the trainer's own block says of advantages."""
    found: dict[str, Any] = {}
    if block is None:
        return found
    if not isinstance(block, Mapping):
        raise ConfigError(f"train: needs a mapping, found {_kind(block)}")
    method = block.get("advantage_aggregation")
    if method is not None:
        if method not in ("gdpo", "sum"):
            raise ConfigError(
                f"train: advantage_aggregation must be gdpo or sum, found {method!r}"
            )
        found["advantage_aggregation"] = method
    global_std = block.get("global_std")
    if global_std is not None:
        if not isinstance(global_std, bool):
            raise ConfigError(
                f"train: global_std must be true or false, found {global_std!r}"
            )
        found["global_std"] = global_std
    return found


@functools.cache
def _say_whose_concurrency() -> None:
    log.warning(
        "num_workers is accepted and not used: concurrency is the workers', celery worker --concurrency"
    )


def _say_default_url(where: str, url: str) -> None:
    log.warning(
        "%s has no api_base_url: each worker asks the judge at %s, on the worker's own host",
        where,
        url,
    )


def _parse_reward(
    entry: Any, where: str, folder: Path, for_evaluation: bool
) -> RewardSpec:
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{where}: needs a mapping with reward_model, found {_kind(entry)}"
        )
    model = entry.get("reward_model")
    if not isinstance(model, str) or not model.strip():
        raise ConfigError(
            f"{where}: reward_model must name a reward model, found {model!r}"
        )
    model = model.strip()
    found = catalog.find(model, may_be_unknown=for_evaluation)
    name = entry.get("name") or (found[0] if found else model)
    where = f"{where} ({' '.join(str(name).split())})"

    ours, beside, nested = split_keys(entry, where)
    known = {key: value for key, value in ours.items() if value is not None}
    check_not_built(beside, found[0] if found else model, where)
    options = {**nested, **beside}
    known["name"] = name
    if "dtype" in known:
        known["dtype"] = _dtype(known["dtype"], where)

    if found is None:
        check_own_options(model, beside, nested, where)
        _declare(known, model, where)
        known["reward_model"] = (
            model.lower() if model.lower() in catalog.NOT_BUILT else model
        )
        known["options"] = _plain(options, where)
        known["code"] = code_of(known["reward_model"])
    else:
        canonical, builtin = found
        for key in ("kind", "required_fields"):
            if key in known and key not in builtin.options:
                raise ConfigError(
                    f"{where}: {key} is for a class of your own; {canonical} has its own"
                )
        options |= _options_among(known, builtin, nested, where)
        known["how"] = builtin.how
        known.setdefault("queue", builtin.queue)
        known.setdefault("batch_size", builtin.batch_size)
        known.setdefault("timeout_s", builtin.timeout_s)
        known["reward_model"] = canonical
        known["options"] = check_options(
            canonical, builtin, options, KEYS, where, folder
        )
        if builtin.is_judge and "api_base_url" not in options:
            _say_default_url(where, known["options"]["api_base_url"])
        named = known["options"].get("required_fields")
        known["required"] = (
            builtin.required
            if not named
            else tuple((f,) for f in named if f not in BY_NAME)
        )
        known["fields"] = tuple(named or builtin.fields)
    _check_image_format(known, found[1] if found else None, where)
    try:
        spec = RewardSpec(**known)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        needs = (
            "needs raise, nan, or {value: a finite number}"
            if key == "on_failure"
            else first["msg"]
        )
        found_it = (
            "" if ", found " in needs else f" (found {known[key]!r})"
        )  # an error of ours says it
        raise ConfigError(
            f"{where}: {key}: {needs.removeprefix('Value error, ')}{found_it}"
        ) from None
    if spec.num_workers > 1:
        _say_whose_concurrency()
    most = found[1].max_batch_size if found else spec.batch_size
    return spec.model_copy(update={"batch_size": min(spec.batch_size, most)})


def _options_among(
    known: dict[str, Any], builtin: ModelEntry, nested: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Keys of ours that this built-in has an option of the same name for, taken out of `known`."""
    names = [key for key in known if key in builtin.options]
    for key in names:
        if key in nested:
            raise ConfigError(
                f"{where}: {key!r} is given twice, beside extra_kwargs and in it; say it once"
            )
    return {key: known.pop(key) for key in names}


def _declare(known: dict[str, Any], path: str, where: str) -> None:
    """What a class of the user's says of itself, where its source is at hand; the config's own words come first."""
    is_path = "." in path
    if is_path:
        known["absent"] = check_class(path, where, said=known)
    declared = declared_by(path) if is_path else None
    kind = (
        known.pop("kind", None) or (declared.kind if declared else None) or "pointwise"
    )
    if kind not in ("pointwise", "groupwise"):
        raise ConfigError(
            f"{where}: kind must be pointwise or groupwise, found {kind!r}"
        )
    known["how"] = "model" if kind == "groupwise" else "each"
    if "queue" not in known:
        known["queue"] = _queue_of(declared, path, where) if is_path else catalog.GPU
    given = known.pop("required_fields", None)
    named = (
        _fields_given(given, where) if given is not None else _fields_declared(declared)
    )
    if (
        named is None
    ):  # all that a sample has travels; the worker knows what the class takes
        return
    fields = tuple(dict.fromkeys(THEIR_NAMES.get(name, name) for name in named))
    unknown = [name for name in fields if name not in SAMPLE_FIELDS]
    if unknown:
        raise ConfigError(f"{where}: {no_such_field(unknown[0])}")
    media = tuple(name for name in fields if name in (*GENERATED, *CONDITIONS))
    known["required"] = (media,) if any(name in GENERATED for name in media) else ()
    known["fields"] = with_numbers(fields)


def no_such_field(name: str) -> str:
    """What to say of a field that no sample has."""
    return (
        f"a sample has no field {name!r}{nearest(str(name), SAMPLE_FIELDS)}; it has {', '.join(SAMPLE_FIELDS)} "
        "(a column of the data set is a key of its metadata)"
    )


def with_numbers(fields: tuple[str, ...]) -> tuple[str, ...]:
    """`fields` with those that go along: fps with videos, the sample rate with audio."""
    along = [
        number
        for medium, number in (("video", "fps"), ("audio", "sample_rate"))
        if medium in fields
    ]
    return tuple(dict.fromkeys((*fields, *along)))


def _queue_of(declared: Declared | None, path: str, where: str) -> str:
    """The queue that a class names, or the usual one."""
    if declared is None:
        _say_queue_is_taken(path, why_not_read(path.rpartition(".")[0]))
        return catalog.GPU
    if not declared.unread_queue:
        return declared.queue or catalog.GPU
    if declared.is_queue_assigned:
        raise ConfigError(
            f"{where}: {path} names a queue in a way that cannot be read without running its module "
            f"({declared.unread_queue}); say it in the config too, queue: its_name"
        )
    _say_queue_is_taken(path, declared.unread_queue)
    return catalog.GPU


@functools.cache
def _say_queue_is_taken(path: str, why: str) -> None:
    log.warning(
        "%s is sent to the queue %s: whether it names another cannot be read (%s); say it in the config, queue: %s",
        path, catalog.GPU, why, catalog.GPU,
    )  # fmt: skip


def _fields_given(given: Any, where: str) -> tuple[str, ...]:
    """The fields that a config names."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str) for name in names
    ):
        raise ConfigError(
            f"{where}: required_fields must be a list of fields of a sample, found {given!r}"
        )
    return tuple(names)


def _fields_declared(declared: Declared | None) -> tuple[str, ...] | None:
    """The fields that a class declares, with what it takes by naming it in its `__call__`; None if that is unknown."""
    if (
        declared is None
        or declared.required_fields is None
        or declared.optional_fields is None
    ):
        return None
    arguments = declared.arguments
    by_name = [name for name in BY_NAME if arguments is None or name in arguments]
    return (*declared.required_fields, *declared.optional_fields, *by_name)


def _check_image_format(
    known: dict[str, Any], builtin: ModelEntry | None, where: str
) -> None:
    is_judge = builtin is not None and builtin.is_judge
    allowed = ("png", "jpeg", "webp") if is_judge else (RAW, JPEG)
    known.setdefault(
        "image_format",
        builtin.image_format if builtin is not None and is_judge else RAW,
    )
    if known["image_format"] not in allowed:
        raise ConfigError(
            f"{where}: image_format must be one of {', '.join(allowed)}, found {known['image_format']!r}"
        )


def _dtype(value: Any, where: str) -> str:
    name = str(value).removeprefix("torch.").lower()
    if name not in DTYPES:
        raise ConfigError(
            f"{where}: dtype must be one of {', '.join(DTYPES)}, found {value!r}"
        )
    return DTYPES[name]


def _plain(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a dotted path as they arrive on a worker: anything that msgpack carries."""
    try:
        arrived: dict[str, Any] = msgpack.unpackb(msgpack.packb(dict(options)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{where}: options must be plain data (numbers, text, lists, mappings by text; what YAML takes for a date "
            f"goes in quotes): {error}"
        ) from None
    return arrived


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(msgpack.packb(parts)).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    """`value` with mappings in the order of their keys, so that equal options give equal bytes."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
