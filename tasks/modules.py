"""The source of modules, found and parsed without importing any (they may need torch, or a GPU), and what it binds."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import threading
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

STAR = "*"
"""Bound by `from x import *`: any name."""

_NEW_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(eq=False)
class Module:
    """A module as it is written."""

    name: str
    is_package: bool
    tree: ast.Module

    @cached_property
    def _binders(self) -> dict[str, list[ast.stmt]]:
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            for name in bound_by(statement):
                found.setdefault(name, []).append(statement)
        return found

    def binder(self, name: str) -> ast.stmt | None:
        """The one statement of the module that binds `name`; None if there is none, or if others may bind it anew."""
        binders = self._binders.get(name, [])
        if len(binders) != 1:
            return None
        stars = self._binders.get(STAR, [])
        return None if any(star.lineno > binders[0].lineno for star in stars) else binders[0]

    def binds(self, name: str) -> bool:
        """Whether any statement binds `name`, or may."""
        return name in self._binders or STAR in self._binders

    def imported_from(self, statement: ast.ImportFrom) -> str:
        """The full name of the module that `from ... import` names here; empty if it is above the top."""
        if not statement.level:
            return statement.module or ""
        parts = self.name.split(".")
        package = parts[: len(parts) - statement.level + self.is_package]
        return ".".join([*package, *([statement.module] if statement.module else [])]) if package else ""


def module_of(name: str) -> Module | None:
    """The module of a dotted name; None if its source is not on this host, or is no Python of this version."""
    file = _file_of(name)
    if file is None:
        return None
    try:
        status = file.stat()
        tree = _parsed(str(file), status.st_mtime_ns, status.st_size)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    return Module(name, file.name == "__init__.py", tree)


def bound_by(statement: ast.AST) -> set[str]:
    """The names that a statement binds, changes or deletes in the scope that it stands in; `STAR` for any."""
    names: set[str] = set()
    left = [statement]
    while left:
        node = left.pop()
        names.update(_names_bound(node))
        if not isinstance(node, (*_NEW_SCOPES, ast.Lambda)):
            left.extend(ast.iter_child_nodes(node))
    return names


def _names_bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, _NEW_SCOPES):
        yield node.name
        for inner in ast.walk(node):
            if isinstance(inner, ast.Global):
                yield from inner.names
    elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, ast.alias):
        yield node.asname or node.name.partition(".")[0]
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest


def _file_of(name: str) -> Path | None:
    """Where Python would find the source of a module. No package is imported on the way."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for folder in [os.getcwd(), *sys.path]:
        base = Path(folder).joinpath(*parts)
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return file
    return _file_by_finders(parts)


def _file_by_finders(parts: list[str]) -> Path | None:
    """The same where something else than a folder says it: an editable install, or a module that is imported."""
    try:
        spec = importlib.util.find_spec(parts[0])  # which imports nothing: it has no parent
    except (ImportError, ValueError):
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        base = Path(folder).joinpath(*parts[1:])
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return file
    is_file = len(parts) == 1 and spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return Path(str(spec.origin)) if spec is not None and is_file else None


_parsing = threading.Lock()
"""Python 3.11 counts the depth of a syntax tree for all threads together: SystemError if two parse at once."""


@lru_cache(maxsize=256)
def _parsed(file: str, _mtime_ns: int, _size: int) -> ast.Module:
    with tokenize.open(file) as source:
        text = source.read()
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Python thinks of the user's code it says where it runs
        return ast.parse(text)
