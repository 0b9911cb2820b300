"""Flower, by its documented command, shows the workers of both queues and what each task is for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.pipeline.conftest import samples_of
from tests.servers import flower_of, wait_until


@pytest.fixture
def flower(settings, workers, tmp_path: Path):
    workers("gpu", "vlm")
    with flower_of(settings, tmp_path) as url:
        yield url


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode()


def score_until_shown(flower: str, clients):
    """Play steps until Flower, which hears only of what happens after it has connected, shows two of them."""
    client = clients("PixelCode", {"reward_model": "PixelCode", "name": "other", "queue": "vlm", "add": 1}, run="demo")
    for step in range(200):
        client.submit(samples_of(range(16 * step, 16 * step + 16)))
        client.collect(timeout_s=60)
        tasks = json.loads(read(f"{flower}/api/tasks"))
        if len(tasks) >= 4:
            return wait_until(lambda: all_done(json.loads(read(f"{flower}/api/tasks"))), 30)
    raise AssertionError(f"Flower shows {tasks}")


def all_done(tasks):
    return all(task["state"] == "SUCCESS" for task in tasks.values()) and tasks


def test_flower_lists_both_workers_and_short_texts_for_tasks(flower, clients):
    wait_until(lambda: len(json.loads(read(f"{flower}/api/workers?refresh=1"))) == 2, 30)
    assert sorted(name.split(".")[0] for name in json.loads(read(f"{flower}/api/workers"))) == ["gpu", "vlm"]
    tasks = score_until_shown(flower, clients)
    for task in tasks.values():
        assert (task["name"], task["result"]) == ("rewardq.score", "'16 scored'")
        assert re.fullmatch(r"PixelCode x 16, run demo step \d+", task["args"])
        assert len(json.dumps(task)) < 2000


@pytest.mark.system
def test_flowers_pages_show_them_in_a_browser(flower, clients, tmp_path):
    chromium = shutil.which("chromium")
    assert chromium, "needs Debian's package chromium"
    score_until_shown(flower, clients)

    def page(path: str) -> str:
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={tmp_path}/chromium", "--virtual-time-budget=8000", "--dump-dom", f"{flower}/{path}"),
        ]
        html = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
        return re.sub(r"<[^>]+>", " ", html)

    workers_page = page("workers")
    assert re.search(r"gpu\.\d+@", workers_page)
    assert re.search(r"vlm\.\d+@", workers_page)
    tasks_page = page("tasks")
    assert re.search(r"PixelCode x 16, run demo step \d", tasks_page)
    assert "16 scored" in tasks_page
