"""The report: several runs as one HTML page and its pictures as PNG files.

Law: joins reading, figures and page, and writes files. Only ``style``, ``figures`` and ``links`` know matplotlib, which
is imported here when a report is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlion.observe.read import Run
from dlion.observe.report import page
from dlion.observe.summary import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlion.observe.report.style import Theme


def build_report(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write the page to ``out`` and each picture beside it as ``STEM-PICTURE.png``; returns all paths, page first.

    Raises ModuleNotFoundError without matplotlib (the extra ``report``), OSError when a file cannot be written.
    """
    from dlion.observe.report import style

    runs = _told_apart(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    written, sections = [out], []
    for name, title, text in _pictures(runs):
        with style.in_theme(style.LIGHT, name):
            figure = _draw(runs, name, style.LIGHT)
            if figure is None:
                continue
            png = out.with_name(f"{out.stem}-{name.replace(':', '-')}.png")
            png.write_bytes(style.as_png(figure))
            written.append(png)
        with style.in_theme(style.PAGE, name):
            figure = _draw(runs, name, style.PAGE)
            if figure is not None:
                sections.append(page.Section(title, text, style.as_svg(figure)))
    sheet = page.css(asdict(style.LIGHT), asdict(style.DARK))
    hues = [style.hue(i) for i in range(len(runs))]
    out.write_text(page.page(runs, [summarise(run) for run in runs], sections, sheet, hues), encoding="utf-8")
    return written


def _pictures(runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    """Name, title and text of every picture; ``peers:2`` is that of the third run."""
    yield "overview", "Course of the training", "Mean of the peers as a line; the band reaches to the worst of them."
    for i, run in enumerate(runs):
        of = f": {run.name}" if len(runs) > 1 else ""
        yield f"peers:{i}", f"Peers{of}", "One colour per micro-cloud."
        yield (
            f"links:{i}",
            f"Links{of}",
            "From the peer on the left to the peer at the top. In bold: the share of the link's capacity in use.",
        )


def _draw(runs: Sequence[Run], name: str, theme: Theme) -> Figure | None:
    from dlion.observe.report import figures, links

    what, _, index = name.partition(":")
    if what == "overview":
        return figures.overview(runs, theme)
    return (figures.peers if what == "peers" else links.links)(runs[int(index)], theme)


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in exchange are called by it; those of one name get it added, and a number where needed."""
    exchanges = {run.header.exchange for run in runs}
    if 1 < len(exchanges) == len(runs):
        return [replace(run, name=run.header.exchange) for run in runs]
    names = [run.name for run in runs]
    named = [f"{r.name} {r.header.exchange}" if names.count(r.name) > 1 else r.name for r in runs]
    return [
        replace(run, name=f"{name} #{named[: i + 1].count(name)}" if named.count(name) > 1 else name)
        for i, (run, name) in enumerate(zip(runs, named, strict=True))
    ]
