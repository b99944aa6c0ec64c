"""Small line plots as inline SVG: raw values faint, smoothed on top, coloured by the page's style sheet."""

import math

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # room for the axis labels
MAX_POINTS = 240  # more cannot be told apart at this width


def line_plot(steps, values, *, name: str, validation=((), ()), log: bool = False) -> Markup:
    """SVG of values [n] over steps [n]; validation: another (steps, values), drawn as points.

    log asks for a logarithmic vertical axis, which positive values get. Spikes are cut at the edge: the
    range is that of the smoothed values and 98 % of the raw ones. Non-finite values are left out.
    """
    steps, values = _finite(steps, values)
    checked_steps, checked = _finite(*validation)
    if len(steps) == 0:
        return Markup("<p class='note'>no finite values</p>")
    smooth = smoothed(values)
    shown = np.concatenate([smooth, checked, np.percentile(values, [1, 99])])
    log = log and bool(shown.min() > 0)
    low, high = float(shown.min()), float(shown.max())
    if log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = 0.0, float(max(steps.max(), checked_steps.max(initial=0), 1))

    def x(step):
        return LEFT + (np.asarray(step) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value):
        value = np.log10(np.maximum(value, 1e-300)) if log else np.asarray(value)
        return TOP + (1 - np.clip((value - low) / (high - low), 0, 1)) * (HEIGHT - TOP - BOTTOM)

    parts = [f"<svg class='plot' viewBox='0 0 {WIDTH} {HEIGHT}' role='img'><title>{escape(name)}</title>"]
    for tick in _ticks(low, high, 4, log):
        at = float(y(10**tick if log else tick))
        parts.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{at:.1f}' y2='{at:.1f}'/>")
        label = short_number(10**tick if log else tick)
        parts.append(f"<text x='{LEFT - 5}' y='{at + 3.5:.1f}' text-anchor='end'>{label}</text>")
    for tick in _ticks(first, last, 4, False):
        parts.append(
            f"<text x='{x(tick):.1f}' y='{HEIGHT - 6}' text-anchor='middle'>{short_number(tick)}</text>"
        )
    for style, curve in (("raw", values), ("smooth", smooth)):
        bins = np.array_split(np.arange(len(curve)), min(len(curve), MAX_POINTS))
        points = " ".join(f"{x(steps[i].mean()):.1f},{y(curve[i].mean()):.1f}" for i in bins)
        parts.append(f"<polyline class='{style}' points='{points}'/>")
    for step, value in zip(checked_steps, checked, strict=True):
        parts.append(f"<circle class='validation' cx='{x(step):.1f}' cy='{y(value):.1f}' r='3'/>")
    return Markup("".join(parts) + "</svg>")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve around each point, shorter at the ends. [n] -> [n]."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.arange(len(values)) - half, np.arange(len(values)) + half + 1
    first, last = np.maximum(first, 0), np.minimum(last, len(values))
    return (total[last] - total[first]) / (last - first)


def _finite(steps, values) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    keep = np.isfinite(steps) & np.isfinite(values)
    return steps[keep], values[keep]


def _ticks(low: float, high: float, number: int, log: bool) -> list[float]:
    """About `number` round values between low and high; log: exponents, whole ones if there are two."""
    decades = [float(i) for i in range(math.ceil(low), math.floor(high) + 1)]
    if log and len(decades) >= 2:
        return decades[:: math.ceil(len(decades) / number)]
    rough = (high - low) / number
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def short_number(value: float) -> str:
    """Three digits: 0.00123, 45.6, 7.5k, 3.21M; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}".replace("e-0", "e-")
