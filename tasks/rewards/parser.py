"""From the blocks of a config, as YAML or a dict has them, to checked specs of rewards."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from pydantic import ValidationError

from tasks import catalog
from tasks.catalog.entry import ModelEntry
from tasks.errors import ConfigError
from tasks.rewards.fields import BY_NAME
from tasks.rewards.options import check_options
from tasks.rewards.own_class import fields_of_own_class
from tasks.rewards.queues import queue_of_builtin
from tasks.rewards.spec import DTYPES, JPEG, RAW, RewardSpec
from tasks.rewards.yaml_file import NO_LINES, Lines
from tasks.rewards.yaml_keys import (
    KEYS,
    as_found,
    check_not_built,
    check_own_options,
    given_twice,
    split_keys,
)
from tasks.source.code import code_of

log = logging.getLogger(__name__)

MAX_REWARDS = 200
"""Rewards of a block."""

MAX_NAME = 500
"""Characters of a reward model's name or dotted path."""

OWN_CLASS_KEYS = ("kind", "required_fields")
"""Keys of ours that are for a class of the user's only."""


def parse_block(
    block: Any,
    where: str,
    folder: Path,
    lines: Lines = NO_LINES,
    *,
    for_evaluation: bool = False,
) -> tuple[RewardSpec, ...]:
    """The rewards of a block: a list of rewards, or one as a mapping.

    Args:
        block: As the config has it.
        where: The block's key, for errors.
        folder: What relative file names start from.
        lines: Where the block and its entries stand, for errors.
        for_evaluation: Names that mean nothing here are let pass; see `catalog.find`.

    Raises:
        ConfigError: Says which reward and key is wrong, what was found and what is needed.
    """
    with lines.told(where):
        entries = _entries(block, where)
    specs = []
    for i, entry in enumerate(entries):
        with lines.told(where, i):
            specs.append(_parse_reward(entry, f"{where}[{i}]", folder, for_evaluation))
    with lines.told(where):
        _check_names(specs, where)
    return tuple(specs)


def _entries(block: Any, where: str) -> Sequence[Any]:
    entries = [block] if isinstance(block, Mapping) else block
    if not isinstance(entries, list | tuple) or not entries:
        raise ConfigError(
            f"{where}: needs a list of rewards or one reward, found {as_found(block)}"
        )
    if len(entries) > MAX_REWARDS:
        raise ConfigError(f"{where}: {len(entries)} rewards, the most is {MAX_REWARDS}")
    return entries


def _check_names(specs: Sequence[RewardSpec], where: str) -> None:
    num_of_name = Counter(spec.name for spec in specs)
    repeated = sorted(name for name, num in num_of_name.items() if num > 1)
    if repeated:
        raise ConfigError(
            f"{where}: two rewards of the name {repeated[0]!r}; give each its own"
        )


def parse_train(block: Any) -> dict[str, Any]:
    """What the trainer's own block says of advantages, by field of a `RewardConfig`.

    Raises:
        ConfigError: The block is no mapping, or one of the two keys that are read has a wrong value.
    """
    if block is None:
        return {}
    if not isinstance(block, Mapping):
        raise ConfigError(f"train: needs a mapping, found {as_found(block)}")

    found: dict[str, Any] = {}
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


@dataclass(frozen=True, slots=True)
class _Written:
    """One entry of a block, as it is written."""

    where: str
    """The entry, for errors: `rewards[0] (OCR)`."""
    folder: Path
    keys: Mapping[str, Any]
    """Our keys that have a value, `name` among them."""
    beside: Mapping[str, Any]
    """Options beside our keys."""
    nested: Mapping[str, Any]
    """Options under `extra_kwargs`."""

    @property
    def options(self) -> dict[str, Any]:
        """All options: each is given beside our keys or under `extra_kwargs`, never in both."""
        return {**self.nested, **self.beside}


def _parse_reward(
    entry: Any, where: str, folder: Path, for_evaluation: bool
) -> RewardSpec:
    model = _model_of(entry, where)
    found = catalog.find(model, may_be_unknown=for_evaluation)
    model, builtin = found if found is not None else (model, None)
    written = _read(entry, model, where, folder)

    fields = (
        _fields_of_own_class(written, model)
        if builtin is None
        else _fields_of_builtin(written, model, builtin)
    )
    _check_image_format(fields["image_format"], builtin, written.where)

    spec = _validated(fields, written.where)
    if spec.num_workers > 1:
        _say_whose_concurrency()
    if builtin is None or spec.batch_size <= builtin.max_batch_size:
        return spec
    return spec.model_copy(update={"batch_size": builtin.max_batch_size})


def _model_of(entry: Any, where: str) -> str:
    """The reward model that an entry names."""
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{where}: needs a mapping with reward_model, found {as_found(entry)}"
        )
    model = entry.get("reward_model")
    if not isinstance(model, str) or not model.strip():
        raise ConfigError(
            f"{where}: reward_model must name a reward model, found {model!r:.100}"
        )
    if not model.strip().isprintable():
        raise ConfigError(
            f"{where}: reward_model must be one line of printable characters, found {model!r:.100}"
        )
    if len(model) > MAX_NAME:
        raise ConfigError(
            f"{where}: reward_model has {len(model)} characters, the most is {MAX_NAME}"
        )
    return model.strip()


def _read(entry: Mapping[Any, Any], model: str, where: str, folder: Path) -> _Written:
    """The parts of an entry; `model` is the built-in's canonical name, or the name or path as written."""
    name = entry.get("name") or model
    where = f"{where} ({' '.join(str(name).split())})"
    ours, beside, nested = split_keys(entry, where)
    check_not_built(beside, model, where)

    keys = {key: value for key, value in ours.items() if value is not None}
    keys["name"] = name
    if "dtype" in keys:
        keys["dtype"] = _dtype(keys["dtype"], where)
    return _Written(where, folder, keys, beside, nested)


def _fields_of_own_class(written: _Written, model: str) -> dict[str, Any]:
    """The fields of the spec of a class of the user's, or of a name that loads and means nothing here."""
    check_own_options(model, written.beside, written.nested, written.where)
    told = fields_of_own_class(model, written.keys, written.where)
    path = model.lower() if model.lower() in catalog.NOT_BUILT else model

    fields = {"image_format": RAW, **written.keys, **told}
    for key in OWN_CLASS_KEYS:
        fields.pop(key, None)
    return {
        **fields,
        "reward_model": path,
        "options": _plain(written.options, written.where),
        "code": code_of(path),
    }


def _fields_of_builtin(
    written: _Written, name: str, builtin: ModelEntry
) -> dict[str, Any]:
    """The fields of the spec of a built-in: what the entry says, with the catalog's defaults."""
    where = written.where
    for key in OWN_CLASS_KEYS:
        if key in written.keys and key not in builtin.options:
            raise ConfigError(
                f"{where}: {key} is for a class of your own; {name} has its own"
            )

    given = {**written.options, **_options_among_keys(written, builtin)}
    options = check_options(name, builtin, given, KEYS, where, written.folder)
    if builtin.is_judge and "api_base_url" not in given:
        _say_default_url(where, options["api_base_url"])

    keys = {
        key: value for key, value in written.keys.items() if key not in builtin.options
    }
    return {
        "batch_size": builtin.batch_size,
        "timeout_s": builtin.timeout_s,
        "image_format": builtin.image_format if builtin.is_judge else RAW,
        **keys,
        "queue": queue_of_builtin(builtin, keys),
        "reward_model": name,
        "how": builtin.how,
        "options": options,
        **_sample_fields_of_builtin(builtin, options.get("required_fields")),
    }


def _options_among_keys(written: _Written, builtin: ModelEntry) -> dict[str, Any]:
    """Keys of ours that this built-in has an option of the same name for: they are meant for the option."""
    options = {
        key: value for key, value in written.keys.items() if key in builtin.options
    }
    for key in options:
        if key in written.nested:
            raise ConfigError(given_twice(key, written.where))
    return options


def _sample_fields_of_builtin(
    builtin: ModelEntry, named: list[str] | None
) -> dict[str, tuple[Any, ...]]:
    """`fields` and `required` of the spec: the catalog's, or what the option `required_fields` names."""
    if not named:
        return {"fields": builtin.fields, "required": builtin.required}
    needed = [name for name in named if name not in BY_NAME]
    return {"fields": tuple(named), "required": tuple((name,) for name in needed)}


def _validated(fields: dict[str, Any], where: str) -> RewardSpec:
    """The spec with these fields. Raises `ConfigError` for the first field that is wrong."""
    try:
        return RewardSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]

    key = str(first["loc"][0])
    if key == "on_failure":  # of a union, pydantic says what each of its types needs
        needed = "needs raise, nan, or {value: a finite number}"
    else:
        needed = first["msg"].removeprefix("Value error, ")
    found = "" if ", found " in needed else f" (found {fields[key]!r:.200})"
    raise ConfigError(f"{where}: {key}: {needed}{found}")


def _check_image_format(given: Any, builtin: ModelEntry | None, where: str) -> None:
    is_judge = builtin is not None and builtin.is_judge
    allowed = ("png", "jpeg", "webp") if is_judge else (RAW, JPEG)
    if given not in allowed:
        raise ConfigError(
            f"{where}: image_format must be one of {', '.join(allowed)}, found {given!r}"
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
