"""The report's page: facts, figures in a row, one file that needs nothing else.

Law: text in, one HTML text out. No script, no link, no font, no picture from anywhere; the page's own policy forbids
them. Everything that came out of a log is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from dlion.observe.live import size
from dlion.observe.read import Run
from dlion.observe.summary import Summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
BEST = ' class="best"'
CSS = """
:root{color-scheme:light dark;%(light)s}
@media (prefers-color-scheme:dark){:root{%(dark)s}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:48px 0 2px;letter-spacing:-.005em}
p{margin:0 0 12px;color:var(--muted);max-width:72ch}
.void{color:#b34e63;font-weight:600}
dl.facts{display:flex;flex-wrap:wrap;gap:2px 28px;margin:14px 0 26px;font-size:13px}
dl.facts div{display:flex;gap:7px}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;font-variant-numeric:tabular-nums}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;background:var(--grid);
border:1px solid var(--grid);border-radius:8px;overflow:hidden;margin:0 0 30px}
.tiles div{background:var(--paper);padding:12px 16px}
.tiles b{display:block;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}
.tiles span{font-size:12.5px;color:var(--muted)}
.scroll{overflow-x:auto;margin:0 0 30px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;width:100%%}
th,td{text-align:right;padding:7px 12px;border-bottom:1px solid var(--grid);white-space:nowrap}
th{font-weight:500;color:var(--muted)}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
td.best{font-weight:700}
i.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:8px}
svg{display:block;width:100%%;height:auto;margin:10px 0 8px;font-family:inherit}
svg text{font-family:inherit!important}
footer{margin-top:48px;padding-top:14px;border-top:1px solid var(--grid);font-size:12.5px;color:var(--muted)}
footer p{font-size:12.5px}
"""


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    svg: str


def page(
    runs: Sequence[Run], summaries: Sequence[Summary], sections: Iterable[Section], style: str, hues: Sequence[str]
) -> str:
    """The whole document. ``style``: CSS; ``hues``: the colour of each run in the overview."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    first = tiles(runs[0], summaries[0]) if len(runs) == 1 else comparison(runs, summaries, hues)
    body = "".join(f"<section><h2>{escape(s.title)}</h2><p>{escape(s.text)}</p>{s.svg}</section>" for s in sections)
    return document(title, style, f"{void(runs, summaries)}{facts(runs)}{first}{body}{footer()}")


def document(title: str, style: str, body: str) -> str:
    """A whole page around ``body``; ``style``: CSS."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · dlion</title><style>{style}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def css(light: dict[str, str], dark: dict[str, str]) -> str:
    """The style sheet with both themes' colours as variables."""

    def variables(theme: dict[str, str]) -> str:
        return "".join(f"--{name}:{colour};" for name, colour in theme.items())

    return CSS % {"light": variables(light), "dark": variables(dark)}


def facts(runs: Sequence[Run]) -> str:
    """What was run; where several runs differ, all values."""
    headers = [run.header for run in runs]
    clouds = [len({log.header.cloud for log in run.peers.values()}) for run in runs]
    rows: list[tuple[str, list[str]]] = [
        ("exchange", [h.exchange for h in headers]),
        ("job", [h.job for h in headers]),
        ("topology", [h.topology for h in headers]),
        ("peers", [f"{len(run.peers)} in {n} micro-clouds" for run, n in zip(runs, clouds, strict=True)]),
        ("model", [size(h.model_bytes) for h in headers]),
        ("lasted", [f"{run.seconds:.1f} s" for run in runs]),
        ("seed", [str(h.seed) for h in headers]),
        ("run", [h.run for h in headers]),
        ("config", [h.config[:12] for h in headers]),
        ("dlion", [h.version for h in headers]),
    ]
    cells = (f"<div><dt>{name}</dt><dd>{escape(', '.join(dict.fromkeys(values)))}</dd></div>" for name, values in rows)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def void(runs: Sequence[Run], summaries: Sequence[Summary]) -> str:
    named = [
        f"{run.name} ({100 * s['overrun']:.1f} % overrun)" for run, s in zip(runs, summaries, strict=True) if s["void"]
    ]
    if not named:
        return ""
    text = f"Void for timing: this machine could not keep the modelled pace in {', '.join(named)}."
    return f'<p class="void">{escape(text)}</p>'


def tiles(run: Run, summary: Summary) -> str:
    """The six figures of one run."""
    reached = {target: seconds for target, seconds in summary["time_to"].items() if seconds is not None}
    target = max(reached, default=None)
    stalls = list(summary["stalled_share"].values())
    cells = [
        (_share(summary["accuracy"]["mean"]), "accuracy, mean of the peers"),
        (_share(summary["accuracy"]["worst"]), "accuracy, worst peer"),
        (
            f"{reached[target]:.1f} s" if target else "–",
            f"to {100 * float(target):.0f} % mean" if target else "no target reached",
        ),
        (size(summary["wan_bytes"]), f"over the WAN, {size(summary['lan_bytes'])} over LANs"),
        (_share(sum(stalls) / max(len(stalls), 1)), "of the time stalled, mean"),
        (
            f"{summary['staleness']['p90']:.0f}",
            f"steps stale at the 90th percentile, {summary['staleness']['max']} at most",
        ),
    ]
    inner = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in cells)
    return f'<div class="tiles">{inner}</div>'


def comparison(runs: Sequence[Run], summaries: Sequence[Summary], hues: Sequence[str]) -> str:
    """One row per run; the best figure of a column is bold."""
    targets = [t for t in summaries[0]["time_to"] if any(s["time_to"][t] is not None for s in summaries)][-3:]
    columns: list[tuple[str, list[float | None], bool, str]] = [
        ("accuracy", [s["accuracy"]["mean"] for s in summaries], True, "share"),
        ("worst peer", [s["accuracy"]["worst"] for s in summaries], True, "share"),
        *((f"to {100 * float(t):.0f} %", [s["time_to"][t] for s in summaries], False, "seconds") for t in targets),
        ("WAN", [float(s["wan_bytes"]) for s in summaries], False, "bytes"),
        ("LAN", [float(s["lan_bytes"]) for s in summaries], False, "bytes"),
        ("stalled", [_mean(s["stalled_share"].values()) for s in summaries], False, "share"),
        ("stale, p90", [s["staleness"]["p90"] for s in summaries], False, "steps"),
        ("steps", [float(sum(s["steps"].values())) for s in summaries], True, "steps"),
        ("samples", [float(s["samples"]) for s in summaries], True, "steps"),
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name, *_ in columns)
    rows = []
    for i, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
        cells = []
        for _, values, high, unit in columns:
            known = [v for v in values if v is not None]
            best = len(set(known)) > 1 and values[i] == (max if high else min)(known)
            cells.append(f"<td{BEST if best else ''}>{_figure(values[i], unit)}</td>")
        swatch = f'<i class="swatch" style="background:{hues[i]}"></i>'
        rows.append(
            f"<tr><td>{swatch}{escape(run.name)}</td><td>{escape(summary['exchange'])}</td>{''.join(cells)}</tr>"
        )
    return f'<div class="scroll"><table><tr><th>run</th><th>exchange</th>{head}</tr>{"".join(rows)}</table></div>'


def footer() -> str:
    return (
        "<footer><p>Accuracy is that of the view a peer would deploy, on held-out samples. The mean's curve is "
        "interpolated between each peer's evaluations on one even grid; times to a target are read from it after "
        "averaging each point with its two neighbours. Staleness is how many steps behind our own last step an update "
        "was when it was applied. Stalled is time in which a peer could have computed: held by its pace, by its "
        "strategy's round, or for want of room on its links.</p></footer>"
    )


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "share":
        return _share(value)
    if unit == "bytes":
        return size(value)
    return f"{value:.1f} s" if unit == "seconds" else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / max(len(held), 1)
