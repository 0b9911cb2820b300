"""A built-in's options as configured: known names, right types, defaults filled in, files read, no keys."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from tasks.catalog import CATALOG
from tasks.catalog.entry import ModelEntry, Option
from tasks.errors import ConfigError, UnknownOptionError, nearest
from tasks.masking import without_password
from tasks.rewards.numerals import as_numbers
from tasks.rewards.spelling import misspelt
from tasks.settings import KEY_PREFIX, OPENAI_KEY, is_key_variable

MAX_FILE_BYTES = 256 * 1024
"""A rubric larger than this is a mistake; its text travels with every request."""

MAX_SHOWN_CHARS = 300
"""How much of a wrong value its error repeats."""

NO_KEY_VARIABLE = f"api_key_env must be {OPENAI_KEY} or {KEY_PREFIX}*"

_FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]


def check_options(
    model: str,
    builtin: ModelEntry,
    given: Mapping[str, Any],
    keys: tuple[str, ...],
    where: str,
    folder: Path | None,
) -> dict[str, Any]:
    """Every option of a built-in with its value or default, so that a default written out is the same computation.

    Args:
        keys: Keys of any reward, to name the nearest of all.
        where: The entry of the config, for errors.
        folder: What a relative file name starts from; None on a worker, which reads no file that a message names.

    Raises:
        ConfigError: An option is unknown, missing or of a wrong type, or a file cannot be read.
    """
    checked = _defaults(builtin)
    for name, value in given.items():
        if name in builtin.options:
            checked[name] = _checked(builtin.options[name], name, value, where)
            continue
        if name in keys:
            raise UnknownOptionError(
                f"{where}: {name} is a key of the reward and no option of {model}: write it beside extra_kwargs, "
                "not in it"
            )
        raise UnknownOptionError(
            f"{where}: {model} has no option {name!r}{nearest(str(name), (*builtin.options, *keys))}; "
            f"its options: {', '.join(builtin.options) or 'none'}"
        )
    for name, option in builtin.options.items():
        if option.is_needed and name not in given:
            raise ConfigError(f"{where}: {model} needs {name}: {option.doc}")
    _read_files(builtin, checked, where, folder)
    _check_key(checked, where)
    return checked


def options_in_message(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a built-in that a message names, checked on the worker as in the trainer.

    Whoever can write to Redis can send a message: that a trainer has checked its options is not known.

    Raises:
        ConfigError: An option is unknown, missing or of a wrong type, names a file of the worker to be read, or a key.
    """
    return check_options(
        model, CATALOG[model], given, (), f"a message for {model}", None
    )


def options_of_subclass(
    builtin: ModelEntry,
    given: Mapping[str, Any],
    where: str,
    unchecked: Collection[str] = (),
) -> dict[str, Any]:
    """The options of a user's class that subclasses a built-in: the built-in's, checked, and its own as they are.

    Args:
        unchecked: Options of the built-in that may have other values in such a class.

    Raises:
        ConfigError: An option of the built-in has a wrong value, or one of the class's own is a slip of the built-in's.
    """
    checked = _defaults(builtin)
    for name, value in given.items():
        meant = None if name in builtin.options else misspelt(name, builtin.options)
        if meant is not None:
            raise UnknownOptionError(
                f"{where}: {name!r} is no option; did you mean {meant!r}? An option of your class needs another name"
            )
        is_ours = name in builtin.options and name not in unchecked
        checked[name] = (
            _checked(builtin.options[name], name, value, where) if is_ours else value
        )
    _refuse_files(builtin, checked, where)
    _check_key(checked, where)
    return checked


def _defaults(builtin: ModelEntry) -> dict[str, Any]:
    """A copy of each default, which whoever gets it may change."""
    return {name: copy.copy(option.default) for name, option in builtin.options.items()}


def _checked(option: Option, name: str, value: Any, where: str) -> Any:
    try:
        needed = TypeAdapter(_FiniteFloat if option.type is float else option.type)
        written = as_numbers(value, needed.json_schema())
        return needed.validate_python(written, strict=True)  # an integer is a float too
    except ValidationError as error:
        raise ConfigError(
            f"{where}: option {name}: {error.errors()[0]['msg']} (found {_shown(value)!r:.{MAX_SHOWN_CHARS}})"
        ) from None


def _shown(value: Any) -> Any:
    """The given value, without the passwords of URLs."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if not isinstance(value, str):
        return value
    if "://" in value or "@" not in value:
        return without_password(value)
    return without_password(f"://{value}").removeprefix("://")


def _read_files(
    builtin: ModelEntry, checked: dict[str, Any], where: str, folder: Path | None
) -> None:
    """Replace the name of each file by its text: workers may be on other hosts, and the content is what counts."""
    if folder is None:
        _refuse_files(builtin, checked, where)
        return
    for name, option in builtin.options.items():
        if not (option.reads and checked[name]):
            continue
        if checked[option.reads]:
            raise ConfigError(
                f"{where}: both {option.reads} and {name} are given; one of them is the text"
            )
        checked[option.reads] = _text_of(
            checked[name], folder, f"{where}: option {name}"
        )
        checked[name] = ""


def _refuse_files(builtin: ModelEntry, checked: Mapping[str, Any], where: str) -> None:
    """Raise if an option names a file: on a worker, where the text must have come with the message."""
    for name, option in builtin.options.items():
        if option.reads and checked[name]:
            raise ConfigError(
                f"{where}: option {name} names a file, and a worker reads none that a message names; give its text as "
                f"{option.reads}, as the trainer does for a built-in"
            )


def _text_of(name: str, folder: Path, where: str) -> str:
    try:
        path = folder / Path(name).expanduser()
        with path.open("rb") as file:  # a device says of itself that it is empty
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: no UTF-8, or a NUL in the name. RuntimeError: the home of a user whom nobody knows.
        raise ConfigError(f"{where}: cannot read {name!r}: {error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{where}: {path} is larger than {MAX_FILE_BYTES} bytes")
    if not text.strip():
        raise ConfigError(f"{where}: {path} is empty")
    return text


def _check_key(checked: Mapping[str, Any], where: str) -> None:
    if checked.get("api_key") not in (None, "", "EMPTY"):
        raise ConfigError(
            f"{where}: an API key does not belong into a config, which travels; set it on the worker as "
            "OPENAI_API_KEY or REWARDQ_KEY_<name> and give that variable's name as api_key_env"
        )
    key_env = checked.get("api_key_env") or OPENAI_KEY
    if not isinstance(key_env, str) or not is_key_variable(key_env):
        raise ConfigError(f"{where}: {NO_KEY_VARIABLE}, found {key_env!r}")
