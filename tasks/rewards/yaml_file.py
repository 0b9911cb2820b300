"""Reads the YAML of a rewards file so that nothing in its blocks of rewards is lost or changed unseen.

PyYAML keeps the last of two equal keys, reads `1e-1` as text, `1:30` as 90 and `version: 1.10` as 1.1. Here two equal
keys are an error, a number in exponent form is a number as in YAML 1.2, a number that the two versions of YAML read
differently is an error, and a key whose value is a text keeps the text that was written.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

_TAG = "tag:yaml.org,2002:"
_RETYPED = tuple(f"{_TAG}{kind}" for kind in ("int", "float", "bool", "timestamp"))
"""Types that YAML gives to a text without quotes that looks like such a value."""

_NUMBERS = (f"{_TAG}int", f"{_TAG}float")

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_BASE_8 = re.compile(r"[-+]?0[0-7_]+")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that reads numbers in exponent form as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(f"^(?:{EXPONENT_PATTERN})$"), list("-+.0123456789")
)


def read(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file cannot be read, is no YAML or no mapping, or something in a block of rewards would be lost
            or become something else; says the line.
    """
    where = os.fspath(path)
    try:
        loaded = _load(Path(path).read_text(encoding="utf-8"), where)
    except OSError as error:
        raise ConfigError(
            f"cannot read the rewards file {where}: {error.strerror}"
        ) from None
    except ConfigError:  # a ValueError too, which says the file already
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is no YAML: {error}") from None
    except (ValueError, RecursionError) as error:
        # A date that does not exist; an anchor within itself.
        raise ConfigError(f"{where} cannot be read: {error}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(
            f"{where}: needs a mapping with a rewards: block, found {as_found(loaded)}"
        )
    return loaded


def _load(text: str, where: str) -> Any:
    """The value of a YAML text whose blocks of rewards were checked; None of an empty text."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            _check(root, where)
        return None if root is None else loader.construct_document(root)
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
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                left += (key, value)
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


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
    if found is None:
        return set()

    texts: set[str] = set()
    for name, option in found[1].options.items():
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
