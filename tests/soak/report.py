"""The page docs/reliability.md."""

from __future__ import annotations

import json
import statistics
import uuid
from collections.abc import Iterable
from pathlib import Path

from tests.delivery.seen import Seen

HEAD = """# Reliability: what faults cost

Written by `make soak` from its own run ({about}), with real processes, a real Redis on loopback and the default times.
*Lost*: samples that ended without their reward and should have one. *Scored twice*: samples begun again, or questions
asked a second time. *Added*: seconds longer than without the fault, median and worst of the tries; where Redis cannot
be reached or is full, after the end of that. What happens at each fault: [delivery.md](delivery.md).

| fault | tries | rewards checked | wrong | lost | scored twice | added, s: median | worst |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Report:
    """Rows, a fault each, in files of a folder: several processes may make them."""

    def __init__(self, folder: Path, server: str) -> None:
        self._folder, self._server = folder, server

    def add(self, fault: str, seen: Seen) -> None:
        """Take up what a fault did."""
        added = (
            f"{max(0.0, statistics.median(seen.added_s)):.1f} | {max(0.0, *seen.added_s):.1f}"
            if seen.added_s
            else " | "
        )
        counts = f"{seen.tries} | {seen.checked} | {seen.wrong} | {seen.lost} | {seen.again}"
        row = {"fault": fault, "row": f"| {fault} | {counts} | {added} |\n", "server": self._server}
        (self._folder / uuid.uuid4().hex).write_text(json.dumps(row))

    def rows(self, faults: Iterable[str]) -> list[str]:
        """Those that are there, in the order of `faults`."""
        found = {one["fault"]: one for one in (json.loads(f.read_text()) for f in self._folder.iterdir())}
        self._server = next((one["server"] for one in found.values()), "")
        return [found[fault]["row"] for fault in faults if fault in found]

    @property
    def server(self) -> str:
        """What Redis is."""
        return self._server

    @staticmethod
    def page(about: str, rows: Iterable[str]) -> str:
        """The page, for a run of which `about` says when and where."""
        return HEAD.format(about=about) + "".join(rows)
