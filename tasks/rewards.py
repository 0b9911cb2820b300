"""Rewards as configured: YAML to validated specs; fingerprints, queues and weights."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgpack
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from tasks import catalog
from tasks.class_names import check_class
from tasks.classes import declared_by
from tasks.entries import How, ModelEntry
from tasks.errors import ConfigError, UnknownRewardError, nearest
from tasks.messages import RewardCall
from tasks.options import answer_options, check_options

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
SAMPLE_FIELDS = ("prompt", "image", "video", "audio", "condition_images", "condition_videos", "metadata")

_KEYS = (
    "name", "reward_model", "weight", "dtype", "device", "batch_size", "async_reward", "num_workers",
    "queue", "version", "on_failure", "timeout_s", "cache", "image_format", "kind", "required_fields", "extra_kwargs",
)  # fmt: skip


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, found true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
FiniteNumber = Annotated[Number, Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]


class ConstantOnFailure(BaseModel):
    """`on_failure: {value: x}`: a failed sample gets `x` in the rewards and is still listed as failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: FiniteNumber


class RewardSpec(BaseModel):
    """One entry of a `rewards:` block, checked. `fingerprint` names the computation, `name` is the user's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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
    version: str = ""
    """Of your own class: change it when its code changes, and old rewards are no answer any more."""
    on_failure: Literal["raise", "nan"] | ConstantOnFailure | None = None
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
    def is_local(self) -> bool:
        """Whether the worker's own device computes it; a class of the user's counts as such."""
        return not self.is_builtin or catalog.CATALOG[self.reward_model].is_local

    @property
    def counts_launch(self) -> bool:
        """Whether it is another computation in each launch: the user's own code, without `version`."""
        return not self.version and (not self.is_builtin or catalog.CATALOG[self.reward_model].is_yours)

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
        options = {name: value for name, value in self.options.items() if name != "ties"}
        return self.model_copy(
            update={"name": entry.part, "reward_model": entry.part, "how": "each", "options": options}
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
        """16 hex digits of what makes two rewards the same computation: not name, weight, batch size, timeouts."""
        uses_dtype = not self.is_builtin or catalog.CATALOG[self.reward_model].uses_dtype
        parts = [
            self.reward_model if self.how != "model" else f"{self.reward_model} of groups",
            self.model_version,
            self.dtype if uses_dtype else "",
            _canonical(self._answer_options),
            self.image_format,
            self.launch,
        ]
        return hashlib.sha256(msgpack.packb(parts)).hexdigest()[:16]

    @property
    def _answer_options(self) -> Mapping[str, Any]:
        return answer_options(catalog.CATALOG[self.reward_model], self.options) if self.is_builtin else self.options

    @property
    def counts_slot(self) -> bool:
        """Whether equal samples in different slots are different computations (a judge that samples)."""
        sampled = catalog.CATALOG[self.reward_model].sampled if self.is_builtin else None
        return bool(sampled and self.options.get(sampled, 0) > 0 and not self.cache)

    @property
    def call(self) -> RewardCall:
        """The computation as workers are told it."""
        return RewardCall(
            name=self.name,
            model=self.reward_model,
            fingerprint=self.fingerprint,
            version=self.model_version,
            dtype=self.dtype,
            batch_size=self.batch_size,
            timeout_s=self.timeout_s,
            image_format=self.image_format,
            options=self.options,
        )

    def for_launch(self, launch: str) -> RewardSpec:
        """This reward as it stands in `launch`."""
        return self.model_copy(update={"launch": launch}) if self.counts_launch else self


class RewardConfig(BaseModel):
    """The rewards of a run: for training, and for evaluation (the training rewards unless given)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

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
            ConfigError: The file cannot be read, is no YAML, or a block is wrong.
        """
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read the rewards file {os.fspath(path)}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{os.fspath(path)} is no YAML: {error}") from None
        if not isinstance(loaded, Mapping):
            raise ConfigError(f"{os.fspath(path)}: needs a mapping with a rewards: block, found {_kind(loaded)}")
        return cls.from_dict(loaded, Path(path).parent)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], folder: Path = Path()) -> RewardConfig:
        """Check the `rewards` and `eval_rewards` of a parsed file (each a list, or one reward as a mapping).

        Relative file names in it start from `folder`.

        Raises:
            ConfigError: Says which reward and key is wrong, what was found and what is needed.
        """
        if "rewards" not in config:
            raise ConfigError(f"no rewards: block; found the keys {', '.join(map(str, config)) or 'none'}")
        return cls(
            rewards=_parse_block(config["rewards"], "rewards", folder),
            eval_rewards=(
                ()
                if config.get("eval_rewards") in (None, [], {}, ())
                else _parse_block(config["eval_rewards"], "eval_rewards", folder)
            ),
            **_parse_train(config.get("train")),
        )

    def of(self, split: Split) -> tuple[RewardSpec, ...]:
        """The rewards of a split, for use.

        Raises:
            UnknownRewardError: One is a name of Flow-Factory's that loads but is not built here, or a class that its
                module does not have.
        """
        specs = (self.eval_rewards or self.rewards) if split == "eval" else self.rewards
        for spec in specs:
            if spec.absent:
                raise UnknownRewardError(spec.absent)
            if spec.reward_model in catalog.NOT_BUILT:
                raise UnknownRewardError(
                    f"reward {spec.name!r}: {spec.reward_model} is not built here; bring a class of your own and name "
                    "it by its dotted path, reward_model: my_rewards.MyReward"
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
        return tuple(dict.fromkeys(r.queue for r in (*self.rewards, *self.eval_rewards)))


def _parse_block(block: Any, where: str, folder: Path) -> tuple[RewardSpec, ...]:
    entries = [block] if isinstance(block, Mapping) else block
    if not isinstance(entries, list | tuple) or not entries:
        raise ConfigError(f"{where}: needs a list of rewards or one reward, found {_kind(block)}")
    specs = tuple(_parse_reward(entry, f"{where}[{i}]", folder) for i, entry in enumerate(entries))
    names = [s.name for s in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"{where}: two rewards of the name {twice[0]!r}; give each its own")
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
            raise ConfigError(f"train: advantage_aggregation must be gdpo or sum, found {method!r}")
        found["advantage_aggregation"] = method
    global_std = block.get("global_std")
    if global_std is not None:
        if not isinstance(global_std, bool):
            raise ConfigError(f"train: global_std must be true or false, found {global_std!r}")
        found["global_std"] = global_std
    return found


@functools.cache
def _say_whose_concurrency() -> None:
    log.warning("num_workers is accepted and not used: concurrency is the workers', celery worker --concurrency")


def _parse_reward(entry: Any, where: str, folder: Path) -> RewardSpec:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: needs a mapping with reward_model, found {_kind(entry)}")
    entry = dict(entry)
    model = entry.get("reward_model")
    if not isinstance(model, str) or not model.strip():
        raise ConfigError(f"{where}: reward_model must name a reward model, found {model!r}")
    found = catalog.find(model.strip())
    name = entry.get("name") or (found[0] if found else model)
    where = f"{where} ({' '.join(str(name).split())})"

    known: dict[str, Any] = {key: entry.pop(key) for key in _KEYS if key in entry and key != "extra_kwargs"}
    known = {key: value for key, value in known.items() if value is not None}
    nested = entry.pop("extra_kwargs", None)
    nested = {} if nested is None else nested
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{where}: extra_kwargs must be a mapping, found {_kind(nested)}")
    options = {**nested, **entry}
    known["name"] = name
    if "dtype" in known:
        known["dtype"] = _dtype(known["dtype"], where)

    if found is None:
        _declare(known, model.strip(), where)
        known["reward_model"] = model.strip().lower() if model.strip().lower() in catalog.NOT_BUILT else model.strip()
        known["options"] = _plain(options, where)
    else:
        canonical, builtin = found
        for key in ("kind", "required_fields"):
            if key in known and key not in builtin.options:
                raise ConfigError(f"{where}: {key} is for a class of your own; {canonical} has its own")
        options |= {key: known.pop(key) for key in tuple(known) if key in builtin.options}
        known["how"] = builtin.how
        known.setdefault("queue", builtin.queue)
        known.setdefault("batch_size", builtin.batch_size)
        known.setdefault("timeout_s", builtin.timeout_s)
        known["reward_model"] = canonical
        known["options"] = check_options(canonical, builtin, options, _KEYS, where, folder)
        named = known["options"].get("required_fields")
        known["required"] = builtin.required if not named else tuple((f,) for f in named if f != "metadata")
        known["fields"] = tuple(named or builtin.fields)
    _check_image_format(known, found[1] if found else None, where)
    try:
        spec = RewardSpec(**known)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        needs = "needs raise, nan, or {value: a finite number}" if key == "on_failure" else first["msg"]
        raise ConfigError(f"{where}: {key}: {needs} (found {known[key]!r})") from None
    if spec.num_workers > 1:
        _say_whose_concurrency()
    most = found[1].max_batch_size if found else spec.batch_size
    return spec.model_copy(update={"batch_size": min(spec.batch_size, most)})


def _declare(known: dict[str, Any], path: str, where: str) -> None:
    """What a class of the user's says of itself, where its source is at hand; the config's own words come first."""
    if path.lower() not in catalog.NOT_BUILT:
        known["absent"] = check_class(path, where, said=known)
    declared = declared_by(path)
    kind = known.pop("kind", None) or (declared.kind if declared else None) or "pointwise"
    if kind not in ("pointwise", "groupwise"):
        raise ConfigError(f"{where}: kind must be pointwise or groupwise, found {kind!r}")
    known["how"] = "model" if kind == "groupwise" else "each"
    known.setdefault("queue", (declared.queue if declared else None) or catalog.GPU)
    required = known.pop("required_fields", None)
    optional: tuple[str, ...] = ()
    if required is None and declared is not None and declared.kind is not None:
        required, optional = declared.required_fields, declared.optional_fields or ()
        required = ("prompt", "image") if required is None else required
    if required is None:
        return
    unknown = [f for f in (*required, *optional) if f not in SAMPLE_FIELDS]
    if unknown:
        raise ConfigError(
            f"{where}: a sample has no field {unknown[0]!r}{nearest(str(unknown[0]), SAMPLE_FIELDS)}; "
            f"it has {', '.join(SAMPLE_FIELDS)}"
        )
    known["required"] = tuple((f,) for f in required if f != "metadata")
    known["fields"] = tuple(dict.fromkeys((*required, *optional)))


def _check_image_format(known: dict[str, Any], builtin: ModelEntry | None, where: str) -> None:
    is_judge = builtin is not None and builtin.is_judge
    allowed = ("png", "jpeg", "webp") if is_judge else (RAW, JPEG)
    known.setdefault("image_format", builtin.image_format if builtin is not None and is_judge else RAW)
    if known["image_format"] not in allowed:
        raise ConfigError(f"{where}: image_format must be one of {', '.join(allowed)}, found {known['image_format']!r}")


def _dtype(value: Any, where: str) -> str:
    name = str(value).removeprefix("torch.").lower()
    if name not in DTYPES:
        raise ConfigError(f"{where}: dtype must be one of {', '.join(DTYPES)}, found {value!r}")
    return DTYPES[name]


def _plain(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a dotted path as they arrive on a worker: anything that msgpack carries."""
    try:
        arrived: dict[str, Any] = msgpack.unpackb(msgpack.packb(dict(options)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{where}: options must be plain data (numbers, text, lists, mappings by text): {error}"
        ) from None
    return arrived


def _canonical(value: Any) -> Any:
    """`value` with mappings in the order of their keys, so that equal options give equal bytes."""
    if isinstance(value, Mapping):
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]
