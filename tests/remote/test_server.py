"""`workers.server.RewardServer`, asked by a client of the standard library that speaks only Flow-Factory's JSON."""

from __future__ import annotations

import asyncio
import base64
import gc
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image

from tests.clock import Clock
from tests.remote.conftest import get, post
from tests.servers import ROOT, STOP_S, clean_env, wait_until
from workers.server import RewardServer


def picture(number: int, width: int = 7, height: int = 5) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray, mode: str = "RGB") -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def length(prompt):
    return [float(len(p)) for p in prompt]


def test_a_request_of_flow_factorys_is_answered_with_a_reward_for_each_prompt(serve):
    url = serve(lambda prompt, image=None: [float(np.asarray(one)[0, 0, 0]) for one in image])
    images = [picture(n) for n in range(3)]
    body = {
        "prompt": ["a", "b", "c"],
        "image": [png(one) for one in images],
        "video": None,
        "condition_images": None,
        "condition_videos": None,
        "extra": {},
    }
    status, answer, _ = post(f"{url}/compute", body)
    assert (status, answer) == (200, {"rewards": [float(one[0, 0, 0]) for one in images]})


def test_media_of_mixed_sizes_arrive_pixel_for_pixel_where_they_belong(serve):
    seen = {}

    def compute(prompt, image, video, condition_images, condition_videos):
        seen.update(prompt=prompt, image=image, video=video, c_images=condition_images, c_videos=condition_videos)
        return [0.0] * len(prompt)

    url = serve(compute)
    sent = {
        "image": [picture(1), picture(2, 3, 9)],
        "video": [[picture(3), picture(4)], [picture(5, 2, 2)]],
        "condition_images": [[picture(6, 4, 4), picture(7, 8, 1)], []],
        "condition_videos": [[[picture(8)], [picture(9, 1, 1), picture(10, 1, 1)]], [[picture(11)]]],
    }

    def as_png(value):
        return [as_png(one) for one in value] if isinstance(value, list) else png(value)

    status, _, _ = post(f"{url}/compute", {"prompt": ["a", "b"], **{n: as_png(v) for n, v in sent.items()}})
    assert status == 200

    def as_lists(value):
        return [as_lists(one) for one in value] if isinstance(value, list) else np.asarray(value).tolist()

    arrived = dict(zip(sent, (seen["image"], seen["video"], seen["c_images"], seen["c_videos"]), strict=True))
    assert as_lists(list(arrived.values())) == as_lists(list(sent.values()))
    assert seen["image"][0].mode == "RGB"


def test_an_image_that_is_not_rgb_is_made_so(serve):
    url = serve(lambda image: [float(one.mode == "RGB" and one.getpixel((0, 0))[0]) for one in image])
    grey = np.full((2, 2, 3), 77, np.uint8)
    assert post(f"{url}/compute", {"prompt": ["a"], "image": [png(grey, "L")]})[1] == {"rewards": [77.0]}
    assert post(f"{url}/compute", {"prompt": ["a"], "image": [png(grey, "RGBA")]})[1] == {"rewards": [77.0]}


@pytest.mark.parametrize("pixels", [np.uint16([[32768]]), np.int32([[70_000]]), np.float32([[0.5]])])
def test_an_image_of_more_than_8_bits_is_refused_and_not_cut_off_at_white(serve, pixels):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(buffer, "TIFF" if pixels.dtype != np.uint16 else "PNG")
    deep = base64.b64encode(buffer.getvalue()).decode()
    url = serve(lambda image: [float(one.getpixel((0, 0))[0]) for one in image])
    status, answer, _ = post(f"{url}/compute", {"prompt": ["a", "b"], "image": [png(picture(0)), deep]})
    assert (status, list(answer["errors"])) == (422, ["1"])
    assert f"sample 1: image: ValueError: its mode {image.mode} has no exact RGB" in answer["error"]


def test_an_image_may_be_a_data_url_and_no_other(serve):
    url = serve(lambda image: [float(np.asarray(one).sum()) for one in image])
    pixels = picture(3)

    def ask(image):
        status, answer, _ = post(f"{url}/compute", {"prompt": ["a"], "image": [image]})
        return status, answer.get("error") or answer["rewards"]

    assert ask(f"data:image/png;base64,{png(pixels)}") == (200, [float(pixels.sum())])
    for wrong, words in (
        ("data:image/png,abc", "needs a data: URL in base64"),
        ("data:", "needs a data: URL in base64"),
        ("https://host/a.png", "found a URL (https:...), which nothing is fetched from"),
    ):
        status, said = ask(wrong)
        assert (status, words in said) == (422, True), said


def test_only_declared_arguments_are_passed(serve):
    seen = {}

    def of_the_guide(prompts, images=None, videos=None):
        seen.update(prompts=prompts, images=images, videos=videos)
        return [1.0]

    def with_metadata(prompt, metadata):
        seen.update(metadata=metadata)
        return [1.0]

    def with_all(prompt, **kwargs):
        seen.update(kwargs=kwargs)
        return [1.0]

    body = {"prompt": ["a"], "image": [png(picture(0))], "metadata": [{"text": "hi", "n": 3}]}
    for compute in (of_the_guide, with_metadata, with_all):
        assert post(f"{serve(compute)}/compute", body)[0] == 200
    assert seen["prompts"] == ["a"]
    assert len(seen["images"]) == 1
    assert seen["videos"] is None
    assert seen["metadata"] == [{"text": "hi", "n": 3}]
    assert seen["kwargs"].keys() == {"image", "video", "condition_images", "condition_videos"}


def test_health_says_what_is_taken_and_in_hand(serve):
    said = get(f"{serve(length, max_body_bytes=5000)}/health")
    assert said == {
        "status": "ok",
        "takes": ["application/json", "application/msgpack"],
        "max_body_bytes": 5000,
        "num_in_hand": 0,
    }


@pytest.mark.parametrize(
    "rewards",
    [
        np.float32([0.5, 2.0]),
        torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
        [np.float16(0.5), torch.tensor(2.0)],
        (0.5, 2),
    ],
    ids=["array", "tensor", "scalars", "tuple"],
)
def test_rewards_may_be_arrays_tensors_and_their_scalars(serve, rewards):
    assert post(f"{serve(lambda prompt: rewards)}/compute", {"prompt": ["a", "b"]})[1] == {"rewards": [0.5, 2.0]}


def test_a_sample_without_a_number_is_named_and_the_others_keep_theirs(serve):
    def compute(prompt):
        return [0.25, float("nan"), ValueError("no face"), None, "high", True, np.float32("inf"), 10**400, [1, 2], 0.5]

    status, answer, _ = post(f"{serve(compute)}/compute", {"prompt": ["p"] * 10})
    assert status == 500
    assert answer["error"] == answer["detail"] == "sample 1: compute_reward returned nan (and 7 more)"
    assert answer["rewards"] == [0.25, *[None] * 8, 0.5]
    assert set(answer["errors"]) == {"1", "2", "3", "4", "5", "6", "7", "8"}
    assert answer["errors"]["2"] == "ValueError: no face"
    assert answer["errors"]["4"] == "compute_reward returned 'high'"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "returned 1 rewards for 2 samples"),
        (np.zeros((3, 1)), "returned 3 rewards for 2 samples"),
        (1.0, "returned a float instead of rewards for 2 samples"),
        (None, "returned a NoneType instead of rewards for 2 samples"),
    ],
)
def test_a_wrong_count_is_an_error_of_all_samples(serve, returned, words):
    status, answer, _ = post(f"{serve(lambda prompt: returned)}/compute", {"prompt": ["a", "b"]})
    assert status == 500
    assert answer["error"].startswith("samples 0 to 1: ")
    assert words in answer["error"]
    assert set(answer["errors"]) == {"0", "1"}
    assert "rewards" not in answer


@pytest.mark.parametrize(
    "error", [ValueError("bad \ud800 colour"), SystemExit(3), StopIteration(), KeyboardInterrupt()]
)
def test_what_compute_reward_raises_is_the_answer_and_the_server_lives(serve, error):
    def compute(prompt):
        if "bad" in prompt:
            raise error
        return length(prompt)

    url = serve(compute)
    status, answer, _ = post(f"{url}/compute", {"prompt": ["bad"]})
    assert status == 500
    assert answer["error"].startswith(f"sample 0: {type(error).__name__}: ")
    assert list(answer["errors"]) == ["0"]
    status, answer, _ = post(f"{url}/compute", {"prompt": ["good", "bad"]})
    assert status == 500
    assert answer["error"].startswith("samples 0 to 1: ")
    assert "errors" not in answer, "it is not known which of them is to blame"
    assert post(f"{url}/compute", {"prompt": ["good"]})[1] == {"rewards": [4.0]}


IMAGE = png(picture(0))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "cannot be read"),
        (b"{", 400, "cannot be read"),
        (b"[" * 100_000, 400, "cannot be read"),
        ([1], 400, "'prompt'"),
        ({"image": [IMAGE]}, 400, "'prompt'"),
        ({"prompt": "a", "image": [IMAGE]}, 400, "'prompt'"),
        ({"prompt": [1], "image": [IMAGE]}, 400, "'prompt'"),
        ({"prompt": ["a"]}, 400, "compute_reward needs image"),
        ({"prompt": ["a", "b"], "image": [IMAGE]}, 400, "'image' has 1 values for 2 prompts"),
        ({"prompt": ["a"], "image": IMAGE}, 400, "'image' has a str for 1 prompts"),
        ({"prompt": ["a", "b"], "image": [IMAGE, "no base64!"]}, 422, "sample 1: image: "),
        ({"prompt": ["a", "b"], "image": [IMAGE, base64.b64encode(b"no image").decode()]}, 422, "sample 1: image: "),
        ({"prompt": ["a", "b"], "image": [IMAGE[:40], IMAGE]}, 422, "sample 0: image: "),
        ({"prompt": ["a"], "image": [5]}, 422, "found a int"),
        ({"prompt": ["a"], "image": [png(picture(0, 40, 30))]}, 422, "40 x 30 are more than 1000 pixels"),
        ({"prompt": ["a"], "image": [IMAGE], "video": [[IMAGE, {}]]}, 422, "sample 0: video: "),
        ({"prompt": ["a"], "image": [IMAGE], "video": [IMAGE]}, 422, "needs a list, found a str"),
        ({"prompt": ["a"], "image": [IMAGE], "video": [[IMAGE, None]]}, 422, "found a NoneType"),
    ],
)
def test_a_request_that_cannot_be_computed_is_refused_with_its_reason(serve, body, status, words):
    url = serve(lambda prompt, image, video=None: length(prompt), max_pixels=1000)
    found, answer, _ = post(f"{url}/compute", body)
    assert (found, words in answer["error"]) == (status, True), answer
    assert ("errors" in answer) == (status == 422)


def test_no_prompts_have_no_rewards(serve):
    assert post(f"{serve(length)}/compute", {"prompt": []})[1] == {"rewards": []}


def test_msgpack_is_taken_as_well(serve):
    url = serve(lambda prompt, image: [float(np.asarray(one).sum()) for one in image])
    pixels = picture(3, 6, 4)
    raw = {"size": [6, 4], "rgb": pixels.tobytes()}

    def ask(image):
        return post(
            f"{url}/compute", msgpack.packb({"prompt": ["a"], "image": [image]}), Content_Type="application/msgpack"
        )

    assert ask(raw)[1] == ask(png(pixels))[1] == {"rewards": [float(pixels.sum())]}
    assert ask({**raw, "size": [6, 5]})[0] == 422
    assert ask({**raw, "size": 6})[0] == 422
    assert post(f"{url}/compute", b"\xc1", Content_Type="application/msgpack")[0] == 400


def test_a_large_body_is_refused_even_if_its_length_is_not_said(serve):
    url = serve(length, max_body_bytes=1000)
    body = {"prompt": ["x" * 3_000_000]}
    assert post(f"{url}/compute", body)[0] == 413
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("POST", "/compute", iter([json.dumps(body).encode()]), encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == 413
    assert "more than 1000 bytes" in json.loads(answer.read())["error"]
    connection.close()
    assert post(f"{url}/compute", {"prompt": ["small"]})[0] == 200


def count_of_threads(is_safe: bool, serve, **attributes) -> tuple[int, set[str], list[float]]:
    """How many of eight requests compute at once, and on which threads."""
    lock, inside, most, names = threading.Lock(), [0], [0], set()

    def compute(prompt):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            names.add(threading.current_thread().name + str(threading.get_ident()))
        time.sleep(0.1)
        with lock:
            inside[0] -= 1
        return length(prompt)

    url = serve(compute, thread_safe=is_safe, **attributes)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: post(f"{url}/compute", {"prompt": ["x" * n]})[1], range(8)))
    return most[0], names, [answer["rewards"][0] for answer in answers]


def test_one_request_computes_at_a_time_and_always_on_the_same_thread(serve):
    most, names, rewards = count_of_threads(False, serve)
    assert (most, len(names)) == (1, 1)
    assert rewards == [float(n) for n in range(8)]


def test_a_thread_safe_class_computes_several_at_once(serve):
    most, _, rewards = count_of_threads(True, serve, num_threads=4)
    assert 2 <= most <= 4
    assert rewards == [float(n) for n in range(8)]


def test_above_the_bound_requests_are_answered_503_at_once_and_health_still_answers(serve):
    go, begun = threading.Event(), threading.Semaphore(0)

    def compute(prompt):
        begun.release()
        go.wait(20)
        return length(prompt)

    url = serve(compute, max_waiting=2)
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(post, f"{url}/compute", {"prompt": ["ab"]}) for _ in range(2)]
        assert begun.acquire(timeout=10)
        wait_until(lambda: get(f"{url}/health")["num_in_hand"] == 2)
        refused = post(f"{url}/compute", {"prompt": ["x" * 1_000_000]})
        assert refused[0] == 503
        assert int(refused[2]["Retry-After"]) >= 1
        assert "2 requests are in hand, the most is 2" in refused[1]["error"]
        assert get(f"{url}/health")["status"] == "ok"
        go.set()
        assert [t.result()[1] for t in taken] == [{"rewards": [2.0]}] * 2
    assert post(f"{url}/compute", {"prompt": ["abc"]})[1] == {"rewards": [3.0]}


@pytest.fixture
def clock(monkeypatch):
    """The clock by which the server tells how long a call takes."""
    monkeypatch.setattr("workers.server.time", found := Clock())
    return found


def test_a_request_that_would_wait_for_too_long_is_sent_away_at_once(serve, clock):
    go, answers = threading.Event(), {}

    def compute(prompt):
        clock.now += 30
        go.wait(20)
        return length(prompt)

    url = serve(compute, max_wait_s=70)
    go.set()
    assert post(f"{url}/compute", {"prompt": ["a"]})[0] == 200
    go.clear()

    def ask(n):
        answers[n] = post(f"{url}/compute", {"prompt": ["x" * n]})

    with ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(ask, n) for n in range(12)]
        wait_until(lambda: len(answers) == 9)
        assert {status for status, _, _ in answers.values()} == {503}, "while the others still wait"
        go.set()
        for one in asking:
            one.result()
    taken = [(n, answer) for n, (status, answer, _) in answers.items() if status == 200]
    refused = [(answer, headers) for status, answer, headers in answers.values() if status == 503]
    assert (len(taken), len(refused)) == (3, 9), "what waits for 60 seconds at most"
    assert all(answer == {"rewards": [float(n)]} for n, answer in taken)
    for answer, headers in refused:
        assert "3 requests are in hand and each took 30 seconds lately" in answer["error"]
        assert int(headers["Retry-After"]) == 30


def test_a_free_thread_takes_a_request_however_long_the_others_took(serve, clock):
    both = threading.Barrier(2)

    def compute(prompt):
        both.wait(20)
        clock.now += 30
        return length(prompt)

    url = serve(compute, max_wait_s=10, thread_safe=True, num_threads=2)
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda n: post(f"{url}/compute", {"prompt": ["x" * n]}), range(2)))
        assert [status for status, _, _ in answers] == [200, 200]


def test_a_request_whose_turn_does_not_come_is_given_back(serve):
    go, computed = threading.Event(), []

    def compute(prompt):
        computed.append(prompt[0])
        go.wait(20)
        return length(prompt)

    url = serve(compute, max_wait_s=0.4)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, f"{url}/compute", {"prompt": ["first"]})
        wait_until(lambda: computed)
        status, answer, headers = post(f"{url}/compute", {"prompt": ["second"]})
        assert (status, int(headers["Retry-After"])) == (503, 1)
        assert "its turn did not come within 0.6 seconds" in answer["error"]
        assert not first.done(), "what is being computed has no such limit"
        go.set()
        assert first.result()[1] == {"rewards": [5.0]}
    assert post(f"{url}/compute", {"prompt": ["third"]})[0] == 200
    assert computed == ["first", "third"]


def test_what_was_given_back_holds_no_media_while_a_call_hangs(serve):
    go, computed = threading.Event(), []

    def compute(prompt, image):
        computed.append(prompt[0])
        go.wait(20)
        return length(prompt)

    def num_images():
        gc.collect()
        return sum(type(one) is Image.Image and one.size == (211, 109) for one in gc.get_objects())

    url = serve(compute, max_wait_s=0.2)
    body = {"prompt": ["a"], "image": [png(picture(1, 211, 109))]}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, f"{url}/compute", body)
        wait_until(lambda: computed)
        assert [post(f"{url}/compute", body)[0] for _ in range(3)] == [503] * 3
        leaving = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        leaving.request("POST", "/compute", json.dumps(body))
        wait_until(lambda: get(f"{url}/health")["num_in_hand"] == 2)
        leaving.close()
        wait_until(lambda: get(f"{url}/health")["num_in_hand"] == 1)
        wait_until(lambda: num_images() <= 1)  # of the call that hangs
        go.set()
        assert first.result()[0] == 200
    assert computed == ["a"]


def half_sent(url: str) -> socket.socket:
    """A connection with the head and the first byte of a request."""
    where = urlsplit(url)
    sending = socket.create_connection((where.hostname, where.port), timeout=20)
    sending.sendall(b"POST /compute HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{")
    return sending


def all_of(connection: socket.socket) -> bytes:
    """What a server says until it closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize("max_waiting", [1, 0], ids=["taken", "refused"])
def test_a_body_that_is_never_sent_to_its_end_holds_no_place(serve, max_waiting):
    url = serve(length, max_waiting=max_waiting, max_receive_s=3)
    sending = [half_sent(url) for _ in range(8)]
    assert post(f"{url}/compute", {"prompt": ["a"]})[0] == (200 if max_waiting else 503), "others are served meanwhile"
    assert get(f"{url}/health")["num_in_hand"] == 0
    for one in sending:
        said = all_of(one)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"not all of it came within 3 seconds" in said


def test_a_request_whose_client_left_before_its_turn_is_not_computed(serve):
    go, computed = threading.Event(), []

    def compute(prompt):
        computed.append(prompt[0])
        go.wait(20)
        return length(prompt)

    url = serve(compute, max_waiting=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, f"{url}/compute", {"prompt": ["first"]})
        wait_until(lambda: computed)
        leaving = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        leaving.request("POST", "/compute", json.dumps({"prompt": ["left"]}))
        wait_until(lambda: get(f"{url}/health")["num_in_hand"] == 2)
        leaving.close()
        wait_until(lambda: get(f"{url}/health")["num_in_hand"] == 1)
        go.set()
        assert first.result()[0] == 200
    assert post(f"{url}/compute", {"prompt": ["last"]})[0] == 200
    assert computed == ["first", "last"]


def test_a_call_is_dropped_before_the_server_does_anything_else():
    """The thread becomes free while the server answers the client that left, which must be too late for its call."""
    began, go, computed = threading.Event(), threading.Event(), []

    class Held(RewardServer):
        def compute_reward(self, prompt):
            computed.append(prompt[0])
            began.set()
            go.wait(20)
            return length(prompt)

    app = Held().make_app()

    async def ask(prompt, left=None, on_send=lambda: None):
        """One request to the app; its client leaves when `left` is set."""
        body = json.dumps({"prompt": [prompt]}).encode()
        to_come = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {"type": "http", "method": "POST", "path": "/compute", "query_string": b"", "headers": []}

        async def receive():
            if to_come:
                return to_come.pop()
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            on_send()

        await app(scope, receive, send)

    def let_the_thread_go():
        go.set()
        time.sleep(0.3)  # the loop stands still here, the thread does not

    async def scenario():
        first = asyncio.ensure_future(ask("first"))
        await asyncio.to_thread(began.wait, 20)
        left = asyncio.Event()
        leaving = asyncio.ensure_future(ask("left", left, let_the_thread_go))
        await asyncio.sleep(0.3)  # it is decoded, and waits for its turn
        left.set()
        await asyncio.gather(first, leaving)
        await ask("last")

    asyncio.run(scenario())
    assert computed == ["first", "last"]


def test_a_class_that_asks_for_what_no_request_has_is_refused_at_the_start():
    class Unknown(RewardServer):
        def compute_reward(self, prompt, style):
            return []

    class Empty(RewardServer):
        pass

    with pytest.raises(TypeError, match=r"takes 'style', which no request has; they have prompt, image"):
        Unknown().make_app()
    with pytest.raises(TypeError, match="Empty has no compute_reward"):
        Empty().make_app()


SLOW = """
import sys, time
from workers.server import RewardServer

class Slow(RewardServer):
    stop_grace_s = 4

    def compute_reward(self, prompt):
        print("computing", flush=True)
        time.sleep(float(prompt[0]))
        return [1.0] * len(prompt)

Slow(port=1).run(port=int(sys.argv[2]))
print("after run", flush=True)
"""


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_a_stopped_server_answers_what_it_has_in_hand(server_process, tmp_path, how):
    (tmp_path / "slow.py").write_text(SLOW)
    server = server_process(tmp_path / "slow.py")
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(post, f"{server.url}/compute", {"prompt": ["1.0"]})
        wait_until(lambda: "computing" in server.log.read_text())
        server.process.send_signal(getattr(signal, how))
        assert taken.result()[1] == {"rewards": [1.0]}
        assert server.process.wait(STOP_S) == 0
    assert server.log.read_text().rstrip().endswith("after run")
    assert "Traceback" not in server.log.read_text()


def test_a_stopped_server_does_not_wait_for_what_hangs(server_process, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    server = server_process(tmp_path / "slow.py")
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(post, f"{server.url}/compute", {"prompt": ["60"]})
        wait_until(lambda: "computing" in server.log.read_text())
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 20
        with pytest.raises((OSError, http.client.HTTPException, ValueError)):
            taken.result()


def test_a_port_in_use_ends_it_with_an_error(serve, tmp_path):
    url = serve(length)
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "slow.py", "--port", str(urlsplit(url).port)]
    env = {**clean_env(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "address already in use" in done.stderr
