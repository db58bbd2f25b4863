"""The picture of the network: from whom (rows) to whom (columns), used against available.

Law: draws the links of one Run with the theme in force; no page, no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dlion.observe.live import mbit, size
from dlion.observe.read import Run
from dlion.observe.report.figures import WIDTH_IN, cloud_colours
from dlion.observe.report.series import LinkSeries, link_table, same_cloud
from dlion.observe.report.style import Theme

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
    count = len(names)
    height_in = 0.75 + 0.98 * count
    figure = Figure(figsize=(WIDTH_IN, height_in))
    grid = figure.add_gridspec(
        count,
        count,
        left=0.045,
        right=0.995,
        top=1 - 0.42 / height_in,
        bottom=0.3 / height_in,
        hspace=0.14,
        wspace=0.07,
    )
    colours = cloud_colours(run)
    for i, source in enumerate(names):
        for j, target in enumerate(names):
            axes = figure.add_subplot(grid[i, j])
            _bare(axes)
            if i == 0:
                axes.set_title(f"to {target}", fontsize=9, loc="center", color=colours.get(target, theme.ink), pad=6)
            if j == 0:
                axes.set_ylabel(source, rotation=0, ha="right", va="center", fontsize=9, fontweight="bold", labelpad=8)
                axes.yaxis.label.set_color(colours.get(source, theme.ink))
            if (source, target) in table:
                lan = same_cloud(run, source, target)
                _spark(axes, table[source, target], (theme.muted if lan else colours.get(source, theme.ink)), theme)
                axes.set_xlim(min((link.t[0] for link in table.values() if link.t.size), default=0.0), run.seconds or 1)
                axes.set_facecolor(theme.wash if lan else "none")
    figure.text(0.045, 0.1 / height_in, _caption(run), color=theme.muted, fontsize=8.5, va="center")
    return figure


def _caption(run: Run) -> str:
    return (
        f"Line: what the link can carry.  Area: what was sent.  One scale per cell (its own largest capacity); "
        f"0 to {run.seconds:.0f} s.  Grey cells lie inside a micro-cloud."
    )


def _spark(axes: Axes, link: LinkSeries, colour: str, theme: Theme) -> None:
    ceiling = float(link.available_bps.max(initial=0.0)) or 1.0
    if link.t.size:
        axes.fill_between(link.t, link.used_bps / ceiling, color=colour, alpha=0.55, linewidth=0, step="mid")
        style = "-" if link.known else (0, (1, 1.5))
        axes.plot(
            link.t, link.available_bps / ceiling, color=theme.ink, linewidth=0.8, linestyle=style, drawstyle="steps-mid"
        )
    axes.set_ylim(0, 1.62)
    used = float(link.used_bps.mean()) if link.t.size else 0.0
    could = float(link.available_bps.mean()) if link.t.size else 0.0
    left: dict[str, Any] = {"xycoords": "axes fraction", "va": "top", "fontsize": 7.5}
    axes.annotate(f"{100 * link.used_share:.0f} %", (0.04, 0.94), fontweight="bold", color=theme.ink, **left)
    detail = f"{mbit(used)} of {mbit(could)} Mbit/s" if could else size(link.sent_bytes)
    axes.annotate(detail, (0.96, 0.94), ha="right", color=theme.muted, **left)


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


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
