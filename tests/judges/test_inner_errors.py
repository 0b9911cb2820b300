"""An error inside an answer of 200 is an error: it is repeated like its code, and its words reach the reason."""

from __future__ import annotations

import json

import pytest

from tests.judges.scripted import Answer, says, says_yes
from workers import Unscored
from workers.judges.inner_errors import inner_error, words_of

BUSY = {"message": "rate limit, try again", "code": 429}


def beside(answer: Answer, **more) -> dict:
    return {**json.loads(answer.body), **more}


def in_choice(**more) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": ""}, **more}]}


PASSING = {
    "an error": {"error": BUSY},
    "a code as text": {"error": {**BUSY, "code": "429"}},
    "a code in words": {"error": {"message": "slow down", "code": "rate_limit_exceeded"}},
    "a type in words": {"error": {"message": "slow down", "type": "overloaded_error"}},
    "a status in words": {"error": {"message": "no more", "status": "RESOURCE_EXHAUSTED"}},
    "only words": {"error": "the server is overloaded"},
    "beside an empty message": beside(says(None), error=BUSY),
    "beside a message": beside(says_yes(0.1), error=BUSY),
    "in the choice": in_choice(error={"code": 502, "message": "upstream broke"}),
    "in the message": {"choices": [{"message": {"content": None, "error": BUSY}}]},
    "finish_reason error": in_choice(finish_reason="error"),
    "finish_reason error, with words": in_choice(finish_reason="error", error="it stopped"),
    "loading": {"status": "error", "message": "Model is loading"},
    "no memory": {"error": "CUDA out of memory"},
    "vLLM's of old": {"object": "error", "message": "engine is dead", "type": "InternalServerError", "code": 500},
    "msg": {"code": 503, "msg": "no capacity", "data": None},
    "error_msg": {"error_code": 18, "error_msg": "Open api qps request limit reached"},
    "base_resp": {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
    "errors": {"success": False, "errors": [{"code": 529, "message": "overloaded"}]},
    "detail": {"detail": "temporarily unavailable", "status": 503},
    "a list": [{"error": {"code": 429, "message": "quota"}}],
    "true": {"error": True, "code": 503, "message": "busy"},
}


REPEATED = (408, 409, 429, *range(500, 600))
"""What the openai SDK repeats, as its page says."""


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_error_has_the_status_of_one(name):
    found = inner_error(json.dumps(PASSING[name]).encode())
    assert found.status in REPEATED
    assert found.words


@pytest.mark.parametrize("name", ["an error", "beside an empty message", "in the choice", "finish_reason error"])
def test_a_passing_error_inside_a_200_is_repeated(judge_server, make_judge, picture, name):
    body = json.dumps(PASSING[name]).encode()
    server = judge_server(lambda q: Answer(body=body) if q.number == 0 else says_yes(0.75))
    output = make_judge("vllm_evaluate", server)(["a cat"], image=[picture()])
    assert output.rewards == [pytest.approx(0.75)]
    assert output.extra_info["judge"][0]["num_requests"] == 2


def test_one_in_a_stream_that_nobody_asked_for_is_repeated(judge_server, make_judge, picture):
    body = b": PROCESSING\n\ndata: " + json.dumps({"error": BUSY}).encode() + b"\n\ndata: [DONE]\n\n"
    server = judge_server(lambda q: Answer(body=body) if q.number == 0 else says_yes(0.75))
    assert make_judge("vllm_evaluate", server)(["a cat"], image=[picture()]).rewards == [pytest.approx(0.75)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"error": {"code": 400, "message": "cannot identify image file"}},
            "400 after 1 request: cannot identify",
        ),
        ({"error": {"code": "invalid_api_key", "message": "no such key"}}, "of code invalid_api_key after 1 request"),
        ({"error": "I am a teapot"}, "the judge answered 200 with an error after 1 request: I am a teapot"),
        ({"error": {"strange": 1}}, '{"strange": 1}'),
        ({"detail": "no such field"}, "no such field"),
        (
            {
                "error": {
                    "code": 400,
                    "message": "Provider returned error",
                    "metadata": {"raw": "too large"},
                }
            },
            "Provider returned error: too large",
        ),
    ],
)
@pytest.mark.parametrize("model", ["vllm_evaluate", "rational_rewards_t2i"])
def test_another_error_is_a_reason_with_the_servers_words(judge_server, make_judge, picture, model, body, words):
    server = judge_server(lambda _: Answer(body=json.dumps(body).encode()))
    (found,) = make_judge(model, server)(["a cat"], image=[picture()]).rewards
    assert isinstance(found, Unscored)
    assert found.kind == "failed"
    assert words in found.message
    assert len(server.questions) == 1


def test_retries_end_and_the_reason_has_the_code_and_the_words(judge_server, make_judge, picture):
    server = judge_server(lambda _: Answer(body=json.dumps({"error": BUSY}).encode()))
    (found,) = make_judge("vllm_evaluate", server, max_retries=1)(["a cat"], image=[picture()]).rewards
    assert found.message == "the judge answered 200 with an error of code 429 after 2 requests: rate limit, try again"


def test_another_server_is_asked_as_after_a_real_429(judge_server, make_judge, picture):
    full = judge_server(lambda _: Answer(body=json.dumps({"error": BUSY}).encode()))
    judge = make_judge("vllm_evaluate", full, judge_server(lambda _: says_yes(0.6)), max_retries=0)
    assert judge(["a cat"], image=[picture()]).rewards == [pytest.approx(0.6)]
    assert len(full.questions) == 1


def test_a_model_that_is_not_found_is_told_with_the_list(judge_server, make_judge, picture):
    body = {"error": {"code": 404, "message": "no endpoints for scripted"}}
    server = judge_server(lambda _: Answer(body=json.dumps(body).encode()), models=["one"])
    (found,) = make_judge("vllm_evaluate", server)(["a cat"], image=[picture()]).rewards
    assert "no endpoints for scripted" in found.message
    assert found.message.endswith("it lists: one")


@pytest.mark.parametrize(
    "more",
    [
        {"error": None},
        {"error": {}},
        {"error": ""},
        {"error": False},
        {"error": {"code": None, "message": ""}},
        {"error": {"code": 0, "message": "success"}},
        {"error": "none"},
        {"code": 200, "message": "ok"},
        {"errors": []},
        {"base_resp": {"status_code": 0, "status_msg": ""}},
        {"detail": "cached"},
    ],
)
def test_the_form_of_an_error_that_says_nothing_is_none(judge_server, make_judge, picture, more):
    server = judge_server(lambda _: Answer(body=json.dumps(beside(says_yes(0.75), **more)).encode()))
    assert make_judge("vllm_evaluate", server)(["a cat"], image=[picture()]).rewards == [pytest.approx(0.75)]
    assert len(server.questions) == 1


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b"7", b'"text"', b'{"choices": []}', b"<p>", b"[" * 5000])
def test_what_is_no_error_is_none(body):
    assert inner_error(body) is None


def test_the_fields_that_a_server_complains_of_are_kept():
    detail = [{"loc": ["body", "top_logprobs"], "msg": "too many"}]
    assert words_of({"detail": detail}) == json.dumps(detail)
    assert words_of(["one", "two"]) == "one; two"
