"""Numbers that arrive as text: YAML 1.1, which PyYAML reads, takes `1e-1` for a word."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_DECIMAL = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", re.ASCII
)
_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+", re.ASCII)
EXPONENT_PATTERN = _EXPONENT.pattern
"""A number in exponent form, whatever YAML makes of it."""


def in_exponent_form(value: Any) -> float | None:
    """The number that a text in exponent form stands for, if `value` is one."""
    return _number(value, _EXPONENT)


def as_numbers(value: Any, schema: Mapping[str, Any]) -> Any:
    """`value` with texts that stand for numbers as numbers, where the JSON schema of its type wants a number.

    Where it wants an integer: texts in exponent form, and floats, that are whole.
    """
    of_items = schema.get("additionalProperties")
    if isinstance(value, Mapping) and isinstance(of_items, Mapping):
        return {key: as_numbers(item, of_items) for key, item in value.items()}
    kinds = {part.get("type") for part in (schema, *schema.get("anyOf", ()))}
    if "number" in kinds:
        found = _number(value, _DECIMAL)
        return value if found is None else found
    if "integer" in kinds:
        return _whole(value)
    return value


def _whole(value: Any) -> Any:
    found = value if isinstance(value, float) else in_exponent_form(value)
    if found is None or not math.isfinite(found) or not found.is_integer():
        return value
    return int(found)


def _number(value: Any, form: re.Pattern[str]) -> float | None:
    if not isinstance(value, str) or form.fullmatch(value.strip()) is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None
