"""The page docs/reliability.md, and the data that it is made of.

`make soak` and `make fuzz` leave what they saw in `docs/reliability/*.json`. The page is made of these files alone.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.delivery.seen import Seen
from tests.fuzz.counts import Counts
from tests.servers import ROOT
from tests.soak import flatness
from tests.soak.long_run import NO_POOLS, PAYLOAD_TTL_S, RESULT_TTL_S, LongRun
from tests.soak.plot import chart, column

PAGE = ROOT / "docs" / "reliability.md"
DATA = ROOT / "docs" / "reliability"

HEAD = """# Reliability: what faults, a long run and hostile input cost

Written by `make soak` and `make fuzz` from their own runs, with real processes and a real Redis on loopback. The data
are in [reliability/](reliability). What happens at each fault: [delivery.md](delivery.md).
"""

FAULTS_HEAD = """
## Faults

{about}; two faults at a time, at the default times.

*Lost*: samples that ended without their reward and should have one. *Scored twice*: samples begun again, or questions
asked a second time. *Added*: seconds longer than without the fault, median and worst of the tries; where Redis cannot
be reached or is full, after the end of that.

| fault | tries | rewards checked | wrong | lost | scored twice | added, s: median | worst |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

LONG_HEAD = """
## A long run

{about}; one trainer, two gpu workers, one Redis.
Results live for {result_ttl_s} s and payloads for {payload_ttl_s} s, so that both expire many times during the run.

| load | samples | wrong | lost | seconds | payloads left at the end | keys left after the TTLs |
| --- | --- | --- | --- | --- | --- | --- |
"""

LONG_RULE = """
*Flat* means: a straight line through the memory of a process rises by no more than {per_million:g} MB for a million
samples, beside {floor:g} MB for the allocator and the bytes of {few} samples, which may be on their way when memory is
measured. It is measured after the warm-up (grey in the plot): a fifth of the samples, and twice the results' TTL. Of
Redis, what its keys and payloads take is left out: their number follows the speed, and none outlives its TTL. `make
soak` fails where memory is not flat.

With the large images, trainer and workers run with {pools}, so that memory of
media goes back to the system at once and only what is held is measured. By default glibc and Pillow keep such memory
for the next media: a worker rises in steps to what its threads have decoded at once, and stays there.

| load | process | MB after the warm-up | MB at the end | rise, MB | limit, MB |
| --- | --- | --- | --- | --- | --- |
"""

LONG_KEYS = """
Keys that stay are those of any pipeline, however many samples pass: {names}.

![Memory over samples](reliability/long_run.svg)
"""

FUZZ_HEAD = """
## Hostile input

{about}. `make fuzz` makes such input by chance for some minutes.
*Refused*: with words, as it should be. *Wrong*: taken for something else, or an error that nobody expects. *Ended*: a
process. *Stuck*: no answer, or a place for work is gone.

| input | tried | refused | wrong | ended | stuck |
| --- | --- | --- | --- | --- | --- |
"""


def about(server: str = "") -> str:
    """When, where and with what a run is made.

    Args:
        server: What Redis is, where there is one.
    """
    parts = (
        time.strftime("%Y-%m-%d"),
        f"{os.cpu_count()} cores of {platform.machine()}",
        f"Python {platform.python_version()}",
        f"celery {version('celery')}",
        f"redis-py {version('redis')}",
        server,
    )
    return ", ".join(part for part in parts if part)


def server_of(client: Any) -> str:
    """What the Redis of a client is."""
    server = client.info("server")
    return f"{server.get('server_name', 'redis')} {server.get('valkey_version', server['redis_version'])}"


class Rows:
    """What tests leave for the end of their session, in files of a folder: several processes may write them."""

    def __init__(self, folder: Path, server: str = "") -> None:
        self._folder, self._server = folder, server

    def add(self, kind: str, name: str, data: Mapping[str, Any]) -> None:
        """Take up what one test saw."""
        row = {"kind": kind, "name": name, "data": data, "about": about(self._server)}
        (self._folder / uuid.uuid4().hex).write_text(json.dumps(row))

    def complete(self, kind: str, names: Iterable[str]) -> dict[str, Any] | None:
        """All rows of a kind in the order of `names`, and what they are about; None if one is not there."""
        rows = [json.loads(path.read_text()) for path in self._folder.iterdir()]
        found = {row["name"]: row for row in rows if row["kind"] == kind}
        wanted = list(names)
        if not set(wanted) <= found.keys():
            return None
        return {"about": found[wanted[0]]["about"], "rows": [found[name]["data"] for name in wanted]}


def row_of_fault(fault: str, seen: Seen) -> dict[str, Any]:
    """What a fault did, as data."""
    added = [round(statistics.median(seen.added_s), 1), round(max(seen.added_s), 1)] if seen.added_s else None
    counts = {"tries": seen.tries, "checked": seen.checked, "wrong": seen.wrong, "lost": seen.lost, "again": seen.again}
    return {"fault": fault, **counts, "added_s": added}


def write(name: str, data: Mapping[str, Any]) -> None:
    """Leave the data of a part of the page, and make the page anew."""
    DATA.mkdir(exist_ok=True)
    (DATA / f"{name}.json").write_text(json.dumps(data, separators=(",", ":"), indent=None) + "\n")
    make_page()


def write_fuzz(counts: Mapping[str, Counts]) -> None:
    """Leave what the fuzzers counted, and make the page anew."""
    rows = [{"input": name, **asdict(one)} for name, one in counts.items()]
    write("fuzz", {"about": about(), "rows": rows})


def make_page() -> None:
    """Write the page and its plot from the data."""
    long_run = data_of("long_run")
    if long_run is not None:
        (DATA / "long_run.svg").write_text(plot([LongRun.from_data(row) for row in long_run["rows"]]))
    PAGE.write_text(page(data_of("faults"), long_run, data_of("fuzz")))


def page(faults: Mapping[str, Any] | None, long_run: Mapping[str, Any] | None, fuzz: Mapping[str, Any] | None) -> str:
    """The page, of those parts that were run."""
    parts: tuple[tuple[Mapping[str, Any] | None, Callable[[Mapping[str, Any]], str]], ...] = (
        (faults, _faults),
        (long_run, _long_run),
        (fuzz, _fuzz),
    )
    return HEAD + "".join(made(data) for data, made in parts if data is not None)


def plot(runs: Sequence[LongRun]) -> str:
    """The memory of each run's processes, as SVG."""
    charts = []
    for run in runs:
        lines = {name: list(memory) for name, memory in flatness.processes(run.points).items()}
        title = f"{run.load.num_samples:,} images of {run.load.side} x {run.load.side}"
        warm_from = flatness.after_warm_up(run)[0].done
        charts.append(chart(title, [point.done for point in run.points], lines, warm_from))
    return column(charts)


def data_of(name: str) -> dict[str, Any] | None:
    """The data of a part of the page; None if it was not run."""
    path = DATA / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _faults(data: Mapping[str, Any]) -> str:
    lines = []
    for row in data["rows"]:
        added = [f"{max(0.0, seconds):.1f}" for seconds in row["added_s"]] if row["added_s"] else ["", ""]
        lines.append(_row(row["fault"], row["tries"], row["checked"], row["wrong"], row["lost"], row["again"], *added))
    return FAULTS_HEAD.format(about=data["about"]) + "".join(lines)


def _long_run(data: Mapping[str, Any]) -> str:
    runs = [LongRun.from_data(row) for row in data["rows"]]
    passed = [
        _row(
            f"{run.load.side} x {run.load.side}",
            f"{run.load.num_samples:,}",
            run.wrong,
            run.lost,
            round(run.took_s),
            len(run.payload_keys),
            len(run.keys_left),
        )
        for run in runs
    ]
    memory = [
        _row(
            f"{run.load.side} x {run.load.side}",
            growth.of,
            f"{growth.warm_MB:.1f}",
            f"{growth.last_MB:.1f}",
            f"{growth.rise_MB:+.1f}",
            f"{growth.limit_MB:.1f}",
        )
        for run in runs
        for growth in flatness.growths(run)
    ]
    names = sorted({key.partition("/")[2] for run in runs for key in run.keys_that_stay})
    return "".join(
        (
            LONG_HEAD.format(about=data["about"], result_ttl_s=RESULT_TTL_S, payload_ttl_s=PAYLOAD_TTL_S),
            *passed,
            LONG_RULE.format(
                per_million=flatness.PER_MILLION_MB,
                floor=flatness.FLOOR_MB,
                few=flatness.FEW,
                pools=" and ".join(f"`{name}={value}`" for name, value in NO_POOLS.items()),
            ),
            *memory,
            LONG_KEYS.format(names=", ".join(f"`{name}`" for name in names)),
        )
    )


def _fuzz(data: Mapping[str, Any]) -> str:
    rows = [
        _row(row["input"], *(f"{row[number]:,}" for number in ("tried", "refused", "wrong", "ended", "stuck")))
        for row in data["rows"]
    ]
    return FUZZ_HEAD.format(about=data["about"]) + "".join(rows)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"
