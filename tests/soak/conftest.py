"""The fixtures of the delivery tests at default times, and the table that a whole run leaves."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from tasks.settings import Settings, load_settings
from tests.delivery.conftest import bench, calls, judges, proxies, supervised, trainers  # noqa: F401  (fixtures)
from tests.pipeline.conftest import clients  # noqa: F401  (a fixture)
from tests.servers import ROOT
from tests.soak.faults import FAULTS
from tests.soak.report import Report

PAGE = ROOT / "docs" / "reliability.md"


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """As users have them: times are the defaults."""
    return load_settings(broker_url=redis_url)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    """Where each fault leaves its row; the page is written when all of them did, and held."""
    started, made = time.monotonic(), Report()
    yield made
    if len(made.rows) == len(FAULTS) and not request.session.testsfailed:
        about = (
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, Python {platform.python_version()}, "
            f"celery {version('celery')}, redis-py {version('redis')}; {(time.monotonic() - started) / 60:.0f} minutes"
        )
        PAGE.write_text(made.page(about))
