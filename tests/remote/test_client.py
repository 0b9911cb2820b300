"""Remote rewards in this process, answered by servers that speak only Flow-Factory's JSON and by ours."""

from __future__ import annotations

import base64
import json
import logging
import platform
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from tasks.errors import ModelLoadError
from tests.clock import Clock
from tests.judges.scripted import Answer, together
from tests.remote.json_server import gives, pixels_of, says_error
from tests.servers import wait_until
from workers import Unscored
from workers.network import servers as network
from workers.remote import client as remote
from workers.remote.token import token_for


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.1)


def picture(number: int, width: int = 6, height: int = 4) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def lengths(asked):
    return gives([float(len(p)) for p in asked.prompts])


def ask(model, *prompts: str, **fields):
    """What the model says of samples with these prompts, and an image each unless given otherwise."""
    return model(list(prompts), **(fields or {"image": [picture(n) for n in range(len(prompts))]})).rewards


def reason_of(rewards, kind: str = "failed") -> str:
    """The one reason that stands for all samples."""
    assert {type(one) for one in rewards} == {Unscored}
    assert {one.kind for one in rewards} == {kind}
    (message,) = {one.message for one in rewards}
    return message


def test_a_request_is_what_flow_factorys_client_sends(json_server, make_remote):
    server = json_server(lengths)
    images = [picture(0), picture(1, 3, 5)]
    videos = [[picture(2), picture(3)], [picture(4, 1, 1)]]
    condition_images = [[picture(5), picture(6, 9, 2)], []]
    condition_videos = [[[picture(7)], [picture(8, 2, 2), picture(9, 2, 2)]], [[picture(10)]]]
    model = make_remote("Pointwise", server.url)
    rewards = model(["ab", "abc"], images, videos, condition_images, condition_videos).rewards
    assert rewards == [2.0, 3.0]
    assert server.num_health == 1
    (asked,) = server.asked
    assert asked.body.keys() == {"prompt", "image", "video", "condition_images", "condition_videos"}

    def as_lists(value):
        if isinstance(value, list):
            return [as_lists(one) for one in value]
        return (pixels_of(value) if isinstance(value, str) else np.asarray(value)).tolist()

    sent = {
        "image": images,
        "video": videos,
        "condition_images": condition_images,
        "condition_videos": condition_videos,
    }
    for name, value in sent.items():
        assert as_lists(asked.body[name]) == as_lists(value), name


def test_what_is_not_given_is_null(json_server, make_remote):
    server = json_server(lengths)
    model = make_remote("Pointwise", server.url)
    ask(model, "a", "b")
    ask(model, "a", "b", image=[picture(0), None], video=None)
    assert [server.asked[0].body[n] for n in ("video", "condition_images", "condition_videos")] == [None] * 3
    assert server.asked[1].body["image"][1] is None
    assert "metadata" not in server.asked[0].body


def test_metadata_are_sent_only_where_they_are_declared(json_server, make_remote):
    server = json_server(lengths)
    plain = make_remote("Pointwise", server.url)
    declaring = make_remote("Pointwise", server.url, required_fields=["prompt", "image", "metadata"])
    assert (plain.required_fields, plain.optional_fields) == (("prompt",), ("image", "video"))
    assert (declaring.required_fields, declaring.optional_fields) == (("prompt", "image", "metadata"), ())
    ask(declaring, "a", image=[picture(0)], metadata=[{"text": "é", "n": [1, None]}])
    assert server.asked[0].body["metadata"] == [{"text": "é", "n": [1, None]}]
    assert "fps" not in server.asked[0].body
    with_fps = make_remote("Pointwise", server.url, required_fields=["prompt", "video", "fps"])
    ask(with_fps, "a", video=[[picture(0)]], fps=[24])
    assert server.asked[1].body["fps"] == [24]


@pytest.mark.parametrize("has_msgpack", [True, False])
def test_our_server_gets_the_pixels_by_msgpack_and_by_json(serve, make_remote, monkeypatch, has_msgpack):
    seen = []

    def compute(prompt, image, video=None, metadata=None):
        seen.append((image, video, metadata))
        return [float(len(p)) for p in prompt]

    url = serve(compute)
    sent = []
    send = remote.RemoteClient._send

    async def spy(self, server, method, path, timeout_s, content=b"", content_type=""):
        sent.append((path, content_type))
        return await send(self, server, method, path, timeout_s, content, content_type)

    monkeypatch.setattr(remote.RemoteClient, "_send", spy)
    if not has_msgpack:
        monkeypatch.setattr(remote, "terms_of", lambda *_: remote.Terms())
    images, videos = [picture(0), None], [[picture(1, 2, 3)] * 2, None]
    conditions = [[picture(3)], [picture(4)]]
    model = make_remote("Pointwise", url)
    found = ask(model, "ab", "c", image=images, video=videos, condition_images=conditions, metadata=[{"a": 1}, {}])
    assert found == [2.0, 1.0]
    kind = "application/msgpack" if has_msgpack else "application/json"
    assert sent == [("/health", ""), ("/compute", kind)]
    ((image, video, metadata),) = seen
    assert np.array_equal(image[0], images[0])
    assert image[1] is None
    assert [np.array_equal(a, b) for a, b in zip(video[0], videos[0], strict=True)] == [True, True]
    assert video[1] is None
    assert metadata == [{"a": 1}, {}]


def test_a_whole_group_is_sent_at_once(json_server, make_remote):
    server = json_server(lambda asked: gives([float(i) for i in range(len(asked.prompts))]))
    assert ask(make_remote("Groupwise", server.url), *"pppppppp") == [float(i) for i in range(8)]
    assert [len(asked.prompts) for asked in server.asked] == [8]


def test_health_is_asked_at_first_use_and_once_for_all_threads_later(json_server, make_remote):
    server = json_server(lengths)
    models = [make_remote("Pointwise", server.url, timeout=t) for t in (10, 20)]
    assert server.num_health == 0
    ask(models[0], "a")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: ask(models[n % 2], "a"), range(16)))
    assert (server.num_health, len(server.asked)) == (1, 17)
    assert sum(t.name == "rewardq-remote" for t in threading.enumerate()) == 1


def test_something_else_at_the_url_is_said_and_not_asked_again(json_server, make_remote):
    server = json_server(lengths, health=Answer(404, b"<html>no such page</html>"))
    message = reason_of(ask(make_remote("Pointwise", server.url), "a", "b"))
    assert message == f"{server.url}/health answered 404: <html>no such page</html>; is a reward server there?"
    assert (server.num_health, server.asked) == (1, [])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (gives([1.0]), "gave 1 rewards for 2 samples"),
        (gives([1.0, 2.0, 3.0]), "gave 3 rewards for 2 samples"),
        (Answer(body=b"<html>It works!</html>"), "gave no rewards but '<html>It works!</html>'"),
        (Answer(body=b'{"rewards": 5}'), "gave no rewards but '{\"rewards\": 5}'"),
        (Answer(body=b'{"rewards": [1.0'), "gave no rewards but"),
        (Answer(body=b"[" * 100_000), "gave no rewards but"),
        (says_error(404, {"detail": "Not Found"}), "answered 404: Not Found"),
        (says_error(401, {"detail": "who are you"}), "answered 401: who are you"),
        (
            says_error(302, {}, Location="http://me:secret@elsewhere"),
            "302: look at http://me:***@elsewhere, which is not",
        ),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_reason_for_all_and_not_asked_for_again(
    json_server, make_remote, answer, words
):
    server = json_server(lambda _: answer)
    message = reason_of(ask(make_remote("Pointwise", server.url), "a", "b"))
    assert message.startswith(server.url)
    assert words in message
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"errors": {"1": "no face"}},
        {"errors": {"0": None, "1": "no face", "2": ""}},
        {"errors": [None, "no face", None]},
        {"errors": {"1": {"message": "no face"}}},
    ],
)
@pytest.mark.parametrize("kind", ["Pointwise", "Groupwise"])
def test_a_sample_that_a_200_blames_has_no_reward_whatever_number_stands_there(json_server, make_remote, kind, more):
    server = json_server(lambda _: Answer(body=json.dumps({"rewards": [0.5, 0.0, 2.5], **more}).encode()))
    first, second, third = ask(make_remote(kind, server.url), *"abc")
    assert (first, third, second.kind) == (0.5, 2.5, "failed")
    assert "no face" in second.message
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "more",
    [
        {"error": "no memory"},
        {"errors": ["no memory"]},
        {"errors": "no memory"},
        {"status": "error", "message": "no memory"},
        {"status": "Failed", "detail": "no memory"},
        {"success": False, "message": "no memory"},
    ],
)
def test_rewards_in_an_answer_that_says_it_failed_are_none(json_server, make_remote, more):
    server = json_server(lambda _: Answer(body=json.dumps({"rewards": [0.0, 0.0], **more}).encode()))
    assert "no memory" in reason_of(ask(make_remote("Groupwise", server.url), "a", "b"))


@pytest.mark.parametrize("more", [{"error": None}, {"errors": {}}, {"errors": [None, None]}, {"status": "ok"}])
def test_an_error_that_is_none_takes_no_reward_away(json_server, make_remote, more):
    server = json_server(lambda _: Answer(body=json.dumps({"rewards": [0.5, 0.0], **more}).encode()))
    assert ask(make_remote("Pointwise", server.url), "a", "b") == [0.5, 0.0]


def test_what_is_no_number_is_left_to_whoever_checks_rewards(json_server, make_remote):
    server = json_server(lambda _: Answer(body=b'{"rewards": [1.5, NaN, null]}'))
    first, second, third = ask(make_remote("Pointwise", server.url), "a", "b", "c")
    assert (first, second != second, third) == (1.5, True, None)


def bad_ones(asked) -> Answer:
    """As Flow-Factory's server: one bad sample is an error of the whole request."""
    if any(p.startswith("bad") for p in asked.prompts):
        return says_error(500, {"detail": "cannot score: bad colour"})
    return lengths(asked)


@pytest.mark.parametrize("status", [200, 400, 413, 422, 500])
def test_one_bad_sample_fails_alone_with_the_servers_words(json_server, make_remote, status):
    def script(asked):
        answer = bad_ones(asked)
        if answer.status == 500:
            body = {"error": "cannot score: bad colour"} if status == 200 else {"detail": "cannot score: bad colour"}
            return says_error(status, body)
        return answer

    server = json_server(script)
    rewards = ask(
        make_remote("Pointwise", server.url, retry_attempts=1), "a", "bb", "ccc", "bad", "eeeee", "ffffff", "g"
    )
    assert [r for r in rewards if not isinstance(r, Unscored)] == [1.0, 2.0, 3.0, 5.0, 6.0, 1.0]
    assert "cannot score: bad colour" in rewards[3].message
    assert rewards[3].kind == ("invalid" if status in (400, 413, 422) else "failed")
    assert len(server.asked) == 7, "the whole, then halves"


def test_samples_that_the_server_names_are_left_out_at_once(serve, make_remote):
    asked = []

    def compute(prompt, image):
        asked.append(list(prompt))
        return [float(len(p)) for p in prompt]

    model = make_remote("Pointwise", serve(compute, max_pixels=100))
    images = [picture(0), picture(1, 11, 11), picture(2), picture(3, 200, 1)]
    first, second, third, fourth = ask(model, "a", "bb", "ccc", "dddd", image=images)
    assert (first, third) == (1.0, 3.0)
    assert "11 x 11 are more than 100 pixels" in second.message
    assert (second.kind, fourth.kind) == ("invalid", "invalid")
    assert asked == [["a", "ccc"]]


@pytest.mark.parametrize("kind", ["Pointwise", "Groupwise"])
def test_rewards_beside_samples_that_have_none_are_taken(serve, make_remote, kind):
    calls = []

    def compute(prompt):
        calls.append(prompt)
        return [1.5, float("nan"), ValueError("no face"), 2.5]

    url = serve(compute)
    first, second, third, fourth = ask(make_remote(kind, url), *"abcd")
    assert (first, fourth) == (1.5, 2.5)
    assert second.message == f"{url}: compute_reward returned nan"
    assert third.message == f"{url}: ValueError: no face"
    assert len(calls) == 1


def test_a_wrong_count_at_our_server_is_a_reason_for_all(serve, make_remote):
    url = serve(lambda prompt: [1.0])
    assert reason_of(ask(make_remote("Pointwise", url), "a", "b")) == (
        f"{url}: compute_reward returned 1 rewards for 2 samples"
    )


def test_a_group_is_not_sent_apart(json_server, make_remote):
    server = json_server(bad_ones)
    message = reason_of(ask(make_remote("Groupwise", server.url), "a", "bad", "c"))
    assert message == f"{server.url} answered 500: cannot score: bad colour after 3 requests"
    assert [len(asked.prompts) for asked in server.asked] == [3, 3, 3]


def test_more_than_a_server_takes_is_sent_in_parts(serve, make_remote):
    sizes = []

    def compute(prompt, image):
        sizes.append(len(prompt))
        return [float(len(p)) for p in prompt]

    url = serve(compute, max_body_bytes=4000)
    large = picture(9, 50, 50)
    images = [picture(n, 20, 20) for n in range(5)]  # 1,200 bytes each, so that three fit
    rewards = ask(make_remote("Pointwise", url), "a", "bb", "ccc", "dddd", "eeeee", "f", image=[*images, large])
    assert rewards[:5] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert rewards[5].kind == "invalid"
    assert "takes at most 4000 bytes, found" in rewards[5].message
    assert sum(sizes) == 5


ONCE = {
    "500": says_error(500, {"detail": "out of memory"}),
    "502": says_error(502, b"bad gateway"),
    "503": says_error(503, b"starting"),
    "cut": Answer(cut_after=0),
    "cut in the middle": Answer(body=b'{"rewards": [1.0]}', cut_after=5),
}


@pytest.mark.parametrize("fault", ONCE)
def test_a_request_that_failed_is_repeated(json_server, make_remote, fault):
    server = json_server(lambda asked: ONCE[fault] if asked.number == 0 else lengths(asked))
    assert ask(make_remote("Pointwise", server.url), "abc") == [3.0]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "answered 500: out of memory after 3 requests"),
        ("502", "answered 502: bad gateway after 3 requests"),
        ("503", "answered 503: starting after 3 requests"),
        ("cut", "after 3 requests"),
        ("cut in the middle", "after 3 requests"),
    ],
)
def test_a_server_that_always_fails_is_asked_retry_attempts_times(json_server, make_remote, fault, words):
    server = json_server(lambda _: ONCE[fault])
    assert words in reason_of(ask(make_remote("Pointwise", server.url), "abc"))
    assert len(server.asked) == 3
    assert "after 1 request" in reason_of(ask(make_remote("Pointwise", server.url, retry_attempts=1), "abc"))


def test_nobody_at_the_url_is_said(make_remote):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        message = reason_of(ask(make_remote("Pointwise", url), "a", "b"))
    assert message.startswith(f"no answer from {url}: ConnectError")
    assert "Connection refused" in message
    assert f"from the worker's host {platform.node()}" in message
    assert "after 3 requests" in message


def test_a_host_in_no_proxy_is_asked_and_a_proxy_that_was_used_is_named(json_server, make_remote, in_env):
    server = json_server(lambda _: gives([0.5]))
    in_env(ALL_PROXY="socks5://127.0.0.1:9", NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")
    assert ask(make_remote("Pointwise", server.url), "a") == [0.5]
    in_env(http_proxy="http://me:secret@127.0.0.1:9", NO_PROXY="", no_proxy="")
    other = json_server(lambda _: gives([0.5]))
    message = reason_of(ask(make_remote("Pointwise", other.url, retry_attempts=1), "a"))
    assert "through the proxy http://me:***@127.0.0.1:9 (http_proxy" in message
    assert not other.asked


@pytest.mark.parametrize("body", [{"error": {"code": 503, "message": "loading"}}, {"error": "loading", "code": 503}])
def test_an_error_with_a_code_inside_a_200_is_repeated_like_the_code(json_server, make_remote, body):
    server = json_server(lambda q: says_error(200, body) if q.number == 0 else gives([0.5]))
    assert ask(make_remote("Pointwise", server.url), "a") == [0.5]
    server = json_server(lambda q: says_error(200, body))
    assert "loading" in reason_of(ask(make_remote("Pointwise", server.url, retry_attempts=1), "a"))


def test_pauses_grow_and_are_varied(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 1.0)
    for num_failures, middle in ((1, 1.0), (2, 2.0), (3, 4.0), (10, 30.0)):
        pauses = [remote.backoff_s(num_failures) for _ in range(300)]
        assert 0.5 * middle <= min(pauses) < 0.6 * middle
        assert 1.4 * middle < max(pauses) <= 1.5 * middle


def test_requests_that_failed_are_that_far_apart(json_server, make_remote, monkeypatch):
    backoff_s, pauses, times = remote.backoff_s, [], []

    def spy(num_failures):
        assert num_failures == len(pauses) + 1
        pauses.append(backoff_s(num_failures))
        return pauses[-1]

    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.4)
    monkeypatch.setattr(remote, "backoff_s", spy)

    def script(_):
        times.append(time.monotonic())
        return says_error(500, {"detail": "out of memory"})

    assert "after 4 requests" in reason_of(
        ask(make_remote("Pointwise", json_server(script).url, retry_attempts=4), "a")
    )
    gaps = [b - a for a, b in pairwise(times)]
    for gap, pause, middle in zip(gaps, pauses[:3], (0.4, 0.8, 1.6), strict=True):
        assert 0.5 * middle <= pause <= min(gap, 1.5 * middle)


def test_a_request_that_hangs_ends_at_timeout(json_server, make_remote):
    server = json_server(lambda _: Answer(delay_s=30))
    started = time.monotonic()
    message = reason_of(ask(make_remote("Pointwise", server.url, timeout=0.4, retry_attempts=2), "a", "b"), "timeout")
    assert message == f"{server.url} gave no answer to /compute within 0.4 seconds after 2 requests"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("options", [{"timeout": 60}, {"timeout": 0.3, "retry_attempts": 100}])
def test_timeout_s_is_held_whatever_is_repeated(json_server, make_remote, options):
    server = json_server(lambda _: Answer(delay_s=30))
    started = time.monotonic()
    rewards = ask(make_remote("Pointwise", server.url, timeout_s=1.5, **options), "a", "b")
    assert time.monotonic() - started < 10
    assert {r.kind for r in rewards} == {"timeout"}
    assert server.url in rewards[0].message


def test_timeout_s_is_held_over_the_parts_of_a_rejected_request(json_server, make_remote):
    def script(asked):
        if "bad" in asked.prompts:
            return says_error(422, {"detail": "bad"})
        return Answer(delay_s=30) if "ccc" in asked.prompts else lengths(asked)

    server = json_server(script)
    started = time.monotonic()
    rewards = ask(make_remote("Pointwise", server.url, timeout_s=4), "bad", "bb", "ccc", "dddd")
    assert time.monotonic() - started < 20
    assert [r if not isinstance(r, Unscored) else r.kind for r in rewards] == ["invalid", 2.0, "timeout", "timeout"]


def test_a_busy_server_is_asked_again_when_it_says_and_that_is_no_failure(json_server, make_remote):
    times = []

    def script(asked):
        times.append(time.monotonic())
        return says_error(503, {"error": "full"}, Retry_After="0.4") if asked.number < 4 else lengths(asked)

    server = json_server(script)
    assert ask(make_remote("Pointwise", server.url, retry_attempts=1), "abc") == [3.0]
    assert len(times) == 5
    assert min(b - a for a, b in pairwise(times)) >= 0.4


def test_a_server_that_stays_busy_is_a_timeout_before_the_deadline(json_server, make_remote):
    server = json_server(lambda _: says_error(503, {"error": "16 requests are in hand"}, Retry_After="0.3"))
    started = time.monotonic()
    message = reason_of(ask(make_remote("Pointwise", server.url, timeout_s=1.5), "a"), "timeout")
    assert f"{server.url} answered 503: 16 requests are in hand after" in message
    assert time.monotonic() - started < 10

    server.script = lambda _: says_error(429, {"error": "tomorrow"}, Retry_After="86400")
    started = time.monotonic()
    message = reason_of(ask(make_remote("Pointwise", server.url, timeout_s=20), "a"), "timeout")
    assert message == f"{server.url} answered 429: tomorrow after 1 request"
    assert time.monotonic() - started < 10


def test_many_threads_get_through_a_server_that_takes_few(serve, make_remote):
    def compute(prompt):
        time.sleep(0.02)
        return [float(len(p)) for p in prompt]

    model = make_remote("Pointwise", serve(compute, max_waiting=2))
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda n: ask(model, "x" * n)[0], range(1, 25)))
    assert found == [float(n) for n in range(1, 25)]


def test_many_threads_get_all_rewards_of_a_server_that_takes_long(serve, make_remote):
    def compute(prompt):
        time.sleep(0.15)
        return [float(len(p)) for p in prompt]

    # scaled down from 4 seconds a request, waits of 20 and a `timeout` of 60: in one line they would exceed it
    url = serve(compute, max_wait_s=0.6)
    model = make_remote("Pointwise", url, timeout=4, timeout_s=60, retry_attempts=1)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda n: ask(model, "x" * n)[0], range(1, 49)))
    assert found == [float(n) for n in range(1, 49)]
    (place,) = remote.remote_loop()._servers.values()
    assert place.cool_down_s == 0, "it is not taken for sick"


def test_of_those_that_a_busy_server_sent_away_none_is_passed_by_for_long(json_server, make_remote):
    inside, lock, numbers = [0], threading.Lock(), []

    def script(asked):
        with lock:
            if inside[0] == 2:
                return says_error(503, {"error": "full"}, Retry_After="0.1")
            inside[0] += 1
        time.sleep(0.05)
        with lock:
            inside[0] -= 1
            numbers.append(int(asked.prompts[0]))
        return gives([1.0])

    server = json_server(script)
    model = make_remote("Pointwise", server.url)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda n: ask(model, f"{n}")[0], range(100))) == [1.0] * 100
    assert len(server.asked) < 200, "it is not asked by all that wait"
    passed_by = [sum(other > n for other in numbers[:place]) for place, n in enumerate(numbers)]
    assert max(passed_by) < 24


def test_the_least_busy_of_several_servers_is_asked(json_server, make_remote):
    script = together(8, lengths)
    servers = [json_server(script) for _ in range(2)]
    model = make_remote("Pointwise", *(s.url for s in servers))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: ask(model, "x" * n)[0], range(1, 17))) == [float(n) for n in range(1, 17)]
    assert [len(s.asked) for s in servers] == [8, 8]


def test_a_server_that_fails_is_left_to_others_and_tried_again_later(json_server, make_remote, monkeypatch):
    monkeypatch.setattr(network, "time", clock := Clock())
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 60.0)  # longer than `timeout_s`: another server is asked at once
    sick, well = json_server(lambda _: Answer(cut_after=0)), json_server(lengths)
    model = make_remote("Pointwise", sick.url, well.url, retry_attempts=1)
    assert [ask(model, "abc")[0] for _ in range(4)] == [3.0] * 4
    assert len(sick.asked) == 1
    sick.script = lengths
    clock.now += network.FIRST_COOL_DOWN_S
    assert [ask(model, "abc")[0] for _ in range(4)] == [3.0] * 4
    assert len(sick.asked) > 1


def test_a_server_that_took_anothers_place_is_asked_how_it_is_spoken_to(json_server, make_remote):
    server = json_server(lengths)
    model = make_remote("Pointwise", server.url)
    (place,) = remote.remote_loop()._servers.values()
    place.terms = remote.Terms(takes_msgpack=True)  # as the one before it said
    assert ask(model, "a", "bb") == [1.0, 2.0]
    assert server.num_health == 1
    server.script = lambda asked: Answer(cut_after=0) if asked.number == 2 else lengths(asked)
    assert ask(model, "abc") == [3.0]
    assert server.num_health == 2


def test_a_call_that_is_given_up_leaves_nothing_in_flight(json_server, make_remote):
    server = json_server(lambda _: Answer(delay_s=30))
    model = make_remote("Pointwise", server.url, timeout_s=0.5)
    assert ask(model, "a")[0].kind == "timeout"
    (place,) = remote.remote_loop()._servers.values()
    wait_until(lambda: place.num_in_flight == 0)


def test_a_password_in_the_url_is_sent_and_never_shown(json_server, make_remote, caplog):
    caplog.set_level(logging.DEBUG, "workers")
    server = json_server(lambda _: says_error(502, b"no"))
    model = make_remote("Pointwise", server.url.replace("http://", "http://me:s3cret@"), retry_attempts=1)
    message = reason_of(ask(model, "a"))
    assert "s3cret" not in message + caplog.text
    assert "me:***@" in message
    assert base64.b64decode(server.asked[0].headers["Authorization"].split()[1]) == b"me:s3cret"


def test_a_long_error_is_cut(json_server, make_remote):
    server = json_server(lambda _: says_error(404, {"detail": "x" * 10_000}))
    assert len(reason_of(ask(make_remote("Pointwise", server.url), "a"))) < 700


def test_an_error_that_is_no_text_is_shown_as_json(json_server, make_remote):
    server = json_server(lambda _: says_error(422, {"detail": [{"loc": ["body"], "msg": "no dict"}]}))
    assert json.dumps([{"loc": ["body"], "msg": "no dict"}]) in reason_of(
        ask(make_remote("Pointwise", server.url), "a"), "invalid"
    )


# --- token ---------------------------------------------------------------------------------------

TOKEN = "t0ken-of-the-server"


@pytest.fixture
def with_token(serve, in_env):
    """The URL of a server that has a token; this process, the worker's, has none."""
    in_env(REWARDQ_SERVER_TOKEN=TOKEN)
    url = serve(lambda prompt: [float(len(p)) for p in prompt])
    in_env(REWARDQ_SERVER_TOKEN="")
    return url


def test_a_token_is_sent_and_never_shown(with_token, make_remote, in_env, caplog):
    caplog.set_level(logging.DEBUG)
    in_env(REWARDQ_SERVER_TOKEN=TOKEN)
    model = make_remote("Pointwise", with_token)
    model.warm_up()
    assert ask(model, "a", "bb") == [1.0, 2.0]
    (server,) = remote.remote_loop()._servers.values()
    assert TOKEN not in caplog.text + repr(server)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "wants a token; set REWARDQ_SERVER_TOKEN on this worker"),
        ("another", "answered 401: the token of the request is not this server's; set the same REWARDQ_SERVER_TOKEN"),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_said_at_once(with_token, make_remote, in_env, token, words):
    in_env(REWARDQ_SERVER_TOKEN=token)
    model = make_remote("Pointwise", with_token)
    with pytest.raises(ModelLoadError, match=re.escape(words)):
        model.warm_up()
    message = reason_of(ask(model, "a"))
    assert words in message
    assert "another" not in message


def test_a_token_is_sent_to_this_host_and_to_listed_hosts_only(in_env):
    in_env(REWARDQ_SERVER_TOKEN=TOKEN, REWARDQ_HOSTS="http://scores.example:8000,secure.example")
    for url in (
        "http://127.0.0.1:8000",
        "http://localhost:8000",
        "http://[::1]:8000",
        "http://scores.example:8000",
        "https://secure.example",
    ):
        assert token_for(url).headers == {"Authorization": f"Bearer {TOKEN}"}, url
    refused = ("http://other.example:8000", "http://scores.example.evil:8000", "http://127.0.0.1.evil:8000")
    for url in (*refused, "http://scores.example:8001", "http://secure.example", "http://a b"):
        token = token_for(url)
        assert (token.headers, TOKEN in token.why_not) == ({}, False), url
    host = "REWARDQ_HOSTS=http://scores.example:8000,secure.example,http://other.example:8000"
    assert token_for("http://other.example:8000").why_not.endswith(f"to other.example; if it may, start it with {host}")


def test_a_server_that_repeats_the_token_leaves_none_in_rewards_and_reasons(json_server, make_remote, in_env, caplog):
    caplog.set_level(logging.DEBUG, "workers")
    in_env(REWARDQ_SERVER_TOKEN=TOKEN)

    def repeat(asked):
        said = asked.headers["Authorization"]
        bodies = (gives([said]), says_error(422, {"errors": {"0": said}}), says_error(302, b"", Location=f"/{said}"))
        return bodies[asked.number % 3]

    server = json_server(repeat)
    model = make_remote("Pointwise", server.url)
    found = [ask(model, "a")[0] for _ in range(3)]
    assert found[0] == "Bearer ***"
    assert [one.message.count("Bearer ***") for one in found[1:]] == [1, 1]
    assert TOKEN not in caplog.text
