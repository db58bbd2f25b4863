"""A trace as a picture: the rate over time, and how much of the time it was at least so high.

Law: a ``Rate`` in, a PNG out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dlion.net.wan import Rate
from dlion.observe.report import style

POINTS_MAX = 2000


def draw(out: Path, rate: Rate, title: str, unit: str, scale: float = 1.0) -> Path:
    """Write the picture; values are divided by ``scale`` to be in ``unit``. Raises OSError."""
    end = rate.period_s if rate.looped else rate.starts[-1] or 1.0
    edges = np.linspace(0.0, end, min(POINTS_MAX, max(len(rate.values) * 4, 2)) + 1) + rate.origin_s
    integral = np.array([rate.integral(rate.origin_s, t) for t in edges])
    means = np.diff(integral) / np.diff(edges) / scale
    with style.in_theme(style.LIGHT, "trace"):
        figure = Figure(figsize=(10.4, 3.4))
        over_time = figure.add_axes((0.06, 0.15, 0.62, 0.72))
        over_time.stairs(means, edges - rate.origin_s, fill=True, color=style.hue(0), alpha=0.25, linewidth=0)
        over_time.stairs(means, edges - rate.origin_s, color=style.hue(0), baseline=None, linewidth=1.0)
        over_time.set_title(f"{title}, {unit}")
        over_time.set_xlabel(f"seconds, means over {edges[1] - edges[0]:.2g} s")
        shares = figure.add_axes((0.74, 0.15, 0.24, 0.72))
        shares.plot(np.linspace(0, 1, means.size), np.sort(means)[::-1], color=style.hue(0))
        shares.set_title("At least so much")
        shares.set_xlabel("share of the time")
        for axes in (over_time, shares):
            axes.set_ylim(bottom=0)
            axes.margins(x=0)
        out.write_bytes(style.as_png(figure))
    return out
