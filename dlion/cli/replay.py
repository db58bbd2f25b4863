"""``dlion replay``: a recorded run again in virtual time, as it was or with something changed.

Law: joins the plan beside the logs with what the logs tell of links and machines; all measuring is ``observe``'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dlion.cli.build import Plan, check, talking
from dlion.cli.options import changes_of, flags_of
from dlion.cli.planfile import load_plan
from dlion.cli.record import doubts, whole
from dlion.cli.simulate import play, writable, write_run
from dlion.config import flag_origins, overruled
from dlion.mesh.changes import changed
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.observe.live import size
from dlion.observe.read import Run, read_directory
from dlion.observe.recording import recorded, topology
from dlion.observe.runlog import Begin, End, run_digest
from dlion.observe.sidebyside import Pair, SideBySide, side_by_side, worst

DIED_BEFORE_S = 5.0
"""A log without a last line that ends so long before the others is that of a peer that died."""
LINKS_SHOWN = 12
BEGIN_WITHIN_S = 2.0
"""Who begins later than the first by more was not there at the start."""


@dataclass(frozen=True)
class Recorded:
    """A run directory, ready to be played again."""

    run: Run
    plan: Plan
    """Of the network as recorded or stated; who was killed is absent from then on."""
    notes: tuple[str, ...]
    """What is uncertain about the network that will be played."""
    begins: Mapping[PeerId, float]
    """Seconds by which each peer of a live run began later than the first."""


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--exchange", help="Another strategy, with its own defaults.", metavar="NAME")
@click.option("--pace", help="Another pace.", metavar="NAME")
@click.option("--until", help="How long to train.", metavar="DURATION")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, data order and all chance.")
@click.option("--data", type=click.Path(file_okay=False), help="Where the job's data files are.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="link.a-b.bandwidth=x2, peer.a1.speed=x0.5 ...")
@click.option("--recorded", "all_recorded", is_flag=True, help="Links and speeds all from the logs, none as stated.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where the replayed logs go.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def command(directory: Path, all_recorded: bool, out: Path | None, as_json: bool, **options: Any) -> None:
    """Run what was recorded in DIR again in virtual time and print both side by side.

    What the run's topology states of links and speeds is taken from it; what it left to real networks and machines is
    taken from the logs.
    """
    found = load_recorded(directory, all_recorded)
    plan = altered(found.plan, options)
    if out is not None:
        writable(out)
    played = play(plan, begins=found.begins)
    if out is not None:
        write_run(plan, played, out)
    both = side_by_side(found.run, played.run, plan.job.evaluate.targets)
    same = digest_of(directory) == played.summary["log_sha256"]
    if as_json:
        whole_answer = {"same_log": same, "notes": found.notes, "recorded_against_replayed": both}
        click.echo(msgspec.json.encode({**whole_answer, "replayed": played.summary}).decode())
        return
    for note in found.notes:
        click.echo(note, err=True)
    show(Console(highlight=False), both, same, as_it_was=plan == found.plan)


def load_recorded(directory: Path, all_recorded: bool = False) -> Recorded:
    """The run in ``directory`` and the plan that plays it again. Raises Fault, DamagedLogError, OSError."""
    run, plan = read_directory(directory), talking(load_plan(directory))
    live = any(log.host for log in run.peers.values())
    network, notes = plan.topology, list[str]()
    silent = [peer for peer in plan.peers if peer not in run.peers]
    if silent:
        notes.append(f"no log of {', '.join(silent)} in {directory}: what they did is not told")
    if live or all_recorded:
        found = whole(recorded(run), directory)
        network = replace(topology(found, network.name, None if all_recorded else network), talk=network.talk)
        network = replace(network, digest=hashlib.sha256(repr(found).encode()).hexdigest())
        notes = doubts(found)
    if any(bool(void) for log in run.peers.values() for void in log[End]["void"]):
        notes.append("the recorded run is void for timing: its machine was too busy")
    if run.seconds < plan.job.job.until_s:  # it was ended early
        plan = replace(plan, job=overruled(plan.job, {"job.until": run.seconds}))
    begins = _begins(run) if live else {}
    return Recorded(run, replace(plan, topology=_with_deaths(network, run)), tuple(notes), begins)


def altered(plan: Plan, options: Mapping[str, Any]) -> Plan:
    """``plan`` with what the options change in job and network; raises ConfigError, ChangeError."""
    network = changed(plan.topology, changes_of(options))
    flags = flags_of(options)
    origins = {**plan.origins, **flag_origins(flags)}
    return check(replace(plan, job=overruled(plan.job, flags), topology=network, origins=origins))


def _begins(run: Run) -> dict[PeerId, float]:
    """Nothing where a log does not say when training began: it is of an older version."""
    found = {PeerId(peer): float(log[Begin]["clock_s"][0]) for peer, log in run.peers.items() if log[Begin]["t"].size}
    first = min(found.values(), default=0.0)
    together = {peer: at - first for peer, at in found.items() if at - first < BEGIN_WITHIN_S}
    return together if len(found) == len(run.peers) else {}


def _with_deaths(network: Topology, run: Run) -> Topology:
    """Peers whose log breaks off well before the run's end were killed, and are killed again."""
    peers = dict(network.peers)
    for peer, log in run.peers.items():
        last = max(float(c["t"].max()) for c in log.events.values() if c["t"].size)
        spec = peers.get(PeerId(peer))
        if spec is None or spec.presence is not None or log[End]["t"].size or last > run.seconds - DIED_BEFORE_S:
            continue
        peers[spec.name] = replace(spec, presence=Rate.steps([0.0, last], [1.0, 0.0], loop=False))
    return replace(network, peers=peers)


def digest_of(directory: Path) -> str:
    """What ``simulate`` calls log_sha256, of the logs in a directory."""
    logs = [path for path in directory.glob("*.jsonl") if not path.name.endswith(".eval.jsonl")]
    return run_digest(
        {path.name.removesuffix(".jsonl"): hashlib.sha256(path.read_bytes()).hexdigest() for path in logs}
    )


# -- on the screen ------------------------------------------------------------------------------------------------


def show(console: Console, both: SideBySide, same: bool, as_it_was: bool = True) -> None:
    """How near the replay came is said of a run ``as_it_was``; of a changed one it would say nothing."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("", "recorded", "replayed", "change"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def add(name: str, one: Pair, unit: str) -> None:
        change = "-" if one["change"] is None else f"{one['change']:+.1%}"
        table.add_row(name, _figure(one["first"], unit), _figure(one["second"], unit), change)

    for peer, one in both["steps"].items():
        add(f"steps of {peer}", one, "count")
    by_link = len(both["link_bytes"]) <= LINKS_SHOWN
    for ends, one in both["link_bytes" if by_link else "cloud_bytes"].items():
        add(f"bytes {ends}", one, "bytes")
    for name, one in both["staleness"].items():
        add(f"staleness {name}", one, "count")
    for target, one in both["time_to"].items():
        add(f"time to {target}", one, "seconds")
    add("accuracy", both["accuracy"], "share")
    console.print(table)
    if same:
        console.print("the same run, line by line: equal log sha256")
    if same or not as_it_was:
        return
    for what, pairs in (("steps per peer", both["steps"]), ("bytes per link", both["link_bytes"])):
        most = worst(pairs)
        told = "some are there in one run only" if most is None else f"within {most:.1%}"
        console.print(f"{what}: {told}")


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "never" if unit == "seconds" else "-"
    match unit:
        case "bytes":
            return size(value)
        case "seconds":
            return f"{value:.1f} s"
        case "share":
            return f"{value:.4f}"
        case _:
            return f"{value:.1f}".removesuffix(".0")
