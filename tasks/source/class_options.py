"""Which options the code of a user's class reads, told from source on this host; nothing is imported.

An option is a key of a reward's entry that is not ours. A class reads it from `config.extra_kwargs`, or as an attribute
of `config`.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from tasks.source.code import sources_from
from tasks.source.files import find_source, last_name, parse

CONFIG, OPTIONS = "config", "extra_kwargs"
"""Names of a class's configuration, and of the mapping in the configuration that has its options."""

_SAY_NOTHING = (
    "RewardModel",
    "PointwiseRewardModel",
    "GroupwiseRewardModel",
    "object",
    "ABC",
)
"""Bases that read no options."""

_READERS = ("get", "pop", "setdefault", "__getitem__", "__contains__")
"""Methods of a mapping whose first argument is the key that is read."""


@dataclass(frozen=True, slots=True)
class OptionsRead:
    """The options that the code of a class reads."""

    file: str
    """The name of the class's file, for people."""
    names: frozenset[str]
    """Names that it reads."""
    words: frozenset[str]
    """All words of its source: an option that is none of these words is not read in any way."""


def options_read_by(path: str) -> OptionsRead | None:
    """The options that the code of the class at a dotted path reads.

    None where the source does not tell: it is not here or cannot be parsed; a base of the class is a library's or a
    built-in of ours, which reads options of its own; or the options are handed on as a whole
    (`**config.extra_kwargs`), so that any name may be read elsewhere.
    """
    module, _, name = path.rpartition(".")
    first = find_source(module)
    if first is None:
        return None
    sources = [source for _, source in sources_from(first)]
    try:
        trees = [parse(source) for source in sources]
    except (SyntaxError, ValueError, RecursionError):
        return None
    if not _is_all_there(name, trees):
        return None

    names: set[str] = set()
    for tree in trees:
        reading = _Reading(tree)
        if reading.is_handed_on:
            return None
        names |= reading.names
    return OptionsRead(first.name, frozenset(names), _words_of(sources))


def _words_of(sources: list[bytes]) -> frozenset[str]:
    """All words of these sources."""
    words: set[str] = set()
    for source in sources:
        words.update(re.findall(r"\w+", source.decode("utf-8", "replace")))
    return frozenset(words)


def _classes_in(trees: list[ast.Module]) -> dict[str, list[ast.ClassDef]]:
    """The classes of these modules by name; several may have one name."""
    classes: dict[str, list[ast.ClassDef]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
    return classes


def _is_all_there(name: str, trees: list[ast.Module]) -> bool:
    """Whether a class and all its bases that may read options are in these modules."""
    classes = _classes_in(trees)
    left, seen = [name], set(_SAY_NOTHING)
    while left:
        current = left.pop()
        if current in seen:
            continue
        seen.add(current)
        if current not in classes:
            return False
        for node in classes[current]:
            left += map(last_name, node.bases)
    return True


class _Reading(ast.NodeVisitor):
    """Collects what one module reads."""

    def __init__(self, tree: ast.Module) -> None:
        self.names: set[str] = set()
        self.is_handed_on = False
        self._aliases = {OPTIONS}
        self._told: set[ast.expr] = set()
        for node in ast.walk(tree):
            self._find_alias(node)
        self.visit(tree)

    def _find_alias(self, node: ast.AST) -> None:
        """`options = self.config.extra_kwargs`, also with `or {}` behind it."""
        if not isinstance(node, ast.Assign):
            return
        value = node.value
        if isinstance(value, ast.BoolOp):
            value = value.values[0]
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if self._is_options(value) and len(names) == len(node.targets):
            self._told.add(value)
            self._aliases.update(names)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """`extra_kwargs["name"]`."""
        if self._is_options(node.value):
            self._read(node.value, node.slice)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """`"name" in extra_kwargs`."""
        for operator, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operator, ast.In | ast.NotIn) and self._is_options(right):
                self._read(right, node.left)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`extra_kwargs.get("name")`, `getattr(config, "name", ...)`."""
        called = node.func
        if isinstance(called, ast.Attribute):
            if called.attr in _READERS and self._is_options(called.value):
                self._read(called.value, node.args[0] if node.args else None)
        elif _is_call_of_getattr(node):
            self._read_attribute(node.args[0], node.args[1])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`config.name`; the options themselves, where nothing above has told what is read of them."""
        if self._is_options(node):
            self.is_handed_on |= node not in self._told
        elif _is_config(node.value):
            self.names.add(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """An alias of the options that is used as a whole."""
        if isinstance(node.ctx, ast.Load) and self._is_options(node):
            self.is_handed_on |= node not in self._told

    def _is_options(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr == OPTIONS
        return isinstance(node, ast.Name) and node.id in self._aliases

    def _read(self, options: ast.expr, key: ast.expr | None) -> None:
        """Note a key of the options that is read. A key that is not written out may be any."""
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            self._told.add(options)
            self.names.add(key.value)

    def _read_attribute(self, config: ast.expr, name: ast.expr) -> None:
        if not _is_config(config):
            return
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            self.names.add(name.value)
            if name.value == OPTIONS:
                self.is_handed_on = True
        else:
            self.is_handed_on = True


def _is_call_of_getattr(node: ast.Call) -> bool:
    """`getattr(config, "name", ...)`, or `hasattr`."""
    called = node.func
    is_name = isinstance(called, ast.Name) and called.id in ("getattr", "hasattr")
    return is_name and len(node.args) > 1


def _is_config(node: ast.expr) -> bool:
    """`config`, or `self.config`."""
    return (isinstance(node, ast.Name) and node.id == CONFIG) or (
        isinstance(node, ast.Attribute) and node.attr == CONFIG
    )
