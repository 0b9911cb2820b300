"""Proxies of the environment: NO_PROXY holds whatever the proxies are, and a proxy that was used is named."""

from __future__ import annotations

import importlib.util
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tasks.errors import ModelLoadError
from tests.judges.scripted import MODEL, Answer, send
from trainer_client import RewardClient, Sample
from workers.network import proxies
from workers.network.proxies import proxy_for

DEAD = "127.0.0.1:9"
NEEDS_SOCKS = r"socks5.*ALL_PROXY.*pip install socksio, or put the host into NO_PROXY"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class ForwardProxy:
    """An HTTP proxy that passes requests on, or refuses all of them."""

    def __init__(self, refuses: bool = False) -> None:
        self.asked: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.pass_on(None)

            def do_POST(self) -> None:
                self.pass_on(self.rfile.read(int(self.headers["Content-Length"])))

            def pass_on(self, body: bytes | None) -> None:
                owner.asked.append(self.path)
                if refuses:
                    send(self, Answer(403, b"blocked by policy", {"Content-Type": "text/plain"}))
                    return
                request = urllib.request.Request(self.path, body, {"Content-Type": "application/json"})
                direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                try:
                    with direct.open(request, timeout=20) as answer:
                        send(self, Answer(answer.status, answer.read()))
                except urllib.error.HTTPError as error:
                    with error:
                        send(self, Answer(error.code, error.read()))

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def forward_proxy():
    started: list[ForwardProxy] = []

    def start(**options):
        started.append(ForwardProxy(**options))
        return started[-1]

    yield start
    for proxy in started:
        proxy.stop()


def ask(judge, picture):
    return judge(["a cat"], image=[picture()]).rewards[0]


def test_a_proxy_of_the_environment_is_used(judge_server, make_judge, picture, in_env, forward_proxy):
    proxy, server = forward_proxy(), judge_server()
    in_env(http_proxy=proxy.url)
    assert ask(make_judge("vllm_evaluate", server), picture) == pytest.approx(0.75)
    assert proxy.asked == [f"{server.url}/models", f"{server.url}/chat/completions"]


@pytest.mark.parametrize("proxy", [f"socks5://{DEAD}", f"socks://{DEAD}", f"socks4://{DEAD}", f"http://{DEAD}", DEAD])
@pytest.mark.parametrize("variable", ["ALL_PROXY", "http_proxy"])
def test_a_host_in_no_proxy_is_asked_whatever_the_proxies_are(
    judge_server, make_judge, picture, in_env, variable, proxy
):
    in_env(**{variable: proxy, "NO_PROXY": "example.com, 127.0.0.1,localhost"})
    assert ask(make_judge("vllm_evaluate", judge_server()), picture) == pytest.approx(0.75)


def test_a_proxy_of_another_scheme_is_not_in_the_way(judge_server, make_judge, picture, in_env):
    in_env(https_proxy=f"socks5://{DEAD}")
    assert ask(make_judge("vllm_evaluate", judge_server()), picture) == pytest.approx(0.75)


def test_a_dead_proxy_is_named_without_its_password(judge_server, make_judge, picture, in_env):
    in_env(HTTP_PROXY=f"http://me:secret@{DEAD}")
    message = ask(make_judge("vllm_evaluate", judge_server(), max_retries=0), picture).message
    assert f"through the proxy http://me:***@{DEAD} (HTTP_PROXY" in message
    assert "NO_PROXY" in message


@pytest.mark.parametrize("model", ["vllm_evaluate", "rational_rewards_t2i"])
def test_a_proxy_that_answers_itself_is_named(judge_server, make_judge, picture, in_env, forward_proxy, model):
    proxy = forward_proxy(refuses=True)
    in_env(http_proxy=proxy.url)
    message = ask(make_judge(model, judge_server()), picture).message
    assert message.startswith("the judge answered 403 after 1 request: blocked by policy; asked through the proxy ")
    assert proxy.url in message


@pytest.mark.skipif(importlib.util.find_spec("socksio") is not None, reason="SOCKS is installed here")
@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks"])
def test_a_socks_proxy_that_is_needed_says_what_to_install(make_judge, in_env, scheme):
    in_env(ALL_PROXY=f"{scheme}://me:secret@{DEAD}")
    with pytest.raises(ModelLoadError, match=NEEDS_SOCKS) as caught:
        make_judge("vllm_evaluate", "http://judge.example:8000/v1")
    assert "secret" not in str(caught.value)


def test_a_proxy_of_an_unknown_scheme_is_told(make_judge, in_env):
    in_env(ALL_PROXY=f"socks4://{DEAD}")
    with pytest.raises(ModelLoadError, match="a proxy has to be http://"):
        make_judge("vllm_evaluate", "http://judge.example:8000/v1")


@pytest.mark.parametrize("wrong", ["http://", "http://proxy.example:port", "http://proxy.example:0"])
def test_a_proxy_that_is_no_url_is_told_with_its_variable(make_judge, in_env, wrong):
    in_env(http_proxy=wrong)
    with pytest.raises(ModelLoadError, match=r"\(http_proxy\), which is no URL"):
        make_judge("vllm_evaluate", "http://judge.example:8000/v1")


def test_white_space_around_a_proxy_is_not_part_of_it(in_env):
    in_env(http_proxy=" http://proxy.example:3128 ", all_proxy="  ")
    found = proxy_for("http://judge.example/v1")
    assert (found.url, found.variable) == ("http://proxy.example:3128", "http_proxy")
    assert proxy_for("https://judge.example/v1") is None


@pytest.mark.parametrize(
    ("entry", "url", "is_direct"),
    [
        ("*", "http://judge.example/v1", True),
        ("judge.example", "http://judge.example/v1", True),
        ("example", "http://judge.example/v1", True),
        (".example", "http://judge.example:8000/v1", True),
        ("*.example", "http://judge.example/v1", True),
        ("JUDGE.example", "http://judge.EXAMPLE/v1", True),
        ("judge.example:8000", "http://judge.example:8000/v1", True),
        ("judge.example:80", "http://judge.example/v1", True),
        ("judge.example:443", "http://judge.example/v1", False),
        ("http://judge.example", "http://judge.example/v1", True),
        ("10.1.2.3", "http://10.1.2.3:8000/v1", True),
        ("10.0.0.0/8", "http://10.1.2.3:8000/v1", True),
        ("10.2.0.0/16", "http://10.1.2.3:8000/v1", False),
        ("::1", "http://[::1]:8000/v1", True),
        ("[::1]:8000", "http://[::1]:8000/v1", True),
        ("fd00::/8", "http://[fd00::7]/v1", True),
        ("other.example judge.example", "http://judge.example/v1", True),
        ("http://judge.example:80/", "http://judge.example/v1", True),
        ("ge.example", "http://judge.example/v1", False),
        ("other.example,,", "http://judge.example/v1", False),
        ("", "http://judge.example/v1", False),
    ],
)
def test_an_entry_of_no_proxy_means_a_host(in_env, entry, url, is_direct):
    in_env(http_proxy="http://proxy.example:3128", no_proxy=entry)
    assert (proxy_for(url) is None) == is_direct


def test_a_judge_in_a_worker_is_asked_by_no_proxy(settings, workers, judge_server, picture):
    server = judge_server()
    workers("vlm", env={"ALL_PROXY": f"socks5://{DEAD}", "NO_PROXY": "127.0.0.1"})
    reward = {"reward_model": "vllm_evaluate", "api_base_url": server.url, "vlm_model": MODEL}
    with RewardClient.from_dict({"rewards": reward}, run="proxies", settings=settings) as client:
        client.submit([Sample(prompt="a cat", image=picture())])
        batch = client.collect(60, progress=False)
    assert batch.rewards["vllm_evaluate"] == pytest.approx([0.75])


def test_certificates_of_the_environment_are_trusted(in_env, tmp_path, monkeypatch):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert proxies.trusted_certificates() is True
    in_env(SSL_CERT_DIR=str(tmp_path))
    assert proxies.trusted_certificates().cert_store_stats()["x509"] == 0
