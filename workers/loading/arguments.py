"""What a loaded reward model takes of a sample, whether it was sent, and how it is called: a worker has the class."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.errors import ModelLoadError
from tasks.messages import Failure, SampleRequest
from tasks.rewards import BY_NAME, GENERATED, SAMPLE_FIELDS, THEIR_NAMES, no_such_field
from tasks.samples import MEDIA_FIELDS
from workers.base import RewardModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taking:
    """What a model takes."""

    declared: tuple[str, ...]
    """Fields of a sample that its class declares."""
    words: Mapping[str, str]
    """By declared field, what the class calls it."""
    fields: tuple[str, ...]
    """Those, and the small ones that its `__call__` names."""
    arguments: Mapping[str, bool]
    """Arguments that its `__call__` names, and whether each has a default."""
    takes_rest: bool
    """Whether it has `**kwargs`."""
    looked_up: frozenset[str]
    """Names of fields that its code has as texts where it has `**kwargs`: `kwargs.get("metadata")`."""

    def call_with(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The arguments for a call with these values of each field; None for a field that no sample has.

        As in Flow-Factory `__call__` gets what it has a name for. A field that no sample has is left to its default.
        """
        given: dict[str, Any] = {}
        for field, column in columns.items():
            value = (
                None
                if field != "prompt" and all(one is None for one in column)
                else column
            )
            names = [
                name for name in (field, *_their_names(field)) if name in self.arguments
            ]
            for name in names:
                has_default = self.arguments[name]
                if value is not None or not has_default:
                    given[name] = value
            if not names and self.takes_rest:
                looked_up = [
                    name for name in _their_names(field) if name in self.looked_up
                ]
                given |= dict.fromkeys(
                    (self.words.get(field, field), *looked_up), value
                )
        return given


def taking_of(model: RewardModel) -> Taking:
    """What a model takes.

    Raises:
        ModelLoadError: It declares a field that no sample has, or its declaration is no list of fields.
    """
    named = _declared(model, "required_fields") + _declared(model, "optional_fields")
    words = {THEIR_NAMES.get(name, name): name for name in named}
    declared = tuple(words)
    unknown = [name for name in declared if name not in SAMPLE_FIELDS]
    if unknown:
        raise ModelLoadError(
            f"{type(model).__name__} declares what is none: {no_such_field(unknown[0])}"
        )
    arguments, takes_rest = _arguments(model)
    looked_up = _looked_up(model) if takes_rest else frozenset()
    by_name = [
        THEIR_NAMES.get(name, name)
        for name in BY_NAME
        if name in arguments or name in looked_up
    ]
    return Taking(
        declared,
        words,
        tuple(dict.fromkeys((*declared, *by_name))),
        arguments,
        takes_rest,
        looked_up,
    )


def unsent(
    name: str, taking: Taking, samples: Iterable[SampleRequest]
) -> Failure | None:
    """Why these samples cannot be scored if the model takes a field that they have and that was not sent.

    To the model it would look like a sample without: a number that is plausible and wrong.

    Args:
        name: Of the reward model, as the config has it.
    """
    withheld = {field for sample in samples for field in sample.withheld}
    missing = [field for field in taking.fields if field in withheld]
    if not missing:
        _warn_of_named(name, taking, withheld)
        return None
    return Failure(
        kind="failed",
        message=f"{name} takes {' and '.join(missing)}, which the sample has and the trainer did not send: its config "
        "does not list it, or the source of the class could not be read for certain there; say "
        f"`required_fields: [{', '.join(taking.fields)}]` in the config",
    )


def lacks_all_media(taking: Taking, sample: SampleRequest) -> str:
    """The media fields that a model declares, if it scores media and the sample has none of them; else empty."""
    media = [field for field in taking.declared if field in MEDIA_FIELDS]
    is_there = any(sample.media.get(field) not in (None, ()) for field in media)
    return (
        ""
        if is_there or not any(field in GENERATED for field in media)
        else " or ".join(media)
    )


def is_ours(model: RewardModel) -> bool:
    """Whether its class is one of this package: what it declares as required, it demands."""
    return type(model).__module__.partition(".")[0] == "workers"


def _declared(model: RewardModel, attribute: str) -> tuple[str, ...]:
    """What an attribute of a class says, however it says it: a text, any sequence of texts, a property, a method."""
    value: Any = getattr(model, attribute, None)
    if callable(value):
        value = value()
    if value is None:
        return ()
    names = (
        (value,)
        if isinstance(value, str)
        else tuple(value)
        if isinstance(value, Iterable)
        else (value,)
    )
    if not all(isinstance(name, str) for name in names):
        raise ModelLoadError(
            f"{type(model).__name__}.{attribute} must name fields of a sample, found {value!r}"[
                :500
            ]
        )
    return names


def _arguments(model: RewardModel) -> tuple[dict[str, bool], bool]:
    """The arguments that a call takes by name, each with whether it has a default, and whether it takes any other."""
    try:
        parameters = inspect.signature(model.__call__).parameters.values()  # type: ignore[operator]
    except (TypeError, ValueError):  # not a function of Python
        return {}, True
    by_name = [
        p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default is not p.empty for p in by_name}, takes_rest


def _looked_up(model: RewardModel) -> frozenset[str]:
    """The names of fields that the code of a call has as texts, in functions within it too."""
    found: set[str] = set()
    waiting: list[Any] = [
        getattr(inspect.unwrap(type(model).__call__), "__code__", None)
    ]  # type: ignore[operator]
    while waiting:
        constants = getattr(waiting.pop(), "co_consts", ())
        found |= {one for one in constants if isinstance(one, str)}
        waiting += [one for one in constants if inspect.iscode(one)]
    return frozenset(found.intersection((*SAMPLE_FIELDS, *THEIR_NAMES)))


def _their_names(field: str) -> list[str]:
    return [theirs for theirs, ours in THEIR_NAMES.items() if ours == field]


def _warn_of_named(name: str, taking: Taking, withheld: set[str]) -> None:
    """Say which media a class has an argument for, or looks up, without declaring them: they do not travel."""
    for field in MEDIA_FIELDS:
        if field in withheld and (
            field in taking.arguments or field in taking.looked_up
        ):
            _warn_once(name, field)


@functools.cache
def _warn_once(name: str, field: str) -> None:
    log.warning(
        "not sent reward=%s field=%s reason=its __call__ names it, but its required_fields do not declare it; "
        "declare it if the reward depends on it",
        name, field,
    )  # fmt: skip
