"""The league table as one page and its picture: accuracy over time of each strategy, median and range over seeds.

Law: rows and curves in, files out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dlion.observe.league import Outcome, Row, Spread, table
from dlion.observe.live import size
from dlion.observe.report import page, style
from dlion.observe.summary import together

NOTE = (
    "Median over seeds, the range in brackets. Times to a target are read from the mean accuracy of the peers; "
    "accuracy is that of the view a peer would deploy. Disagreement is the largest distance of a replica from the "
    "mean of all, relative to the norm of that mean. A run that failed takes part in no figure. When training ends, "
    "peers drain: they still tell what they owe. The worst peer, bytes and disagreement are those after that."
)


def draw(out: Path, title: str, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> list[Path]:
    """Write the page to ``out`` and its picture beside it; returns both paths."""
    written = [out]
    body = f'<p>{escape(NOTE)}</p><div class="scroll">{html_table(rows)}</div>{_failures(rows)}'
    if any(outcome.curve for outcome in outcomes):
        png = out.with_suffix(".png")
        with style.in_theme(style.LIGHT, "league"):
            png.write_bytes(style.as_png(curves(rows, outcomes)))
        with style.in_theme(style.PAGE, "league"):
            svg = style.as_svg(curves(rows, outcomes))
        body += (
            f"<section><h2>Accuracy over time</h2><p>Median of the seeds; the band is their range.</p>{svg}</section>"
        )
        written.append(png)
    sheet = page.css(asdict(style.LIGHT), asdict(style.DARK))
    out.write_text(page.document(title, sheet, body), encoding="utf-8")
    return written


def curves(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> Figure:
    """One line per strategy."""
    figure = Figure(figsize=(10.4, 4.4))
    axes = figure.add_axes((0.06, 0.11, 0.76, 0.84))
    ends = []
    for i, row in enumerate(rows):
        held = [np.array(o.curve).T for o in outcomes if o.exchange == row.exchange and o.curve]
        times, values = together([(t, y) for t, y in held])
        if not times.size:
            continue
        middle, least, most = (f(values, axis=0) for f in (np.nanmedian, np.nanmin, np.nanmax))
        axes.fill_between(times, least, most, color=style.hue(i), alpha=0.16, linewidth=0)
        axes.plot(times, middle, color=style.hue(i))
        ends.append((float(middle[-1]), f"{row.exchange} {100 * middle[-1]:.1f} %", style.hue(i)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.set_xlim(left=0)
    axes.margins(x=0)
    axes.set_xlabel("seconds")
    style.end_labels(axes, ends)
    return figure


def html_table(rows: Sequence[Row]) -> str:
    """The best median of each column is bold."""
    columns = table(rows)
    head = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(
            f"<td{page.BEST if c.best is not None and c.spreads[i].median == c.best else ''}>"
            f"{escape(_text(c.spreads[i], c.unit))}</td>"
            for c in columns
        )
        swatch = f'<i class="swatch" style="background:{style.hue(i)}"></i>'
        seeds = ", ".join(map(str, row.seeds)) or "none"
        lines.append(f"<tr><td>{swatch}{escape(row.exchange)}</td><td>{escape(seeds)}</td>{cells}</tr>")
    return f"<table><tr><th>exchange</th><th>seeds</th>{head}</tr>{''.join(lines)}</table>"


def _failures(rows: Sequence[Row]) -> str:
    failed = [f"{row.exchange}, seed {seed}: {why}" for row in rows for seed, why in row.failed.items()]
    return "".join(f'<p class="void">Failed: {escape(text)}</p>' for text in failed)


def _text(spread: Spread, unit: str) -> str:
    if spread.median is None:
        return f"{spread.reached} of {spread.of}" if spread.reached else "–"
    if spread.low == spread.high:
        return _figure(spread.median, unit)
    high = "never" if spread.high is None else _figure(spread.high, unit)
    return f"{_figure(spread.median, unit)} ({_figure(spread.low or 0.0, unit)} – {high})"


def _figure(value: float, unit: str) -> str:
    shown = {"seconds": f"{value:.1f} s", "bytes": size(value), "ratio": f"{value:.1e}"}
    return shown.get(unit, f"{100 * value:.1f} %")
