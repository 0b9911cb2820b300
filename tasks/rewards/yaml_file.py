"""Reads the YAML of a rewards file so that nothing in its blocks of rewards is lost or changed unseen.

PyYAML keeps the last of two equal keys, reads `1e-1` as text, `1:30` as 90 and `version: 1.10` as 1.1. Here two equal
keys are an error, a number in exponent form is a number as in YAML 1.2, a number that the two versions of YAML read
differently is an error, and a key whose value is a text keeps the text that was written.

A file is bounded before its values are made: by bytes, by depth, by the values that its aliases stand for, and by the
digits of a number. Whatever PyYAML raises becomes an error that names the file and the line.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter

from tasks import catalog
from tasks.errors import ConfigError, UnknownRewardError
from tasks.rewards.numerals import EXPONENT_PATTERN
from tasks.rewards.yaml_keys import BLOCKS, TRAIN_KEYS, as_found

log = logging.getLogger(__name__)

TEXT_KEYS = ("name", "device", "queue", "version")
"""Keys of any reward whose value is a text, whatever it looks like."""

MERGE = "<<"

MAX_BYTES = 1 << 20
"""A larger file is none of rewards."""

MAX_DEPTH = 64
"""How deep lists and mappings may lie in each other, those that aliases stand for included."""

MAX_VALUES = 100_000
"""Values in a file, those that aliases stand for included: ten lines of aliases can stand for a billion. PyYAML takes
some ten seconds for so many."""

MAX_DIGITS = 100
"""Characters of a number."""

MAX_WORDS = 2000
"""Characters of an error."""

_TAG = "tag:yaml.org,2002:"
_RETYPED = tuple(f"{_TAG}{kind}" for kind in ("int", "float", "bool", "timestamp"))
"""Types that YAML gives to a text without quotes that looks like such a value."""

_NUMBERS = (f"{_TAG}int", f"{_TAG}float")

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_BASE_8 = re.compile(r"[-+]?0[0-7_]+")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that reads numbers in exponent form as YAML 1.2 does, within bounds.

    Args:
        where: The file, for errors.
    """

    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self._where = where
        self._depth = self._num_nodes = 0
        self._extents: dict[int, tuple[int, int]] = {}
        """Of each node that is complete, by identity: its values and its depth, with what its aliases stand for."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node. Raises `ConfigError` where it goes beyond a bound, and for an anchor within itself."""
        line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        self._num_nodes += 1
        if self._num_nodes > MAX_VALUES:
            self._refuse(line, f"more than {MAX_VALUES} values")
        if self._depth > MAX_DEPTH:
            self._refuse(line, f"lists and mappings are nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not is_alias:
            self._extents[id(node)] = self._extent(node)
        elif id(node) not in self._extents:
            self._refuse(line, "an anchor is named within itself")
        self._check_bounds(node, line)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node. Raises `ConfigError` for a text that is not what its tag says."""
        try:
            return super().construct_object(node, deep)
        except _RAISED_BY_VALUES as error:
            if isinstance(error, ConfigError):  # of a node within this one
                raise
            kind = node.tag.rpartition(":")[2]
            words = f"{_shown(node)} cannot be read as {kind}: {error}"
            self._refuse(node.start_mark.line + 1, words)

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        extents = [self._extents[id(child)] for child in _children(node)]
        num_values = 1 + sum(num for num, _ in extents)
        return num_values, 1 + max((depth for _, depth in extents), default=0)

    def _check_bounds(self, node: yaml.Node, line: int) -> None:
        num_values, depth = self._extents[id(node)]
        if num_values > MAX_VALUES:
            words = f"this stands for {num_values} values with its aliases, the most is {MAX_VALUES}"
            self._refuse(line, words)
        if depth > MAX_DEPTH:
            self._refuse(line, f"lists and mappings are nested deeper than {MAX_DEPTH}")
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node, line)

    def _check_scalar(self, node: yaml.ScalarNode, line: int) -> None:
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            words = f"a number of {len(node.value)} characters, the most is {MAX_DIGITS}; put a text in quotes"
            self._refuse(line, words)
        try:
            node.value.encode()
        except UnicodeEncodeError:
            self._refuse(line, f"{_shown(node)} has half of a surrogate pair")

    def _refuse(self, line: int, words: str) -> NoReturn:
        raise ConfigError(f"{self._where} cannot be read: line {line}: {words}")


_RAISED_BY_VALUES = (
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What PyYAML's constructors raise for a text that is not what its tag says: `!!int ''`, `!!bool x`, a wrong date."""


_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(f"^(?:{EXPONENT_PATTERN})$"), list("-+.0123456789")
)


class Lines:
    """In which lines the blocks of a config and their entries stand, for errors; none where it is no file.

    Args:
        blocks: The line of each block, by its key.
        entries: The line of each entry of a block of rewards.
    """

    def __init__(
        self, blocks: Mapping[str, int], entries: Mapping[str, list[int]]
    ) -> None:
        self._blocks, self._entries = blocks, entries

    @classmethod
    def of(cls, root: yaml.Node | None) -> Lines:
        """The lines of a file's blocks."""
        blocks: dict[str, int] = {}
        entries: dict[str, list[int]] = {}
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        for key, value in pairs:
            if isinstance(key, yaml.ScalarNode):
                blocks[key.value] = key.start_mark.line + 1
                entries[key.value] = [
                    entry.start_mark.line + 1 for entry in _listed(value)
                ]
        return cls(blocks, entries)

    @contextlib.contextmanager
    def told(self, block: Any, entry: int | None = None) -> Iterator[None]:
        """Puts the line of a block, or of one of its entries, before what a `ConfigError` says."""
        try:
            yield
        except ConfigError as error:
            lines = self._entries.get(block, []) if entry is not None else []
            line = lines[entry] if entry is not None and entry < len(lines) else None
            line = line or self._blocks.get(block)
            if line is None:
                raise
            raise type(error)(f"line {line}: {error}") from None


NO_LINES = Lines({}, {})
"""Of a config that was no file."""


def read(path: str | os.PathLike[str]) -> tuple[Mapping[Any, Any], Lines]:
    """The mapping in a YAML file, and where its blocks stand.

    Raises:
        ConfigError: The file cannot be read, is no YAML or no mapping, or something in a block of rewards would be lost
            or become something else; says the line.
    """
    where = os.fspath(path)
    text = _text_of(path, where)
    try:
        loaded, lines = _load(text, where)
    except yaml.reader.ReaderError as error:  # it knows the character, not the line
        line = text.count("\n", 0, error.position) + 1
        words = f"the character U+{error.character:04X} is not allowed"
        raise ConfigError(f"{where} is no YAML: line {line}: {words}") from None
    except yaml.YAMLError as error:
        raise ConfigError(in_short(f"{where} is no YAML: {error}")) from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(
            f"{where}: needs a mapping with a rewards: block, found {as_found(loaded)}"
        )
    return loaded, lines


def in_short(words: str) -> str:
    """An error's words without the middle, where a value of the file makes them longer than anybody reads."""
    if len(words) <= MAX_WORDS:
        return words
    half = MAX_WORDS // 2
    return f"{words[:half]} [{len(words) - 2 * half} characters] {words[-half:]}"


def _text_of(path: str | os.PathLike[str], where: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the rewards file {where}: {error.strerror}"
        ) from None
    except ValueError as error:  # a name with a NUL
        raise ConfigError(f"cannot read the rewards file {where!r}: {error}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{where} has more than {MAX_BYTES} bytes; a rewards file is smaller, is this the right one?"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where} is no YAML: line {line}: {error}") from None


def _load(text: str, where: str) -> tuple[Any, Lines]:
    """The value of a YAML text whose blocks of rewards were checked, and where they stand; None of an empty text."""
    loader = _Loader(text, where)
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            _check(root, where)
        loaded = None if root is None else loader.construct_document(root)
        return loaded, Lines.of(root)
    finally:
        loader.dispose()


def _check(root: yaml.MappingNode, where: str) -> None:
    _check_twice(root, where, (*BLOCKS, "train"))
    for key, value in root.value:
        if key.value in BLOCKS:
            _check_block(value, where)
        elif key.value == "train" and isinstance(value, yaml.MappingNode):
            _check_twice(value, where, TRAIN_KEYS)


def _check_block(block: yaml.Node, where: str) -> None:
    """Check a block of rewards, and keep the texts in it as they were written."""
    for node in _nodes_below(block):
        if isinstance(node, yaml.MappingNode):
            _check_twice(node, where)
            _say_what_is_replaced(node, where)
    for entry in _listed(block):
        _keep_texts(entry)
    _check_numbers(block, where)


def _listed(node: yaml.Node) -> list[yaml.Node]:
    """The nodes of a list; a node that is no list by itself."""
    return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]


def _children(node: yaml.Node) -> list[yaml.Node]:
    """The nodes of a list, or the keys and values of a mapping."""
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    children: list[yaml.Node] = []
    for pair in node.value:
        children += pair
    return children


def _shown(node: yaml.Node) -> str:
    """A node as an error says what was found."""
    return repr(node.value)[:80] if isinstance(node, yaml.ScalarNode) else "this"


def _nodes_below(root: yaml.Node) -> Iterator[yaml.Node]:
    """A node and all below it, each once: a node that has an anchor is found again wherever the anchor is named."""
    seen: set[int] = set()
    left = [root]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        left += _children(node)


def _check_twice(
    node: yaml.MappingNode, where: str, ours: tuple[str, ...] | None = None
) -> None:
    """Raises `ConfigError` for a key that is given twice; only for one of `ours` where the others are the trainer's."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            words = f"{where}: the key {key.value!r} is given twice, in line {lines[key.value]} and in line {line}"
            if ours is None or key.value in ours:
                raise ConfigError(f"{words}; one of them would be lost, keep one")
            log.warning("%s; the last of them counts", words)
        lines[key.value] = line


def _say_what_is_replaced(node: yaml.MappingNode, where: str) -> None:
    """A mapping beside `<<` replaces the mapping of that key as a whole; people expect the two to be joined."""
    own = {key.value: key for key in _keys_of_mappings(node)}
    for base in _merged(node):
        for key in _keys_of_mappings(base):
            if key.value in own:
                line = own[key.value].start_mark.line + 1
                log.warning(
                    "%s: line %d: %s replaces that of <<, of which nothing is kept",
                    where,
                    line,
                    key.value,
                )


def _keys_of_mappings(node: yaml.MappingNode) -> list[yaml.ScalarNode]:
    """The keys whose values are mappings, but for `<<`."""
    keys: list[yaml.ScalarNode] = []
    for key, value in node.value:
        is_plain = isinstance(key, yaml.ScalarNode) and key.value != MERGE
        if is_plain and isinstance(value, yaml.MappingNode):
            keys.append(key)
    return keys


def _merged(node: yaml.MappingNode) -> list[yaml.MappingNode]:
    """The mappings that `<<` brings into this one, and those that it brings into them."""
    found: list[yaml.MappingNode] = []
    left: list[yaml.Node] = [node]
    while left:
        current = left.pop(0)
        is_known = any(current is one for one in found)
        if is_known or not isinstance(current, yaml.MappingNode):
            continue
        found.append(current)
        for key, value in current.value:
            if key.value == MERGE:
                left += _listed(value)
    return found[1:]


def _keep_texts(entry: yaml.Node) -> None:
    """Keep the keys of one reward, and the values that must be texts, as the texts that were written."""
    if not isinstance(entry, yaml.MappingNode):
        return
    texts = {*TEXT_KEYS, *_text_options(entry)}
    for mapping in (entry, *_merged(entry)):
        nested = [value for key, value in mapping.value if key.value == "extra_kwargs"]
        for part in (mapping, *nested):
            if isinstance(part, yaml.MappingNode):
                _keep_texts_of(part, texts if part is mapping else texts - {*TEXT_KEYS})


def _keep_texts_of(mapping: yaml.MappingNode, texts: set[str]) -> None:
    for key, value in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.tag == f"{_TAG}bool":
            key.tag = f"{_TAG}str"
        is_text = isinstance(value, yaml.ScalarNode) and key.value in texts
        if is_text and value.tag in _RETYPED:
            value.tag = f"{_TAG}str"


def _text_options(entry: yaml.MappingNode) -> set[str]:
    """The options of its built-in that are texts."""
    try:
        found = catalog.find(_model_of(entry).strip())
    except UnknownRewardError:
        return set()
    return _text_options_of(found[0]) if found is not None else set()


@functools.cache
def _text_options_of(builtin: str) -> set[str]:
    texts: set[str] = set()
    for name, option in catalog.CATALOG[builtin].options.items():
        if _is_text(TypeAdapter(option.type).json_schema()):
            texts.add(name)
    return texts


def _model_of(entry: yaml.MappingNode) -> str:
    """The reward model that an entry names itself, or that `<<` brings; empty if there is none."""
    for mapping in (entry, *reversed(_merged(entry))):
        for key, value in mapping.value:
            if key.value == "reward_model":
                return str(value.value)
    return ""


def _is_text(schema: Mapping[str, Any]) -> bool:
    kinds = {part.get("type") for part in (schema, *schema.get("anyOf", ()))}
    return "string" in kinds and not kinds & {"number", "integer"}


def _check_numbers(block: yaml.Node, where: str) -> None:
    """Raises `ConfigError` for a number that YAML 1.1 and YAML 1.2 read differently."""
    for node in _nodes_below(block):
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _NUMBERS:
            continue
        if _BASE_60.fullmatch(node.value) or _is_octal(node.value):
            raise ConfigError(
                f"{where}: line {node.start_mark.line + 1}: {node.value} is another number, or a text, to another "
                "reader of YAML; write the plain number, or put it in quotes"
            )


def _is_octal(text: str) -> bool:
    if not _BASE_8.fullmatch(text):
        return False
    digits = text.replace("_", "")
    return int(digits, 8) != int(digits)
