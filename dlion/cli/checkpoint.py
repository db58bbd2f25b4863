"""``dlion checkpoint``: what lies in a run's directory, whether it is whole, and the weights out of it.

Law: reads; writes only the file that ``export`` is told to write. What a checkpoint is: ``dlion.checkpoint``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dlion.checkpoint import CheckpointStore
from dlion.cli.errors import BAD_DATA, CANNOT_READ, Fault
from dlion.cli.keep import FOLDER, cuts_of
from dlion.cut import name_of, number_of

DIRECTORY = click.argument("directory", type=click.Path(path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")


@click.group()
def checkpoint() -> None:
    """List, verify and export the checkpoints of a run's DIRECTORY (--out of up or peer)."""


def stores_of(directory: Path) -> dict[str, CheckpointStore]:
    """The peers that have checkpoints below ``directory``; raises Fault when there are none."""
    folder = directory / FOLDER
    stores = {path.name: CheckpointStore(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    stores = {peer: store for peer, store in stores.items() if store.paths()}
    if not stores:
        raise Fault(CANNOT_READ, "no checkpoints here", str(directory), advice="name the --out of dlion up or peer")
    return stores


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode({"checkpoints": rows}))
        return
    table = Table(box=None)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(highlight=False).print(table)


@checkpoint.command("list")
@DIRECTORY
@AS_JSON
def list_(directory: Path, as_json: bool) -> None:
    """Every checkpoint of every peer; ``common``: all of these peers have it, so a run can go on from it."""
    stores = stores_of(directory)
    common = set.intersection(*(set(cuts_of(store)) for store in stores.values()))
    rows = []
    for peer, store in stores.items():
        for entry in store.entries():
            meta = entry.meta
            rows.append(
                {
                    "peer": peer,
                    "name": meta.get("name", "?"),
                    "seconds": round(meta.get("t", 0.0), 1),
                    "step": meta.get("step", "?"),
                    "bytes": entry.nbytes,
                    "common": "yes" if meta.get("cut") in common else "no",
                    "where": entry.path.name,
                    "damage": entry.damage,
                }
            )
    _show(rows, as_json)


@checkpoint.command()
@DIRECTORY
@AS_JSON
def verify(directory: Path, as_json: bool) -> None:
    """Read every checkpoint in full and hold it against its hashes; exit code 65 when one is damaged."""
    rows = []
    for peer, store in stores_of(directory).items():
        for path, flaw in store.verify().items():
            rows.append({"peer": peer, "where": path.name, "damage": flaw.why if flaw else ""})
    _show(rows, as_json)
    if damaged := [f"{row['peer']}/{row['where']}" for row in rows if row["damage"]]:
        raise Fault(BAD_DATA, f"{len(damaged)} of {len(rows)} checkpoints are damaged", ", ".join(damaged))


@checkpoint.command()
@DIRECTORY
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--peer", help="Whose weights; the first peer's if not given.", metavar="NAME")
@click.option("--cut", default="", help="Which checkpoint; the newest whole one if not given.", metavar="NAME")
def export(directory: Path, target: Path, peer: str | None, cut: str) -> None:
    """Write a checkpoint's weights to TARGET as plain safetensors: the replica, one tensor per parameter."""
    stores = stores_of(directory)
    peer = peer or next(iter(stores))
    if peer not in stores:
        raise Fault(CANNOT_READ, f"{peer} has no checkpoints here", str(directory), f"there are: {', '.join(stores)}")
    source = None
    if cut:
        known = cuts_of(stores[peer])
        try:
            source = known[number_of(cut)]
        except (KeyError, ValueError) as error:
            have = ", ".join(map(name_of, known))
            raise Fault(CANNOT_READ, f"{peer} has no checkpoint {cut!r}", str(directory), f"it has {have}") from error
    click.echo(f"{stores[peer].export(target, source)}")
