"""What-if holds: a live run replayed, and its links changed, in virtual time and for real.

    python scripts/whatif.py [--topology hetero-network] [--exchange full] [--until 30s] [--target 0.9]
                             [--change link.b-c.bandwidth=x0.5 --change link.a-b.bandwidth=x0.5] [--out DIR] [--json]

A live run (``dlion up``) is recorded and replayed (``dlion replay``): steps of each peer and bytes of each link must
agree within 5 %. Then, for each change: the recorded run is replayed with it, and it is really made in a second live
run. The replays' change of time to target must be that of the live runs within 10 %, be it large or none. A live run
that is void for timing is repeated, up to ``--tries`` times.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dlion.observe.sidebyside import worst

NEAR, RATIO_NEAR = 0.05, 0.10


def dlion(*words: str) -> Any:
    """What ``dlion WORDS --json`` prints. Raises CalledProcessError with its words on stderr."""
    command = [sys.executable, "-m", "dlion", *words, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def live(case: Sequence[str], change: str, out: Path, tries: int) -> tuple[Path, Mapping[str, Any]]:
    """A live run that counts, and its summary."""
    for n in itertools.count():
        directory = out / f"{change.replace('=', '-') or 'unchanged'}-{n}"
        summary = dlion("up", *case, *(["--set", change] if change else []), "--out", str(directory))
        if not summary["void"]:
            return directory, summary
        click.echo(f"{directory}: void", err=True)
        if n + 1 == tries:
            raise click.ClickException(f"{tries} live runs were void: the machine is too busy")
    raise AssertionError


def line(what: str, live_s: float, replayed_s: float, before: tuple[float, float] | None) -> dict[str, Any]:
    """Times to target; after a change also their ratios to ``before`` (live, replayed)."""
    found: dict[str, Any] = {"change": what, "live_s": live_s, "replayed_s": replayed_s}
    if before is not None:
        really, predicted = live_s / before[0], replayed_s / before[1]
        error = abs(predicted / really - 1)
        found |= {"live_ratio": really, "predicted_ratio": predicted, "error": error, "near": error <= RATIO_NEAR}
    return found


def reached(summary: Mapping[str, Any], key: str) -> float:
    if (found := summary["time_to"].get(key)) is None:
        raise click.ClickException(f"{key} was not reached: choose a lower --target or a longer --until")
    return float(found)


def tell(console: Console, lines: Sequence[Mapping[str, Any]], target: float) -> None:
    table = Table(title=f"time to {target:g}", title_justify="left")
    for name in ("change", "live", "replayed", "really", "predicted", "error", ""):
        table.add_column(name, justify="left" if name in ("change", "") else "right")
    for one in lines:
        cells = [one["change"] or "as it was", f"{one['live_s']:.2f} s", f"{one['replayed_s']:.2f} s"]
        if "error" in one:
            cells += [f"x{one['live_ratio']:.2f}", f"x{one['predicted_ratio']:.2f}", f"{one['error']:.1%}"]
            cells.append("ok" if one["near"] else "MISS")
        table.add_row(*cells)
    console.print(table)


@click.command()
@click.option("--job", default="digits", show_default=True)
@click.option("--topology", default="hetero-network", show_default=True)
@click.option("--exchange", default="full", show_default=True)
@click.option("--until", default="30s", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--target", default=0.9, show_default=True)
@click.option(
    "--change",
    "changes",
    multiple=True,
    default=("link.b-c.bandwidth=x0.5", "link.a-b.bandwidth=x0.5"),
    show_default=True,
)
@click.option("--tries", default=3, show_default=True, help="How often a void run is repeated.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where the runs go.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def main(target: float, changes: tuple[str, ...], tries: int, as_json: bool, **options: Any) -> None:
    """Record, replay, change. Exit code 1 when something misses its limit."""
    out = options["out"] or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-whatif"
    case = [
        word for key in ("job", "topology", "exchange", "until", "seed") for word in (f"--{key}", str(options[key]))
    ]
    case += ["--set", f"evaluate.targets=[{target}]", "--set", "evaluate.every=1s"]
    key = f"{target:.2f}"
    directory, summary = live(case, "", out, tries)
    replayed = dlion("replay", str(directory))
    both = replayed["recorded_against_replayed"]
    agree = {name: worst(both[name]) for name in ("steps", "link_bytes")}
    before = reached(summary, key), reached(replayed["replayed"], key)
    lines = [line("", *before, None)]
    for change in changes:
        _, really = live(case, change, out, tries)
        predicted = dlion("replay", str(directory), "--set", change)["replayed"]
        lines.append(line(change, reached(really, key), reached(predicted, key), before))
    if as_json:
        click.echo(json.dumps({"recorded_against_replayed": agree, "what_if": lines}))
    console = Console(stderr=as_json, highlight=False, width=120)
    tell(console, lines, target)
    for name, change in agree.items():
        told = "some are there in one run only" if change is None else f"within {change:.1%}"
        console.print(f"recorded against replayed, {name}: {told}")
    if not all(one.get("near", True) for one in lines) or any(c is None or c > NEAR for c in agree.values()):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}\n{error.stderr.decode(errors='replace')}")
