"""``dlion topology``: show, check and list topology files.

Law: prints what ``config`` read. Results on stdout, messages on stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import click
from rich.console import Console
from rich.table import Table

from dlion.cli.errors import CONFIGURATION, Fault
from dlion.cli.frommatrix import from_matrix
from dlion.config import ConfigError, known, load_topology
from dlion.mesh.topology import LinkSpec, Speed, Topology
from dlion.net.wan import Rate


@click.group(help="Show, check and list topologies.")
def topology() -> None:
    pass


topology.add_command(from_matrix)


@topology.command("list")
def list_() -> None:
    """The topologies that come with dlion."""
    table = Table("name", "peers", "talk", "about", box=None, pad_edge=False)
    for name in known("topology"):
        one = load_topology(name)
        table.add_row(name, str(len(one.peers)), one.talk, one.about)
    Console().print(table)


@topology.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def check(names: tuple[str, ...]) -> None:
    """Read topologies (names or paths) and say what is wrong with each."""
    wrong = []
    for name in names:
        try:
            one = load_topology(name)
        except ConfigError as error:
            wrong.append(str(error))
        else:
            click.echo(f"{name}: ok, {len(one.peers)} peers, {len(one.clouds)} micro-clouds, {len(one.links)} links")
    if wrong:
        raise Fault(CONFIGURATION, "\n  ".join(wrong))


@topology.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Peers, micro-clouds and links of one topology (a name or a path)."""
    one = load_topology(name)
    if as_json:
        click.echo(json.dumps(described(one), indent=2))
        return
    console = Console()
    console.print(f"[bold]{one.name}[/bold]: {one.about or 'no description'} (talk: {one.talk})", highlight=False)
    peers = Table("micro-cloud", "members", "samples/s", "overhead")
    for cloud, members in one.clouds.items():
        for row in sorted({_speed(one.peers[m].speed) for m in members}):
            same = [m for m in members if _speed(one.peers[m].speed) == row]
            peers.add_row(cloud, " ".join(same), *row)
    console.print(peers)
    links = Table("from", "to", "links", "Mbit/s", "ms one way", "shared")
    for a in one.clouds:
        for b in one.clouds:
            between = [k for k in one.links.values() if (one.cloud_of(k.source), one.cloud_of(k.target)) == (a, b)]
            if between:
                links.add_row(a, b, *_links(one, between))
    console.print(links)


def described(one: Topology) -> dict[str, object]:
    """The topology as plain values: bits and samples per second as means over a period, seconds."""
    return {
        "name": one.name,
        "about": one.about,
        "talk": one.talk,
        "digest": one.digest,
        "clouds": {cloud: list(members) for cloud, members in one.clouds.items()},
        "peers": {
            p.name: {
                "cloud": p.cloud,
                "samples_per_s": _mean(p.speed.samples_per_s) if p.speed else None,
                "overhead_s": p.speed.overhead_s if p.speed else None,
                "address": one.addresses.get(p.name),
            }
            for p in one.peers.values()
        },
        "resources": {
            r.name: {"kind": r.kind, "mean_bps": _mean(r.rate), "varies": len(set(r.rate.values)) > 1}
            for r in one.resources.values()
        },
        "links": [
            {
                "from": k.source,
                "to": k.target,
                "delay_s": k.delay_s,
                "delay_varies": k.delays_s is not None,
                "resources": list(k.resources),
            }
            for k in one.links.values()
        ],
    }


def _mean(rate: Rate) -> float:
    """A rate that ends in a constant is, in the long run, that constant."""
    return rate.mean if rate.looped else rate.values[-1]


def _speed(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "as it is", ""
    return _span(speed.samples_per_s.values), f"{speed.overhead_s * 1000:g} ms"


def _links(one: Topology, links: list[LinkSpec]) -> tuple[str, str, str, str]:
    """Count, narrowest rates, delays, and the resources that several links cross."""
    narrowest = [
        min((one.resources[name].rate for name in link.resources), key=_mean) for link in links if link.resources
    ]
    users = {name: sum(name in k.resources for k in one.links.values()) for k in links for name in k.resources}
    return (
        str(len(links)),
        _span(v / 1e6 for rate in narrowest for v in rate.values) if narrowest else "as it is",
        _span(v * 1000 for k in links for v in (k.delays_s.values if k.delays_s else (k.delay_s,))),
        ", ".join(name for name in sorted(users) if users[name] > 1),
    )


def _span(values: Iterable[float]) -> str:
    seen = sorted({round(v, 3) or v for v in values})  # a slip of units is not hidden by rounding
    return f"{seen[0]:g}" if len(seen) == 1 else f"{seen[0]:g} to {seen[-1]:g}"
