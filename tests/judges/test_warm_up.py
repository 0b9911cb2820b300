"""A judge is asked for its models before there are samples: what is wrong is told in words to act on."""

from __future__ import annotations

import socket

import pytest

from tasks.errors import ModelLoadError
from tests.judges.scripted import fails, says_yes
from tests.judges.test_chat import serves


def why_not(judge) -> str:
    with pytest.raises(ModelLoadError) as caught:
        judge.warm_up()
    return str(caught.value)


@pytest.mark.parametrize("model", ["vllm_evaluate", "rational_rewards_t2i", "pairwise_judge"])
def test_a_judge_that_lists_its_model_is_asked_nothing_more(judge_server, make_judge, model):
    server = judge_server()
    make_judge(model, server).warm_up()
    assert (server.num_lists, len(server.questions)) == (1, 0)


def test_a_judge_that_lists_nothing_or_not_this_is_asked_for_one_token(judge_server, make_judge):
    for models in (None, [], ["acme/*"]):
        server = judge_server(serves("acme/seer"), models=models)
        make_judge("vllm_evaluate", server, vlm_model="acme/seer").warm_up()
        (question,) = server.questions
        assert (question.body["model"], question.body["max_tokens"]) == ("acme/seer", 1)


def test_a_name_that_is_refused_is_told_with_the_list(judge_server, make_judge):
    server = judge_server(serves("one"), models=["one", "two"])
    message = why_not(make_judge("vllm_evaluate", server, vlm_model="three"))
    assert "The model `three` does not exist." in message
    assert message.endswith(f"{server.url} serves no model 'three' (vlm_model); it lists: one, two")


def test_a_judge_that_takes_no_text_alone_is_not_refused(judge_server, make_judge):
    server = judge_server(lambda _: fails(400, "needs an image"), models=["other"])
    make_judge("vllm_evaluate", server).warm_up()


def test_a_server_that_is_away_is_told_with_its_url(judge_server, make_judge):
    message = why_not(make_judge("vllm_evaluate", judge_server(), "http://127.0.0.1:9/v1"))
    assert "http://127.0.0.1:9/v1 from the worker's host" in message
    assert "Connection refused" in message


def test_a_server_that_hangs_is_told_with_its_url_and_the_time_that_it_had(judge_server, make_judge, monkeypatch):
    for module in ("chat", "endpoints"):
        monkeypatch.setattr(f"workers.judges.{module}.LIST_TIMEOUT_S", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        assert f"no answer from {url} within 0.3 seconds" in why_not(make_judge("vllm_evaluate", judge_server(), url))


def test_a_wrong_key_is_told(judge_server, make_judge):
    server = judge_server(lambda _: fails(401, "no such key"), models=[])
    assert "401" in why_not(make_judge("vllm_evaluate", server))


def test_a_missing_name_or_v1_is_told(judge_server, make_judge):
    server = judge_server(lambda _: says_yes(0.5), models=["one", "two"])
    assert "serves several models" in why_not(make_judge("vllm_evaluate", server, vlm_model=""))
    assert "has no /v1" in why_not(make_judge("vllm_evaluate", server.root, vlm_model="one"))
