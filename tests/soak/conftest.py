"""The fixtures of the delivery tests at default times, and the table that a whole run leaves."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from tasks.settings import Settings, load_settings
from tests.delivery.conftest import bench, calls, judges, proxies, supervised, trainers  # noqa: F401  (fixtures)
from tests.pipeline.conftest import clients  # noqa: F401  (a fixture)
from tests.servers import ROOT, RedisServer
from tests.soak.faults import FAULTS
from tests.soak.report import Report

PAGE = ROOT / "docs" / "reliability.md"


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """As users have them: times are the defaults."""
    return load_settings(broker_url=redis_url)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Report]:
    """Where each fault leaves its row; the page is written when all of them did, and held."""
    started, made = time.monotonic(), Report()
    yield made
    if len(made.rows) == len(FAULTS) and not request.session.testsfailed:
        with redis_server.client() as client:
            server = client.info("server")
        about = (
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores of {platform.machine()}, "
            f"Python {platform.python_version()}, celery {version('celery')}, redis-py {version('redis')}, "
            f"{server.get('server_name', 'redis')} {server.get('valkey_version', server['redis_version'])}; "
            f"{(time.monotonic() - started) / 60:.0f} minutes"
        )
        PAGE.write_text(made.page(about))
