"""Remote rewards as configured: what a config must say, what travels, and what makes two of them the same."""

from __future__ import annotations

import sys

import jsonschema
import pytest

from tasks.errors import ConfigError, ModelLoadError
from tasks.rewards import RewardConfig
from tasks.rewards.schema import rewards_schema
from workers.loading.cache import ModelCache

POINTWISE, GROUPWISE = "RemotePointwiseRewardModel", "RemoteGroupwiseRewardModel"
URL = "http://scores:8000"


def spec_of(reward_model: str = POINTWISE, **entry):
    return RewardConfig.from_dict({"rewards": {"reward_model": reward_model, "server_url": URL, **entry}}).rewards[0]


def test_they_run_where_the_network_is_waited_for_and_are_of_both_kinds():
    pointwise, groupwise = spec_of(), spec_of(GROUPWISE)
    assert (pointwise.queue, pointwise.is_groupwise, pointwise.is_local) == ("vlm", False, False)
    assert (groupwise.queue, groupwise.is_groupwise, groupwise.how) == ("vlm", True, "model")
    assert (pointwise.options["timeout"], pointwise.options["retry_attempts"]) == (60.0, 3)
    assert spec_of(queue="mine").queue == "mine"


WRONG = [
    ({"reward_model": POINTWISE}, "needs server_url: URL of the reward server"),
    ({"reward_model": f"{POINTWISE}_Rank"}, "needs server_url"),
    ({"reward_model": POINTWISE, "server_url": "scores:8000"}, "option server_url"),
    ({"reward_model": POINTWISE, "server_url": []}, "option server_url"),
    ({"reward_model": POINTWISE, "server_url": None}, "option server_url"),
    ({"reward_model": POINTWISE, "server_url": URL, "timeout": 0}, "option timeout"),
    ({"reward_model": POINTWISE, "server_url": URL, "retry_attempts": 0}, "option retry_attempts"),
    ({"reward_model": POINTWISE, "server_url": URL, "required_fields": ["images"]}, "option required_fields"),
    ({"reward_model": POINTWISE, "server_url": URL, "required_fields": []}, "option required_fields"),
    ({"reward_model": POINTWISE, "server_url": URL, "retries": 2}, "did you mean 'retry_attempts'?"),
    ({"reward_model": POINTWISE, "server_url": URL, "kind": "groupwise"}, "kind is for a class of your own"),
]


@pytest.mark.parametrize(("reward", "words"), WRONG)
def test_a_wrong_config_is_refused_with_what_it_needs(reward, words):
    with pytest.raises(ConfigError) as caught:
        RewardConfig.from_dict({"rewards": reward})
    assert words in str(caught.value)
    assert not jsonschema.Draft7Validator(rewards_schema()).is_valid({"rewards": reward})


@pytest.mark.parametrize("url", ["htp://me:s3cret@h:1", ["http://h:1", "htp://me:s3cret@h:1", "htp://me:s3cret@h:2"]])
def test_a_wrong_url_is_shown_without_its_password(url):
    with pytest.raises(ConfigError, match="option server_url") as caught:
        spec_of(server_url=url)
    assert "s3cret" not in str(caught.value)
    assert "me:***@h" in str(caught.value)


@pytest.mark.parametrize(
    "reward",
    [
        {"server_url": URL},
        {"server_url": [URL, "https://other/rewards"], "timeout": 5},
        {"extra_kwargs": {"server_url": URL}},
        {"server_url": URL, "required_fields": ["image", "metadata"]},
    ],
)
def test_a_right_config_loads_and_is_valid(reward):
    config = {"rewards": {"reward_model": GROUPWISE, **reward}}
    RewardConfig.from_dict(config)
    jsonschema.Draft7Validator(rewards_schema()).validate(config)


@pytest.mark.parametrize("module", ["my_reward_remote", "remote"])
@pytest.mark.parametrize("model", [POINTWISE, GROUPWISE])
def test_both_dotted_paths_that_flow_factory_gives_them_are_ours(module, model):
    spec = spec_of(f"flow_factory.rewards.{module}.{model}")
    assert (spec.reward_model, spec.fingerprint) == (model, spec_of(model).fingerprint)
    config = {"rewards": {"reward_model": f"flow_factory.rewards.{module}.{model}", "server_url": URL}}
    jsonschema.Draft7Validator(rewards_schema()).validate(config)


def test_only_the_fields_that_are_declared_travel():
    assert spec_of().fields == ("prompt", "image", "video")
    assert spec_of().required == (("prompt",), ("image", "video"))
    declaring = spec_of(required_fields=["prompt", "image", "condition_images", "metadata"])
    assert declaring.fields == ("prompt", "image", "condition_images", "metadata")
    assert declaring.required == (("prompt",), ("image",), ("condition_images",))
    assert declaring.call.options["required_fields"] == list(declaring.fields)


def test_the_fingerprint_is_of_the_server_and_not_of_how_it_is_asked():
    same = [spec_of(), spec_of(timeout=5, retry_attempts=9), spec_of(name="other", weight=2.0, timeout_s=7)]
    assert len({spec.fingerprint for spec in same}) == 1
    others = [
        spec_of(server_url="http://b:1"),
        spec_of(required_fields=["image"]),
        spec_of(GROUPWISE),
        spec_of(version="2"),
    ]
    assert len({spec.fingerprint for spec in (same[0], *others)}) == 5


@pytest.mark.parametrize("model", [POINTWISE, GROUPWISE, f"{POINTWISE}_Rank"])
def test_the_launch_counts_unless_a_version_is_given(model):
    loose, versioned = spec_of(model), spec_of(model, version="3")
    assert loose.for_launch("a").fingerprint != loose.for_launch("b").fingerprint
    assert loose.for_launch("a").part.fingerprint != loose.for_launch("b").part.fingerprint
    assert versioned.for_launch("a").fingerprint == versioned.for_launch("b").fingerprint


def test_a_worker_without_the_http_client_says_what_to_install(settings, monkeypatch):
    for name in ("models", "client", "wire"):
        monkeypatch.delitem(sys.modules, f"workers.remote.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with (
        pytest.raises(ModelLoadError, match=r"'httpx2'.*pip install .*\[remote\]'"),
        ModelCache(settings).lend(spec_of().call),
    ):
        pass


def test_two_ways_of_asking_have_an_instance_each(settings):
    models = ModelCache(settings)
    calls = [spec_of().call, spec_of(timeout=5).call, spec_of().call]
    instances = []
    for call in calls:
        with models.lend(call) as loaded:
            instances.append(loaded.model)
    assert instances[0] is instances[2]
    assert instances[0] is not instances[1]
