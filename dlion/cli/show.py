"""How a finished run is told on stdout.

Law: a summary in, text or JSON out.
"""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dlion.observe.live import percent, size
from dlion.observe.summary import Summary

DRAIN_SHOWN_S = 1.0
"""Less is not worth a word."""


def show_summary(summary: Summary, as_json: bool, out: Path | None = None) -> None:
    """The whole summary as one JSON object, or what a person wants to know."""
    if as_json:
        click.echo(msgspec.json.encode(summary).decode())
        return
    console = Console(highlight=False)
    accuracy = summary["accuracy"]
    console.print(
        f"[bold]{summary['exchange']}[/] on {summary['job']}, {summary['topology']}, seed {summary['seed']}: "
        f"{summary['virtual_seconds']:.1f} s"
        + (f", of these {drain:.1f} s drain" if (drain := summary.get("drain_seconds", 0.0)) >= DRAIN_SHOWN_S else "")
        + (f" (wall time {wall:.1f} s)" if (wall := summary["wall_seconds"]) is not None else "")
    )
    facts = Table.grid(padding=(0, 2))
    if accuracy["mean"] is not None and accuracy["worst"] is not None:
        facts.add_row("accuracy", f"mean {accuracy['mean']:.4f}, worst peer {accuracy['worst']:.4f}")
    reached = [f"{t}: {_seconds(s)}" for t, s in summary["time_to"].items()]
    if reached:
        facts.add_row("time to", "  ".join(reached))
    facts.add_row("sent", f"{size(summary['wan_bytes'])} over WAN links, {size(summary['lan_bytes'])} inside LANs")
    if summary["replica_disagreement"] is not None:
        facts.add_row("replicas differ by", f"{summary['replica_disagreement']:.1e} of their norm")
    facts.add_row("staleness", f"median {summary['staleness']['p50']:.0f}, most {summary['staleness']['max']} steps")
    if cut := summary.get("cut_short"):
        facts.add_row("drain cut short", f"{', '.join(cut)} stopped before all had what they were owed")
    if summary["refused"]:
        facts.add_row("refused", f"{summary['refused']}: the logs' refuse lines say what and why")
    if summary["void"]:
        facts.add_row("[red]void for timing[/]", f"this machine missed the modelled pace by {summary['overrun']:.1%}")
    console.print(facts)
    peers = Table(box=None, header_style="dim")
    for column in ("peer", "steps", "batch", "stalled", "accuracy"):
        peers.add_column(column, justify="left" if column == "peer" else "right")
    for peer, steps in summary["steps"].items():
        stalled = percent(summary["stalled_share"].get(peer, 0.0))
        batch = str(summary["batch"]["per_peer"].get(peer, "-"))
        value = accuracy["per_peer"].get(peer)
        peers.add_row(peer, str(steps), batch, stalled, "-" if value is None else f"{value:.4f}")
    console.print(peers)
    if summary["log_sha256"]:
        console.print(f"log sha256 {summary['log_sha256']}", style="dim")
    if out is not None:
        console.print(f"logs in {out}")


def _seconds(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f} s"
