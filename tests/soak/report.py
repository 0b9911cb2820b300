"""The page docs/reliability.md."""

from __future__ import annotations

import statistics

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
    """Rows, a fault each."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def add(self, fault: str, seen: Seen) -> None:
        """Take up what a fault did."""
        added = (
            f"{max(0.0, statistics.median(seen.added_s)):.1f} | {max(0.0, *seen.added_s):.1f}"
            if seen.added_s
            else " | "
        )
        counts = f"{seen.tries} | {seen.checked} | {seen.wrong} | {seen.lost} | {seen.again}"
        self.rows.append(f"| {fault} | {counts} | {added} |\n")

    def page(self, about: str) -> str:
        """The page, for a run of which `about` says when and where."""
        return HEAD.format(about=about) + "".join(self.rows)
