"""The curves of a run as one SVG file: loss, metric, learning rate and mask flips, each in a panel of its own.

Written by hand, so that no plotting library is needed; every browser and README shows it, and it stays sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import floor, isfinite, log10
from pathlib import Path

from nmconvert.checkpoint.atomic import atomic_file

Points = Sequence[tuple[float, float]]
"""(epoch, value)."""

WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 200, 56, 34, 26


def write_curves(path: Path, panels: Mapping[str, Points], *, levels: Mapping[str, Mapping[str, float]] = {}) -> None:
    """Draw ``panels`` (title → points) two in a row; ``levels`` adds dashed lines to a panel (title → name → value)."""
    with atomic_file(path) as file:
        file.write(curves_svg(panels, levels=levels).encode())


def curves_svg(panels: Mapping[str, Points], *, levels: Mapping[str, Mapping[str, float]] = {}) -> str:
    """The text of the SVG file; points that are not finite are left out, panels without points too."""
    finite = {title: [p for p in points if all(map(isfinite, p))] for title, points in panels.items()}
    drawn = [
        _panel(title, points, levels.get(title, {}), at=(i % 2, i // 2))
        for i, (title, points) in enumerate((t, p) for t, p in finite.items() if p)
    ]
    width, height = 2 * (WIDTH + LEFT) + GAP, (len(drawn) + 1) // 2 * (HEIGHT + TOP + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _panel(title: str, points: Points, levels: Mapping[str, float], at: tuple[int, int]) -> str:
    xs, ys = [x for x, _ in points], [y for _, y in points] + list(levels.values())
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    ticks = _ticks(min(ys), max(ys))
    y0, y1 = min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * WIDTH

    def py(y: float) -> float:
        return TOP + HEIGHT - (y - y0) / (y1 - y0) * HEIGHT

    parts = [f'<text x="{LEFT}" y="{TOP - 12}" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {py(tick):.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in {x0, x1}:
        parts.append(f'<text x="{px(x):.1f}" y="{TOP + HEIGHT + 15}" text-anchor="middle">{x:.3g}</text>')
    for name, level in levels.items():
        parts.append(f'<path d="M{LEFT} {py(level):.1f}h{WIDTH}" stroke="#888" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{LEFT + WIDTH}" y="{py(level) - 4:.1f}" text-anchor="end" fill="#666">{escape(name)}</text>')
    line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>')
    if len(points) <= 40:
        parts += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5" fill="#1f6feb"/>' for x, y in points]
    column, row = at
    shift = f"translate({column * (WIDTH + LEFT + GAP / 2):g} {row * (HEIGHT + TOP + GAP)})"
    return f'<g transform="{shift}">{"".join(parts)}</g>'


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers around low … high."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** floor(log10(span))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 6)
    first = floor(low / step)
    count = max(2, floor((high - first * step) / step) + 1)
    return [round((first + i) * step, 12) for i in range(count + 1) if i < count or (first + i - 1) * step < high]
