"""The rule of the long run: what counts as flat, and the page that says it."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.soak import report
from tests.soak.flatness import growths
from tests.soak.long_run import Load, LongRun, Point

NUM_POINTS = 60


def a_run(leak_MB: float = 0.0, of: str = "", num_samples: int = 600_000, side: int = 8) -> LongRun:
    """A run with noise, a warm-up and a speed that changes; one process grows by `leak_MB` for a million samples."""
    rng = np.random.default_rng(7)
    points = []
    for i in range(NUM_POINTS):
        done = num_samples * (i + 1) // NUM_POINTS
        grown = {of: leak_MB * done / 1e6}
        warm = 90 - 10 * np.exp(-i / 3) + rng.normal(0, 0.3)
        num_keys = int(30_000 + 10_000 * np.sin(i / 7))
        points.append(
            Point(
                done=done,
                at_s=10.0 * i,
                trainer_MB=warm + grown.get("trainer", 0.0),
                workers_MB=(warm + 1, warm + 2 + grown.get("worker 2", 0.0) + 40 * (i == 40)),
                redis_MB=3 + 5e-4 * num_keys + rng.normal(0, 0.1) + grown.get("Redis", 0.0),
                payload_MB=0.0,
                num_keys=num_keys,
            )
        )
    return LongRun(
        load=Load("tiny", num_samples, side, 1000),
        points=tuple(points),
        wrong=0,
        lost=0,
        took_s=590.0,
        payload_keys=(),
        keys_left=(),
        keys_that_stay=("0/rewardq:sent:gpu",),
    )


def test_noise_a_single_peak_and_keys_that_follow_the_speed_are_flat():
    assert [growth.of for growth in growths(a_run()) if not growth.is_flat] == []


@pytest.mark.parametrize("of", ["trainer", "worker 2", "Redis"])
def test_a_process_that_keeps_some_bytes_of_each_sample_is_not_flat(of):
    assert [growth.of for growth in growths(a_run(25.0, of)) if not growth.is_flat] == [of]
    found = next(growth for growth in growths(a_run(25.0, of)) if growth.of == of)
    passed = 600_000 * (1 - 12 / 60)
    assert found.rise_MB == pytest.approx(25 * passed / 1e6, abs=1.5)


def test_of_a_run_that_is_too_short_nothing_is_said():
    run = a_run()
    with pytest.raises(AssertionError, match="let more samples pass"):
        growths(replace(run, points=run.points[:9]))


def test_the_page_and_its_plot_are_made_of_the_data_alone():
    runs = [a_run(), replace(a_run(side=1024, num_samples=10_000), load=Load("large", 10_000, 1024, 32))]
    rows = json.loads(json.dumps([run.as_data() for run in runs]))
    assert [LongRun.from_data(row) for row in rows] == runs

    text = report.page(None, {"about": "somewhere", "rows": rows}, None)
    assert "| 8 x 8 | 600,000 | 0 | 0 | 590 | 0 | 0 |" in text
    assert text.count("| trainer |") == 2
    assert "`rewardq:sent:gpu`" in text
    drawn = ElementTree.fromstring(report.plot(runs))
    lines = drawn.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [NUM_POINTS] * 8


def test_the_page_in_the_repository_is_that_of_its_data():
    data = [report.data_of(name) for name in ("faults", "long_run", "fuzz")]
    assert report.PAGE.read_text() == report.page(*data)
