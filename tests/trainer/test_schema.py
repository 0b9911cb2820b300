"""The JSON schema of a rewards file agrees with what `RewardConfig` takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from tasks.catalog import CATALOG
from tasks.errors import ConfigError
from tasks.rewards import RewardConfig
from tasks.schema import rewards_schema
from tests.trainer.test_flow_factory_configs import EXAMPLES, GUIDANCE
from trainer_client.cli.schema import schema


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema.Draft7Validator.check_schema(rewards_schema())
    return jsonschema.Draft7Validator(rewards_schema())


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
