"""What a hostile or broken client can do to a reward server is bounded: memory, connections, time, log lines."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import msgpack
import pytest
from PIL import Image

from tests.remote.conftest import get, post
from tests.remote.test_server import all_of, half_sent, length, picture
from tests.servers import wait_until

MSGPACK = "application/msgpack"
MIB = 1 << 20


def packed(url: str, body: bytes):
    return post(f"{url}/compute", body, Content_Type=MSGPACK)


def flat_png(width: int, height: int) -> str:
    """A file of some kilobytes for millions of pixels."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(line)


SERVER = """
import resource, sys
from workers import server

{before}

class Served(server.RewardServer):
    {attributes}

    def compute_reward(self, prompt, image=None, video=None, metadata=None):
        return [float(len(p)) for p in prompt]

Served().run(port=int(sys.argv[2]))
"""


@pytest.fixture
def bounded(server_process, tmp_path):
    """Starts a server in a process of its own: `bounded("max_head_s = 1")`."""

    def start(attributes="pass", before=""):
        (tmp_path / "served.py").write_text(SERVER.format(before=before, attributes=attributes))
        return server_process(tmp_path / "served.py")

    return start


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["images", "video"])
def test_pixels_of_a_request_are_counted_before_any_is_decoded(bounded, body):
    server = bounded()
    before = peak_bytes(server.process.pid)
    file = flat_png(8192, 8192)  # 64 Mi pixels, the most that one image may have
    fields = (
        {"prompt": ["a"] * 8, "image": [file] * 8} if body == "images" else {"prompt": ["a"], "video": [[file] * 8]}
    )
    status, answer, _ = post(f"{server.url}/compute", fields)
    assert status == 413
    assert "536870912 pixels in all its images, the most is 268435456; send fewer samples" in answer["error"]
    assert peak_bytes(server.process.pid) - before < 64 * MIB, "one image alone takes 256 MiB"


def held_up():
    """A `compute_reward` that waits, an event for that it has begun, and one that lets it go on."""
    begun, go = threading.Event(), threading.Event()

    def compute(prompt, image):
        begun.set()
        go.wait(20)
        return length(prompt)

    return compute, begun, go


def test_memory_of_all_requests_is_bounded_and_a_later_one_is_sent_away(serve):
    compute, begun, go = held_up()
    url = serve(compute, max_bytes_in_hand=8 * MIB, thread_safe=True)
    body = {"prompt": ["a"], "image": [flat_png(1024, 1024)]}  # 4 MiB as Pillow has it
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, f"{url}/compute", body)
        assert begun.wait(20)
        status, answer, headers = post(f"{url}/compute", {**body, "image": [flat_png(1024, 1200)]})
        assert (status, int(headers["Retry-After"])) == (503, 1)
        assert f"other requests hold {4 * MIB} of {8 * MIB}" in answer["error"]
        status, answer, _ = post(f"{url}/compute", {**body, "image": [flat_png(1024, 2048)]})
        assert (status, "the most for all requests is" in answer["error"]) == (413, True), "it would never fit"
        go.set()
        assert first.result()[1] == {"rewards": [1.0]}
    assert post(f"{url}/compute", {**body, "image": [flat_png(1024, 1200)]})[0] == 200, "all was given back"


def test_bodies_that_arrive_are_bounded_together(serve):
    url = serve(length, max_bytes_in_hand=2 * MIB)
    where = urlsplit(url)
    part = b"POST /compute HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 1_500_000
    with contextlib.ExitStack() as sending:

        def is_refused_beside_one_that_arrives() -> bool:
            # If it comes first itself, the other one is refused.
            other = sending.enter_context(socket.create_connection((where.hostname, where.port), timeout=20))
            other.sendall(part)
            return post(f"{url}/compute", {"prompt": ["x" * 700_000]})[0] == 503

        wait_until(is_refused_beside_one_that_arrives)
        assert post(f"{url}/compute", {"prompt": ["x"]})[0] == 200
    wait_until(lambda: post(f"{url}/compute", {"prompt": ["x" * 500_000]})[0] == 200)


def test_what_a_call_still_uses_is_counted_after_its_client_left(serve):
    compute, begun, go = held_up()
    url = serve(compute, max_bytes_in_hand=6 * MIB, thread_safe=True)
    body = {"prompt": ["a"], "image": [flat_png(1024, 1024)]}
    leaving = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    leaving.request("POST", "/compute", json.dumps(body))
    assert begun.wait(20)
    leaving.close()
    wait_until(lambda: get(f"{url}/health")["num_in_hand"] == 0)
    assert post(f"{url}/compute", body)[0] == 503
    go.set()
    wait_until(lambda: post(f"{url}/compute", body)[0] == 200)


LISTS = b"\x82\xa6prompt\x91\xa1a\xa8metadata"
MANY = {
    "empty lists in msgpack": (LISTS + b"\xdd" + struct.pack(">I", 8 * MIB) + b"\x90" * (8 * MIB), MSGPACK, 413),
    "lists that say they are long, in each other": (LISTS + b"\xdd\x00\x7f\xff\xff" * 1000, MSGPACK, 400),
    "deep lists in msgpack": (LISTS + b"\x91" * MIB + b"\x90", MSGPACK, 400),
    "a list as a key": (b"\x81\x91\xa1a\xa1b", MSGPACK, 400),
    "bytes behind the value": (b"\x81\xa6prompt\x91\xa1a\xc0", MSGPACK, 400),
    "empty lists in JSON": (b'{"prompt": ["a"], "metadata": [' + b"[]," * (2 * MIB) + b"[]]}", "application/json", 413),
    "numbers in JSON": (b'{"prompt": ["a"], "metadata": [' + b"7," * (2 * MIB) + b"7]}", "application/json", 413),
}


@pytest.mark.parametrize("what", MANY)
def test_a_body_of_many_values_takes_no_more_memory_than_its_bytes(bounded, what):
    body, kind, status = MANY[what]
    server = bounded()
    before = peak_bytes(server.process.pid)
    found, answer, _ = post(f"{server.url}/compute", body, Content_Type=kind)
    assert (found, "error" in answer) == (status, True), answer
    assert peak_bytes(server.process.pid) - before < 64 * MIB
    assert post(f"{server.url}/compute", {"prompt": ["abc"]})[1] == {"rewards": [3.0]}


@pytest.mark.parametrize("wide", ["\U0001f600", "\\ud83d\\ude00"], ids=["as it is", "escaped"])
def test_a_text_that_takes_four_bytes_a_character_is_counted_as_such(serve, wide):
    url = serve(length, max_bytes_in_hand=4 * MIB)
    body = '{"prompt": ["%s"]}'
    assert post(f"{url}/compute", (body % ("x" * 900_000)).encode())[0] == 200
    assert post(f"{url}/compute", (body % ("x" * 900_000 + wide)).encode())[0] == 413


SIZES = {
    "negative": [-1, -1],
    "zero": [2**40, 0],
    "floats": [1e9, 1e-9],
    "a NaN": [float("nan"), 1],
    "three": [1, 2, 3],
    "a text": "ab",
    "none": None,
    "booleans": [True, True],
    "a long text times a number": ["a" * 1_000_000, 2000],
    "a list times a number": [[0] * 1000, 2000],
}


@pytest.mark.parametrize("what", SIZES)
def test_a_size_that_is_no_pair_of_integers_is_refused_before_it_is_reckoned_with(serve, what):
    url = serve(lambda prompt, image: length(prompt))
    status, answer, _ = packed(url, msgpack.packb({"prompt": ["a"], "image": [{"size": SIZES[what], "rgb": b"abc"}]}))
    assert status == 422
    assert answer["error"] == "sample 0: image: ValueError: needs a size of [width, height], two integers above 0"


@pytest.mark.parametrize(("rgb", "words"), [("abc", "found a str"), (None, "found a NoneType"), (b"ab", "found 2")])
def test_pixels_of_another_type_or_count_are_refused(serve, rgb, words):
    url = serve(lambda prompt, image: length(prompt))
    good = {"size": [1, 1], "rgb": b"abc"}
    body = {"prompt": ["a", "b"], "image": [good, {"size": [1, 1], "rgb": rgb}]}
    status, answer, _ = packed(url, msgpack.packb(body))
    assert (status, list(answer["errors"]), words in answer["error"]) == (422, ["1"], True)


@pytest.mark.parametrize(
    ("field", "values", "blamed"),
    [
        ("metadata", [{"a": 1}, [1], "text"], ["1", "2"]),
        ("fps", [24, "24", True], ["1", "2"]),
        ("fps", [24.0, float("nan"), 10**400], ["1", "2"]),
    ],
)
def test_metadata_and_fps_of_another_type_fail_alone(serve, field, values, blamed):
    url = serve(lambda prompt, metadata=None, fps=None: length(prompt))
    status, answer, _ = post(f"{url}/compute", {"prompt": ["a"] * 3, field: values})
    assert (status, list(answer["errors"])) == (422, blamed)
    assert post(f"{url}/compute", {"prompt": ["a"] * 2, field: [values[0], None]})[0] == 200


def test_a_file_of_a_format_that_runs_a_program_is_not_opened(serve):
    buffer = io.BytesIO()
    Image.fromarray(picture(1)).save(buffer, "EPS")
    url = serve(lambda prompt, image: length(prompt))
    status, answer, _ = post(
        f"{url}/compute", {"prompt": ["a"], "image": [base64.b64encode(buffer.getvalue()).decode()]}
    )
    assert (status, "bytes that are none of PNG, JPEG" in answer["error"]) == (422, True)
    for known in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(picture(1)).save(buffer, known)
        file = base64.b64encode(buffer.getvalue()).decode()
        assert post(f"{url}/compute", {"prompt": ["a"], "image": [file]})[0] == 200, known


def test_a_long_reason_is_cut(serve):
    def compute(prompt):
        raise ValueError("x" * 1_000_000)

    status, answer, _ = post(f"{serve(compute)}/compute", {"prompt": ["a"]})
    assert status == 500
    assert len(answer["error"]) < 2100


# --- who may ask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"])
def test_no_page_describes_the_server(serve, path):
    connection = http.client.HTTPConnection(urlsplit(serve(length)).netloc, timeout=20)
    connection.request("GET", path)
    assert connection.getresponse().status == 404
    connection.close()


TOKEN = "t0ken-of-the-server"


def test_a_server_with_a_token_answers_only_whoever_has_it(serve, in_env, caplog):
    in_env(REWARDQ_SERVER_TOKEN=TOKEN)
    url = serve(length)
    body = {"prompt": ["abc"]}
    status, answer, headers = post(f"{url}/compute", body)
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer["error"].endswith("the request has none; set REWARDQ_SERVER_TOKEN where the client runs")
    for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, "Bearer ", "Basic abc", "Bearer \xe9"):
        status, answer, _ = post(f"{url}/compute", body, Authorization=wrong)
        assert (status, "is not this server's" in answer["error"]) == (401, True), wrong
    assert post(f"{url}/compute", body, Authorization=f"Bearer {TOKEN}")[1] == {"rewards": [3.0]}
    assert get(f"{url}/health")["needs_token"] is True
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("token", ["", "  "])
def test_a_token_that_is_empty_is_none(serve, in_env, token):
    in_env(REWARDQ_SERVER_TOKEN=token)
    assert post(f"{serve(length)}/compute", {"prompt": ["abc"]})[1] == {"rewards": [3.0]}


@pytest.mark.parametrize("token", ["two words", "caf\xe9", "a\nb"])
def test_a_token_that_no_header_can_have_is_refused_at_the_start_and_not_shown(serve, in_env, token):
    in_env(REWARDQ_SERVER_TOKEN=token)
    with pytest.raises(ValueError, match="REWARDQ_SERVER_TOKEN needs") as caught:
        serve(length)
    assert token not in str(caught.value)


def test_a_server_that_others_reach_without_a_token_says_so(server_process, tmp_path):
    code = SERVER.format(before="", attributes="pass").replace(".run(", ".run(host='0.0.0.0', ")
    (tmp_path / "served.py").write_text(code)
    server = server_process(tmp_path / "served.py")
    assert "listens on 0.0.0.0 and serves whoever reaches it, since REWARDQ_SERVER_TOKEN is not set" in (
        server.log.read_text()
    )


# --- connections and time ------------------------------------------------------------------------


def connected(url: str, said: bytes = b"") -> socket.socket:
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=20)
    connection.sendall(said)
    return connection


HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: h\r\nX-A: "


@pytest.mark.parametrize("said", [b"", HALF_A_HEAD], ids=["nothing", "half a head"])
def test_a_connection_without_a_whole_head_is_closed(bounded, said):
    server = bounded("max_head_s = 1")
    started = time.monotonic()
    assert all_of(connected(server.url, said)) == b""
    assert time.monotonic() - started < 10


def test_a_head_that_comes_byte_by_byte_is_cut_and_so_is_a_second_one(bounded):
    server = bounded("max_head_s = 1")
    connection = connected(server.url, b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    started = time.monotonic()
    with connection, contextlib.suppress(OSError):
        connection.sendall(HALF_A_HEAD)
        while time.monotonic() - started < 15:
            connection.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - started < 10, "the server has closed it"


def test_half_sent_heads_take_no_place_from_others(bounded):
    before = "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    server = bounded("max_head_s = 60", before)
    connections = [connected(server.url, HALF_A_HEAD) for _ in range(300)]
    assert post(f"{server.url}/compute", {"prompt": ["abc"]})[1] == {"rewards": [3.0]}
    assert len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) < 200
    for one in connections:
        one.close()


def test_of_too_many_connections_those_with_a_request_in_hand_are_kept(bounded, tmp_path):
    server = bounded("max_connections = 4")
    slow = [half_sent(server.url) for _ in range(4)]
    assert post(f"{server.url}/compute", {"prompt": ["abc"]})[1] == {"rewards": [3.0]}
    closed = 0
    for one in slow:
        one.settimeout(0.2)
        try:
            closed += one.recv(10) == b""
        except ConnectionError:
            closed += 1
        except TimeoutError:
            pass
        one.close()
    assert closed >= 1


def num_files(server) -> int:
    """Files and connections that a server's process has open."""
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def num_files_at_rest(server) -> int:
    """As `num_files`, once the connection that asked whether the server is up is closed."""
    seen = []
    for _ in range(20):
        seen.append(num_files(server))
        time.sleep(0.05)
    return min(seen)


def test_an_answer_that_is_not_read_is_given_up(bounded):
    server = bounded("max_send_s = 1")
    before = num_files_at_rest(server)
    body = json.dumps({"prompt": ["abc"] * 150_000}).encode()
    head = f"POST /compute HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection = connected(server.url, head)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def send():
        with contextlib.suppress(OSError):
            connection.sendall(body + 40 * (head + body))  # the answers are many times what sockets buffer

    with connection, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        wait_until(lambda: num_files(server) > before)
        wait_until(lambda: num_files(server) <= before, 20)
        sending.result()
    assert post(f"{server.url}/compute", {"prompt": ["abc"]})[1] == {"rewards": [3.0]}


# --- log -----------------------------------------------------------------------------------------


def test_requests_that_fail_fill_no_log(bounded):
    server = bounded("max_log_lines = 10", "server.LOG_WINDOW_S = 3")
    for _ in range(200):
        assert post(f"{server.url}/compute", b"{")[0] == 400
        with connected(server.url, b"\x16\x03\x01 no HTTP\r\n\r\n") as connection:
            connection.recv(100)
    lines = server.log.read_text().splitlines()
    assert 10 <= sum("no rewards status=400" in line for line in lines) <= 60
    assert 10 <= sum("Invalid HTTP request" in line for line in lines) <= 60
    time.sleep(3)
    post(f"{server.url}/compute", b"{")
    assert re.search(r"no rewards status=400 \(\d+ lines of this kind were left out before\)", server.log.read_text())
    assert server.stop() == 0
    assert server.log.read_text().rstrip().endswith("stopped")
