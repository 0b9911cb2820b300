"""Shortens long runs of marks and white space in a judge's text, before patterns are matched.

Several parts of a pattern can match the same run, so that the time to match grows with the square or the cube of its
length: 8,000 bars behind a verdict took 18 s, in which no other thread of the worker ran.
"""

from __future__ import annotations

import re

KEPT = 16
"""Characters of a long run that are kept at each of its ends."""

_LONG_RUN = re.compile(rf"[\W_]{{{2 * KEPT + 2},}}")


def shortened(text: str) -> str:
    """A text whose runs of characters that are no letter or digit are short; a run over lines stays one over lines."""
    return _LONG_RUN.sub(_ends_of, text)


def _ends_of(run: re.Match[str]) -> str:
    between = "\n" if "\n" in run[0] else ""
    return f"{run[0][:KEPT]}{between}{run[0][-KEPT:]}"
