"""Measures the snapshots of a run, beside it, at the lowest priority.

Law: a loop around ``observe.evaluate``; says each result on stdout as a JSON line; ends when stdin is closed and
nothing is left.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import click
import msgspec

from dlion.cli.build import workload_of
from dlion.cli.host import SNAPSHOTS
from dlion.cli.planfile import load_plan
from dlion.observe.evaluate import evaluate_directory, lower_priority


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--peer", default="", help="Only this one's.")
def command(out: Path, peer: str) -> None:
    """Measure a run's snapshots until stdin is closed and nothing is left."""
    lower_priority()
    plan = load_plan(out)
    workload = workload_of(plan, plan.peers[0])
    (out / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
    closed = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        closed.set()

    threading.Thread(target=listen, daemon=True).start()
    limit = plan.job.evaluate.samples or None
    found = evaluate_directory(out / SNAPSHOTS, workload, out, finished=closed.is_set, limit=limit, only=peer)
    for name, event in found:
        sys.stdout.write(msgspec.json.encode({"peer": name, "accuracy": event.accuracy, "t": event.t}).decode() + "\n")
        sys.stdout.flush()
