"""What each pattern costs in each layer, as one SVG file: a row a layer, a column of bars a pattern, on one logarithmic scale.

Written by hand like the curves of training (:mod:`nmconvert.train.curves`): no plotting library is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING

from nmconvert.checkpoint.atomic import atomic_file

if TYPE_CHECKING:
    from nmconvert.calibrate.budget import Sensitivity

BAR, GAP, ROW, TOP, LETTER = 120, 34, 18, 44, 6.6
_SMALLEST = 1e-9  # what is less has no logarithm to speak of


def write_sensitivities(path: Path, found: Sequence[Sensitivity]) -> None:
    """Draw ``found`` into ``path``."""
    with atomic_file(path) as file:
        file.write(sensitivities_svg(found).encode())


def sensitivities_svg(found: Sequence[Sensitivity]) -> str:
    """The text of the SVG file; every layer of ``found`` has the same patterns."""
    losses = [max(option.loss, _SMALLEST) for layer in found for option in layer.options[1:]]
    low = floor(log10(min(losses)))
    high = max(ceil(log10(max(losses))), low + 1)
    left = LETTER * max(len(layer.name) for layer in found) + 12
    columns = [str(option.pattern) for option in found[0].options[1:]]
    width, height = left + len(columns) * (BAR + GAP), TOP + ROW * len(found) + 24

    def px(loss: float) -> float:
        return (log10(max(loss, _SMALLEST)) - low) / (high - low) * BAR

    parts = [
        _column(pattern, left + number * (BAR + GAP), low, high, ROW * len(found)) for number, pattern in enumerate(columns)
    ]
    for row, layer in enumerate(found):
        y = TOP + ROW * row
        parts.append(f'<text x="{left - 8:.0f}" y="{y + 13}" text-anchor="end">{escape(layer.name)}</text>')
        for number, option in enumerate(layer.options[1:]):
            x, length = left + number * (BAR + GAP), px(option.loss)
            title = f"<title>{escape(layer.name)} {option.pattern}: {option.loss:.6f}</title>"
            parts.append(f'<rect x="{x:.0f}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}" fill="#1f6feb">{title}</rect>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-weight="bold">Squared error of the outputs, '
        f"relative, with one layer pruned alone</text>{''.join(parts)}</svg>\n"
    )


def _column(pattern: str, x: float, low: int, high: int, height: int) -> str:
    """Head, decades and frame of the bars of one pattern."""
    step = ceil((high - low) / 4)
    parts = [f'<text x="{x:.0f}" y="{TOP - 8}" font-weight="bold">{pattern}</text>']
    for decade in range(low, high + 1, step):
        at = x + (decade - low) / (high - low) * BAR
        parts.append(f'<path d="M{at:.1f} {TOP}v{height}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{TOP + height + 14}" text-anchor="middle">10<tspan dy="-4">{decade}</tspan></text>'
        )
    return "".join(parts)
