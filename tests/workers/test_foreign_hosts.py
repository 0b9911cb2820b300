"""Every built-in in real workers under strace: they talk to loopback, and ask nobody for a foreign host."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tasks import catalog
from tasks.settings import load_settings
from tests.judges.scripted import MODEL, Answer, JudgeServer, Question, says
from tests.remote.json_server import JsonServer
from tests.servers import ROOT, RedisServer, wait_until
from tests.workers import test_ranks_of_builtins as builtins
from tests.workers.checkpoints import ARCHITECTURE
from tests.workers.test_clip_models import save_hps
from trainer_client import RewardClient, Sample
from workers.telemetry import TURNED_OFF

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

TO = re.compile(r'(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')

STRACE = ("strace", "-DD", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o")
"""What a process and its children connect to, or send to; `-DD` leaves the process its id and its signals."""


def foreign(trace: Path) -> set[str]:
    """Addresses that are not this host's, a name server among them."""
    told = TO.findall(trace.read_text(errors="replace"))
    return {address for address in told if not ipaddress.ip_address(address.split("%")[0]).is_loopback}


def wait_for_the_end(trace: Path, pid: int) -> None:
    """The tracer writes until its process has ended."""
    ended = re.compile(rf"^{pid} +\+\+\+ ", re.MULTILINE)
    wait_until(lambda: ended.search(trace.read_text(errors="replace")), 30)


def traced(code: str, trace: Path, **env: str) -> set[str]:
    process = subprocess.Popen([*STRACE, str(trace), sys.executable, "-c", code], env={**os.environ, **env})
    assert process.wait(60) == 0
    wait_for_the_end(trace, process.pid)
    return foreign(trace)


def test_the_trace_shows_who_is_asked(tmp_path):
    quiet = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    assert traced(quiet, tmp_path / "quiet") == set()
    to_address = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setblocking(False)\n"
        "try: s.connect(('192.0.2.7', 9))\nexcept OSError: pass"
    )
    assert traced(to_address, tmp_path / "to an address") == {"192.0.2.7"}
    by_name = "import socket\ntry: socket.getaddrinfo('telemetry.example', 443)\nexcept OSError: pass"
    assert traced(by_name, tmp_path / "by name"), "a name server is asked"


class TracedWorker(builtins.WorkerOfSmallArchitecture):
    """A worker under strace."""

    folder: Path

    @classmethod
    def trace(cls, queue: str) -> Path:
        return cls.folder / f"{queue}.trace"

    @classmethod
    def command(cls, queue: str, concurrency: int | None) -> list[str]:
        return [*STRACE, str(cls.trace(queue)), *super().command(queue, concurrency)]


def judge_says(question: Question) -> Answer:
    """As the built-ins' own test has it; two compared are a tie."""
    return says("Verdict: tie") if "Verdict" in question.text else builtins.judge_says(question)


@pytest.fixture
def places(tmp_path, clip_folder, large_clip_folder, head_file) -> Iterable[builtins.Places]:
    judge, server = JudgeServer(judge_says), JsonServer(builtins.server_says)
    yield builtins.Places(clip_folder, large_clip_folder, head_file, save_hps(tmp_path), judge.url, server.url)
    judge.stop()
    server.stop()


def test_no_built_in_asks_for_a_foreign_host(tmp_path, places, monkeypatch):
    for name in TURNED_OFF:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ViT-H-14.json").write_text(json.dumps(ARCHITECTURE))
    TracedWorker.file, TracedWorker.folder = tmp_path / "ViT-H-14.json", tmp_path
    options = {name: case.options for name, case in builtins.cases_at(places).items()}
    options["pairwise_judge"] = {"vlm_model": MODEL, "api_base_url": places.judge}
    options["RemoteGroupwiseRewardModel"] = {"server_url": places.server}
    assert set(options) == {name for name, entry in catalog.CATALOG.items() if entry.how != "rank"}
    rewards = [{"name": name, "reward_model": name, "dtype": "float32", **given} for name, given in options.items()]
    redis = RedisServer(tmp_path)
    settings = load_settings(broker_url=redis.url)
    workers = [TracedWorker(*(q, settings, tmp_path, n, {})) for q, n in (("gpu", None), ("vlm", 8))]
    try:
        with RewardClient.from_dict({"rewards": rewards}, "abroad", settings=settings) as client:
            samples = [
                Sample(builtins.PROMPT, image=image, condition_images=[builtins.SOURCE], group="g")
                for image in builtins.IMAGES[:3]
            ]
            client.submit(samples, group_size=len(samples))
            batch = client.collect(timeout_s=300, on_failure="nan")
    finally:
        for worker in workers:
            worker.stop()
            print(worker.log_text)
        redis.stop()
    assert not batch.failures, "each was asked, and answered"
    for worker in workers:
        trace = TracedWorker.trace(worker.queue)
        wait_for_the_end(trace, worker.pid)
        assert "127.0.0.1" in trace.read_text(), "it was traced: it has talked to Redis"
        assert foreign(trace) == set(), worker.queue


def test_a_reward_server_asks_for_no_foreign_host(tmp_path):
    code = (
        "import threading, urllib.request\n"
        "from workers.server import RewardServer\n"
        "import onnxruntime, rapidocr, numpy\n"
        "class Reads(RewardServer):\n"
        "    def compute_reward(self, prompt): return [1.0] * len(prompt)\n"
        "read = rapidocr.RapidOCR(params={'Global.log_level': 'error'})\n"
        "read(numpy.full((80, 200, 3), 255, numpy.uint8))\n"
    )
    assert traced(code, tmp_path / "trace", PYTHONPATH=str(ROOT)) == set()
