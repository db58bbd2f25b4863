"""``dlion topology from-matrix``: measured throughput and latency between regions as a topology file.

Law: reads with ``net.matrices``, writes TOML. A pair that nobody measured is named and refuses the file; nothing is
filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import click

from dlion.cli.errors import BAD_DATA, USAGE, Fault, writing
from dlion.cli.options import TALKS
from dlion.config import load_topology
from dlion.config.errors import did_you_mean
from dlion.config.units import UNITS
from dlion.net import matrices, traces
from dlion.net.matrices import Matrix

MISSING_SHOWN = 12
PEERS_PER_REGION_MAX = 1000


@dataclass(frozen=True)
class Measured:
    """What is known between regions: bits per second, round-trip seconds; and where it came from."""

    bandwidth: Matrix | float
    round_trip_s: Matrix
    sources: tuple[str, ...]


@click.command("from-matrix")
@click.option("--throughput", type=click.Path(dir_okay=False), help="A Skyplane throughput grid, or a DT-FM table.")
@click.option("--bandwidth", help="Of every pair of regions, where nobody measured it.", metavar="RATE")
@click.option(
    "--latency", type=click.Path(dir_okay=False), help="A Skyplane latency grid, or a square RTT matrix (ms)."
)
@click.option("--regions", required=True, help="Names as in the files, by commas.")
@click.option("--tier", help="Of a Skyplane grid with several: PREMIUM, or PREMIUM/STANDARD (source/target).")
@click.option("--peers-per-region", type=click.IntRange(1, PEERS_PER_REGION_MAX), default=1, show_default=True)
@click.option("--shared", is_flag=True, help="All peers of a region share its path to another.  [default: one each]")
@click.option("--compute", multiple=True, metavar="[REGION=]N", help="Samples per second of each peer.")
@click.option("--talk", type=click.Choice(TALKS), default="auto", show_default=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The topology to write.")
def from_matrix(  # noqa: PLR0917 - one per option
    throughput: str | None,
    bandwidth: str | None,
    latency: str | None,
    regions: str,
    tier: str | None,
    peers_per_region: int,
    shared: bool,
    compute: tuple[str, ...],
    talk: str,
    out: Path,
) -> None:
    """Write a topology whose links are as measured between REGIONS; each becomes a micro-cloud."""
    names = [name.strip() for name in regions.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise Fault(USAGE, f"--regions: found {regions!r}", advice="name two or more different regions")
    stated = _stated(bandwidth)
    measured = _measured(throughput, bandwidth, stated, latency, _tiers(tier))
    _check(measured, names, {"throughput": throughput or "", "latency": latency or throughput or ""})
    clouds = {name: _slug(name) for name in names}
    if len(set(clouds.values())) < len(names):
        raise Fault(USAGE, "two regions have one name when reduced to letters, digits and -", ", ".join(names))
    speeds = _speeds(compute, names)
    lines = [
        *(f"# {line}" for line in measured.sources),
        "# delay = half the mean round trip; bandwidth as received, each direction its own.",
        f'about = "{len(names)} regions as measured"',
        f'talk = "{talk}"',
        "",
        *_clouds(clouds, peers_per_region, speeds),
        *_links(measured, clouds, peers_per_region, shared),
    ]
    with writing(out):
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    made = load_topology(out)
    click.echo(f"{out}: {len(made.peers)} peers, {len(made.clouds)} micro-clouds, {len(made.links)} links")
    if len(speeds) < len(names):
        click.echo("virtual time needs a speed of every peer, too: give --compute, or write [compute]", err=True)


def _tiers(tier: str | None) -> tuple[str, str] | None:
    if tier is None:
        return None
    source, _, target = tier.partition("/")
    return source, target or source


def _measured(
    throughput: str | None,
    bandwidth: str | None,
    stated: float,
    latency: str | None,
    tiers: tuple[str, str] | None,
) -> Measured:
    """Read the files, whichever kind they are. Raises Fault, TraceError."""
    where = f" (tier {'/'.join(tiers)})" if tiers else ""
    if throughput and _header(throughput).startswith("region_a"):
        if bandwidth or latency:
            advice = "leave out --bandwidth and --latency"
            raise Fault(USAGE, "the table says both rates and round trips", throughput, advice=advice)
        grid = matrices.undirected(throughput)
        return Measured(grid.bandwidth, grid.round_trip_s, (f"bandwidth and round trips: {Path(throughput).name}",))
    if (throughput is None) == (bandwidth is None):
        raise Fault(
            USAGE, "bandwidths are missing or given twice", advice="one of --throughput FILE or --bandwidth RATE"
        )
    if latency is None:
        raise Fault(USAGE, "latencies are missing", advice="--latency FILE")
    square = _header(latency).split(",")[0] not in ("src_region", "src")
    trips = matrices.square(latency) if square else matrices.round_trips(latency, tiers=tiers)
    source = f"round trips: {Path(latency).name}{'' if square else where}"
    if throughput:
        rates = matrices.throughput(throughput, tiers=tiers)
        return Measured(rates, trips, (f"bandwidth: {Path(throughput).name}{where}", source))
    return Measured(stated, trips, (f"bandwidth: {bandwidth}, as stated, not measured", source))


def _stated(bandwidth: str | None) -> float:
    """Bits per second; 0 where none is given. Raises Fault."""
    if bandwidth is None:
        return 0.0
    parse, words = UNITS["bits_per_s"]
    try:
        found = parse(bandwidth)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise Fault(USAGE, f"--bandwidth: found {bandwidth!r}", advice=f"{words}, above 0")
    return found


def _header(path: str) -> str:
    return traces.text(path).partition("\n")[0]


def _check(measured: Measured, names: Sequence[str], files: Mapping[str, str]) -> None:
    """Every region known, every pair measured; all that is missing is named at once."""
    tables = [("latency", measured.round_trip_s)]
    if isinstance(measured.bandwidth, Matrix):
        tables.insert(0, ("throughput", measured.bandwidth))
    for what, table in tables:
        for name in names:
            if name not in table.names:
                hint = did_you_mean(name, table.names) or f"it has {_some(table.names)}"
                raise Fault(BAD_DATA, f"the {what} file has no region {name!r}", files[what], advice=hint)
    missing = [f"{what} {a} -> {b}" for what, table in tables for a, b in table.missing(names)]
    if missing:
        raise Fault(BAD_DATA, f"{len(missing)} pairs were not measured", why=_some(missing), advice="other regions")


def _some(names: Iterable[str]) -> str:
    held = list(names)
    return ", ".join(held[:MISSING_SHOWN]) + (f" and {len(held) - MISSING_SHOWN} more" * (len(held) > MISSING_SHOWN))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:48]


def _speeds(compute: Iterable[str], names: Sequence[str]) -> dict[str, float]:
    """Region -> samples per second; a bare number is that of all regions not named."""
    found: dict[str, float] = {}
    for text in compute:
        region, equals, value = text.rpartition("=")
        if equals and region not in names:
            raise Fault(USAGE, f"--compute: {region!r} is not among the regions", advice=", ".join(names))
        try:
            found[region] = float(value)
            if not 0 < found[region] < math.inf:
                raise ValueError(value)
        except ValueError:
            raise Fault(USAGE, f"--compute: found {text!r}", advice="a number above 0, or REGION=NUMBER") from None
    return {name: speed for name in names if (speed := found.get(name, found.get(""))) is not None}


def _clouds(clouds: dict[str, str], count: int, speeds: dict[str, float]) -> Iterable[str]:
    yield "[clouds]"
    for name, cloud in clouds.items():
        members = ", ".join(f'"{peer}"' for peer in _members(cloud, count))
        yield f"{cloud}.members = [{members}] # {name}"
    if speeds:
        yield "\n[compute]"
        yield from (f"{clouds[name]}.samples_per_s = {speed:g}" for name, speed in speeds.items())


def _members(cloud: str, count: int) -> list[str]:
    return [f"{cloud}-{i}" for i in range(1, count + 1)]


def _links(measured: Measured, clouds: dict[str, str], count: int, shared: bool) -> Iterable[str]:
    for a, b in permutations(clouds, 2):
        bps = measured.bandwidth if isinstance(measured.bandwidth, float) else measured.bandwidth.values[a, b]
        rate = f'bandwidth = "{bps / 1e6:.6g}Mbit"'
        delay = f'delay = "{measured.round_trip_s.values[a, b] * 500:.6g}ms"'
        crosses = rate
        if shared:
            name = f"{clouds[a]}-to-{clouds[b]}"
            yield f"\n[resources.{name}]\n{rate}"
            crosses = f'resources = ["{name}"]'
        for source in _members(clouds[a], count):
            for target in _members(clouds[b], count):
                yield f'\n[[link]]\nfrom = "{source}"\nto = "{target}"\n{crosses}\n{delay}'
