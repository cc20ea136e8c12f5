"""Curves as inline SVG: every line and bar of the report's charts, without a plotting library and without external
parts.

A chart is drawn in units of about one pixel for the width of a phone, so that its text has the size of the page's
text. Colours are classes, which the style sheet sets for light and dark pages. The values under the pointer are shown
in the legend by the page's script, from `data-chart`: positions, labels and ready texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from swirl_fast.outputs.text import is_number, show
from swirl_fast.report.markup import escape

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
SMOOTH_FROM = 30  # points from which a running mean is drawn over the values

Value = float | None


@dataclass(frozen=True)
class Series:
    """values: one a step, None or not finite where there is none."""

    name: str
    values: Sequence[Value]


@dataclass(frozen=True)
class Scale:
    """low, high: ends of the axis in the data's unit. ticks: where its marks stand. start, end: the axis' ends in the
    drawing."""

    low: float
    high: float
    ticks: tuple[float, ...]
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        part = ((math.log10(value) if self.log else value) - low) / (high - low)
        return round(self.start + part * (self.end - self.start), 1)


def lines(
    title: str,
    steps: Sequence[int],
    series: Sequence[Series],
    unit: str,
    *,
    top: float | None = None,
    log: bool = False,
    over: str = "step",
) -> str:
    """A figure with one line a series over training steps, or over whole numbers of something else, which `over` names.

    unit: "%" for shares, else the text after the title. top: fixed upper end of the axis. log: decades, where all
    values are 0 a plain axis; values of 0 are then not drawn. Empty where nothing was recorded.
    """
    known = [value for one in series for value in one.values if is_number(value)]
    if not known:
        return ""
    positive = [value for value in known if value > 0]
    log = log and bool(positive)
    y = _decades(min(positive), max(positive)) if log else _linear(min(0.0, *known), max(known) if top is None else top)
    x = _steps(steps)
    marks = []
    for number, one in enumerate(series):
        values = [value if is_number(value) and not (log and value <= 0) else None for value in one.values]
        points = [(x(step), None if value is None else y(value)) for step, value in zip(steps, values, strict=True)]
        if smoothing(len(steps)) > 1:
            means = _running_mean(values, smoothing(len(steps)))
            smooth = [(x(step), None if mean is None else y(mean)) for step, mean in zip(steps, means, strict=True)]
            marks += [_path(points, f"raw s{number}"), _path(smooth, f"line s{number}")]
        else:
            marks.append(_path(points, f"line s{number}"))
        marks += _dots(points, number, every=len(steps) <= 25)
    drawing = _axes(x, y, unit) + "".join(marks)
    return _figure(title, unit, steps, series, x, drawing, "lines", over)


def stacked(title: str, steps: Sequence[int], series: Sequence[Series], unit: str) -> str:
    """A figure of bars, one a step, the series on top of each other from the first upwards; None counts as 0. Empty where nothing was
    recorded."""
    totals = [
        sum(value for value in column if is_number(value))
        for column in zip(*(one.values for one in series), strict=True)
    ]
    if not totals or not any(totals):
        return ""
    y = _linear(0.0, max(totals))
    room = (WIDTH - LEFT - RIGHT) / len(steps)
    x = _steps(steps, inset=room / 2)
    width = max(room * (0.8 if room > 4 else 1.0), 0.5)
    below = [0.0] * len(steps)
    marks = []
    for number, one in enumerate(series):
        path = []
        for i, (step, value) in enumerate(zip(steps, one.values, strict=True)):
            if is_number(value) and value > 0:
                bottom, below[i] = y(below[i]), below[i] + value
                path.append(f"M{x(step) - width / 2:.1f} {bottom}h{width:.1f}V{y(below[i])}h-{width:.1f}z")
        marks.append(f'<path class="bar s{number}" d="{"".join(path)}"/>')
    drawing = _axes(x, y, unit) + "".join(marks)
    return _figure(title, unit, steps, series, x, drawing, "stack")


def interval_bar(value: float, low: float, high: float) -> str:
    """A share and its interval on a line from 0 to 1."""
    at, left, right = (round(4 + 72 * min(max(share, 0.0), 1.0), 1) for share in (value, low, high))
    label = f"95% interval {show(low, '%')} to {show(high, '%')}"
    return (
        f'<svg class="interval" viewBox="0 0 80 12" role="img" aria-label="{label}">'
        '<path class="track" d="M4 6H76M4 3V9M76 3V9"/>'
        f'<path class="range" d="M{left} 6H{right}"/><circle cx="{at}" cy="6" r="4"/></svg>'
    )


def smoothing(points: int) -> int:
    """Points in the running mean that is drawn over the values; 1: none is drawn."""
    return points // 12 | 1 if points >= SMOOTH_FROM else 1


def _linear(low: float, high: float) -> Scale:
    """An axis of 3 to 6 round ticks around [low, high]."""
    if high <= low:
        high = low + 1.0
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, HEIGHT - BOTTOM, TOP)


def _decades(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = -(-(last - first) // 5)
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Scale(10.0**first, 10.0**last, ticks, HEIGHT - BOTTOM, TOP, log=True)


def _steps(steps: Sequence[int], inset: float = 4.0) -> Scale:
    """Whole steps only; the ends of the axis are the first and the last step."""
    low, high = steps[0], max(steps[-1], steps[0])
    if low == high:
        return Scale(low - 1, high + 1, (low,), LEFT, WIDTH - RIGHT)
    every = max(int(_linear(0, high - low).ticks[1]), 1)
    ticks = tuple(range(-(-low // every) * every, high + 1, every))
    return Scale(low, high, ticks, LEFT + inset, WIDTH - RIGHT - inset)


def _axes(x: Scale, y: Scale, unit: str) -> str:
    step = y.ticks[1] - y.ticks[0]
    parts = []
    for tick in y.ticks:
        label = f"1e{round(math.log10(tick))}" if y.log else _tick(tick, step, y.ticks[-1], unit)
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick)}" dy=".35em" text-anchor="end">{label}</text>')
    for tick in x.ticks:
        parts.append(f'<path class="grid" d="M{x(tick)} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - 8}" text-anchor="middle">{tick:,}</text>')
    return "".join(parts)


def _tick(tick: float, step: float, top: float, unit: str) -> str:
    if not tick:
        return "0%" if unit == "%" else "0"
    suffix = ""
    if unit == "%":
        tick, step, suffix = 100 * tick, 100 * step, "%"
    elif top >= 1e6:
        tick, step, suffix = tick / 1e6, step / 1e6, "M"
    elif top >= 1e4:
        tick, step, suffix = tick / 1e3, step / 1e3, "k"
    if 0 < top < 1e-3:
        return f"{tick:.3g}"
    decimals = next(n for n in range(12) if abs(step - round(step, n)) < 1e-9 * max(step, 1e-3))
    return f"{tick:,.{decimals}f}{suffix}"


def _path(points: Sequence[tuple[float, float | None]], kind: str) -> str:
    parts, pen = [], "M"
    for across, up in points:
        if up is None:
            pen = "M"
            continue
        parts.append(f"{pen}{across} {up}")
        pen = "L"
    return f'<path class="{kind}" d="{"".join(parts)}"/>'


def _dots(points: Sequence[tuple[float, float | None]], number: int, every: bool) -> list[str]:
    """Dots on every point, or on those only that no line reaches."""
    marks = []
    for i, (across, up) in enumerate(points):
        near = [points[j][1] for j in (i - 1, i + 1) if 0 <= j < len(points)]
        if up is not None and (every or all(other is None for other in near)):
            marks.append(f'<circle class="dot s{number}" cx="{across}" cy="{up}" r="2.2"/>')
    return marks


def _running_mean(values: Sequence[Value], width: int) -> list[Value]:
    means: list[Value] = []
    for i in range(len(values)):
        window = [value for value in values[max(i - width // 2, 0) : i + width // 2 + 1] if value is not None]
        means.append(sum(window) / len(window) if window else None)
    return means


def _figure(
    title: str,
    unit: str,
    steps: Sequence[int],
    series: Sequence[Series],
    x: Scale,
    drawing: str,
    kind: str,
    over: str = "step",
) -> str:
    """The drawing with its title, a legend with the values of the last step that has any, and what the script needs to show others."""
    last = max(i for i in range(len(steps)) if any(is_number(one.values[i]) for one in series))
    keys = "".join(
        '<span class="key"><svg class="swatch" viewBox="0 0 18 6" aria-hidden="true">'
        f'<path class="line s{number}" d="M0 3H18"/></svg>{escape(one.name)} <b>{show(one.values[last], unit)}</b></span>'
        for number, one in enumerate(series)
    )
    data = {
        "x": [x(step) for step in steps],
        "at": [f"{over} {step:,}" for step in steps],
        "values": [[show(value, unit) for value in one.values] for one in series],
        "last": last,
    }
    ends = "; ".join(
        f"{one.name} {show(one.values[0], unit)} at {over} {steps[0]}, {show(one.values[last], unit)} at {over} {steps[last]}"
        for one in series
    )
    label = escape(f"{title} by {'training step' if over == 'step' else over}: {ends}")
    return (
        f'<figure class="chart {kind}" data-chart="{escape(json.dumps(data))}"><figcaption>{_title(title, unit)}'
        f'<p class="legend"><span class="at">{over} {steps[last]:,}</span>{keys}</p></figcaption>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">{drawing}'
        f'<path class="cursor" d="M0 {TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/></svg></figure>\n'
    )


def _title(title: str, unit: str) -> str:
    small = f" <small>{escape(unit)}</small>" if unit not in ("%", "") else ""
    return f"<h3>{escape(title)}{small}</h3>"
