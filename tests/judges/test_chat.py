"""What a judge in this process makes of its servers: errors, retries, deadlines, several servers, keys."""

from __future__ import annotations

import platform
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.errors import BusyError, ModelLoadError
from tasks.servers.http_urls import DEFAULT_JUDGE_URL
from tests.judges.scripted import Answer, fails, says, says_yes, together
from tests.servers import wait_until
from workers import Unscored
from workers.judges import chat, client, endpoints
from workers.judges.budget import FleetBudget

ODD_PROMPT = "a {cat} {prompt} {0} <image> %s \\n \u0000 </s> <|im_end|> 🐈 {"


def reason(output) -> Unscored:
    (found,) = output.rewards
    assert isinstance(found, Unscored), found
    return found


def ask(judge, picture, **kwargs):
    return judge(["a cat"], image=[picture(**kwargs)])


def test_the_reward_is_the_share_of_yes(judge_server, make_judge, picture):
    output = ask(make_judge("vllm_evaluate", judge_server(lambda _: says_yes(0.3))), picture)
    assert output.rewards == [pytest.approx(0.3)]
    (info,) = output.extra_info["judge"]
    assert info == {
        "text": "Yes",
        "p_yes": pytest.approx(0.27),
        "p_no": pytest.approx(0.63),
        "mass": pytest.approx(0.9),
        "model": "scripted",
        "num_requests": 1,
    }


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_permanent_error_is_asked_once_and_told_in_the_servers_words(judge_server, make_judge, picture, status):
    server = judge_server(lambda _: fails(status, "these are the server's words"))
    found = reason(ask(make_judge("vllm_evaluate", server), picture))
    assert found.kind == "failed"
    assert found.message == f"the judge answered {status} after 1 request: these are the server's words"
    assert len(server.questions) == 1


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503])
def test_a_passing_error_is_retried(judge_server, make_judge, picture, status):
    server = judge_server(lambda q: fails(status, "later") if q.number == 0 else says_yes(0.6))
    output = ask(make_judge("vllm_evaluate", server), picture)
    assert output.rewards == [pytest.approx(0.6)]
    assert output.extra_info["judge"][0]["num_requests"] == 2


def test_retries_end_and_the_reason_counts_them(judge_server, make_judge, picture):
    server = judge_server(lambda _: fails(503, "overloaded"))
    found = reason(ask(make_judge("vllm_evaluate", server, max_retries=2), picture))
    assert (found.kind, found.message) == ("failed", "the judge answered 503 after 3 requests: overloaded")
    assert len(server.questions) == 3


def test_the_servers_retry_after_is_honoured(judge_server, make_judge, picture):
    times = []

    def script(question):
        times.append(time.monotonic())
        return fails(429, "slow down", retry_after="2") if question.number == 0 else says_yes(0.5)

    assert ask(make_judge("vllm_evaluate", judge_server(script)), picture).rewards == [pytest.approx(0.5)]
    assert times[1] - times[0] >= 2.0


def test_a_request_that_hangs_is_retried_and_then_a_timeout(judge_server, make_judge, picture):
    server = judge_server(lambda q: says_yes(0.5, delay_s=60))
    started = time.monotonic()
    found = reason(ask(make_judge("vllm_evaluate", server, timeout=0.5, max_retries=1), picture))
    assert found.kind == "timeout"
    assert found.message.startswith(
        f"the judge gave no answer within timeout=0.5 seconds after 2 requests; asked {server.url} from the worker's"
    )
    assert time.monotonic() - started < 20


def test_a_sample_ends_at_its_deadline_whatever_is_retried(judge_server, make_judge, picture):
    server = judge_server(lambda _: fails(429, "slow down", retry_after="60"))
    started = time.monotonic()
    found = reason(ask(make_judge("vllm_evaluate", server, timeout_s=1.5), picture))
    words = "no answer within timeout_s=1.5 seconds after 1 request; before that the judge answered 429: slow down"
    assert found.kind == "timeout"
    assert found.message.startswith(f"{words}; asked {server.url} from the worker's host {platform.node()}")
    assert 1.4 < time.monotonic() - started < 20


def test_a_timeout_tells_what_was_said_inside_a_200(judge_server, make_judge, picture):
    body = b'{"error": {"code": 429, "message": "too many of you"}}'
    server = judge_server(lambda _: Answer(body=body, headers={"Retry-After": "50"}))
    found = reason(ask(make_judge("vllm_evaluate", server, timeout_s=1), picture))
    assert found.kind == "timeout"
    assert "; before that the judge answered 200 with an error of code 429: too many of you;" in found.message


def test_a_list_of_models_that_does_not_come_is_said(picture, make_judge):
    with socket.create_server(("127.0.0.1", 0)) as nobody_answers:
        url = f"http://127.0.0.1:{nobody_answers.getsockname()[1]}/v1"
        found = reason(ask(make_judge("vllm_evaluate", url, timeout_s=0.5), picture))
    assert found.message.startswith(
        f"no answer within timeout_s=0.5 seconds when it was asked for its models; asked {url} from the worker's host"
    )


@pytest.mark.parametrize("cut_after", [0, 20])
def test_a_connection_that_is_cut_is_retried(judge_server, make_judge, picture, cut_after):
    def script(question):
        answer = says_yes(0.4)
        answer.cut_after = cut_after if question.number == 0 else None
        return answer

    output = ask(make_judge("vllm_evaluate", judge_server(script)), picture)
    assert output.rewards == [pytest.approx(0.4)]
    assert output.extra_info["judge"][0]["num_requests"] == 2


def test_nobody_there_is_a_reason(make_judge, picture):
    found = reason(ask(make_judge("vllm_evaluate", "http://127.0.0.1:9/v1", max_retries=1), picture))
    assert found.kind == "failed"
    assert found.message.startswith("no connection to the judge after 2 requests: http://127.0.0.1:9/v1 from the ")
    assert platform.node() in found.message
    assert "Connection refused" in found.message


def test_http_where_https_is_asked_is_told_in_the_words_of_tls_alone(judge_server, make_judge, picture):
    url = judge_server().url.replace("http://", "https://")
    (found,) = make_judge("vllm_evaluate", url, max_retries=0)(["a cat"], image=[picture()]).rewards
    assert "SSL" in found.message
    assert "Operation not permitted" not in found.message, "what the system calls the number of that error"


def test_nobody_at_the_default_url_is_said_to_be_that(make_judge, picture):
    judge = make_judge("vllm_evaluate", DEFAULT_JUDGE_URL, max_retries=0)
    assert "http://localhost:8000/v1 (the default of api_base_url) from" in reason(ask(judge, picture)).message


def test_a_host_that_nobody_knows_is_told_in_the_resolvers_words(make_judge, picture):
    judge = make_judge("vllm_evaluate", "http://judge.invalid:8000/v1", max_retries=0)
    message = reason(ask(judge, picture)).message
    with pytest.raises(socket.gaierror) as caught:
        socket.getaddrinfo("judge.invalid", 8000)
    assert "http://judge.invalid:8000/v1 from the worker's host" in message
    assert caught.value.strerror in message


PAGE = Answer(body=b"<html>welcome</html>", headers={"Content-Type": "text/html"})
NO_TOKEN = Answer(body=b'{"choices": [{"message": {}, "logprobs": {"content": [{"a": 1}]}}]}')


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (PAGE, "failed", "'<html>welcome</html>'"),
        (Answer(body=b'{"choices": [{"mess'), "failed", "no chat completion but"),
        (Answer(body=b""), "failed", "no chat completion but ''"),
        (Answer(body=b"[]"), "failed", "no chat completion"),
        (Answer(body=b"null"), "failed", "no chat completion"),
        (Answer(body=b'{"choices": []}'), "failed", "no chat completion"),
        (Answer(body=b'{"choices": [{"message": null}]}'), "failed", "no chat completion"),
        (NO_TOKEN, "failed", "no chat completion"),
        (Answer(body=b"\xff\xfe\x00garbage"), "failed", "no chat completion"),
        (Answer(status=400, body=b"plain words"), "failed", "plain words"),
        (Answer(status=400, body=b'{"detail": "no such field"}'), "failed", "no such field"),
        (says("Yes"), "unparsable", "no logprobs"),
        (says(None), "unparsable", "no logprobs"),
        (says("Maybe", logprobs={"Maybe": 0.9, "Perhaps": 0.1}), "unparsable", "the first are 'Maybe', 'Perhaps'"),
        (Answer(body=says_yes(0.5).body.replace(b'"logprob": -', b'"logprob": NaN, "was": ')), "unparsable", "neither"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_a_reason_and_never_a_number(judge_server, make_judge, picture, answer, kind, words):
    found = reason(ask(make_judge("vllm_evaluate", judge_server(lambda _: answer)), picture))
    assert found.kind == kind
    assert words in found.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says("1. Text Faithfulness:\n## Score: 3\n", finish_reason="length"), "cut at max_tokens"),
        (says("1. Text Faithfulness:\n## Score: 3\n", finish_reason="content_filter"), "ended by 'content_filter'"),
        (says("1. Text Faithfulness:\n## Score: 3\n", finish_reason="tool_calls"), "ended by 'tool_calls'"),
        (says(""), "is empty"),
        (says(None), "is empty"),
        (says("  \n"), "is empty"),
    ],
)
def test_a_reply_that_is_not_whole_is_unparsable(judge_server, make_judge, picture, answer, words):
    judge = make_judge("rational_rewards_t2i", judge_server(lambda _: answer), missing_aspects="skip")
    found = reason(ask(judge, picture))
    assert found.kind == "unparsable"
    assert words in found.message


def serves(*models):
    """A script that answers for these models, and 404 for others as vLLM does."""

    def script(question):
        name = question.body["model"]
        return says_yes(0.75) if name in models else fails(404, f"The model `{name}` does not exist.")

    return script


def test_a_model_that_is_not_served_is_said_with_the_names_that_are(judge_server, make_judge, picture):
    server = judge_server(serves("one", "two"), models=["one", "two"])
    found = reason(ask(make_judge("vllm_evaluate", server, vlm_model="three"), picture))
    assert found.kind == "failed"
    assert found.message == (
        "the judge answered 404 after 1 request: The model `three` does not exist.; "
        f"{server.url} serves no model 'three' (vlm_model); it lists: one, two"
    )
    assert len(server.questions) == 1


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        (["acme/*"], "acme/vision-2"),
        (["seer:latest"], "seer"),
        (["models/seer-2"], "seer-2"),
        (["acme/seer"], "acme/seer:fast"),
        (["base"], "my-adapter"),
        (["seer-2026-01-01"], "seer"),
        ([], "seer"),
    ],
)
def test_a_name_that_is_not_listed_is_asked_for(judge_server, make_judge, picture, listed, wanted, caplog):
    server = judge_server(serves(wanted), models=listed)
    judge = make_judge("vllm_evaluate", server, vlm_model=wanted)
    assert [ask(judge, picture, number=i).rewards[0] for i in range(3)] == [pytest.approx(0.75)] * 3
    assert server.num_lists == 1
    told = [r.message for r in caplog.records if "not listed" in r.message]
    assert len(told) == (1 if listed else 0)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "three is not a valid model ID"),
        (400, "Invalid model name passed in model=three"),
        (400, "Model Not Exist"),
        (403, "The model three does not exist or you do not have access to it"),
    ],
)
def test_a_refused_name_is_told_with_the_list_whatever_the_status(judge_server, make_judge, picture, status, words):
    server = judge_server(lambda _: fails(status, words), models=["one", "two"])
    message = reason(ask(make_judge("vllm_evaluate", server, vlm_model="three"), picture)).message
    assert words in message
    assert message.endswith("it lists: one, two")


def test_another_refusal_says_nothing_of_models(judge_server, make_judge, picture):
    server = judge_server(lambda _: fails(400, "the image is invalid for this model"), models=["one", "two"])
    message = reason(ask(make_judge("vllm_evaluate", server, vlm_model="three"), picture)).message
    assert message == "the judge answered 400 after 1 request: the image is invalid for this model"


def test_of_hundreds_of_names_some_are_told(judge_server, make_judge, picture):
    server = judge_server(serves(), models=[f"m{i}" for i in range(300)])
    message = reason(ask(make_judge("vllm_evaluate", server, vlm_model="three"), picture)).message
    assert message.endswith("it lists: " + ", ".join(f"m{i}" for i in range(20)) + " and 280 more")


def test_a_urls_password_is_in_no_reason(judge_server, make_judge, picture, monkeypatch, outcomes):
    server = judge_server(serves("one", "two"), models=["one", "two"])
    hidden = server.url.replace("://", "://me:***@")

    def judge(url, **options):
        return make_judge("vllm_evaluate", url.replace("://", "://me:secret@"), **options)

    assert hidden in reason(ask(judge(server.url, vlm_model="three"), picture)).message
    assert hidden in reason(ask(judge(server.url, vlm_model=""), picture)).message
    assert hidden in reason(ask(judge(server.root), picture)).message
    budget = FleetBudget(outcomes.redis, 1.0)
    monkeypatch.setattr(chat, "fleet_budget", lambda: budget)
    busy = judge(server.url, fleet_max_concurrent=1)
    budget.acquire(server.url.replace("://", "://me:secret@"), 1)
    with pytest.raises(BusyError, match=re.escape(hidden)):
        busy.admit()
    budget.close()


def test_a_missing_v1_is_said_with_the_url_that_has_it(judge_server, make_judge, picture):
    server = judge_server()
    found = reason(ask(make_judge("vllm_evaluate", server.root), picture))
    assert found.message == f"api_base_url {server.root} has no /v1; the API is at {server.url}"


def test_the_only_model_needs_no_name(judge_server, make_judge, picture):
    server = judge_server(models=["the-only-one"])
    assert ask(make_judge("vllm_evaluate", server, vlm_model=""), picture).rewards == [pytest.approx(0.75)]
    assert server.questions[0].body["model"] == "the-only-one"


@pytest.mark.parametrize(("models", "words"), [(["one", "two"], "serves several models"), (None, "lists no models")])
def test_without_a_name_one_of_several_is_not_guessed(judge_server, make_judge, picture, models, words):
    server = judge_server(models=models)
    assert words in reason(ask(make_judge("vllm_evaluate", server, vlm_model=""), picture)).message
    assert not server.questions


def test_without_a_name_a_server_that_is_away_is_the_reason(make_judge, picture):
    judge = make_judge("vllm_evaluate", "http://127.0.0.1:9/v1", vlm_model="", max_retries=0)
    assert reason(ask(judge, picture)).message.startswith("no connection to the judge")


def test_a_server_that_lists_nothing_is_asked_all_the_same(judge_server, make_judge, picture):
    server = judge_server(models=None)
    assert ask(make_judge("vllm_evaluate", server), picture).rewards == [pytest.approx(0.75)]


def test_the_models_are_listed_once(judge_server, make_judge, picture):
    server = judge_server()
    judges = [make_judge("vllm_evaluate", server, timeout=t) for t in (5, 6)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda i: ask(judges[i % 2], picture, number=i).rewards[0], range(32))) == [0.75] * 32
    assert server.num_lists == 1


def test_a_server_that_is_restarted_with_another_model_is_asked_for_that(
    judge_server, make_judge, picture, monkeypatch
):
    """Where no name is given."""

    def script(question):
        name = question.body["model"]
        return says_yes(0.75) if name in server.models else fails(404, f"The model `{name}` does not exist.")

    monkeypatch.setattr(endpoints, "LIST_AGAIN_S", 0.2)
    server = judge_server(script, models=["old"])
    judge = make_judge("vllm_evaluate", server, vlm_model="")
    assert ask(judge, picture).rewards == [pytest.approx(0.75)]
    server.models = ["new"]
    time.sleep(0.3)
    assert "404 after 1 request: The model `old` does not exist." in reason(ask(judge, picture)).message
    assert [ask(judge, picture).rewards[0] for _ in range(3)] == [pytest.approx(0.75)] * 3
    assert server.num_lists == 2


def test_a_model_that_comes_later_is_found(judge_server, make_judge, picture, monkeypatch):
    monkeypatch.setattr(endpoints, "LIST_AGAIN_S", 0.2)
    server = judge_server(serves("other"), models=["other"])
    judge = make_judge("vllm_evaluate", server)
    assert "serves no model" in reason(ask(judge, picture)).message
    server.script, server.models = serves("scripted"), ["scripted"]
    time.sleep(0.3)
    assert ask(judge, picture).rewards == [pytest.approx(0.75)]


def test_many_threads_share_one_loop_and_one_client(judge_server, make_judge, picture):
    server = judge_server(together(32, lambda _: says_yes(0.75)))
    judges = [make_judge("vllm_evaluate", server, question=f"{i}?") for i in range(4)]
    with ThreadPoolExecutor(32) as pool:
        rewards = list(pool.map(lambda i: ask(judges[i % 4], picture, number=i).rewards[0], range(96)))
    assert rewards == [0.75] * 96
    assert sum(t.name == "rewardq-judges" for t in threading.enumerate()) == 1
    assert len(client.judge_loop()._endpoints) == 1
    assert server.most_in_flight == 32


def test_a_chunk_is_asked_one_after_another_unless_told_otherwise(judge_server, make_judge, picture):
    prompts, images = ["a", "b", "c", "d"], [picture(i) for i in range(4)]
    for max_concurrent, most in ((0, 1), (1, 1), (2, 2), (8, 4)):
        server = judge_server(together(most, lambda _: says_yes(0.75, delay_s=0.1)))
        judge = make_judge("vllm_evaluate", server, max_concurrent=max_concurrent)
        assert judge(prompts, image=images).rewards == [0.75] * 4
        assert server.most_in_flight == most


def test_one_bad_sample_of_a_chunk_fails_alone(judge_server, make_judge, picture):
    def script(question):
        return fails(400, "bad image") if "second" in question.text else says_yes(0.6)

    for max_concurrent in (0, 3):
        judge = make_judge("vllm_evaluate", judge_server(script), max_concurrent=max_concurrent)
        first, second, third = judge(["first", "second", "third"], image=[picture()] * 3).rewards
        assert first == third == pytest.approx(0.6)
        assert second.kind == "failed"


def test_prompts_may_contain_anything(judge_server, make_judge, picture):
    server = judge_server()
    judge = make_judge("vllm_evaluate", server, question="<image>About {prompt}: {other} {prompt}?")
    judge([ODD_PROMPT], image=[picture()])
    assert server.questions[0].text == f"About {ODD_PROMPT}: {{other}} {ODD_PROMPT}?"
    assert len(server.questions[0].images) == 1


def test_further_fields_of_the_request_are_passed_on(judge_server, make_judge, picture):
    server = judge_server()
    ask(make_judge("vllm_evaluate", server, extra_body={"chat_template_kwargs": {"enable_thinking": False}}), picture)
    body = server.questions[0].body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0.0, True, 20)


def test_a_call_that_is_given_up_is_cancelled(judge_server, make_judge, picture):
    server = judge_server(lambda _: says_yes(0.5, delay_s=60))
    assert reason(ask(make_judge("vllm_evaluate", server, timeout_s=0.5), picture)).kind == "timeout"
    loop = client.judge_loop()
    (endpoint,) = loop._endpoints.values()
    wait_until(lambda: endpoint.num_in_flight == 0)


def test_a_key_is_sent_to_allowed_hosts_only(judge_server, make_judge, picture, in_env):
    server = judge_server()
    in_env(REWARDQ_KEY_MINE="s3cret")
    with pytest.raises(ModelLoadError, match=r"REWARDQ_HOSTS=127\.0\.0\.1"):
        make_judge("vllm_evaluate", server, api_key_env="REWARDQ_KEY_MINE")
    in_env(REWARDQ_HOSTS="127.0.0.1")
    ask(make_judge("vllm_evaluate", server, api_key_env="REWARDQ_KEY_MINE"), picture)
    ask(make_judge("vllm_evaluate", server), picture)
    assert [q.headers["authorization"] for q in server.questions] == ["Bearer s3cret", "Bearer EMPTY"]


def test_a_key_that_is_not_set_here_is_said(judge_server, make_judge):
    with pytest.raises(ModelLoadError, match="REWARDQ_KEY_MINE, which is not set"):
        make_judge("vllm_evaluate", judge_server(), api_key_env="REWARDQ_KEY_MINE")
