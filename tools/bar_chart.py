"""Bars of ratios as SVG: what a benchmark shows beside its table."""

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

_ROW = 22
_LEFT = 470
_WIDTH = 360
_RIGHT = 90
_TOP = 46
_COLOURS = ("#2a6f97", "#7a9e7e", "#c97b3d", "#8c5e9e")
_LONGEST = 2.0  # ratios beyond it are cut off, with their number beside


class Bar(NamedTuple):
    """*ratio* of *series* to the peer in *operation*; less than one is faster."""

    operation: str
    series: str
    ratio: float


def draw(bars: Sequence[Bar]) -> str:
    """A picture of *bars* in their order, with a line at one."""
    series = list(dict.fromkeys(bar.series for bar in bars))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(series)}
    height = _TOP + _ROW * len(bars) + 20
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            ' font-family="sans-serif" font-size="12">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="18">time as a part of the peer\'s: less is faster</text>',
    ]
    for i, name in enumerate(series):
        x = 10 + 230 * i
        parts.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 15}" y="35">{escape(name)}</text>')
    for i, bar in enumerate(bars):
        y = _TOP + _ROW * i
        length = min(bar.ratio, _LONGEST) / _LONGEST * _WIDTH
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(bar.operation)}</text>',
            (
                f'<rect x="{_LEFT}" y="{y + 3}" width="{length:.1f}" height="{_ROW - 7}"'
                f' fill="{colours[bar.series]}"/>'
            ),
            f'<text x="{_LEFT + length + 5:.1f}" y="{y + 14}">{bar.ratio:.2f}</text>',
        ]
    one = _LEFT + _WIDTH / _LONGEST
    bottom = _TOP + _ROW * len(bars)
    parts.append(f'<line x1="{one}" y1="{_TOP}" x2="{one}" y2="{bottom}" stroke="#444"/>')
    return "\n".join([*parts, "</svg>", ""])
