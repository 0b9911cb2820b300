"""Answers of judges and reward servers are bounded: in bytes after decompression, in time, in depth, in reach."""

from __future__ import annotations

import gzip
import json
import time
import zlib

import pytest

from tasks.errors import ModelLoadError
from tests.judges.scripted import MODEL, Answer, says, says_yes
from workers import Accelerator, RewardArguments
from workers.base import Unscored
from workers.network.answers import TOO_LARGE
from workers.remote.models import RemotePointwiseRewardModel

BOMB = gzip.compress(b"a" * 200 * 2**20, 9)
"""200 KB that are 200 MB."""


YES = b'{"choices":[{"message":{"content":"Yes"},"logprobs":{"content":[{"token":"Yes","logprob":%s}]}}]}'


def asked(judge, picture):
    (found,) = judge(["a cat"], image=[picture()]).rewards
    return found


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (BOMB, "gzip"),
        (gzip.compress(BOMB), "gzip, gzip"),
        (zlib.compress(b"a" * 50 * 2**20), "deflate"),
        (b"a" * 20 * 2**20, ""),
    ],
)
def test_an_answer_is_read_up_to_a_bound_after_decompression(judge_server, make_judge, picture, body, encoding):
    headers = {"Content-Encoding": encoding} if encoding else {}
    server = judge_server(lambda _: Answer(body=body, headers=headers))
    reason = asked(make_judge("vllm_evaluate", server), picture)
    assert isinstance(reason, Unscored)
    assert "is larger than 16777216 bytes after decompression" in reason.message
    assert "REWARDQ_MAX_ANSWER_BYTES" in reason.message
    assert len(server.questions) == 1, "a retry would bring the same"


def test_the_bound_is_a_setting(judge_server, make_judge, picture, in_env):
    in_env(REWARDQ_MAX_ANSWER_BYTES=str(2**16))
    padded = json.loads(says_yes(0.75).body) | {"padding": "x" * 2**16}
    server = judge_server(lambda _: Answer(body=json.dumps(padded).encode()))
    assert "larger than 65536 bytes" in asked(make_judge("vllm_evaluate", server), picture).message


def test_a_compressed_answer_within_the_bound_is_an_answer(judge_server, make_judge, picture):
    for encoding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        body = compress(says_yes(0.75).body)
        server = judge_server(lambda _, b=body, e=encoding: Answer(body=b, headers={"Content-Encoding": e}))
        assert asked(make_judge("vllm_evaluate", server), picture) == pytest.approx(0.75)


def test_an_answer_that_comes_a_byte_at_a_time_ends_with_the_time_of_its_request(judge_server, make_judge, picture):
    server = judge_server()

    def drip(handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.send_header("Content-Length", "10000")
        handler.end_headers()
        while not server.is_stopping.wait(0.1):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    server.post = drip
    judge = make_judge("vllm_evaluate", server, timeout=1.0, max_retries=0, timeout_s=30.0)
    began_s = time.monotonic()
    reason = asked(judge, picture)
    assert reason.kind == "timeout"
    assert "within timeout=1 seconds" in reason.message
    assert time.monotonic() - began_s < 15


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_judge_does_not_choose_whom_else_the_worker_asks(judge_server, make_judge, picture, status):
    elsewhere = judge_server()
    headers = {"Location": f"{elsewhere.url}/chat/completions"}
    server = judge_server(lambda _: Answer(status, b"{}", headers))
    reason = asked(make_judge("vllm_evaluate", server, max_retries=0), picture)
    assert f"the judge answered {status}" in reason.message
    assert elsewhere.questions == []


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"choices":' + b"[" * 100_000,
        b'{"choices":[{"message":{"content":' + b"[" * 900 + b"]" * 900 + b"}}]}",
        b'{"error":' + b"[" * 900 + b'"x"' + b"]" * 900 + b"}",
        b'{"choices":[{"message":{"content":"Yes"},"logprobs":{"content":[{"token":"Yes","logprob":'
        + b"9" * 400
        + b"}]}}]}",
        b'{"choices":[{"message":{"content":"Yes"},"logprobs":{"content":[{"token":"Yes","logprob":NaN}]}}]}',
        b'{"choices":[{"message":{"content":"Yes"},"logprobs":{"content":[{"token":"Yes","logprob":Infinity}]}}]}',
    ],
)
def test_odd_json_is_a_reason_and_no_reward(judge_server, make_judge, picture, body):
    server = judge_server(lambda _: Answer(body=body))
    assert isinstance(asked(make_judge("vllm_evaluate", server, max_retries=0), picture), Unscored)


def test_a_text_longer_than_any_answer_is_unparsable(judge_server, make_judge, picture):
    server = judge_server(lambda _: says("x" * 2**20))
    reason = asked(make_judge("rational_rewards_t2i", server), picture)
    assert reason.kind == "unparsable"
    assert "has 1048576 characters" in reason.message
    assert len(reason.info["judge"]["text"]) < 1000


def test_a_listing_of_very_many_or_very_long_names_is_cut(judge_server, make_judge, picture):
    server = judge_server(models=[MODEL, "y" * 10_000, *(f"m{i}" for i in range(20_000))])
    judge = make_judge("vllm_evaluate", server, vlm_model="")
    reason = asked(judge, picture)
    assert "serves several models" in reason.message
    assert len(reason.message) < 1000


def test_an_operator_bounds_whom_a_worker_asks(judge_server, make_judge, picture, in_env):
    server = judge_server()
    host = server.root.removeprefix("http://")
    in_env(REWARDQ_JUDGE_HOSTS="judge.example, 127.0.0.1:1")
    with pytest.raises(ModelLoadError, match=rf"does not ask {host}: its REWARDQ_JUDGE_HOSTS is"):
        make_judge("vllm_evaluate", server)
    config = RewardArguments(reward_model="r", timeout_s=5, extra_kwargs={"server_url": server.root})
    with pytest.raises(ModelLoadError, match=rf"does not ask {host}"):
        RemotePointwiseRewardModel(config, Accelerator())
    in_env(REWARDQ_JUDGE_HOSTS=host)
    assert asked(make_judge("vllm_evaluate", server), picture) == pytest.approx(0.75)


def test_the_answer_of_a_reward_server_is_bounded_too(judge_server, picture):
    server = judge_server()
    health = b'{"status": "ok"}'

    def get(handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(health)))
        handler.end_headers()
        handler.wfile.write(health)

    def post(handler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(BOMB)))
        handler.end_headers()
        handler.wfile.write(BOMB)

    server.get, server.post = get, post
    config = RewardArguments(reward_model="r", timeout_s=20, extra_kwargs={"server_url": server.root})
    (reason,) = RemotePointwiseRewardModel(config, Accelerator())(["a cat"], image=[picture()]).rewards
    assert "larger than 16777216 bytes after decompression" in reason.message
    assert TOO_LARGE not in reason.message
