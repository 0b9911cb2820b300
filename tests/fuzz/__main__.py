"""Runs the fuzzers, each in a process of its own, and prints what came of them: `python -m tests.fuzz --minutes 10`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fuzz.counts import Counts, corpus_of
from tests.servers import ROOT, ends_with_us

FOLDER = Path(__file__).parent

NUMBERS = ("tried", "refused", "wrong", "ended", "stuck")

REPLAY_S = 120.0

MORE_S = 120.0
"""A fuzzer may take so much longer than it was told: it starts and ends processes, and looks at what is left."""


def names() -> list[str]:
    """The modules of this folder that have a function `run`."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if "run" in functions:
            found.append(path.stem)
    return found


def run_all(chosen: list[str], seconds: float) -> dict[str, Counts]:
    """Run each fuzzer for `seconds`, one after another; tells the table as it grows."""
    print(f"{'':16}" + "".join(f"{number:>10}" for number in NUMBERS), flush=True)
    counts = {}
    for name in chosen:
        counts[name] = run_apart(name, seconds)
        row = "".join(f"{getattr(counts[name], number):>10,}" for number in NUMBERS)
        print(f"{name:16}{row}", flush=True)
    return counts


def run_apart(name: str, seconds: float, *more: str) -> Counts:
    """Run a fuzzer in a process of its own. One that ends without counts is `ended`, one that does not end `stuck`."""
    command = [
        *ends_with_us("KILL"),
        sys.executable,
        "-m",
        "tests.fuzz",
        "--alone",
        name,
        "--seconds",
        f"{seconds:g}",
        *more,
    ]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=seconds + MORE_S, check=False)
    except subprocess.TimeoutExpired:
        return Counts(stuck=1, found=[f"the fuzzer did not end within {seconds + MORE_S:g} s"])
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode != 0 or not lines:
        return Counts(ended=1, found=[f"the fuzzer ended with status {done.returncode}", *lines[-5:]])
    return counts_from(json.loads(lines[-1]))


def replay_apart(name: str) -> Counts:
    """Try again, in a process of its own, what a fuzzer has found: it may bound the memory of its process."""
    return run_apart(name, REPLAY_S, "--replay")


def run_alone(name: str, seconds: float, *, is_replay: bool) -> None:
    """Run a fuzzer here; the last line that it prints is its counts."""
    module = importlib.import_module(f"tests.fuzz.{name}")
    found = module.replay(corpus_of(name)) if is_replay else module.run(seconds)
    values = found if isinstance(found, Mapping) else {f: getattr(found, f) for f in FIELDS if hasattr(found, f)}
    print(json.dumps(values), flush=True)


FIELDS = tuple(one.name for one in dataclasses.fields(Counts))


def counts_from(values: Mapping[str, Any]) -> Counts:
    """The counts that a fuzzer printed."""
    return Counts(**{name: values[name] for name in FIELDS if name in values})


def main() -> int:
    """The command; its status is 0 if everything held."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all fuzzers together")
    parser.add_argument("--only", action="append", choices=names(), help="this fuzzer; may be given again")
    parser.add_argument("--write", action="store_true", help="write the counts into docs/reliability.md")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--replay", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write and given.only:
        parser.error("--write is for all fuzzers together")
    if given.alone:
        run_alone(given.alone, given.seconds, is_replay=given.replay)
        return os.EX_OK

    chosen = given.only or names()
    counts = run_all(chosen, 60 * given.minutes / len(chosen))
    for name, one in counts.items():
        for words in one.found:
            print(f"{name}: {words}")
    if not all(one.held for one in counts.values()):
        return 1
    if given.write:
        from tests.soak.report import write_fuzz

        write_fuzz(counts)
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
