"""What a class of the user's declares, read from its source without importing it (it may need torch, or a GPU).

What cannot be read with certainty is unknown, never absent: a class has more ways to say something than a reader of its
source can follow. The worker, which has the class itself, compares what it declares with what it was sent.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from tasks.source.class_body import AssignedError
from tasks.source.constants import UnreadableError
from tasks.source.files import last_name
from tasks.source.lineage import ABSENT, MAX_STEPS, OURS, Class, class_named
from tasks.source.modules import module_of

Kind = Literal["pointwise", "groupwise"]

_BASE_OF_KIND: dict[Kind, str] = {
    "groupwise": "GroupwiseRewardModel",
    "pointwise": "PointwiseRewardModel",
}
"""A class that has both bases is groupwise: it comes first."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a class says of itself; a field is None where it cannot be read."""

    kind: Kind | None
    required_fields: tuple[str, ...] | None
    optional_fields: tuple[str, ...] | None
    arguments: frozenset[str] | None
    """Names of the arguments of its `__call__`. Where it has `**kwargs`, also every text in it: the text may be a name
    that it looks up in `kwargs`."""
    queue: str | None
    """None also where the class names no queue."""
    unread_queue: str = ""
    """Why it may name another queue."""
    is_queue_assigned: bool = False
    """Whether the class certainly assigns `queue`, and only the value cannot be read."""


def declared_by(path: str) -> Declared | None:
    """What the class of a dotted path declares; None if its source is not to be found on this host."""
    module_name, _, name = path.rpartition(".")
    module = module_of(module_name) if module_name else None
    if module is None:
        return None
    found = class_named(module, name)
    if found is None:
        unread = "it is not one plain class statement" if module.binds(name) else ""
        return Declared(None, None, None, None, None, unread_queue=unread)
    return _declared(found)


def may_be_reward_model(path: str) -> bool:
    """Whether the class of a dotted path stands in the source of its module, and has or may have a base of ours."""
    module_name, _, name = path.rpartition(".")
    module = module_of(module_name) if module_name else None
    found = class_named(module, name) if module is not None else None
    if found is None:
        return False
    ours, unread = _bases_of(found)
    return bool(ours or unread)


def _declared(cls: Class) -> Declared:
    queue, unread, is_assigned = None, "", False
    try:
        queue = _queue_of(cls)
    except UnreadableError as error:
        unread, is_assigned = str(error), isinstance(error, AssignedError)
    return Declared(
        kind=_kind_of(cls),
        required_fields=_fields(cls, "required_fields"),
        optional_fields=_fields(cls, "optional_fields"),
        arguments=_arguments(cls),
        queue=queue,
        unread_queue=unread,
        is_queue_assigned=is_assigned,
    )


def _queue_of(cls: Class) -> str | None:
    """The queue that a class names; None if it names none.

    Raises:
        UnreadableError: The class may name a queue that cannot be read.
    """
    found = cls.look_up("queue")
    if found is ABSENT or found is None:
        return None
    if isinstance(found, ast.FunctionDef):
        raise AssignedError("it is a function")
    if not isinstance(found, str):
        raise AssignedError(f"queue = {found!r}")
    return found


def _fields(cls: Class, name: str) -> tuple[str, ...] | None:
    try:
        value = cls.look_up(name)
    except UnreadableError:
        return None
    if isinstance(value, str):
        return (value,)
    is_list = isinstance(value, tuple | list)
    if not is_list or not all(isinstance(name, str) for name in value):
        return None
    return tuple(value)


def _arguments(cls: Class) -> frozenset[str] | None:
    try:
        call = cls.look_up("__call__")
    except UnreadableError:
        return None
    if not isinstance(call, ast.FunctionDef):
        return frozenset() if call is ABSENT else None
    arguments = call.args
    named = {
        argument.arg
        for argument in (
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
        )
    }
    if arguments.kwarg is not None:
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.add(node.value)
    return frozenset(named)


def _kind_of(cls: Class) -> Kind | None:
    """By its bases; by their names where they cannot be followed: the worker checks it."""
    ours, unread = _bases_of(cls)
    for kind, base in _BASE_OF_KIND.items():
        if base in ours:
            return kind
    for kind, base in _BASE_OF_KIND.items():
        if any(name.endswith(base) for name in unread):
            return kind
    return None


def _bases_of(cls: Class) -> tuple[set[str], set[str]]:
    """Names of the bases that are ours, with theirs, and names of the bases that cannot be followed."""
    ours: set[str] = set()
    unread: set[str] = set()
    left: list[Class | str] = [cls]
    for _ in range(MAX_STEPS):
        if not left:
            break
        current = left.pop()
        if isinstance(current, str):
            ours.update(OURS[current])
            continue
        for base in current.node.bases:
            try:
                found = current.follow(base)
            except UnreadableError:
                unread.add(last_name(base))
                continue
            if found is not None:
                left.append(found)
    return ours, unread
