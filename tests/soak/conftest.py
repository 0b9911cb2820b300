"""The fixtures of the delivery tests at default times, and the table that a whole run leaves."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tasks.settings import Settings, load_settings
from tests.delivery.conftest import bench, calls, judges, proxies, supervised, trainers  # noqa: F401  (fixtures)
from tests.pipeline.conftest import clients  # noqa: F401  (a fixture)
from tests.servers import ROOT, RedisServer
from tests.soak.faults import FAULTS
from tests.soak.report import Report

PAGE = ROOT / "docs" / "reliability.md"
ROWS = "SOAK_ROWS"


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """As users have them: times are the defaults."""
    return load_settings(broker_url=redis_url)


def pytest_configure(config: pytest.Config) -> None:
    """Where each fault leaves its row: a folder for the processes of this run, made by the first of them."""
    if not hasattr(config, "workerinput"):
        os.environ[ROWS] = tempfile.mkdtemp(prefix="soak-")


@pytest.fixture(scope="session")
def report(redis_server: RedisServer) -> Report:
    """Takes up rows."""
    with redis_server.client() as client:
        server = client.info("server")
    made = f"{server.get('server_name', 'redis')} {server.get('valkey_version', server['redis_version'])}"
    return Report(Path(os.environ[ROWS]), made)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The page is written when all faults left their rows, and held."""
    if hasattr(session.config, "workerinput") or session.testsfailed:
        return
    made = Report(Path(os.environ[ROWS]), "")
    rows = made.rows(FAULTS)
    if len(rows) == len(FAULTS):
        about = (
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {platform.machine()}, two faults at a time, "
            f"Python {platform.python_version()}, celery {version('celery')}, redis-py {version('redis')}, "
            f"{made.server}"
        )
        PAGE.write_text(made.page(about, rows))
