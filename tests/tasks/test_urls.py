"""What is wrong with a server's URL is told where the trainer reads it, with the URL that was meant."""

from __future__ import annotations

import pytest

from tasks.errors import ConfigError
from tasks.rewards import RewardConfig
from tasks.servers.http_urls import DEFAULT_JUDGE_URL


def config(**reward):
    return RewardConfig.from_dict({"rewards": {"reward_model": "vllm_evaluate", **reward}})


def error_of(**reward) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**reward)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "words", "meant"),
    [
        ("localhost:8123/v1", "needs http://", "'http://localhost:8123/v1'"),
        ("judge/v1", "needs http://", "'http://judge/v1'"),
        ("https//judge/v1", "needs http:// or https://", "'https://judge/v1'"),
        ("http:/judge/v1", "needs http://", "'http://judge/v1'"),
        ("https:judge/v1", "needs http://", "'https://judge/v1'"),
        ("//judge:8000/v1", "needs http://", "'http://judge:8000/v1'"),
        ("htp://judge/v1", "needs http://", "'http://judge/v1'"),
        ("ws://judge/v1", "needs http://", "'http://judge/v1'"),
        ("HTTP://judge/v1", "needs http://", "'http://judge/v1'"),
        (" http://judge/v1", "white space", "'http://judge/v1'"),
        ("http://judge/v1\n", "white space", "'http://judge/v1'"),
        ("http://judge :8000/v1", "white space", "'http://judge:8000/v1'"),
        ("http://judge/v1/chat/completions", "one call (/chat/completions)", "'http://judge/v1'"),
        ("http://judge/v1/chat/completions/", "one call", "'http://judge/v1'"),
        ("http://judge/v1/models", "one call (/models)", "'http://judge/v1'"),
        (
            "http://judge/v1?api-version=1&password=secret",
            "has a query behind its path",
            "take ?api-version=1&password=***",
        ),
        ("http://judge:80v1", "is no URL", "80v1"),
        ("http://judge:99999/v1", "is no URL", "0-65535"),
        ("http://:8000/v1", "needs a host", "http://host:8000"),
        ("http://<host>:8000/v1", "placeholder", ""),
        ("http://${JUDGE}:8000/v1", "placeholder", ""),
        ("http://http://judge/v1", "two schemes", ""),
    ],
)
def test_a_wrong_url_is_refused_with_what_it_needs(url, words, meant):
    for given in (url, ["http://other/v1", url]):
        message = error_of(api_base_url=given)
        assert message.startswith("rewards[0] (vllm_evaluate): option api_base_url: ")
        assert words in message
        assert meant in message


@pytest.mark.parametrize(
    "url",
    [
        "http://judge:8000/v1",
        "https://judge/v1/",
        "http://judge",
        "http://[::1]:8000/v1",
        "http://me:secret@judge/v1",
        "https://generativelanguage.example/v1beta/openai",
        "https://project.services.example/models",
    ],
)
def test_urls_of_apis_are_taken(url):
    assert config(api_base_url=url).rewards[0].options["api_base_url"] == url


@pytest.mark.parametrize(
    "url", ["me:secret@judge/v1", "http://me:secret@judge/v1/chat/completions", " http://me:secret@j"]
)
def test_a_password_is_not_repeated(url):
    assert "secret" not in error_of(api_base_url=url)


@pytest.mark.parametrize("empty", [[], 5, None])
def test_what_is_no_url_is_refused(empty):
    assert "option api_base_url" in error_of(api_base_url=empty)


def test_a_reward_servers_url_is_checked_alike():
    def error_of_remote(url):
        return error_of(reward_model="RemotePointwiseRewardModel", server_url=url)

    assert "needs http://" in error_of_remote("localhost:8000")
    assert "one call (/compute); it needs that of the server: 'http://rewards:8000'" in error_of_remote(
        "http://rewards:8000/compute"
    )


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_a_judge_without_a_url_is_said_to_be_asked_at_the_default(caplog):
    for model in ("vllm_evaluate", "rational_rewards_t2i", "pairwise_judge", "vllm_evaluate_Rank"):
        caplog.clear()
        RewardConfig.from_dict({"rewards": {"name": "mine", "reward_model": model}})
        (said,) = warnings_of(caplog)
        assert "rewards[0] (mine) has no api_base_url" in said
        assert DEFAULT_JUDGE_URL in said
        assert "worker's own host" in said


def test_a_judge_with_a_url_and_what_is_no_judge_say_nothing(caplog):
    config(api_base_url=DEFAULT_JUDGE_URL)
    config(extra_kwargs={"api_base_url": "http://judge/v1"})
    config(reward_model="OCR")
    assert warnings_of(caplog) == []
