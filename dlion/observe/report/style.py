"""How the report's figures look: one quiet palette, light and dark.

Law: colours, fonts and axes; no data. A figure is drawn once per theme: ``LIGHT`` for PNG files, ``PAGE`` for the HTML
page, whose stand-in colours become CSS variables so that one drawing follows the reader's light or dark setting.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    ink: str
    muted: str
    grid: str
    paper: str
    wash: str
    """Fill behind cells that matter less."""


LIGHT = Theme(ink="#1d2329", muted="#6b7480", grid="#e3e6ea", paper="#ffffff", wash="#f4f5f7")
DARK = Theme(ink="#e6e9ec", muted="#98a2ad", grid="#2c333b", paper="#14181d", wash="#1b2027")
PAGE = Theme(ink="#010101", muted="#020202", grid="#030303", paper="#040404", wash="#050505")
HUES = ("#2f6fab", "#c9702b", "#3d8b6d", "#8a63a6", "#b34e63", "#8b7d3a", "#4a8fa8", "#777f88")
"""Told apart on white and on near-black, and by most colour-blind readers in the first four."""
SHORT_CHARS = 4
"""Up to this length, labels of one colour may share a place: names of peers."""
STALLS: Mapping[str, str] = {"pace": "#c9702b", "strategy": "#8a63a6", "room": "#b34e63"}


def hue(index: int) -> str:
    return HUES[index % len(HUES)]


def settings(theme: Theme, salt: str) -> Any:
    """matplotlib's rc parameters; ``salt`` keeps the ids of several drawings on one page apart."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9.0,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10.0,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.linewidth": 0.8,
        "figure.facecolor": theme.paper,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.6,
        "lines.solid_capstyle": "round",
        "text.color": theme.ink,
        "text.parse_math": False,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 3.0,
        "ytick.major.size": 0.0,
        "path.simplify": True,
    }


def as_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def as_svg(figure: Figure) -> str:
    """Inline SVG whose stand-in colours (a figure drawn in ``PAGE``) are CSS variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in vars(PAGE).items():
        text = text.replace(colour, f"var(--{name})")
    return text


def in_theme(theme: Theme, salt: str) -> AbstractContextManager[None]:
    """``with in_theme(...)``: everything drawn and saved within looks like ``theme``."""
    return mpl.rc_context(settings(theme, salt))


def end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.065) -> None:
    """Name lines at their right end instead of in a legend: (y, text, colour) each.

    ``gap`` is the least distance of two labels as a share of the axes' height: closer ones are moved apart, or share a
    place if they are short and of one colour.
    """
    low, high = axes.get_ylim()
    span = (high - low) or 1.0
    groups: list[tuple[float, list[str], str]] = []
    for y, text, colour in sorted(((y - low) / span, text, colour) for y, text, colour in ends):
        if groups and len(text) <= SHORT_CHARS and groups[-1][2] == colour and y - groups[-1][0] < gap:
            groups[-1][1].append(text)
        else:
            groups.append((y, [text], colour))
    heights = apart([y for y, _, _ in groups], gap)
    for y, (_, names, colour) in zip(heights, groups, strict=True):
        first, *others = sorted(names)
        text = f"{first} +{len(others)}" if len(others) > 1 else " ".join([first, *others])
        axes.annotate(
            text,
            (1.0, y),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
            annotation_clip=False,
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending ``heights`` moved as little as needed to be ``gap`` apart, inside 0 to 1 as far as they fit."""
    lifted: list[float] = []
    for y in heights:
        lifted.append(max(y, lifted[-1] + gap if lifted else 0.0))
    lowered: list[float] = []
    for y in reversed(heights):
        lowered.append(min(y, lowered[-1] - gap if lowered else 1.0))
    even = [(up + down) / 2 for up, down in zip(lifted, reversed(lowered), strict=True)]
    placed: list[float] = []
    for y in reversed(even):
        placed.append(min(y, placed[-1] - gap if placed else 1.0))
    return placed[::-1]
