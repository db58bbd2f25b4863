"""The report's pictures: how runs compare, what each peer did, what each link carried.

Law: draws Runs with the theme in force; no page, no file. Lines carry their names at their ends, not in legends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dlion.observe.read import Run
from dlion.observe.report import series
from dlion.observe.report.style import STALLS, Theme, end_labels, hue
from dlion.observe.summary import REASONS, evaluations, staleness, stalled_share

WIDTH_IN = 10.4


def overview(runs: Sequence[Run], theme: Theme) -> Figure:
    """Accuracy and loss over time (mean as a line, worst peer as the edge of the band), and bytes sent."""
    figure = Figure(figsize=(WIDTH_IN, 6.4))
    longest = max(len(_short(run.name)) for run in runs) if len(runs) > 1 else len("worst")
    label = (0.2 + 0.085 * (longest + 7)) / WIDTH_IN
    left, right = 0.055, 1 - label
    panel = (right - left - label - left) / 2
    grid = figure.add_gridspec(
        2,
        2,
        height_ratios=(1.45, 1),
        left=left,
        right=right,
        top=0.93,
        bottom=0.075,
        hspace=0.42,
        wspace=(label + left) / panel,
    )
    _bands(figure.add_subplot(grid[0, :]), runs, "accuracy")
    _bands(figure.add_subplot(grid[1, 0]), runs, "loss")
    _sent(figure.add_subplot(grid[1, 1]), runs)
    return figure


def _bands(axes: Axes, runs: Sequence[Run], measure: str) -> None:
    accuracy = measure == "accuracy"
    ends = []
    for index, run in enumerate(runs):
        band = series.accuracy_band(run) if accuracy else series.loss_band(run)
        if not band.t.size:
            continue
        axes.fill_between(band.t, band.mean, band.worst, color=hue(index), alpha=0.16, linewidth=0)
        axes.plot(band.t, band.worst, color=hue(index), linewidth=0.7, alpha=0.7)
        axes.plot(band.t, band.mean, color=hue(index))
        ends.append((float(band.mean[-1]), _end(run, runs, "mean", float(band.mean[-1]), accuracy), hue(index)))
        if len(runs) == 1:
            ends.append((float(band.worst[-1]), _end(run, runs, "worst", float(band.worst[-1]), accuracy), hue(index)))
    if not ends:
        _nothing(axes, "no evaluations" if accuracy else "no steps")
    axes.set_title(
        "Accuracy of the deployable view: mean of the peers, band to the worst" if accuracy else "Training loss"
    )
    if accuracy:
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.set_xlim(0, max(run.seconds for run in runs) or 1)
    axes.set_xlabel("seconds")
    end_labels(axes, ends, 0.065 if accuracy else 0.11)


def _sent(axes: Axes, runs: Sequence[Run]) -> None:
    ends = []
    for index, run in enumerate(runs):
        for wan in (True, False):
            times, total = series.sent_over_time(run, wan)
            axes.plot(
                times, total / 1e6, color=hue(index), linestyle="-" if wan else (0, (2, 2)), alpha=1 if wan else 0.7
            )
            kind = "WAN" if wan else "LAN"
            ends.append((float(total[-1]) / 1e6, kind if len(runs) == 1 else f"{_short(run.name)} {kind}", hue(index)))
    axes.set_title("Sent by all peers, MB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(run.seconds for run in runs) or 1)
    axes.set_xlabel("seconds")
    end_labels(axes, ends, 0.11)


def peers(run: Run, theme: Theme) -> Figure:
    """What each peer did: its accuracy, its batch size, how late what it heard was, where its time went."""
    names = list(run.peers)
    height_in = 3.0 + 0.24 * len(names)
    figure = Figure(figsize=(WIDTH_IN, height_in))
    top, bottom = 1 - 0.42 / height_in, 0.5 / height_in
    grid = figure.add_gridspec(
        1, 4, width_ratios=(1.25, 1.25, 1, 1), left=0.045, right=0.985, top=top, bottom=bottom, wspace=0.46
    )
    colours = cloud_colours(run)
    batches = figure.add_subplot(grid[0])
    accuracy = figure.add_subplot(grid[1])
    ends: tuple[list[tuple[float, str, str]], list[tuple[float, str, str]]] = ([], [])
    for name, log in run.peers.items():
        for axes, curve, found in (
            (batches, series.batch_over_time(log), ends[0]),
            (accuracy, evaluations(log, "accuracy"), ends[1]),
        ):
            if curve[0].size:
                style = "steps-post" if axes is batches else "default"
                axes.plot(*curve, color=colours[name], linewidth=1.2, drawstyle=style)
                found.append((float(curve[1][-1]), name, colours[name]))
    batches.set_title("Batch, samples")
    batches.set_ylim(bottom=0)
    accuracy.set_title("Accuracy of each peer")
    accuracy.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    for axes, found in zip((batches, accuracy), ends, strict=True):
        axes.set_xlim(0, run.seconds or 1)
        axes.set_xlabel("seconds")
        end_labels(axes, found, 0.15 / (height_in - 0.9)) if len(found) <= 16 else None
    _staleness(figure.add_subplot(grid[2]), run, theme)
    _stall(figure.add_subplot(grid[3]), run, theme)
    return figure


def _staleness(axes: Axes, run: Run, theme: Theme) -> None:
    """Per peer: a bar from the 10th to the 90th percentile, a dot at the median, a tick at the largest."""
    for row, (name, log) in enumerate(run.peers.items()):
        gaps = staleness(log, name)
        if not gaps.size:
            continue
        low, middle, high = np.quantile(gaps, (0.1, 0.5, 0.9))
        axes.plot([low, high], [row, row], color=cloud_colours(run)[name], linewidth=5, alpha=0.35)
        axes.plot([middle], [row], "o", color=cloud_colours(run)[name], markersize=4.5)
        axes.plot([gaps.max()], [row], "|", color=theme.muted, markersize=7)
    _rows(axes, run)
    axes.set_xlim(left=-0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title("Staleness, steps")
    axes.set_xlabel("10–90 %, median ●, largest |")


def _stall(axes: Axes, run: Run, theme: Theme) -> None:
    """Per peer: share of the time spent waiting, by what it waited for."""
    longest = 0.0
    for row, log in enumerate(run.peers.values()):
        shares = stalled_share(log)
        start = 0.0
        for reason in REASONS:
            axes.barh(row, 100 * shares[reason], left=start, height=0.55, color=STALLS[reason])
            start += 100 * shares[reason]
        axes.annotate(
            f"{start:.1f} %", (start, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
        longest = max(longest, start)
    _rows(axes, run)
    axes.set_xlim(0, max(longest * 1.35, 1.0))
    axes.set_title("Stalled, % of time")
    for place, reason in zip((0.0, 0.3, 0.75), REASONS, strict=True):
        axes.annotate(
            reason,
            (place, 0),
            xycoords="axes fraction",
            xytext=(0, -24),
            textcoords="offset points",
            va="top",
            color=STALLS[reason],
            fontsize=9,
        )


def _rows(axes: Axes, run: Run) -> None:
    axes.set_yticks(range(len(run.peers)), list(run.peers))
    axes.set_ylim(len(run.peers) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def cloud_colours(run: Run) -> dict[str, str]:
    """One hue per micro-cloud, so that peers of one place look alike."""
    clouds = sorted({log.header.cloud for log in run.peers.values()})
    return {name: hue(clouds.index(log.header.cloud)) for name, log in run.peers.items()}


def _end(run: Run, runs: Sequence[Run], which: str, value: float, accuracy: bool) -> str:
    text = f"{100 * value:.1f} %" if accuracy else f"{value:.3f}"
    return f"{_short(run.name)} {text}" if len(runs) > 1 else f"{which} {text}"


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _nothing(axes: Axes, text: str) -> None:
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="gray")
    axes.set_yticks([])
