"""A reward that is a class of the user's: what its config entry and its source say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.errors import ConfigError
from tasks.rewards.fields import (
    BY_NAME,
    CONDITIONS,
    GENERATED,
    SAMPLE_FIELDS,
    THEIR_NAMES,
    no_such_field,
    with_numbers,
)
from tasks.rewards.queues import queue_of_own_class
from tasks.source.class_names import check_class
from tasks.source.declared import Declared, declared_by


def fields_of_own_class(
    path: str, keys: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Fields of the `RewardSpec` of a class: what the config says comes first, then what the source says if it is here.

    Args:
        path: The dotted path of the class, or a name that means nothing here, which has no source.
        keys: Our keys of the entry.
        where: The entry, for errors.

    Raises:
        UnknownRewardError: The class is misspelt.
        ConfigError: `kind`, `queue` or `required_fields` is wrong, or cannot be told.
    """
    is_path = "." in path
    absent = check_class(path, where, said=keys) if is_path else ""
    declared = declared_by(path) if is_path else None

    fields: dict[str, Any] = {
        "absent": absent,
        "how": _how(keys.get("kind"), declared, where),
        "queue": queue_of_own_class(path, keys, declared, where),
    }
    return fields | _sample_fields(keys.get("required_fields"), declared, where)


def _how(given: Any, declared: Declared | None, where: str) -> str:
    """`model` for a class that scores whole groups, `each` for one that scores samples."""
    kind = given or (declared.kind if declared else None) or "pointwise"
    if kind not in ("pointwise", "groupwise"):
        raise ConfigError(
            f"{where}: kind must be pointwise or groupwise, found {kind!r}"
        )
    return "model" if kind == "groupwise" else "each"


def _sample_fields(
    given: Any, declared: Declared | None, where: str
) -> dict[str, tuple[Any, ...]]:
    """`fields` and `required` of the spec; nothing where only the worker knows what the class takes: all travels."""
    if given is not None:
        named: tuple[str, ...] | None = _fields_given(given, where)
    else:
        named = _fields_declared(declared)
    if named is None:
        return {}

    fields = tuple(dict.fromkeys(THEIR_NAMES.get(name, name) for name in named))
    for name in fields:
        if name not in SAMPLE_FIELDS:
            raise ConfigError(f"{where}: {no_such_field(name)}")

    media = tuple(name for name in fields if name in (*GENERATED, *CONDITIONS))
    scores_generated = any(name in GENERATED for name in media)
    return {
        "required": (media,) if scores_generated else (),
        "fields": with_numbers(fields),
    }


def _fields_given(given: Any, where: str) -> tuple[str, ...]:
    """The fields that a config names."""
    names = (given,) if isinstance(given, str) else given
    is_list = isinstance(names, list | tuple)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{where}: required_fields must be a list of fields of a sample, found {given!r}"
        )
    return tuple(names)


def _fields_declared(declared: Declared | None) -> tuple[str, ...] | None:
    """The fields that a class declares or takes by naming them in its `__call__`; None if that is unknown."""
    if declared is None:
        return None
    if declared.required_fields is None or declared.optional_fields is None:
        return None
    arguments = declared.arguments
    by_name = [name for name in BY_NAME if arguments is None or name in arguments]
    return (*declared.required_fields, *declared.optional_fields, *by_name)
