"""What the body of a class statement, and the code around it, make of the attributes of the class; nothing is run."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tasks.source.constants import UnreadableError, value_of, written
from tasks.source.modules import STAR, Module, bound_by

_RUNS_CODE = {"exec", "eval", "locals", "vars", "globals", "setattr"}
"""Called in the body of a class they may bind any name there."""

Named = Callable[[ast.expr], Any]
"""The value of a name outside of the body. Raises `UnreadableError`."""


class AssignedError(UnreadableError):
    """The attribute is assigned; its value cannot be read."""


def values_in(body: list[ast.stmt], named: Named) -> dict[str, Any]:
    """By name, the value that the body of a class leaves it with, why that is unknown, or a function's statement."""
    values: dict[str, Any] = {}
    for statement in body:
        _run(statement, values, named)
    return values


def assignments_from_outside(module: Module, name: str) -> Iterator[ast.AST]:
    """Where a module assigns an attribute of one of its classes."""
    for node in ast.walk(module.tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == name
            and not isinstance(node.ctx, ast.Load)
        ):
            if _is_class(module, node.value):
                yield node
        elif (
            isinstance(node, ast.Call)
            and _is_call_of(node, {"setattr"})
            and len(node.args) == 3
        ):
            about = node.args[1]
            if (
                isinstance(about, ast.Constant)
                and about.value == name
                and _is_class(module, node.args[0])
            ):
                yield node


def is_mentioned(module: Module, name: str) -> bool:
    """Whether code of the module speaks of an attribute in another way than by assigning it in the body of a class."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Constant) and node.value == name:
            return True
        if isinstance(node, ast.keyword) and node.arg == name:
            return True
        if (
            isinstance(node, ast.Attribute)
            and node.attr == name
            and not isinstance(node.ctx, ast.Load)
        ):
            return True  # of `self` too: an instance may say otherwise than its class
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed = node.func.value  # `Mine.required_fields.append(...)`
            if isinstance(changed, ast.Attribute) and changed.attr == name:
                return True
    return False


def assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """The name and the value of a plain assignment."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    elif isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        target = statement.target
        if isinstance(target, ast.Name):
            now = ast.copy_location(ast.Name(target.id, ast.Load()), target)
            return target.id, ast.copy_location(
                ast.BinOp(now, ast.Add(), statement.value), statement
            )
    else:
        return None, None
    return (
        (target.id, statement.value) if isinstance(target, ast.Name) else (None, None)
    )


def last_name(base: ast.expr) -> str:
    """`PointwiseRewardModel` of `workers.PointwiseRewardModel`."""
    return (
        base.attr
        if isinstance(base, ast.Attribute)
        else base.id
        if isinstance(base, ast.Name)
        else ""
    )


def _is_class(module: Module, node: ast.expr) -> bool:
    name = last_name(node)
    binder = module.binder(name)
    is_alias = isinstance(binder, ast.Assign) and isinstance(
        binder.value, ast.Name | ast.Attribute
    )
    return name == "cls" or isinstance(binder, ast.ClassDef) or is_alias


def _run(statement: ast.stmt, values: dict[str, Any], named: Named) -> None:
    """Note what one statement of the body makes of the names there."""
    if isinstance(statement, ast.FunctionDef):
        values[statement.name] = statement
        return
    target, value = assigned(statement)
    if target is not None and value is None:
        return  # `required_fields: tuple[str, ...]` binds nothing
    unknown = UnreadableError(written(statement))
    found: Any = unknown
    if target is not None and value is not None:
        with contextlib.suppress(UnreadableError, RecursionError):
            found = value_of(value, lambda node: _named_within(node, values, named))
    values.update(dict.fromkeys(_changed_by(statement, values), unknown))
    if target is not None:
        values[target] = found


def _named_within(node: ast.expr, values: dict[str, Any], named: Named) -> Any:
    """The value of a name within the body."""
    if not isinstance(node, ast.Name) or node.id not in values:
        return named(node)
    found = values[node.id]
    if isinstance(found, UnreadableError | ast.AST):
        raise UnreadableError(node.id)
    return list(found) if isinstance(found, list) else found


def _changed_by(statement: ast.stmt, values: dict[str, Any]) -> set[str]:
    """Names of a class body that a statement binds or may change; `STAR` where it runs code that may bind any."""
    changed = bound_by(statement)
    if isinstance(statement, ast.AsyncFunctionDef | ast.ClassDef):
        return changed
    for node in ast.walk(statement):
        if _is_call_of(node, _RUNS_CODE):
            changed.add(STAR)
        is_list = isinstance(node, ast.Name) and isinstance(values.get(node.id), list)
        if is_list and isinstance(
            statement, ast.Expr
        ):  # a method of a list may change it
            changed.add(node.id)  # type: ignore[attr-defined]
    return changed


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in names
    )
