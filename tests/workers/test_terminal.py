"""What a worker's terminal shows at Celery's default level, as the documented command has it."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tasks.messages import Failure, Outcome
from tasks.settings import load_settings
from tests.pipeline.conftest import (
    clients,  # noqa: F401  (a fixture)
    samples_of,
)
from tests.servers import WorkerProcess, wait_until
from workers.process.terminal import RedisLog, ScoreLog
from workers.scoring.tally import Tally

SCORED = Outcome(reward=1.0)
PASSWORD = "s3cr3t-pa55"


def failed(kind: Any) -> Outcome:
    return Outcome(failure=Failure(kind=kind, message="the prompt was: a secret"))


def test_a_line_has_each_reward_and_what_failed_by_kind_and_no_reason() -> None:
    tally = Tally()
    tally.count("OCR", [SCORED] * 480)
    tally.count("looks_good", [failed("timeout")])
    tally.count("OCR", [failed("invalid"), failed("timeout"), failed("invalid")])
    tally.count("mine", [failed("failed"), SCORED])
    assert tally.take() == (
        "OCR 480 scored, 3 failed (2 invalid, 1 timeout); mine 1 scored, 1 failed; "
        "looks_good 0 scored, 1 failed (1 timeout)"
    )
    assert tally.take() == ""


def test_counts_of_many_threads_are_all_there() -> None:
    tally, said = Tally(), []
    threads = [
        threading.Thread(target=lambda: [tally.count("a", [SCORED]) for _ in range(500)], daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        said.append(tally.take())
    said.append(tally.take())
    assert sum(int(re.fullmatch(r"a (\d+) scored", words)[1]) for words in said if words) == 4000  # type: ignore[index]


def test_nothing_is_said_of_a_time_in_which_nothing_happened(caplog: pytest.LogCaptureFixture) -> None:
    tally = Tally()
    log = ScoreLog(tally, every_s=0.02)
    with caplog.at_level(logging.INFO, "workers"):
        log.start()
        time.sleep(0.2)
        assert caplog.messages == []
        tally.count("OCR", [SCORED, SCORED])
        wait_until(lambda: caplog.messages)
        tally.count("OCR", [failed("abstained")])
        log.end()
        log.join()
    said = [words.partition(": ")[2] for words in caplog.messages]
    assert said == ["OCR 2 scored", "OCR 0 scored, 1 failed (1 abstained)"]


def test_redis_is_gone_once_and_back_once_all_have_it_again(caplog: pytest.LogCaptureFixture) -> None:
    log = RedisLog()
    with caplog.at_level(logging.INFO, "workers"):
        log.back("consumer")
        for who in ("consumer", "claims", "heartbeat", "claims"):
            log.gone(who, redis.ConnectionError("refused"))
        log.back("claims")
        log.back("consumer")
        assert log.is_gone
        assert caplog.messages == ["worker waits: Redis is away: refused"]
        log.back("heartbeat")
        log.back("heartbeat")
        log.gone("claims", redis.OutOfMemoryError("full"))
    assert len(caplog.messages) == 3
    assert caplog.messages[1] == "Redis is back after 0 s, the worker serves on"
    assert caplog.messages[2].startswith("worker waits: Redis is full")


def of_ours(log: str, words: str) -> list[str]:
    return [line for line in log.splitlines() if words in line]


def test_a_worker_says_that_it_is_ready_what_it_scored_and_when_redis_was_gone(
    private_redis: Callable[..., Any],
    workers: Callable[..., list[WorkerProcess]],
    clients: Callable[..., Any],  # noqa: F811
) -> None:
    server = private_redis()
    settings = load_settings(broker_url=server.url, claim_ttl_s=2, reconcile_s=0.5)
    (worker,) = workers("gpu", settings=settings, env={"REWARDQ_PRELOAD": "jpeg_compressibility"})
    wait_until(lambda: "] ready: " in worker.log_text)
    client = clients({"reward_model": "RaisesOn", "name": "mine"}, settings=settings)
    client.submit(samples_of(range(6), metadata={}) + samples_of([6, 7], metadata={"raise": True}))
    assert len(client.collect(timeout_s=60, on_failure="nan").failures) == 2

    server.stop()
    wait_until(lambda: "worker waits: Redis is away" in worker.log_text)
    time.sleep(3)  # for whatever else notices
    server.start()
    wait_until(lambda: "Redis is back after" in worker.log_text)
    client.submit(samples_of(range(10, 13), metadata={}))
    client.collect(timeout_s=60)
    worker.stop()

    log = worker.log_text
    (ready,) = of_ours(log, "] ready: ")
    port = server.url.removesuffix("/0")
    assert ready.endswith(
        f"ready: queues gpu (2 at once); models jpeg_compressibility; Redis {port}/0; payloads {port}/1"
    )
    (scored,) = of_ours(log, "mine ")
    assert re.search(r"in \d+ s: mine 9 scored, 2 failed$", scored)
    assert len(of_ours(log, "worker waits")) == 1
    assert len(of_ours(log, "Redis is back")) == 1
    assert log.count("Traceback") == 1  # of the reward class that raised
    for unwanted in (":**@", "heartbeat failed", "claims not extended", "to broker lost", "number 6"):
        assert unwanted not in log


def test_a_password_is_in_no_line(private_redis: Callable[..., Any], tmp_path: Path) -> None:
    server = private_redis("--requirepass", PASSWORD)
    settings = load_settings(broker_url=server.url.replace("redis://", f"redis://:{PASSWORD}@"))
    worker = WorkerProcess("gpu", settings, tmp_path, None, {})
    try:
        worker.wait_ready()
        wait_until(lambda: "] ready: " in worker.log_text)
        assert f"Redis {settings.broker.replace(PASSWORD, '***')}; payloads redis://:***@" in worker.log_text
    finally:
        worker.stop()
    assert PASSWORD not in worker.log_text
