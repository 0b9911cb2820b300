"""The JSON schema of a rewards file, for editors: keys, built-ins, their options, with descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from tasks.catalog import ALIASES, CATALOG, NOT_BUILT, ModelEntry, Option
from tasks.rewards.config import RewardConfig
from tasks.rewards.fields import SAMPLE_FIELDS, THEIR_NAMES
from tasks.rewards.numerals import EXPONENT_PATTERN
from tasks.rewards.spec import DTYPES, JPEG, RAW, RewardSpec
from tasks.rewards.yaml_keys import NOT_BUILT as KEYS_NOT_BUILT

DRAFT = "http://json-schema.org/draft-07/schema#"
"""What editors' YAML plug-ins understand."""

_REWARD = {"$ref": "#/definitions/reward"}

_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
"""Bounds as pydantic leaves them where a field has a validator of its own, to their names in a schema."""

_DOTTED_PATH = r"^\s*[^.\s].*\.[^.\s]+\s*$"

_NUMBER = r"([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"

_TEXTS = {
    ("number", False): rf"^\s*[+-]?{_NUMBER}",
    ("number", True): rf"^\s*\+?(?=[^eE]*[1-9]){_NUMBER}",
    ("integer", True): (
        r"^\s*\+?([0-9_]*[1-9][0-9_]*(\.0*)?|[0-9]*[1-9][0-9]*(\.0*)?[eE]\+?[0-9]+)\s*$"
    ),
}
"""Texts that are taken for a number, above 0 or any: YAML 1.1 reads 1e-3 as text."""

_BOOLEANS = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
"""Texts that are taken for a boolean, in any case: YAML 1.2 reads yes as text."""

_NOT_BUILT: dict[str, Any] = {
    key: {"description": f"not built here: {advice}", "type": "null"}
    for key, advice in KEYS_NOT_BUILT.items()
}
"""Keys of Flow-Factory's that may stand without a value only."""

_OWN_KEYS = ("options", "how", "required", "fields", "launch")
"""Fields of a `RewardSpec` that are no keys of the file."""

_DECLARED: dict[str, Any] = {
    "kind": {
        "description": "whether it scores samples or whole groups; what its class says unless given",
        "enum": ["pointwise", "groupwise", None],
    },
    "required_fields": {
        "description": "fields of a sample that reach it; what its class says unless given",
        "anyOf": [
            {"type": "array", "items": {"enum": [*SAMPLE_FIELDS, *THEIR_NAMES]}},
            {"enum": [*SAMPLE_FIELDS, *THEIR_NAMES, None]},
        ],
    },
    "extra_kwargs": {"description": "more options", "type": ["object", "null"]},
}
"""Keys of a class of one's own."""

_DESCRIPTIONS = {
    "name": "under which the reward is logged and returned; the reward model's unless given",
    "reward_model": "a built-in (case does not count), or the dotted path of a class of your own",
    "weight": "its weight in advantages",
    "dtype": "in which a local model computes",
    "batch_size": "samples in one task",
    "queue": "which workers serve it, celery -A tasks worker -Q that_queue; gpu or vlm unless given",
    "on_failure": "what a sample without this reward is: an error, NaN, or a number of your choice (still listed)",
}


def rewards_schema() -> dict[str, Any]:
    """The schema of a whole file, as a dict of plain data. Keys that are not ours are the trainer's."""
    block = {"oneOf": [{"type": "array", "items": _REWARD, "minItems": 1}, _REWARD]}
    nothing: dict[str, Any] = {"enum": [None, [], {}]}
    config = RewardConfig.model_json_schema()["properties"]
    return {
        "$schema": DRAFT,
        "title": "rewards of rewardq",
        "type": "object",
        "required": ["rewards"],
        "properties": {
            "rewards": {
                "description": "the rewards of training; a list, or one",
                **block,
            },
            "eval_rewards": {
                "description": "the rewards of evaluation, those of training unless given",
                "anyOf": [block, nothing],
            },
            "train": {
                "type": ["object", "null"],
                "description": "the trainer's own; two keys of it are read",
                "properties": {
                    key: _or_null(config[key])
                    for key in ("advantage_aggregation", "global_std")
                },
            },
        },
        "definitions": {
            "reward": _reward(),
            "own": {
                "description": "a class of your own takes any option",
                "properties": {**_keys(None), **_DECLARED, **_NOT_BUILT},
            },
            **{name: _builtin(entry) for name, entry in CATALOG.items()},
        },
    }


def _reward() -> dict[str, Any]:
    """One reward: what it may say depends on its reward model."""
    by_model: dict[str, Any] = {"$ref": "#/definitions/own"}
    for name in reversed(CATALOG):
        aliases = [path for path, canonical in ALIASES.items() if canonical == name]
        is_this = {"reward_model": {"pattern": _any_of(name, *aliases)}}
        by_model = {
            "if": {"properties": is_this},
            "then": {"$ref": f"#/definitions/{name}"},
            "else": by_model,
        }

    models: list[dict[str, str]] = []
    for name, entry in CATALOG.items():
        models.append({"const": name, "description": entry.doc})
    models.append({"pattern": _any_of(*CATALOG, *NOT_BUILT)})
    models.append({"pattern": _DOTTED_PATH, "description": "a dotted path"})
    return {
        "type": "object",
        "required": ["reward_model"],
        "properties": {
            "reward_model": {
                "description": _DESCRIPTIONS["reward_model"],
                "type": "string",
                "anyOf": models,
            }
        },
        **by_model,
    }


def _builtin(entry: ModelEntry) -> dict[str, Any]:
    options = {name: _option(option) for name, option in entry.options.items()}
    not_its: dict[str, Any] = {key: {"type": "null"} for key in _DECLARED}
    nested = {
        "type": ["object", "null"],
        "properties": options,
        "additionalProperties": False,
    }
    schema: dict[str, Any] = {
        "description": entry.doc,
        "properties": {
            **not_its,
            **_NOT_BUILT,
            **_keys(entry),
            **options,
            "extra_kwargs": nested,
        },
        "additionalProperties": False,
    }

    needed = [name for name, option in entry.options.items() if option.is_needed]
    if needed:
        within = {"type": "object", "required": needed}
        in_extra_kwargs = {
            "required": ["extra_kwargs"],
            "properties": {"extra_kwargs": within},
        }
        schema["anyOf"] = [{"required": needed}, in_extra_kwargs]
    return schema


def _option(option: Option) -> dict[str, Any]:
    described = {"description": option.doc, "default": option.default}
    return {**_or_written_number(TypeAdapter(option.type).json_schema()), **described}


def _keys(entry: ModelEntry | None) -> dict[str, Any]:
    """The keys that every reward may have, with the defaults of this model."""
    keys = _keys_of_spec()
    for key, text in _DESCRIPTIONS.items():
        keys[key]["description"] = text
    del keys["name"]["minLength"]  # an empty name counts as none
    keys["dtype"]["anyOf"] = _dtypes()
    keys["version"]["type"] = ["string", "number"]  # YAML reads 1 as a number

    is_judge = entry is not None and entry.is_judge
    keys["image_format"]["enum"] = ["png", "jpeg", "webp"] if is_judge else [RAW, JPEG]
    if entry is not None:
        keys["queue"]["default"] = entry.queue
        keys["batch_size"]["default"] = entry.batch_size
        keys["timeout_s"]["default"] = entry.timeout_s
        keys["image_format"]["default"] = entry.image_format or RAW

    may_be_null = {key: _or_null(schema) for key, schema in keys.items()}
    return {**may_be_null, "reward_model": keys["reward_model"]}


def _keys_of_spec() -> dict[str, dict[str, Any]]:
    """The fields of a `RewardSpec` that are keys of the file."""
    spec = RewardSpec.model_json_schema()
    keys: dict[str, dict[str, Any]] = {}
    for key, schema in spec["properties"].items():
        if key not in _OWN_KEYS:
            keys[key] = _plain(schema, spec)
    return keys


def _dtypes() -> list[dict[str, Any]]:
    """What `dtype` may be: first the names that an editor offers, then all that are taken."""
    of_torch = [f"torch.{name}" for name in dict.fromkeys(DTYPES.values())]
    in_any_case = "|".join(map(_letters, DTYPES))
    return [
        {"enum": [*DTYPES, *of_torch]},
        {"pattern": rf"^(torch\.)?({in_any_case})$"},
    ]


def _plain(schema: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A field's schema with references written out, without pydantic's titles and null."""
    if "$ref" in schema:
        return _plain(spec["$defs"][schema["$ref"].rsplit("/", 1)[1]], spec)
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "anyOf":
            kinds = [one for one in value if one != {"type": "null"}]
            plain["anyOf"] = [_plain(one, spec) for one in kinds]
        elif key == "properties":
            plain[key] = {name: _plain(one, spec) for name, one in value.items()}
        elif key != "title":
            plain[_BOUNDS.get(key, key)] = value
    return _or_text(plain)


def _or_text(schema: dict[str, Any]) -> dict[str, Any]:
    """A number or boolean, or a text that is taken for one."""
    kind = schema.get("type", "")
    is_bound = "minimum" in schema or "exclusiveMinimum" in schema
    described, rest = _described(schema)
    if kind == "boolean":
        words = "|".join(map(_letters, _BOOLEANS))
        others = [{"pattern": f"^({words})$", "type": "string"}, {"enum": [0, 1]}]
    elif (kind, is_bound) in _TEXTS:
        others = [{"pattern": _TEXTS[kind, is_bound], "type": "string"}]
    else:
        return schema
    return {**described, "anyOf": [rest, *others]}


def _or_written_number(schema: dict[str, Any]) -> dict[str, Any]:
    """A number, or a text that an option takes for one; its bounds are the loader's to check."""
    if schema.get("type") == "number":
        pattern = _TEXTS["number", False]
    elif schema.get("type") == "integer":
        pattern = rf"^\s*{EXPONENT_PATTERN}\s*$"
    else:
        return schema
    return {"anyOf": [schema, {"type": "string", "pattern": pattern}]}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A key without a value is as if it were not there."""
    described, rest = _described(schema)
    return {**described, "anyOf": [rest, {"type": "null"}]}


def _described(schema: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a schema says to its reader, and the rest."""
    words = ("description", "default")
    described = {key: schema[key] for key in words if key in schema}
    rest = {key: value for key, value in schema.items() if key not in words}
    return described, rest


def _any_of(*names: str) -> str:
    """A pattern for any of these names in upper and lower case."""
    return "|".join(rf"^\s*{_letters(name)}\s*$" for name in names)


def _letters(name: str) -> str:
    """A pattern for `name` in upper and lower case; JSON schemas have no flag for that."""
    return "".join(map(_letter, name))


def _letter(character: str) -> str:
    if character.isalpha():
        return f"[{character.upper()}{character.lower()}]"
    return r"\." if character == "." else character
