"""``dlion record``: a run's logs as a topology file with traces beside it.

Law: writes what ``observe.recording`` measured, and says in the file and on the screen what was not.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from dlion.cli.build import talking
from dlion.cli.errors import BAD_DATA, Fault, writing
from dlion.cli.planfile import NAME, load_plan
from dlion.config import load_topology
from dlion.net.wan import Rate
from dlion.observe.read import Run, read_directory
from dlion.observe.recording import RecordedLink, Recording, recorded

UNKNOWN = "never saturated: its capacity beyond this is unknown"


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Directory to write to.")
def command(directory: Path, out: Path) -> None:
    """Turn the logs of all peers in DIR into OUT/topology.toml, its traces beside it.

    Gather the logs of several hosts in one directory first. Each directed link gets the rate at which it delivered
    while it was saturated, half the least round trip as its delay, and its outages; each peer its speed over time.
    """
    run = read_directory(directory)
    found = whole(recorded(run), directory)
    talk = talking(load_plan(directory)).topology.talk if (directory / NAME).exists() else "auto"
    with writing(out):
        path = write(found, run, talk, out)
    made = load_topology(path)
    click.echo(f"{path}: {len(made.peers)} peers, {len(made.links)} links over {run.seconds:.1f} s")
    for line in doubts(found):
        click.echo(f"  {line}")


def whole(found: Recording, directory: Path) -> Recording:
    """``found``, if every peer that was spoken of left a log; raises Fault naming those that did not."""
    if found.unheard:
        missing = ", ".join(found.unheard)
        raise Fault(BAD_DATA, f"no log of {missing}", str(directory), advice="gather the logs of all peers there")
    if not found.links:
        advice = "record a longer run"
        raise Fault(BAD_DATA, "no link was in use long enough to be measured", str(directory), advice=advice)
    return found


def doubts(found: Recording) -> list[str]:
    """What the recording cannot know, in words."""
    unknown = [
        f"{k.source}>{k.target} (at least {k.rate.at(0) / 1e6:.4g} Mbit/s)" for k in found.links.values() if not k.known
    ]
    lines = []
    if unknown:
        many = f"{len(unknown)} of {len(found.links)} links were never saturated"
        lines.append(f"{many}: their capacity beyond what was seen is unknown: {', '.join(unknown)}")
    idle = [peer for peer in found.clouds if peer not in found.speeds]
    if idle:
        lines.append(f"no step, so no speed, of {', '.join(idle)}")
    return lines


def write(found: Recording, run: Run, talk: str, out: Path) -> Path:
    """The topology file; a rate that varies lies in a CSV file of its own beside it."""
    out.mkdir(parents=True, exist_ok=True)
    head = run.header
    lines = [
        f"# Recorded from the run {head.run}: {head.job}, {head.exchange}, {run.seconds:.1f} s, dlion {head.version}.",
        "# bandwidth: what each directed link delivered while it was saturated. Links that shared a bottleneck show",
        "# what each of them got. After the recording's end the last value holds.",
        "# delay: half of the least round trip; the two directions are not told apart.",
        f"about = {json.dumps(f'recorded from {head.run}')}",
        f'talk = "{talk}"',
        "",
        "[clouds]",
    ]
    clouds: dict[str, list[str]] = {}
    for peer, cloud in found.clouds.items():
        clouds.setdefault(cloud if cloud not in found.clouds else f"at-{cloud}", []).append(peer)
    lines += [f'"{cloud}".members = {json.dumps(members)}' for cloud, members in clouds.items()]
    for peer, speed in found.speeds.items():
        rate = _written(speed.samples_per_s, out, f"{peer}.speed", "samples_per_s", "")
        lines += ["", f'[compute."{peer}"]', f"samples_per_s = {rate}", f"overhead = {speed.overhead_s!r}"]
    for link in found.links.values():
        lines += _link(link, out)
    path = out / "topology.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _link(link: RecordedLink, out: Path) -> list[str]:
    rate = _written(link.rate, out, f"{link.source}--{link.target}", "bits_per_s", "bit/s")
    shown = f"its capacity showed for {link.busy_s:.0f} s" if link.known else UNKNOWN
    lines = ["", f"# {shown}", "[[link]]", f'from = "{link.source}"', f'to = "{link.target}"', f"bandwidth = {rate}"]
    lines.append(f"delay = {link.delay_s!r}")
    if link.up is not None:
        steps = ", ".join(f"[{t!r}, {v:g}]" for t, v in zip(link.up.starts, link.up.values, strict=True))
        lines.append(f"up = {{ steps = [{steps}] }}")
    return lines


def _written(rate: Rate, out: Path, name: str, column: str, unit: str) -> str:
    """The rate as TOML: a number, or a trace written to ``name``.csv."""
    if len(rate.values) == 1:
        return repr(rate.values[0])
    path = out / f"{name}.csv"
    rows = [f"{t!r},{v!r}" for t, v in zip(rate.starts, rate.values, strict=True)]
    path.write_text("\n".join([f"t,{column}", *rows]) + "\n", encoding="utf-8")
    of = f', unit = "{unit}"' if unit else ""
    return f'{{ trace = "{path.name}", format = "csv", time = "t", column = "{column}"{of}, loop = false }}'
