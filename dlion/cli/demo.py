"""``dlion demo``: ``up`` with the packaged job and topology for half a minute, and what others do on the same links.

Law: fixed choices and a few sentences; the run is ``up``'s, the alternatives are ``simulate``'s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import msgspec

from dlion.cli.build import Plan, check
from dlion.cli.up import default_out, finish, run_up
from dlion.config import load_topology, read_job
from dlion.observe.summary import Summary

ALTERNATIVES = ("full", "dlion")
"""Everything to everybody in lockstep, and DLion as published."""
EVALUATE_EVERY = "2s"


@click.command()
@click.option("--until", default="30s", show_default=True, help="How long to train.", metavar="DURATION")
@click.option("--exchange", default="pride", show_default=True, help="The strategy.", metavar="NAME")
@click.option("--alone", is_flag=True, help="Do not simulate the alternatives afterwards.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where logs, report and models go.")
def command(until: str, exchange: str, alone: bool, out: Path | None) -> None:
    """Watch six peers in three micro-clouds train one model on this machine, over uneven links.

    a1 and a2 are fast, b1 and b2 half as fast, c1 and c2 six times slower; 50, 35 and 20 Mbit/s lie between them.
    Kill any of the processes while it runs: the others go on. Afterwards other strategies run over the same links in
    virtual time, and the report compares them.
    """
    flags = {"job.until": until, "exchange.name": exchange, "evaluate.every": EVALUATE_EVERY}
    job, origins = read_job("digits", flags)
    plan = check(Plan(job, load_topology("demo"), run="demo", origins=origins))
    directory = out or default_out(plan)
    summary, pride = run_up(plan, directory)
    names = [name for name in ALTERNATIVES if name != exchange and not alone and not pride.stopping]
    beside = [directory / f"simulated-{name}" for name in names]
    if names:
        click.echo(f"the same in virtual time with {' and '.join(names)} ...")
        _tell(summary, "this run")
        for process, name in [(_simulate(name, until, path), name) for name, path in zip(names, beside, strict=True)]:
            stdout, _ = process.communicate()
            if process.returncode == 0:
                _tell(msgspec.json.decode(stdout, type=Summary), name)
    finish(summary, pride, False, directory, [path for path in beside if path.exists()])


def _simulate(exchange: str, until: str, out: Path) -> subprocess.Popen[bytes]:
    """One alternative, in a process of its own."""
    choice = ["--job", "digits", "--topology", "demo", "--exchange", exchange, "--until", until]
    arguments = ["simulate", *choice, "--set", f"evaluate.every={EVALUATE_EVERY}", "--out", str(out), "--json"]
    return subprocess.Popen([sys.executable, "-m", "dlion", *arguments], stdout=subprocess.PIPE)


def _tell(summary: Summary, name: str) -> None:
    times = ", ".join(
        f"{float(target):.0%} {'never' if seconds is None else f'after {seconds:.1f} s'}"
        for target, seconds in summary["time_to"].items()
    )
    click.echo(f"  {name}: {times}; {summary['wan_bytes'] / 1e6:.0f} MB over WAN links")
