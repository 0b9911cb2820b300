"""The JSON schema of a rewards file agrees with what `RewardConfig` takes."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.catalog import CATALOG
from tasks.errors import ConfigError
from tasks.rewards import RewardConfig
from tasks.rewards.schema import rewards_schema
from tests.trainer.test_flow_factory_configs import EXAMPLES, GUIDANCE
from trainer_client.cli.schema import schema


@functools.cache
def schema_validator() -> Any:
    jsonschema.Draft7Validator.check_schema(rewards_schema())
    return jsonschema.Draft7Validator(rewards_schema())


@pytest.fixture(scope="module")
def validator() -> Any:
    return schema_validator()


def test_the_command_prints_the_schema() -> None:
    result = CliRunner().invoke(schema)
    assert result.exit_code == 0
    assert json.loads(result.output) == rewards_schema()


@pytest.mark.parametrize("name", CATALOG)
def test_each_option_of_a_built_in_is_there_with_its_default_and_a_description(name: str) -> None:
    properties = rewards_schema()["definitions"][name]["properties"]
    for option_name, option in CATALOG[name].options.items():
        assert properties[option_name]["default"] == option.default
        assert properties[option_name]["description"]
    for key in ("name", "weight", "queue", "on_failure", "timeout_s", "cache", "version", "image_format"):
        assert key in properties


def test_every_keyword_is_one_of_json_schema() -> None:
    known = set(jsonschema.Draft7Validator.META_SCHEMA["properties"])

    def keywords(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield key
                named = key in ("properties", "definitions")
                for inner in value.values() if named else [] if key in ("default", "enum", "const") else [value]:
                    yield from keywords(inner)
        elif isinstance(part, list):
            for inner in part:
                yield from keywords(inner)

    assert set(keywords(rewards_schema())) - known <= {"prefixItems"}


def loads(config: Any, folder: Path = Path()) -> bool:
    try:
        RewardConfig.from_dict(config, folder)
    except ConfigError:
        return False
    return True


def literals(path: Path) -> Iterator[Any]:
    """The mappings that are written out in a Python file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            with contextlib.suppress(ValueError, TypeError):
                yield ast.literal_eval(node)


ROOT = Path(__file__).parents[2]
YAML_FILES = [path for path in ROOT.glob("examples/**/*.yaml") if "rewards" in (yaml.safe_load(path.read_text()) or {})]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_example_loads_and_is_valid(validator: Any, path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    assert loads(config, path.parent)
    validator.validate(config)


def test_every_config_in_the_tests_that_loads_is_valid(validator: Any) -> None:
    found = [one for path in ROOT.glob("tests/**/*.py") for one in literals(path)]
    rewards = [{"rewards": one} for one in found if "reward_model" in one]
    configs = [one for one in [*rewards, *found] if "rewards" in one and loads(one)]
    assert len(configs) > 50
    assert [config for config in configs if not validator.is_valid(config)] == []


NUMBERS: list[Any] = [1, 0, -1, 0.5, "1e-3", "-2.5E1", " 3 ", "1_000", "+.5", "0", "x", "", "inf", True, None, [], {}]
VALUES: dict[str, list[Any]] = {
    "name": ["mine", "two words", "", None, 3],
    "reward_model": [
        *("OCR", "ocr", " OCR ", "PickScore_Rank", "vllm_evaluate", "clap", "GenEval", "my.Mine", "OCRR", "", 3),
    ],
    "weight": NUMBERS,
    "timeout_s": NUMBERS,
    "batch_size": [*NUMBERS, 16.0, "16.0", "1e1"],
    "num_workers": [1, "2", None],
    "dtype": ["BF16", "Float32", "torch.float16", "torch.Half", "Torch.bf16", "int8", "bf16 ", 16, None],
    "async_reward": [True, "yes", "OFF", "t", 0, 1, 2, 1.0, "maybe", "", None],
    "cache": [False, "No", None],
    "on_failure": ["raise", "nan", "NaN", None, {}, *({"value": one} for one in NUMBERS), {"value": 1, "x": 1}],
    "image_format": ["raw", "jpeg", "png", "RAW", None],
    "queue": ["gpu", "a b", "", None],
    "version": ["1", "", 1, 1.5, True, None],
    "kind": ["groupwise", "other", None],
    "required_fields": [["image"], ["images"], [], None, "image", "images", ["audio_sample_rate", "fps"]],
    "applicable_datasets": [["one"], None],
    "extra_kwargs": [{"ties": "mean"}, {"whatever": 1}, {}, None],
}  # fmt: skip
REWARDS = st.fixed_dictionaries(
    {"reward_model": st.sampled_from(VALUES["reward_model"])},
    optional={key: st.sampled_from(values) for key, values in VALUES.items() if key != "reward_model"},
)
FEW_KEYS = st.sets(st.sampled_from([*VALUES]), max_size=3)
TRAIN = st.fixed_dictionaries(
    {},
    optional={
        "advantage_aggregation": st.sampled_from([*("gdpo", "sum", "mean", "SUM", None, 1)]),
        "global_std": st.sampled_from([*(True, False, None, "yes", 0)]),
        "theirs": st.just([1]),
    },
)


def few(reward: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """A reward with these keys only: one with many is almost never right."""
    return {key: value for key, value in reward.items() if key in keys | {"reward_model"}}


@pytest.mark.parametrize("key", [key for key in VALUES if key != "reward_model"])
def test_schema_and_loader_agree_on_each_value_of_a_key(validator: Any, key: str) -> None:
    configs = [
        {"rewards": {"reward_model": model, key: value}} for model in VALUES["reward_model"] for value in VALUES[key]
    ]
    assert [one for one in configs if validator.is_valid(one) != loads(one)] == []


@settings(deadline=None)
@given(
    reward=st.builds(few, REWARDS, FEW_KEYS),
    eval_rewards=st.none() | st.just([]) | st.just({}) | st.builds(few, REWARDS, FEW_KEYS),
    train=st.none() | TRAIN,
)
def test_schema_and_loader_agree_on_a_file(reward: Any, eval_rewards: Any, train: Any) -> None:
    config = {"rewards": [reward], "eval_rewards": eval_rewards, "train": train}
    assert schema_validator().is_valid(config) == loads(config)


@pytest.mark.parametrize(
    "more",
    [
        {"eval_rewards": None},
        {"eval_rewards": []},
        {"eval_rewards": {}},
        {"train": None},
        {"train": {"advantage_aggregation": None, "global_std": None}},
        {"rewards": {"reward_model": "OCR", "dtype": "BF16"}},
        {"rewards": {"reward_model": "OCR", "weight": "1e-3"}},
        {"rewards": {"reward_model": "OCR", "async_reward": "yes"}},
    ],
)
def test_what_yaml_leaves_empty_or_reads_as_text_is_valid(validator: Any, more: dict[str, Any]) -> None:
    config = {"rewards": {"reward_model": "OCR"}, **more}
    validator.validate(config)
    assert loads(config)


@pytest.mark.parametrize("where", [*EXAMPLES, *GUIDANCE])
def test_what_loads_is_valid(validator: Any, where: str) -> None:
    validator.validate((EXAMPLES | GUIDANCE)[where])


@pytest.mark.parametrize(
    "reward",
    [
        {"reward_model": "ocr", "batch_size": None},
        {"reward_model": "jpeg_compressibility", "on_failure": {"value": 0}, "dtype": "fp32"},
        {"reward_model": "VLLM_Evaluate", "extra_kwargs": {"top_logprobs": 5}, "image_format": "webp"},
        {"reward_model": "my_rewards.MyReward", "whatever": {"one": [1]}},
    ],
)
def test_what_is_valid_loads(validator: Any, reward: dict[str, Any]) -> None:
    validator.validate({"rewards": reward})
    RewardConfig.from_dict({"rewards": reward})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rewards": []},
        {"rewards": {"name": "no model"}},
        {"rewards": {"reward_model": "OCRR"}},
        {"rewards": {"reward_model": "OCR", "bach_size": 3}},
        {"rewards": {"reward_model": "OCR", "batch_size": 0}},
        {"rewards": {"reward_model": "OCR", "image_format": "webp"}},
        {"rewards": {"reward_model": "OCR", "on_failure": "ignore"}},
        {"rewards": [{"reward_model": "vllm_evaluate", "top_logprobs": 30}]},
        {"rewards": {"reward_model": "OCR"}, "train": {"advantage_aggregation": "mean"}},
    ],
)
def test_what_is_wrong_is_wrong_for_both(validator: Any, config: dict[str, Any]) -> None:
    assert not validator.is_valid(config)
    with pytest.raises(ConfigError):
        RewardConfig.from_dict(config)
