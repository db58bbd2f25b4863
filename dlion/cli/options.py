"""Options that several verbs share, and what they mean.

Law: click declarations and the plan that they describe; imports the configuration only when called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dlion.cli.build import Plan

F = TypeVar("F", bound=Callable[..., Any])

TALKS = ("auto", "mesh", "bridges", "tree")
RUN_OPTIONS = (
    click.option("--job", default="digits", show_default=True, help="What to train: a packaged name or a TOML file."),
    click.option("--topology", default="hetero-system", show_default=True, help="Who and over what: a name or a file."),
    click.option("--exchange", help="The strategy, in place of the job's.", metavar="NAME"),
    click.option("--pace", help="The pace, in place of the strategy's own.", metavar="NAME"),
    click.option("--talk", type=click.Choice(TALKS), help="In place of the topology's."),
    click.option("--until", help="How long to train.", metavar="DURATION"),
    click.option("--start", help="Begin this far into the topology's traces.", metavar="DURATION"),
    click.option("--seed", type=click.IntRange(min=0), help="Of weights, data order and all chance."),
    click.option("--data", type=click.Path(file_okay=False), help="Where the job's data files are."),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="A key of the job, train.batch=32; or of the network, link.a-b.bandwidth=x2.",
    ),
    click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where logs, report and models go."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else."),
)


def run_options(command: F) -> F:
    """The options that describe a run."""
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


FLAGS: Mapping[str, str] = {
    "exchange": "exchange.name",
    "pace": "pace.name",
    "until": "job.until",
    "seed": "job.seed",
    "data": "data.dir",
}
"""Option -> the key of the job that it overrules."""


def flags_of(options: Mapping[str, Any]) -> dict[str, object]:
    """What the options overrule in the job file."""
    from dlion.config.job import set_flag
    from dlion.mesh.changes import is_change

    flags: dict[str, object] = dict(set_flag(text) for text in options["sets"] if not is_change(text))
    for option, key in FLAGS.items():
        if options.get(option) is not None:
            flags[key] = options[option]
    return flags


def changes_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What ``--set`` changes in the network: key -> factor."""
    from dlion.mesh.changes import factor_of, is_change

    return dict(factor_of(text) for text in options["sets"] if is_change(text))


def duration(text: str, option: str) -> float:
    """Seconds, as in the configuration files: ``90``, ``"5m"``. Raises BadParameter, which names the option."""
    from dlion.config.units import UNITS, seconds

    try:
        found = seconds(text)
        if found < 0:
            raise ValueError(text)
    except ValueError:
        raise click.BadParameter(f"found {text!r}, expected {UNITS['seconds'][1]}", param_hint=option) from None
    return found


def plan_of(options: Mapping[str, Any]) -> Plan:
    """The run that the options describe; raises ConfigError."""
    from dlion.cli.build import Plan, check, known_workload
    from dlion.config import load_topology, read_job
    from dlion.mesh.changes import changed, started

    job, origins = read_job(options["job"], flags_of(options))
    topology = load_topology(options["topology"], talk=options["talk"])
    topology = changed(started(topology, duration(options.get("start") or "0", "--start")), changes_of(options))
    return known_workload(check(Plan(job, topology, run=f"{job.job.name}@{topology.name}", origins=origins)))
