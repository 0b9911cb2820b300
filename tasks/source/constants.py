"""The value of an expression in source code, where it is certain without running anything."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

Named = Callable[[ast.expr], Any]
"""The value of a name or of an attribute. Raises `UnreadableError`."""

_MAKERS = {"tuple": tuple, "list": list, "frozenset": tuple, "set": tuple}
"""Calls that make a sequence of another sequence. Of a set only its items count here, so that it is read as a tuple."""


class UnreadableError(Exception):
    """The value of an expression cannot be known without running it; the message is the expression."""


def value_of(node: ast.expr, named: Named) -> Any:
    """The value of an expression of texts, tuples, lists, sets and their sums.

    Raises:
        UnreadableError: It is another expression, or the value of a name in it is not certain.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.Set):
        return tuple(_items(node.elts, named))
    if isinstance(node, ast.List):
        return _items(node.elts, named)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sum(value_of(node.left, named), value_of(node.right, named), node)
    if isinstance(node, ast.Call):
        return _made(node, named)
    if isinstance(node, ast.Name | ast.Attribute):
        return named(node)
    raise UnreadableError(written(node))


def written(node: ast.AST) -> str:
    """An expression as it is written, in one line."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sum(left: Any, right: Any, node: ast.AST) -> Any:
    if type(left) is not type(right) or not isinstance(left, str | tuple | list):
        raise UnreadableError(written(node))
    return left + right


def _items(nodes: list[ast.expr], named: Named) -> list[Any]:
    items: list[Any] = []
    for node in nodes:
        if not isinstance(node, ast.Starred):
            items.append(value_of(node, named))
            continue
        inner = value_of(node.value, named)
        if not isinstance(inner, tuple | list):
            raise UnreadableError(written(node))
        items.extend(inner)
    return items


def _made(node: ast.Call, named: Named) -> Any:
    """The value of `tuple(...)` and its kin."""
    maker = _MAKERS.get(node.func.id) if isinstance(node.func, ast.Name) else None
    if maker is None or node.keywords or len(node.args) > 1:
        raise UnreadableError(written(node))
    given = value_of(node.args[0], named) if node.args else ()
    if not isinstance(given, tuple | list):
        raise UnreadableError(written(node))
    return maker(given)
