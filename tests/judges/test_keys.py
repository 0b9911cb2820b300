"""Where an API key goes, and that nobody else sees it."""

from __future__ import annotations

import pytest

from tasks.errors import ModelLoadError
from tests.judges.scripted import Answer
from workers.judges.client import api_key

KEY = "s3cr3t-key-of-mine"


def test_a_key_is_for_openai_ones_own_server_and_named_hosts(in_env):
    in_env(
        REWARDQ_KEY_MINE=KEY,
        OPENAI_BASE_URL="https://LLM.example:8443/v1",
        REWARDQ_HOSTS="http://judge.example:8000, other.example",
    )
    for url in (
        "https://api.openai.com/v1",
        "https://llm.example:8443/v1",
        "http://judge.example:8000/v1",
        "https://OTHER.example/v1",
    ):
        assert api_key(url, "REWARDQ_KEY_MINE") == KEY


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/v1",
        "https://api.openai.com@evil.example/v1",
        "https://evil.example/api.openai.com/v1",
        "https://api.openai.com.evil.example/v1",
        "https://evil-api.openai.com/v1",
        "https://notjudge.example/v1",
        "http://api.openai.com/v1",
        "https://api.openai.com:8443/v1",
        "http://judge.example/v1",
        "https://judge.example:8443/v1",
        "http://api.openai.com\\@evil.example/v1",
        "api.openai.com/v1",
        "",
    ],
)
def test_a_key_goes_to_no_other_host(in_env, url):
    in_env(REWARDQ_KEY_MINE=KEY, REWARDQ_HOSTS="judge.example")
    with pytest.raises(ModelLoadError, match="does not send REWARDQ_KEY_MINE"):
        api_key(url, "REWARDQ_KEY_MINE")


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "PATH", "REWARDQ_BROKER_URL", "REWARDQ_KEY_", "OPENAI_API_KEYS"]
)
def test_no_other_variable_is_read_as_a_key_whoever_names_it(in_env, name):
    in_env(**{name: KEY, "REWARDQ_BROKER_URL": "redis://host:1/0"}, REWARDQ_HOSTS="judge.example")
    with pytest.raises(ModelLoadError, match=r"api_key_env must be OPENAI_API_KEY or REWARDQ_KEY_\*"):
        api_key("https://judge.example/v1", name)


def test_the_refusal_of_a_key_says_which_entry_would_allow_it(in_env):
    in_env(REWARDQ_KEY_MINE=KEY, REWARDQ_HOSTS="other.example")
    with pytest.raises(ModelLoadError, match=r"REWARDQ_HOSTS=other\.example,judge\.example:8443$"):
        api_key("https://judge.example:8443/v1", "REWARDQ_KEY_MINE")
    with pytest.raises(ModelLoadError, match=r"REWARDQ_HOSTS=other\.example,http://judge:8000 .over plain HTTP"):
        api_key("http://judge:8000/v1", "REWARDQ_KEY_MINE")


def test_without_a_name_no_key_is_sent_whatever_the_environment_has(judge_server, make_judge, picture, in_env):
    in_env(OPENAI_API_KEY=KEY, OPENAI_ADMIN_KEY=KEY, OPENAI_CUSTOM_HEADERS=f"Authorization: Bearer {KEY}")
    server = judge_server()
    judge = make_judge("vllm_evaluate", server)
    assert judge(["a cat"], image=[picture()]).rewards == [pytest.approx(0.75)]
    assert server.questions
    assert all(KEY not in repr(q.headers) for q in server.questions)


def test_a_server_that_repeats_the_key_does_not_make_it_travel(judge_server, make_judge, picture, in_env):
    in_env(REWARDQ_KEY_MINE=KEY, REWARDQ_HOSTS="127.0.0.1")
    for body in (f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}', f"no such key: {KEY}"):
        server = judge_server(lambda _, body=body: Answer(status=401, body=body.encode()))
        (reason,) = make_judge("vllm_evaluate", server, api_key_env="REWARDQ_KEY_MINE")(
            ["a cat"], image=[picture()]
        ).rewards
        assert "401" in reason.message
        assert "***" in reason.message
        assert KEY not in repr((reason.message, reason.info))
