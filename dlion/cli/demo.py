"""``dlion demo``: ``up`` with the packaged job and topology, for about a minute.

Law: fixed choices and two sentences of explanation; everything else is ``up``'s.
"""

from __future__ import annotations

from pathlib import Path

import click

from dlion.cli.build import Plan
from dlion.cli.up import default_out, finish, run_up
from dlion.config import load_job, load_topology


@click.command()
@click.option("--until", default="40s", show_default=True, help="How long to train.", metavar="DURATION")
@click.option("--exchange", default="dlion", show_default=True, help="The strategy.", metavar="NAME")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where logs, report and models go.")
def command(until: str, exchange: str, out: Path | None) -> None:
    """Watch six peers in three micro-clouds train one model on this machine, over uneven links.

    a1 and a2 are fast, b1 and b2 half as fast, c1 and c2 six times slower; 50, 35 and 20 Mbit/s lie between them.
    Kill any of the processes while it runs: the others go on.
    """
    job = load_job("digits", {"job.until": until, "exchange.name": exchange, "evaluate.every": "2s"})
    plan = Plan(job, load_topology("demo"), run="demo")
    directory = out or default_out(plan)
    summary, pride = run_up(plan, directory)
    finish(summary, pride, False, directory)
