"""Series over time as lines of text.

Owns: the drawing. Knows nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_BARS = "▁▂▃▄▅▆▇█"


def draw(series: Mapping[str, Sequence[tuple[float, float]]], width: int, unit: str) -> list[str]:
    """A line for each series of points (x, y): its name, first and greatest and last value, and y over all of x, from 0
    to the greatest value. Where nothing was measured it is blank."""
    moments = [x for points in series.values() for x, _ in points]
    if not moments:
        return []
    begin, end = min(moments), max(moments)
    scale = (end - begin) / width or 1.0
    length = max(map(len, series))
    lines = [f"{'':<{length}} {'first':>8} {'most':>8} {'last':>8} {unit}, {end - begin:.0f} s from left to right"]
    for name, points in series.items():
        most = max(y for _, y in points)
        columns: dict[int, float] = {}
        for x, y in points:
            column = min(int((x - begin) / scale), width - 1)
            columns[column] = max(columns.get(column, 0.0), y)
        bars = "".join(
            _BARS[round((len(_BARS) - 1) * columns[n] / most) if most else 0] if n in columns else " "
            for n in range(width)
        )
        lines.append(f"{name:<{length}} {points[0][1]:>8.0f} {most:>8.0f} {points[-1][1]:>8.0f} {bars.rstrip()}")
    return lines
