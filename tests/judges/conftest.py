"""Fixtures: scripted judge servers, judges in this process, a real model behind a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks import catalog
from tests.judges.scripted import MODEL, JudgeServer, Script, says_yes
from workers import Accelerator, RewardArguments
from workers.judges import client
from workers.loading.building import reward_class


@pytest.fixture
def judge_server() -> Iterator[Callable[..., JudgeServer]]:
    """Starts servers: `judge_server(script, models=..., prefix=...)`."""
    servers: list[JudgeServer] = []

    def start(script: Script = lambda _: says_yes(0.75), **options: Any) -> JudgeServer:
        servers.append(JudgeServer(script, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def make_judge(settings: Any) -> Iterator[Callable[..., Any]]:
    """Makes a built-in judge in this process: `make_judge("vllm_evaluate", server, timeout=2)`."""

    def make(
        model: str, *servers: JudgeServer | str, timeout_s: float = 20.0, image_format: str = "", **options: Any
    ) -> Any:
        entry = catalog.CATALOG[model]
        urls = [s if isinstance(s, str) else s.url for s in servers]
        given = {"api_base_url": urls[0] if len(urls) == 1 else urls, "vlm_model": MODEL, **options}
        config = RewardArguments(
            name=model,
            reward_model=model,
            timeout_s=timeout_s,
            image_format=image_format or entry.image_format,
            extra_kwargs={**{name: o.default for name, o in entry.options.items()}, **given},
        )
        return reward_class(model, settings)(config, Accelerator())

    yield make
    loop = client.judge_loop.take()
    if loop is not None:
        loop.close()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """Draws images that differ: `picture(3, size=64)`."""

    def draw(number: int = 0, size: int = 32) -> Image.Image:
        rng = np.random.default_rng(number)
        return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))

    return draw
