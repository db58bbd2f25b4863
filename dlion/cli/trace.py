"""``dlion trace``: what a trace file holds.

Law: reads with ``net.traces``, prints. A format whose units cannot be told from the file is asked for, not guessed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dlion.cli.errors import BAD_DATA, USAGE, Fault, writing
from dlion.net import traces
from dlion.net.wan import Rate
from dlion.observe.tracefacts import Facts, facts, total

FORMS = (*traces.FORMATS, "csv", "churn", "count")
FIRST_LINES = 50


@dataclass(frozen=True)
class Shown:
    """A trace, and how its values are shown."""

    rate: Rate
    unit: str
    scale: float
    about: str = ""


@click.group(help="Show trace files.")
def trace() -> None:
    pass


@trace.command()
@click.argument("file")
@click.option("--format", "form", type=click.Choice(FORMS), help="[default: what the file's first lines tell]")
@click.option("--time", default="time", show_default=True, help="csv: the column of the time.")
@click.option(
    "--time-unit",
    type=click.Choice([*traces.TIME_UNITS]),
    metavar="UNIT",
    default="s",
    show_default=True,
    help=f"csv: its unit, of {', '.join(traces.TIME_UNITS)}.",
)
@click.option("--column", help="csv: the column of the rate, or of the delay.")
@click.option(
    "--unit",
    type=click.Choice([*traces.RATE_UNITS, *traces.TIME_UNITS]),
    metavar="UNIT",
    default="Mbit/s",
    show_default=True,
    help=f"csv: its unit, of {', '.join(traces.RATE_UNITS)}; or of a delay, as of the time.",
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw it to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(  # noqa: PLR0917 - one per option
    file: str,
    form: str | None,
    time: str,
    time_unit: str,
    column: str | None,
    unit: str,
    png: Path | None,
    as_json: bool,
) -> None:
    """Duration, mean, percentiles and outages of a trace FILE (.gz, .xz and ARCHIVE.tar.xz::MEMBER are opened)."""
    form = form or _told_by(file)
    if form == "csv":
        if column is None:
            raise Fault(USAGE, "a csv file has several columns", file, advice=_columns(file))
        shown = _column(file, time, time_unit, column, unit)
    else:
        shown = _shown(file, form)
    found = facts(shown.rate)
    if png is not None:
        from dlion.observe.report.trace import draw

        with writing(png):
            draw(png, shown.rate, Path(file).name, shown.unit, shown.scale)
    if as_json:
        head = {"file": file, "format": form, "unit": shown.unit, "scale": shown.scale}
        click.echo(msgspec.json.encode(head | asdict(found)).decode())
    else:
        _print(file, form, shown, found)
        if png is not None:
            click.echo(png, err=True)


def _column(file: str, time: str, time_unit: str, column: str, unit: str) -> Shown:
    """A column of rates, or of delays."""
    delay_s = traces.TIME_UNITS.get(unit)
    columns = traces.Columns(time, column, time_unit=time_unit, bandwidth_unit="bit/s" if delay_s else unit)
    rate = traces.table(file, columns).bandwidth
    return Shown(rate.scaled(delay_s), "ms", 1e-3) if delay_s else Shown(rate, "Mbit/s", 1e6)


def _shown(file: str, form: str) -> Shown:
    if form == "churn":
        nodes = traces.presence(file)
        return Shown(total(nodes.values()), "peers present", 1.0, f"{len(nodes)} nodes")
    if form == "count":
        return Shown(traces.live_count(file), "peers present", 1.0)
    known = next(f for f in traces.FORMATS if f == form)
    return Shown(traces.read(file, known), "Mbit/s", 1e6)


def _told_by(file: str) -> str:
    """The format, where the file's lines leave no doubt. Raises Fault."""
    if traces.MEMBER not in file and ".tar" in file:
        names = traces.members(file)
        some = "\n    ".join([*names[:10], *([f"and {len(names) - 10} more"] if len(names) > 10 else [])])
        raise Fault(USAGE, "an archive of several files", file, advice=f"name one of them:\n    {some}")
    lines = [fields for _, fields in zip(range(FIRST_LINES), traces.rows(file, ","), strict=False)]
    if not lines:
        raise Fault(BAD_DATA, "an empty file", file, advice=traces.ANOTHER)
    first = lines[0][1]
    if all(len(fields) == 1 and fields[0].isdecimal() for _, fields in lines):
        return "mahimahi"
    if len(first) == 3 and first[1] in ("add", "remove"):
        return "churn"
    if len(first) == 3 and first[0].count("-") == 2:
        return "count"
    if first[0][:1] in ("{", "["):
        raise Fault(USAGE, "JSON is no trace over time", file, advice="a file of lines: see docs/traces.md")
    as_many = {len(fields) for _, fields in lines} == {len(first)}
    if as_many and len(first) > 1 and not any(field.replace(".", "").isdecimal() for field in first):
        return "csv"
    if len(",".join(first).replace(",", " ").split()) == 2:
        raise Fault(USAGE, "the file does not say what its numbers are", file, advice="--format s-mbit, or ms-kbit")
    odd = first
    if len(first) == 1 and first[0].isdecimal():  # as mahimahi begins
        odd = next(fields for _, fields in lines if len(fields) > 1 or not fields[0].isdecimal())
    number = next(n for n, fields in lines if fields is odd)
    what = f"line {number} is of no known format: {', '.join(odd)[:60]!r}"
    raise Fault(BAD_DATA, what, file, advice="docs/traces.md tells which are read; --format names one")


def _columns(file: str) -> str:
    _, names = next(traces.rows(file, ","), (0, [""]))
    some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"name one of {some} with --column (and --unit); of a who-to-whom table make dlion topology from-matrix"


def _print(file: str, form: str, shown: Shown, found: Facts) -> None:
    console = Console(highlight=False)
    again = "then it begins again" if shown.rate.looped else "then the last value holds"
    console.print(f"[bold]{file}[/] ({form}{', ' + shown.about if shown.about else ''})", soft_wrap=True)
    grid = Table.grid(padding=(0, 2))

    def value(number: float) -> str:
        return f"{number / shown.scale:.4g}"

    grid.add_row("duration", f"{found.duration_s:.1f} s in {found.steps} steps, {again}")
    grid.add_row("mean", f"{value(found.mean)} {shown.unit}")
    grid.add_row("range", f"{value(found.low)} to {value(found.high)} {shown.unit}")
    grid.add_row("of the time", "  ".join(f"{name}: {value(v)}" for name, v in found.percentiles.items()))
    outages = f"{found.outages}, together {found.outage_s:.1f} s, the longest {found.longest_outage_s:.1f} s"
    grid.add_row("outages", outages if found.outages else "none")
    console.print(grid)
