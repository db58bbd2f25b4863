"""``dlion compare``: a matrix of strategies and seeds, simulated side by side; a league table of them.

Law: builds the cells, keeps the results file, shows the table. A cell is one simulated run and is computed by
``engines``; a finished cell is a line of the results file and is not computed again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dlion import __version__
from dlion.cli import engines
from dlion.cli.build import Plan, check, modelled
from dlion.cli.errors import BAD_DATA, CANNOT_WRITE, TEMPORARY, Fault, writing
from dlion.cli.options import duration, flags_of, plan_of, run_options
from dlion.cli.planfile import NAME as PLAN
from dlion.cli.planfile import encode_plan
from dlion.config import config_hash, read_job
from dlion.observe.league import Column, Outcome, Row, league, table
from dlion.observe.live import percent, size

RESULTS = "results.jsonl"
PIPED_COLUMNS = 200
"""Where nobody says how wide the output is, no figure may be cut."""


@click.command()
@run_options
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How many, from --seed on.")
@click.option("--at", "at", help="Compare accuracy at these times, by commas.  [default: a quarter, half, the end]")
@click.option("--workers", type=click.IntRange(min=1), help="Runs at a time.  [default: one per core]")
@click.option("--on", "engine", type=click.Choice(["here", "ray"]), default="here", help="Where to compute the runs.")
@click.option("--ray-address", help="With --on ray.  [default: RAY_ADDRESS, or a cluster of this machine]")
def command(seeds: int, at: str | None, workers: int | None, engine: str, **options: Any) -> None:
    """Simulate every strategy of --exchange A,B,C with every seed, and print who did best.

    Each finished run is a line of results.jsonl in --out; the same command again computes only what is missing there.
    """
    cells = cells_of(options, seeds)
    plan = next(iter(cells.values()))
    until_s = plan.job.job.until_s
    at_s = [duration(text, "--at") for text in at.split(",")] if at else [until_s / 4, until_s / 2, until_s]
    compute = _engine(engine, workers, options)
    out: Path = options["out"] or Path(f"compare-{plan.job.job.name}-{plan.topology.name}")
    if (out / PLAN).exists():
        raise Fault(
            CANNOT_WRITE, "a run lies there", str(out), "results beside its logs would hide it", "another --out"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    known = {key: outcome for key, outcome in read_results(out / RESULTS).items() if outcome.summary is not None}
    missing = {key: one for key, one in cells.items() if key not in known}
    with writing(out):
        file = (out / RESULTS).open("ab", buffering=0)
    with file:
        try:
            known |= _computed(missing, len(cells), compute, file)
        except KeyboardInterrupt:
            click.echo(f"stopped: the same command goes on from {out / RESULTS}", err=True)
            raise
    rows = league([known[key] for key in cells], at_s)
    title = f"{plan.job.job.name} over {plan.topology.name}, {until_s:g} s"
    with writing(out):
        written = _draw(out, title, rows, [known[key] for key in cells])
    if options["as_json"]:
        head = {"job": plan.job.job.name, "topology": plan.topology.name, "until_s": until_s}
        click.echo(msgspec.json.encode(head | {"rows": [asdict(row) for row in rows]}).decode())
    else:
        show(Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_COLUMNS), title, rows)
        click.echo("\n".join(map(str, [out / RESULTS, *written])), err=True)
    failed = [f"{row.exchange}, seed {seed}: {why}" for row in rows for seed, why in row.failed.items()]
    if failed:
        advice = "see above; the same command runs the failed ones again"
        raise Fault(TEMPORARY, f"{len(failed)} of {len(cells)} runs failed", why="; ".join(failed), advice=advice)


@click.command()
def cell() -> None:
    """One run: its plan from stdin, its outcome to stdout."""
    sys.stdout.buffer.write(engines.run_bytes(sys.stdin.buffer.read()))


def cells_of(options: Mapping[str, Any], seeds: int) -> dict[str, Plan]:
    """Key -> plan, strategy by strategy. All are checked before the first one runs; raises ConfigError."""
    names = [name.strip() for name in (options["exchange"] or "").split(",") if name.strip()]
    if options["exchange"] is not None and not names:
        raise click.BadParameter("name one or more strategies, by commas", param_hint="--exchange")
    base = modelled(plan_of({**options, "exchange": names[0] if names else None}))
    names = list(dict.fromkeys(names)) or [base.job.exchange.name]
    plans = []
    for name in names:
        for seed in range(base.job.job.seed, base.job.job.seed + seeds):
            job, origins = read_job(options["job"], flags_of({**options, "exchange": name, "seed": seed}))
            plans.append(check(replace(base, job=job, origins=origins)))
    return {key_of(plan): plan for plan in plans}


def key_of(plan: Plan) -> str:
    """Hash of all that a run's outcome depends on; where the data lies is not part of it."""
    job = msgspec.structs.replace(plan.job, data=msgspec.structs.replace(plan.job.data, dir=""))
    return config_hash(__version__, job, plan.topology.name, plan.topology.digest, plan.topology.talk)[:32]


def read_results(path: Path) -> dict[str, Outcome]:
    """Key -> the last outcome written for it; a torn last line is dropped. Raises Fault for other damage."""
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")
    found: dict[str, Outcome] = {}
    for number, line in enumerate(lines, start=1):
        try:
            outcome = msgspec.json.decode(line, type=Outcome) if line else None
        except msgspec.MsgspecError as error:
            if number < len(lines):
                where, advice = f"{path}, line {number}", "take that line out, or name another --out"
                raise Fault(BAD_DATA, "a damaged results file", where, str(error), advice) from error
            path.write_bytes(path.read_bytes()[: -len(line)])
            break
        if outcome is not None:
            found[outcome.key] = outcome
    return found


Engine = Callable[[Mapping[str, bytes]], Generator[tuple[str, bytes | engines.Failure], None, None]]
"""Encoded plans by key -> what came of each, as they finish."""


def _engine(name: str, workers: int | None, options: Mapping[str, Any]) -> Engine:
    address = options["ray_address"]
    if name == "ray":
        if workers:
            raise click.BadParameter("a Ray cluster runs as many as its cores allow", param_hint="--workers")
        import ray  # noqa: F401 - what is missing is said before anything is written

        return lambda plans: engines.on_ray(plans, address)
    if address is not None:
        raise click.BadParameter("it needs --on ray", param_hint="--ray-address")
    return lambda plans: engines.on_processes(plans, workers or engines.cores())


def _computed(missing: Mapping[str, Plan], total: int, engine: Engine, file: BinaryIO) -> dict[str, Outcome]:
    """Run the missing cells; each is written and told on stderr as it finishes."""
    if len(missing) < total:
        click.echo(f"cells: {total - len(missing)}/{total} are in the results file", err=True)
    started, found = time.monotonic(), dict[str, Outcome]()
    if not missing:
        return found
    with closing(engine({key: encode_plan(plan) for key, plan in missing.items()})) as results:
        for key, result in results:
            found[key] = outcome = outcome_of(key, missing[key], result)
            file.write(msgspec.json.encode(outcome) + b"\n")
            count, elapsed = total - len(missing) + len(found), time.monotonic() - started
            click.echo(f"cells: {count}/{total}  {_told(outcome)}  elapsed: {elapsed:.0f} s", err=True)
    return found


def outcome_of(key: str, plan: Plan, result: bytes | engines.Failure) -> Outcome:
    job = plan.job
    whose: dict[str, Any] = {
        "key": key,
        "exchange": job.exchange.name,
        "seed": job.job.seed,
        "until_s": job.job.until_s,
    }
    if isinstance(result, engines.Failure):
        return Outcome(**whose, error=result.why)
    return msgspec.convert(whose | msgspec.json.decode(result), Outcome)


def _told(outcome: Outcome) -> str:
    who = f"{outcome.exchange} seed {outcome.seed}"
    summary = outcome.summary
    if summary is None:
        return f"{who}  failed: {outcome.error}"
    mean = summary["accuracy"]["mean"]
    return f"{who}  accuracy: {'-' if mean is None else f'{mean:.4f}'}  wan: {size(summary['wan_bytes'])}"


def _draw(out: Path, title: str, rows: list[Row], outcomes: list[Outcome]) -> list[Path]:
    """The page and its picture; without matplotlib the table is all there is."""
    try:
        from dlion.observe.report.league import draw
    except ModuleNotFoundError:
        click.echo("no picture: pip install 'dlion[report]'", err=True)
        return []
    return draw(out / "league.html", title, rows, outcomes)


# -- the table ----------------------------------------------------------------------------------------------------


def show(console: Console, title: str, rows: list[Row]) -> None:
    """The league table: medians, and the range over seeds where there are several."""
    shown = Table(box=None, header_style="dim", pad_edge=False, title=f"[bold]{title}[/]", title_justify="left")
    shown.add_column("exchange", no_wrap=True)
    shown.add_column("seeds", justify="right")
    columns = table(rows)
    for column in columns:
        shown.add_column(column.title, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        shown.add_row(row.exchange, _seeds(row), *(_cell(column, i) for column in columns))
    console.print(shown)
    for row in rows:
        for seed, digest in row.log_sha256.items():
            console.print(f"log sha256 {row.exchange} seed {seed}: {digest}", style="dim", soft_wrap=True)


def _seeds(row: Row) -> str:
    return f"{len(row.seeds)}/{len(row.seeds) + len(row.failed)}" if row.failed else str(len(row.seeds))


def _cell(column: Column, row: int) -> str:
    """The median, bold where it is the best; below it the range, where there is one to see."""
    spread, unit = column.spreads[row], column.unit
    if spread.median is None:
        return f"{spread.reached}/{spread.of} reached" if spread.reached else "-"
    low = figure(spread.low or 0.0, unit)
    high = "never" if spread.high is None else figure(spread.high, unit)
    median = figure(spread.median, unit)
    shown = f"[bold]{median}[/]" if spread.median == column.best else median
    return shown if low == high else f"{shown}\n[dim]{low}-{high}[/]"


def figure(value: float, unit: str) -> str:
    match unit:
        case "seconds":
            return f"{value:.1f}s"
        case "bytes":
            return size(value)
        case "ratio":
            return f"{value:.0e}"
        case _:
            return f"{100 * value:.1f}%" if value >= 0.1 else percent(value)
