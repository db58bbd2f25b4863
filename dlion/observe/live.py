"""What ``dlion up`` shows while it runs: a live table on a terminal, one greppable line per interval elsewhere.

Law: pure renderings of a list of PeerStatus, and one small view that picks between them. Reads no clock, no peer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dlion.observe.status import LinkStatus, PeerStatus

_STATE_STYLES: Mapping[str, str] = {"training": "green", "waiting": "yellow", "draining": "cyan", "stopped": "dim"}
BAR_CELLS = 5
HEAD_CHARS, CELL_CHARS, SHORT_CELL_CHARS = 8, 20, 15
"""Columns of the link table: its head, a cell with everything, a cell without the bar."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class LiveView:
    """``with LiveView(console) as view: view.show(statuses)`` once per interval."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Something that happened once."""
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def show(self, statuses: Sequence[PeerStatus]) -> None:
        if self._live is None:
            self._console.print(progress_line(statuses), soft_wrap=True, highlight=False, markup=False)
        else:
            self._live.update(table(statuses, self._console.width), refresh=True)


def progress_line(statuses: Sequence[PeerStatus]) -> str:
    """The run in one line. ``step`` is the slowest peer's of those that run, at the end the furthest; ``loss`` and
    ``stall`` are means, ``sent`` is the total."""
    active = [s for s in statuses if s["state"] != "stopped"]
    total = max([len(statuses), *(s["members"]["total"] for s in statuses)])
    losses = [s["loss"] for s in statuses if s["loss"] is not None]
    accuracies = [s["accuracy"] for s in statuses if s["accuracy"] is not None]
    facts = {
        "step": str(min(s["step"] for s in active) if active else max((s["step"] for s in statuses), default=0)),
        "loss": f"{sum(losses) / len(losses):.4f}" if losses else "-",
        "samples/s": f"{sum(s['samples_per_s'] for s in active):.0f}",
        "sent": size(sum(link["sent_bytes"] for s in statuses for link in s["links"].values())),
        "peers": f"{_living(statuses, active)}/{total}",
        "stale_max": str(max((s["staleness_max"] for s in statuses), default=0)),
        "stall": f"{100 * sum(s['stall_share'] for s in statuses) / max(len(statuses), 1):.1f}%",
    }
    if accuracies:
        facts["accuracy"] = f"{sum(accuracies) / len(accuracies):.4f}"
    return "  ".join(f"{name}: {value}" for name, value in facts.items())


def _living(statuses: Sequence[PeerStatus], active: Sequence[PeerStatus]) -> int:
    """Of many peers, those that run; one alone says whom it believes to live."""
    return len(active) if len(statuses) != 1 else statuses[0]["members"]["live"]


def table(statuses: Sequence[PeerStatus], width: int = 120) -> RenderableType:
    """One row per peer; below, per peer, one line with its links. ``width`` of the terminal, characters."""
    rows = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("peer", "cloud", "state"):
        rows.add_column(name)
    for name in ("step", "loss", "accuracy", "batch", "samples/s", "stale", "stall"):
        rows.add_column(name, justify="right")
    for status in statuses:
        state = status["state"]
        rows.add_row(
            Text(status["peer"], style="bold"),
            status["cloud"],
            Text(state, style=_STATE_STYLES.get(state, "")),
            str(status["step"]),
            _number(status["loss"]),
            _number(status["accuracy"]),
            str(status["batch"]),
            f"{status['samples_per_s']:.0f}",
            str(status["staleness_max"]),
            f"{100 * status['stall_share']:.1f}%",
        )
    return Group(rows, Text(), links(statuses, width), Text(), Text(progress_line(statuses), style="dim"))


def links(statuses: Sequence[PeerStatus], width: int = 120) -> Table:
    """Senders as rows, receivers as columns. As much per cell as fits: Mbit/s used/available, a bar of that, share of
    the model sent; without the bar; or only how much of the link is used."""
    targets = sorted({peer for status in statuses for peer in status["links"]})
    grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    room = (width - HEAD_CHARS) // max(len(targets), 1)
    cell = link_cell if room >= CELL_CHARS else short_cell if room >= SHORT_CELL_CHARS else used_cell
    grid.add_column("used" if cell is used_cell else "Mbit/s")
    for target in targets:
        grid.add_column(f"→ {target}", justify="left", no_wrap=True)
    for status in statuses:
        cells = [cell(status["links"].get(target)) for target in targets]
        grid.add_row(Text(f"{status['peer']} →", style="bold"), *cells)
    return grid


def link_cell(link: LinkStatus | None) -> Text:
    """``12.3/20 ███▌  9%``; dim on a LAN, red when the link is down, empty when there is none."""
    if link is None or not link["up"]:
        return used_cell(link)
    rates = Text(_rates(link), style=_tone(link)).append(" ")
    return rates.append(bar(_used_share(link)), style="cyan").append(f" {percent(link['share_sent'])}")


def short_cell(link: LinkStatus | None) -> Text:
    """``12.3/20 9%``."""
    if link is None or not link["up"]:
        return used_cell(link)
    return Text(f"{_rates(link)} {percent(link['share_sent'])}", style=_tone(link))


def used_cell(link: LinkStatus | None) -> Text:
    """``62%``: used of available."""
    if link is None:
        return Text("")
    return Text(percent(_used_share(link)), style=_tone(link)) if link["up"] else Text("down", style="red")


def _limit_bps(link: LinkStatus) -> float:
    return link["available_bps"] or link["rate_bps"]


def _used_share(link: LinkStatus) -> float:
    limit_bps = _limit_bps(link)
    return min(link["used_bps"] / limit_bps, 1.0) if limit_bps > 0 else 0.0


def _rates(link: LinkStatus) -> str:
    return f"{mbit(link['used_bps'])}/{mbit(_limit_bps(link))}"


def _tone(link: LinkStatus) -> str:
    return "dim" if link.get("lan", False) else ""


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """A bar of ``cells`` characters, filled to ``share`` in eighths."""
    eighths = round(share * cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(cells)


def mbit(bps: float) -> str:
    value = bps / 1e6
    return f"{value:.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 or share == 0 else f"{100 * share:.1f}%"


def size(count: float) -> str:
    """Bytes in decimal units, as in ``3.1MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "B" else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}TB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
