"""The keys of one entry of a `rewards:` block: which are ours, which the model's. No key is ignored."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from tasks.errors import ConfigError, UnknownOptionError, nearest
from tasks.rewards.numerals import in_exponent_form
from tasks.rewards.spelling import misspelt
from tasks.source.class_options import options_read_by

log = logging.getLogger(__name__)

KEYS = (
    "name", "reward_model", "weight", "dtype", "device", "batch_size", "async_reward", "num_workers",
    "queue", "version", "on_failure", "timeout_s", "cache", "image_format", "kind", "required_fields", "extra_kwargs",
)  # fmt: skip
"""What any entry may say."""

NOT_BUILT: dict[str, str] = {
    "applicable_datasets": "a reward scores every sample that is submitted; leave the key out, and submit the samples "
    "of each dataset to a client that has the rewards for them",
}
"""Keys of Flow-Factory that are not built here, and what to do instead."""

BLOCKS = ("rewards", "eval_rewards")

TRAIN_KEYS = ("advantage_aggregation", "global_std")
"""Keys of the trainer's own block that are read here."""

EVALUATES = re.compile("eval|valid|test", re.IGNORECASE)
"""Is in the names of blocks that are for evaluation."""

OWN_WORDS = (
    "cached", "caches", "devices", "dtypes", "extra_args", "kinds", "names", "queues", "timeout", "timeout_ms",
    "timeouts", "versions", "weights",
)  # fmt: skip
"""Options that a class of one's own may well have, though they are close to a key of ours."""


def split_keys(
    entry: Mapping[Any, Any], where: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The parts of an entry: our keys, options written beside them, options under `extra_kwargs`.

    Raises:
        ConfigError: A key is no text, an option is given twice, or `extra_kwargs` is no mapping.
    """
    nested = _extra_kwargs(entry, where)
    ours: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "extra_kwargs":
            continue
        if key in KEYS:
            ours[key] = value
        elif value is not None or key not in NOT_BUILT:
            # A key of Flow-Factory's that is not built here may stand without a value.
            beside[key] = value

    for key in beside:
        if key in nested:
            raise ConfigError(given_twice(key, where))
    return ours, beside, nested


def _extra_kwargs(entry: Mapping[Any, Any], where: str) -> dict[str, Any]:
    for key in entry:
        if not isinstance(key, str):
            raise ConfigError(
                f"{where}: the key {key!r} is no text; put it in quotes (YAML reads on and yes as true)"
            )
    nested = entry.get("extra_kwargs")
    if nested is None:
        return {}
    if not isinstance(nested, Mapping):
        found = f"{type(nested).__name__} {nested!r}"
        raise ConfigError(
            f"{where}: extra_kwargs must be a mapping, found {found}"[:200]
        )
    return dict(nested)


def given_twice(key: str, where: str) -> str:
    """What to say of an option that is both beside `extra_kwargs` and in it."""
    return (
        f"{where}: {key!r} is given twice, beside extra_kwargs and in it; say it once"
    )


def as_found(value: Any) -> str:
    """A value of a config, as an error says what was found."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]


def check_not_built(beside: Mapping[str, Any], model: str, where: str) -> None:
    """Raises `UnknownOptionError` for a key that means something in Flow-Factory and nothing here."""
    for key, advice in NOT_BUILT.items():
        if key in beside:
            raise UnknownOptionError(
                f"{where}: {model} has no option {key!r}: {advice}"
            )


def check_own_options(
    path: str, beside: Mapping[str, Any], nested: Mapping[str, Any], where: str
) -> None:
    """Compare the options of a class of the user's with our own keys: any name is right unless it is ours misspelt.

    Where the class's source tells all options that it reads, they are compared with those too. An option that is odd
    and may be meant is named in the log: a number that is a text (YAML 1.1 reads `1e-3` so), a key of ours under
    `extra_kwargs`, which reaches the class only, and a name that is nowhere in the class's code.

    Raises:
        UnknownOptionError: An option beside our keys is a slip of one of them, or of one that the class reads; says how
            to mean it nevertheless.
    """
    for key in beside:
        meant = misspelt(key, (*KEYS, *NOT_BUILT), OWN_WORDS)
        if meant is not None:
            raise UnknownOptionError(
                f"{where}: {key!r} is no key of a reward; did you mean {meant!r}? If it is an option of your class, "
                f"put it under extra_kwargs: {{{key}: ...}}"
            )
    _check_against_source(path, beside, where)
    for key, value in {**nested, **beside}.items():
        if in_exponent_form(value) is not None:
            log.warning(
                "%s: the option %s is the text %r; where a number is meant, write it with a point, 1.0e-3",
                where,
                key,
                value,
            )
        if key in nested and key in KEYS:
            log.warning(
                "%s: %s under extra_kwargs is an option of the class; the reward's own %s is beside it",
                where,
                key,
                key,
            )


def _check_against_source(path: str, beside: Mapping[str, Any], where: str) -> None:
    """Compare options with those that the code of the class reads, where its source is here and tells them all.

    Raises:
        UnknownOptionError: One is a slip of a name that is read, and stands nowhere in the code.
    """
    if not beside:
        return
    read = options_read_by(path)
    if read is None:
        return
    for key in beside:
        if key in read.words:
            continue
        meant = misspelt(key, read.names)
        if meant is not None:
            raise UnknownOptionError(
                f"{where}: {read.file} reads no option {key!r}; did you mean {meant!r}? If the class is given it in a "
                f"way that its source does not show, put it under extra_kwargs: {{{key}: ...}}"
            )
        log.warning(
            "%s: %s goes to the class as an option of its own, and %s does not name it%s",
            where, key, read.file, nearest(key, (*KEYS, *read.names)),
        )  # fmt: skip


def check_has_rewards(config: Mapping[Any, Any]) -> None:
    """Raises `ConfigError` for a config without a block of rewards."""
    if "rewards" not in config:
        raise ConfigError(_no_rewards(config))


def check_block_name(key: Any, block: Any) -> None:
    """Raises `ConfigError` for a block of rewards whose name is misspelt."""
    meant = _meant(key, BLOCKS)
    if meant is not None and _has_rewards(block):
        raise ConfigError(
            f"the block {key!r} has rewards in it; did you mean {meant!r}?"
        )
    _say_what_is_not_read(key, block)


def check_train_keys(train: Any) -> None:
    """Raises `ConfigError` for a misspelt key of ours in the block `train:`."""
    for key in train if isinstance(train, Mapping) else ():
        meant = _meant(key, TRAIN_KEYS)
        if meant is not None:
            raise ConfigError(
                f"train: {key!r} is read by nobody; did you mean {meant!r}?"
            )


def _meant(key: Any, known: tuple[str, ...]) -> str | None:
    """The known key that another key is a slip of, or None."""
    return None if key in known else misspelt(str(key), known)


def _no_rewards(config: Mapping[Any, Any]) -> str:
    """What to say of a config without a block of rewards."""
    keys = [str(key) for key in config]
    hint = ""
    for key in keys:
        if misspelt(key, ("rewards",)):
            hint = f"; is {key!r} meant to be 'rewards'?"
            break
    return f"no rewards: block; found the keys {', '.join(keys) or 'none'}{hint}"


def _say_what_is_not_read(key: Any, block: Any) -> None:
    """Of other blocks, which are the trainer's or hold what anchors name, what looks as if it were for us."""
    if key in TRAIN_KEYS:
        log.warning(
            "%s beside the block train: is not read here; write it in train:", key
        )
    if key in BLOCKS or not EVALUATES.search(str(key)):
        return
    blocks = {str(key): block}
    if isinstance(block, Mapping):
        blocks |= {f"{key}.{name}": one for name, one in block.items()}
    for path, one in blocks.items():
        if _has_rewards(one):
            log.warning(
                "rewards in the block %s are not read here; those of evaluation are eval_rewards:",
                path,
            )


def _has_rewards(block: Any) -> bool:
    entries = [block] if isinstance(block, Mapping) else block
    if not isinstance(entries, list | tuple):
        return False
    return any(_is_reward(entry) for entry in entries)


def _is_reward(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "reward_model" in entry
