"""What came of hostile inputs: the same counts for every fuzzer."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

CORPUS = Path(__file__).with_name("corpus")

MOST_WORDS = 20
"""So many findings are told in words; the others are counted."""


@dataclass
class Counts:
    """What came of a fuzzer's inputs.

    Attributes:
        tried: Inputs.
        refused: Those that were refused as they should be, with words.
        wrong: Those that were taken for something else, raised what is nobody's to catch, or took more memory than
            they may.
        ended: Those that ended a process.
        stuck: Those that got no answer in time, or after which a place for work is gone.
        found: What is behind the last three, in words.
    """

    tried: int = 0
    refused: int = 0
    wrong: int = 0
    ended: int = 0
    stuck: int = 0
    found: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether something was tried, and nothing was wrong, ended or stuck."""
        return self.tried > 0 and self.wrong == self.ended == self.stuck == 0

    def say(self, words: str) -> None:
        """Take up what was found."""
        if len(self.found) < MOST_WORDS:
            self.found.append(words[:1000])


def try_for(name: str, seconds: float, seed: int | None, try_one: Callable[[random.Random], str]) -> Counts:
    """Try input after input for so many seconds.

    Args:
        name: Of the fuzzer, for the log.
        seed: Another each time unless given. What fails is logged with its seed and number.
        try_one: Makes an input of these random numbers and hands it over; says `refused`, `wrong`, `ended`, or what
            else came of it.
    """
    seed = random.randrange(2**32) if seed is None else seed
    counts = Counts()
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        verdict = try_one(random.Random(f"{seed}.{counts.tried}"))
        if verdict in ("wrong", "ended"):
            log.error("fuzz of %s: %s at seed=%d number=%d", name, verdict, seed, counts.tried)
        counts.tried += 1
        if verdict in ("refused", "wrong", "ended"):
            setattr(counts, verdict, getattr(counts, verdict) + 1)
    return counts


def keep(name: str, data: bytes, suffix: str = "") -> Path:
    """Put an input into the corpus of the fuzzer `name`, once."""
    path = CORPUS / name / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def corpus_of(name: str) -> list[Path]:
    """The inputs that the fuzzer `name` has found, in order of their names."""
    folder = CORPUS / name
    return sorted(folder.iterdir()) if folder.is_dir() else []
