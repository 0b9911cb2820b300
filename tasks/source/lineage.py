"""A class in the source of its module: its attributes along its bases, in other modules too; nothing is imported."""

from __future__ import annotations

import ast
import sys
from functools import cached_property
from typing import Any

from tasks.source.class_body import (
    AssignedError,
    assigned,
    assignments_from_outside,
    is_mentioned,
    values_in,
)
from tasks.source.constants import UnreadableError, value_of, written
from tasks.source.files import last_name
from tasks.source.modules import STAR, Module, module_of

MAX_STEPS = 50
"""Imports and bases followed for one class."""

OURS: dict[str, tuple[str, ...]] = {
    "RewardModel": ("RewardModel",),
    "PointwiseRewardModel": ("PointwiseRewardModel", "RewardModel"),
    "GroupwiseRewardModel": (
        "GroupwiseRewardModel",
        "PointwiseRewardModel",
        "RewardModel",
    ),
}
"""The classes of `workers.base` that are subclassed, with their own bases."""

_OUR_MODULES = ("workers", "workers.base", "rewardq")

OUR_VALUES = {"required_fields": ("prompt", "image"), "optional_fields": ()}
"""What `workers.base.RewardModel` declares; a test compares them."""

_SAY_NOTHING = {*sys.stdlib_module_names, "torch", "transformers"}
"""Packages whose classes have no attribute of the names that are looked for here."""

ABSENT = object()
"""The value of an attribute that a class has not."""


class Class:
    """A class statement in its module."""

    def __init__(self, module: Module, node: ast.ClassDef) -> None:
        self.module, self.node = module, node

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Class) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, int]:
        return self.module.name, self.node.lineno

    def look_up(self, name: str, num_steps: int = 0) -> Any:
        """The value of a class attribute, along the bases; a function as its statement; `ABSENT` if none has it.

        Raises:
            UnreadableError: The value may be another than what is written here.
        """
        if num_steps > MAX_STEPS:
            raise UnreadableError("more bases than are followed")
        found = self._own(name)
        if found is not ABSENT:
            return found
        bases = [self.follow(base) for base in self.node.bases]
        if len(bases) == 1:
            return _value_of_base(bases[0], name, num_steps)
        for one in _merged_bases(self, bases):
            found = one._own(name) if isinstance(one, Class) else _our_value(one, name)
            if found is not ABSENT:
                return found
        return ABSENT

    def follow(self, base: ast.expr) -> Class | str | None:
        """The class that a base names: a class with a source, the name of a class of ours, or None if it says nothing.

        Raises:
            UnreadableError: It cannot be found by reading.
        """
        if isinstance(base, ast.Subscript):  # `Generic[T]`
            found = _find(self.module, base.value)
            if found is None:
                return None
            raise UnreadableError(f"its base {written(base)} cannot be followed")
        return _find(self.module, base)

    def _own(self, name: str) -> Any:
        """What its own body says of an attribute."""
        is_queue = name == "queue"
        if not is_queue:
            self._refuse_doubts(name)
        elif any(assignments_from_outside(self.module, name)):
            raise AssignedError("it is assigned outside the body of its class")

        value = self._body.get(name, ABSENT)
        if isinstance(value, UnreadableError):
            raise AssignedError(str(value))
        if value is ABSENT and STAR in self._body and not is_queue:
            raise UnreadableError(
                "the body of its class runs code that may bind any name"
            )
        return value

    @cached_property
    def _body(self) -> dict[str, Any]:
        return values_in(self.node.body, lambda node: _named_in(self.module, node))

    def _refuse_doubts(self, name: str) -> None:
        """Raise `UnreadableError` where not only the body of the class may say what the attribute is."""
        if self.node.decorator_list:
            raise UnreadableError(
                f"the class has a decorator, {written(self.node.decorator_list[0])}"
            )
        for keyword in self.node.keywords:
            if keyword.arg != "metaclass" or last_name(keyword.value) != "ABCMeta":
                raise UnreadableError(f"the class is made with {written(keyword)}")
        for special in ("__init_subclass__", "__getattribute__", "__getattr__"):
            if special in self._body:
                raise UnreadableError(f"the class has a {special} of its own")
        if name == "__call__":
            return
        is_assigned = any(assignments_from_outside(self.module, name))
        if is_assigned or is_mentioned(self.module, name):
            raise UnreadableError("it is assigned outside the body of its class")


def class_named(module: Module, name: str) -> Class | None:
    """The class that a module has under a name: its own, one that it imports, or another name of one.

    None if that is not certain, or is no class with a source.
    """
    try:
        found = _find(module, ast.Name(name, ast.Load()))
    except UnreadableError:
        return None
    if not isinstance(found, Class):
        return None
    if isinstance(module.binder(name), ast.ClassDef):
        return found
    # The class is written elsewhere, and this module may change it.
    is_changed_here = any(
        is_mentioned(module, attribute) for attribute in (*OUR_VALUES, "queue")
    )
    return None if is_changed_here else found


def _value_of_base(base: Class | str | None, name: str, num_steps: int) -> Any:
    if base is None:
        return ABSENT
    if isinstance(base, str):
        return _our_value(base, name)
    return base.look_up(name, num_steps + 1)


def _our_value(ours: str, name: str) -> Any:
    """What one of our own base classes says of an attribute, itself or by its bases."""
    return OUR_VALUES.get(name, ABSENT) if "RewardModel" in OURS[ours] else ABSENT


def _merged_bases(cls: Class, bases: list[Class | str | None]) -> list[Class | str]:
    """The classes after `cls` in the order in which Python looks attributes up (C3).

    Raises:
        UnreadableError: A base of a base cannot be found, or Python would refuse them.
    """
    return _linear(cls, bases, 0)[1:]


def _linear(
    cls: Class | str, bases: list[Class | str | None], num_steps: int
) -> list[Class | str]:
    if num_steps > MAX_STEPS:
        raise UnreadableError("more bases than are followed")
    known = [base for base in bases if base is not None]
    lines = [_line_of(base, num_steps) for base in known] + [known]
    merged: list[Class | str] = [cls]
    while any(lines):
        lines = [line for line in lines if line]
        following = _first_in_order(lines)
        if following is None:
            raise UnreadableError("its bases have no common order")
        merged.append(following)
        lines = [_without(line, following) for line in lines]
    return merged


def _first_in_order(lines: list[list[Class | str]]) -> Class | str | None:
    """The first head of a line that comes later in no line (C3); None if there is none."""
    for line in lines:
        head = line[0]
        if not any(head in other[1:] for other in lines):
            return head
    return None


def _without(line: list[Class | str], cls: Class | str) -> list[Class | str]:
    return [one for one in line if one != cls]


def _line_of(base: Class | str, num_steps: int) -> list[Class | str]:
    if isinstance(base, str):
        return list(OURS[base])
    return _linear(base, [base.follow(b) for b in base.node.bases], num_steps + 1)


def _named_in(module: Module, node: ast.expr, num_steps: int = 0) -> Any:
    """The value of a constant of a module, of one that it imports, or of an attribute of a class.

    Raises:
        UnreadableError: It is bound more than once, may change, or is nothing of these.
    """
    if isinstance(node, ast.Attribute):
        return _attribute(module, node, num_steps)
    unknown = UnreadableError(written(node))
    if not isinstance(node, ast.Name) or num_steps > MAX_STEPS:
        raise unknown
    statement = module.binder(node.id)
    if isinstance(statement, ast.ImportFrom):
        source, original = _origin(module, statement, node.id)
        return _named_in(source, ast.Name(original, ast.Load()), num_steps + 1)
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        raise unknown
    target, value = assigned(statement)
    if target is None or value is None:
        raise unknown
    found = value_of(value, lambda inner: _named_in(module, inner, num_steps + 1))
    if not isinstance(found, str | tuple):  # other code may change a list
        raise unknown
    return found


def _attribute(module: Module, node: ast.Attribute, num_steps: int) -> Any:
    """`Base.required_fields` of a class, or `names.COMMON` of a module."""
    other = _module_named(module, node.value)
    if other is not None:
        return _named_in(other, ast.Name(node.attr, ast.Load()), num_steps + 1)
    base = _find(module, node.value, num_steps + 1)
    found = _value_of_base(base, node.attr, num_steps + 1)
    if found is ABSENT or isinstance(found, ast.AST):
        raise UnreadableError(written(node))
    return found


def _find(module: Module, node: ast.expr, num_steps: int = 0) -> Class | str | None:
    """The class that an expression names in a module; the name of one of ours; None where it says nothing of ours.

    Raises:
        UnreadableError: It cannot be found by reading.
    """
    unknown = UnreadableError(f"{written(node)} cannot be followed")
    if num_steps > MAX_STEPS:
        raise unknown
    if isinstance(node, ast.Attribute):
        return _in_module(_path_of(module, node.value), node.attr, unknown, num_steps)
    if not isinstance(node, ast.Name):
        raise unknown
    return _find_name(module, node, unknown, num_steps)


def _find_name(
    module: Module, node: ast.Name, unknown: UnreadableError, num_steps: int
) -> Class | str | None:
    """As `_find`, of a plain name."""
    if module.name in _OUR_MODULES and node.id in OURS:
        return node.id

    statement = module.binder(node.id)
    if isinstance(statement, ast.ClassDef):
        return Class(module, statement)
    if isinstance(statement, ast.ImportFrom):
        path = module.imported_from(statement)
        return _in_module(path, _original(statement, node.id), unknown, num_steps)
    other_name = _other_name(statement)
    if other_name is not None:
        return _find(module, other_name, num_steps + 1)
    if node.id == "object" and not module.binds("object"):
        return None
    raise unknown


def _other_name(statement: ast.stmt | None) -> ast.Name | ast.Attribute | None:
    """The other name of a class in a statement such as `Base = GroupwiseRewardModel`."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return None
    target, value = assigned(statement)
    is_name = target is not None and isinstance(value, ast.Name | ast.Attribute)
    return value if is_name else None  # type: ignore[return-value]


def _in_module(
    path: str, name: str, unknown: UnreadableError, num_steps: int
) -> Class | str | None:
    """The class of a name in the module of a path."""
    if path in _OUR_MODULES and name in OURS:
        return name
    if path.partition(".")[0] in _SAY_NOTHING:
        return None
    source = module_of(path) if path else None
    if source is None:
        raise unknown
    return _find(source, ast.Name(name, ast.Load()), num_steps + 1)


def _path_of(module: Module, node: ast.expr) -> str:
    """The dotted name of the module that an expression names; empty if it names none for certain."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    statement = module.binder(node.id) if isinstance(node, ast.Name) else None
    if isinstance(node, ast.Name) and isinstance(statement, ast.ImportFrom):
        return ".".join(
            [module.imported_from(statement), _original(statement, node.id), *parts]
        )
    if isinstance(node, ast.Name) and isinstance(statement, ast.Import):
        for alias in statement.names:
            if alias.asname == node.id:
                return ".".join([alias.name, *parts])
        return ".".join([node.id, *parts])
    return ""


def _module_named(module: Module, node: ast.expr) -> Module | None:
    path = _path_of(module, node)
    return module_of(path) if path else None


def _origin(module: Module, statement: ast.ImportFrom, name: str) -> tuple[Module, str]:
    source = module_of(module.imported_from(statement))
    if source is None:
        raise UnreadableError(name)
    return source, _original(statement, name)


def _original(statement: ast.ImportFrom, name: str) -> str:
    """The name of it in the other module."""
    for alias in statement.names:
        if name == (alias.asname or alias.name):
            return alias.name
    return name
