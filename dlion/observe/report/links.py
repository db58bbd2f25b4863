"""The picture of the network: from whom (rows) to whom (columns), used against available.

Law: draws the links of one Run with the theme in force; no page, no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dlion.observe.live import mbit, size
from dlion.observe.read import Run
from dlion.observe.report.figures import WIDTH_IN, cloud_colours
from dlion.observe.report.series import LinkSeries, link_table, same_cloud
from dlion.observe.report.style import Theme

CELL = 0.94
"""Side of a cell; the rest is the gap to the next."""
ROOM = 0.62
"""Height of the link's largest capacity, as a share of the cell."""
HEADING_CHAR_IN = 0.09
"""Width of a letter of a heading, at most on average."""
SPARKLINE_PEERS_MAX = 8
"""Beyond this many peers a cell is too small for a course over time, and shows one shade."""


def links(run: Run, theme: Theme) -> Figure | None:
    """Small multiples for few peers, a heat map for many; None where no link was logged."""
    table = link_table(run)
    if not table:
        return None
    names = sorted({name for pair in table for name in pair} | set(run.peers))
    return (_multiples if len(names) <= SPARKLINE_PEERS_MAX else _heat)(run, names, table, theme)


def _multiples(run: Run, names: list[str], table: dict[tuple[str, str], LinkSeries], theme: Theme) -> Figure:
    """All cells on one pair of axes (a hundred axes draw slowly): the cell of row i, column j begins at (j, i)."""
    count = len(names)
    height_in = 0.85 + 0.98 * count
    figure = Figure(figsize=(WIDTH_IN, height_in))
    left = max(0.045, (0.3 + HEADING_CHAR_IN * max(map(len, names))) / WIDTH_IN)
    axes = figure.add_axes((left, 0.4 / height_in, 0.995 - left, 1 - 0.8 / height_in))
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.axis("off")
    colours = cloud_colours(run)
    heading: dict[str, Any] = {"fontsize": 9, "fontweight": "bold"}
    for i, name in enumerate(names):
        colour = colours.get(name, theme.ink)
        axes.text(i + 0.5, -0.06, f"to {name}", ha="center", va="bottom", color=colour, **heading)
        axes.text(-0.06, i + 0.5, name, ha="right", va="center", color=colour, **heading)
    for (source, target), link in table.items():
        lan = same_cloud(run, source, target)
        corner = (names.index(target), names.index(source))
        if lan:
            axes.add_patch(Rectangle(corner, CELL, CELL, facecolor=theme.wash, linewidth=0))
        _spark(axes, corner, link, theme.muted if lan else colours.get(source, theme.ink), theme)
    figure.text(0.045, 0.17 / height_in, _caption(run), color=theme.muted, fontsize=8.5, va="center")
    return figure


def _caption(run: Run) -> str:
    return (
        "Line: what the link can carry, looked at once a second (dotted: as its sender measured it).  "
        "Area: what was sent.\nOne scale per cell (its own largest capacity); "
        f"0 to {run.seconds:.0f} s.  Grey cells lie inside a micro-cloud."
    )


def _spark(axes: Axes, corner: tuple[int, int], link: LinkSeries, colour: str, theme: Theme) -> None:
    """One cell: what was used of what was there over time, and both in figures above."""
    left, top = corner
    ceiling = float(link.available_bps.max(initial=0.0)) or 1.0
    if link.t.size:
        x = left + CELL * (link.t - link.t[0]) / (float(link.t[-1] - link.t[0]) or 1.0)
        floor = top + CELL
        used = floor - CELL * ROOM * np.minimum(link.used_bps / ceiling, 1.15)
        axes.fill_between(x, floor, used, color=colour, alpha=0.55, linewidth=0, step="mid")
        could = floor - CELL * ROOM * link.available_bps / ceiling
        style = "-" if link.known else (0, (1, 1.5))
        axes.plot(x, could, color=theme.ink, linewidth=0.8, linestyle=style, drawstyle="steps-mid")
    used_bps = float(link.used_bps.mean()) if link.t.size else 0.0
    could_bps = float(link.available_bps.mean()) if link.t.size else 0.0
    figures: dict[str, Any] = {"va": "top", "fontsize": 7.5}
    axes.text(left + 0.03, top + 0.06, f"{100 * link.used_share:.0f} %", fontweight="bold", color=theme.ink, **figures)
    detail = f"{mbit(used_bps)} of {mbit(could_bps)} Mbit/s" if could_bps else size(link.sent_bytes)
    axes.text(left + CELL - 0.03, top + 0.06, detail, ha="right", color=theme.muted, **figures)


def _heat(run: Run, names: list[str], table: dict[tuple[str, str], LinkSeries], theme: Theme) -> Figure:
    """One shade per link: the share of its capacity that was used."""
    shares = np.full((len(names), len(names)), np.nan)
    for (source, target), link in table.items():
        shares[names.index(source), names.index(target)] = link.used_share
    side_in = min(WIDTH_IN, 1.4 + 0.46 * len(names))
    figure = Figure(figsize=(side_in, side_in))
    axes = figure.add_axes((1.0 / side_in, 0.45 / side_in, 1 - 1.1 / side_in, 1 - 0.85 / side_in))
    shade = LinearSegmentedColormap.from_list("share", ["#dfe9f2", "#2f6fab", "#173a5c"])
    axes.pcolormesh(np.ma.masked_invalid(shares), cmap=shade, vmin=0, vmax=1, edgecolors=theme.paper, linewidth=1.5)
    axes.grid(visible=False)
    centres = np.arange(len(names)) + 0.5
    axes.set_xticks(centres, names, fontsize=8, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(centres, names, fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_ylim(len(names), 0)
    if len(names) <= 24:
        for i, j in zip(*np.nonzero(np.isfinite(shares)), strict=True):
            colour = "#ffffff" if shares[i, j] > 0.35 else "#1d2329"
            axes.text(j + 0.5, i + 0.5, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figure.text(
        1.0 / side_in, 0.2 / side_in, "% of each link's capacity used, row to column", color=theme.muted, fontsize=8.5
    )
    return figure
