"""A chart of memory over samples, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

import numpy as np

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 130, 40, 45
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
NUM_TICKS = 5


def chart(title: str, done: Sequence[float], lines: Mapping[str, Sequence[float]], warm_from: float) -> str:
    """One chart of a column of charts: MB over samples, a line for each process, grey where it warms up."""
    top_MB = _round_up(max(max(values) for values in lines.values()))
    last = max(done)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / last

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top_MB

    parts = [
        f'<rect x="{x(0):.1f}" y="{TOP}" width="{x(warm_from) - x(0):.1f}" height="{HEIGHT - TOP - BOTTOM}" '
        'fill="#eeeeee"/>',
        _text(LEFT, TOP - 15, title, "start", size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "samples", "middle"),
        _text(LEFT - 30, TOP + 4, "MB", "end"),
    ]
    for tick in np.linspace(0, top_MB, NUM_TICKS + 1):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#cccccc"/>')
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    for tick in np.linspace(0, last, NUM_TICKS + 1):
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 16, f"{tick:,.0f}", "middle"))
    for number, (name, values) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in zip(done, values, strict=True))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(_text(WIDTH - RIGHT + 8, TOP + 10 + 18 * number, f"{name}: {values[-1]:.1f}", "start", colour))
    return "\n".join(parts)


def column(charts: Sequence[str]) -> str:
    """An SVG file of charts, one below the other."""
    height = HEIGHT * len(charts)
    moved = [f'<g transform="translate(0 {HEIGHT * i})">\n{one}\n</g>' for i, one in enumerate(charts)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *moved, "</svg>\n"])


def _text(x: float, y: float, words: str, anchor: str, colour: str = "black", size: int = 11) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{colour}">{escape(words)}</text>'


def _round_up(value: float) -> float:
    """A little more than `value`, so that the ticks are round numbers."""
    power = 10 ** np.floor(np.log10(value / NUM_TICKS))
    ticks = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    return float(NUM_TICKS * min(tick for tick in ticks if NUM_TICKS * tick > value))
