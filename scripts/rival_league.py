"""Other frameworks and ours, live, over the same shaped links: learning rates, runs, and the page.

    sudo python scripts/rival_league.py tune --data ../shared/data/training    # rates, on a seed of its own
    sudo python scripts/rival_league.py run --data ../shared/data/training --seeds 0,1,2 [--kill b1@30]
    python scripts/rival_league.py page                                       # docs/rivals.md and its picture

Law: the experiment's order and its page; a run is ``wan_lab``'s, its row one line of docs/league/rivals.jsonl. Finished
runs are skipped, void ones are done again. One at a time: each needs the machine for itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
from league import commit
from league_stats import Rows, by_strategy, interval, ratios, reached, smooth
from rivals import RIVALS
from wan_lab import carried

from dlion.cli.planfile import load_plan
from dlion.observe.read import PeerLog, Run, read_directory
from dlion.observe.runlog import End, Step
from dlion.observe.summary import evaluations, together

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
RESULTS = DOCS / "league" / "rivals.jsonl"
OURS = {"pride": 0.1, "pride-whole": 0.05}
"""Learning rates as tuned in virtual time (docs/league.md)."""
FLAGS: Mapping[str, tuple[str, ...]] = {
    "pride": ("--exchange", "pride"),
    "pride-whole": ("--exchange", "pride", "--set", "exchange.settings.slices=1"),
    **{name: ("--rival", name) for name in RIVALS},
}
RATES = (0.02, 0.05, 0.1)
TUNE_SEED, TUNE_S = 100, 60.0
TARGETS = (0.80, 0.834, 0.85)
"""The second is the league's for this scenario."""
TRIES = 3
"""Of a run that was void for timing."""


@dataclass(frozen=True)
class Spec:
    """One run."""

    strategy: str
    seed: int
    rate: float
    until_s: float
    kill: str = ""
    topology: str = "hetero-system"
    job: str = "fashion-mnist"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def words(self, data: Path, out: Path) -> list[str]:
        """The command. Batches: ours are dealt by speed, as they are by default, others take theirs."""
        sets = {
            "data.dir": data.resolve(),
            "model.hidden": "[512,256]",
            "train.learning_rate": self.rate,
            "train.momentum": 0.9,
            "batching.growth": "false",
            "evaluate.every": "5s",
            "evaluate.samples": 2000,
        }
        words = [sys.executable, str(HERE / "wan_lab.py"), *FLAGS[self.strategy], "--out", str(out), "--json"]
        words += ["--job", self.job, "--topology", self.topology, "--seed", str(self.seed)]
        words += ["--until", f"{self.until_s}s", *(["--kill", self.kill] if self.kill else [])]
        return words + [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]


def row_of(spec: Spec, out: Path) -> dict[str, Any]:
    """Times in seconds; ``mean`` and ``worst`` accuracy of those that are there; IP's bytes between micro-clouds."""
    run, plan = read_directory(out), load_plan(out)
    summary, router = (json.loads((out / name).read_text()) for name in ("summary.json", "router.json"))
    times, values = together([evaluations(log, "accuracy") for log in run.peers.values()])
    return {
        "spec": asdict(spec),
        "times": [round(float(t), 2) for t in times],
        "mean": [round(float(a), 4) for a in np.nanmean(values, axis=0)],
        "worst": [round(float(a), 4) for a in np.nanmin(values, axis=0)],
        "wan_bytes": carried(router, plan.topology)[0],
        "steps": summary["steps"],
        "died_s": {peer: round(float(log[Step]["t"].max(initial=0)), 1) for peer, log in dead(run).items()},
        "pause_s": round(pause_s(run, spec.until_s), 2),
        "late_ms": router["late_ms"]["p99"],
        "overrun": summary["overrun"],
        "void": summary["void"],
        "commit": commit(),
    }


def dead(run: Run) -> dict[str, PeerLog]:
    """Who did not live to the end."""
    return {peer: log for peer, log in run.peers.items() if not log[End]["t"].size}


def pause_s(run: Run, until_s: float) -> float:
    """The longest time that a peer which lived to the end was without a finished step, beyond the median of its own
    steps' distances."""
    longest = 0.0
    for log in [run.peers[peer] for peer in run.peers.keys() - dead(run)]:
        ends = np.concatenate(([0.0], log[Step]["t"][log[Step]["t"] <= until_s], [until_s]))
        apart = np.diff(ends)
        longest = max(longest, float(apart.max() - np.median(apart)))
    return longest


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run_all(specs: Iterable[Spec], data: Path) -> None:
    """Run what has no row yet; a void run is done again, and kept as void in the end."""
    have = {json.dumps(row["spec"], sort_keys=True) for row in rows()}
    for spec in [spec for spec in specs if spec.key not in have]:
        for _ in range(TRIES):
            row = measure(spec, data)
            said = f"{row['mean'][-1]:.4f}, 80 % at {reached([row], 0.8)}, late {row['late_ms']} ms"
            click.echo(f"{spec.key}: {said}{' void' if row['void'] else ''}", err=True)
            if not row["void"]:
                break
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(spec: Spec, data: Path) -> dict[str, Any]:
    """One run in the lab. Raises ClickException with the lab's words when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = subprocess.run(spec.words(data, out), capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"{spec.key}\n{done.stderr[-2000:]}")
        return row_of(spec, out)


def tuned() -> dict[str, float]:
    """Each one's learning rate: the best mean accuracy over the second half of its tuning runs."""
    best = {name: (1.0, rate) for name, rate in OURS.items()}
    for row in rows():
        if (spec := row["spec"])["seed"] == TUNE_SEED:
            late = float(np.mean(row["mean"][len(row["mean"]) // 2 :]))
            best[spec["strategy"]] = max(best.get(spec["strategy"], (0.0, 0.0)), (late, spec["rate"]))
    return {name: rate for name, (_, rate) in best.items()}


def known(_: click.Context, __: click.Parameter, names: str) -> list[str]:
    """Raises BadParameter for a name that is none of ours and no rival's."""
    found = names.split(",")
    if unknown := [name for name in found if name not in FLAGS]:
        raise click.BadParameter(f"found {unknown[0]!r}, expected some of {', '.join(FLAGS)}")
    return found


def names_option(names: Iterable[str]) -> Any:
    return click.option("--names", default=",".join(names), callback=known, show_default=True, help="Comma-separated.")


data_option = click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)


@click.group()
def main() -> None:
    """Measure other frameworks and ours on the same links."""


@main.command()
@data_option
@names_option(RIVALS)
def tune(data: Path, names: list[str]) -> None:
    """Try every learning rate once; at an edge, half or twice of it too."""
    run_all([Spec(name, TUNE_SEED, rate, TUNE_S) for name in names for rate in RATES], data)
    best = tuned()
    for edge, beyond in ((RATES[0], RATES[0] / 2), (RATES[-1], RATES[-1] * 2)):
        run_all([Spec(name, TUNE_SEED, beyond, TUNE_S) for name in names if best.get(name) == edge], data)


@main.command()
@data_option
@names_option([*OURS, *RIVALS])
@click.option("--seeds", default="0", show_default=True, help="Comma-separated.")
@click.option("--until", "until_s", default=100.0, show_default=True, help="Seconds.")
@click.option("--kill", default="", metavar="PEER@SECONDS")
@click.option("--topology", default="hetero-system", show_default=True)
def run(data: Path, names: list[str], seeds: str, until_s: float, kill: str, topology: str) -> None:
    """Run each with its tuned rate."""
    rates = tuned()
    if missing := [name for name in names if name not in rates]:
        raise click.ClickException(f"no learning rate yet: run tune --names {','.join(missing)} first")
    order = product(seeds.split(","), names)
    run_all([Spec(name, int(seed), rates[name], until_s, kill, topology) for seed, name in order], data)


@main.command()
def page() -> None:
    """Write the page and its pictures from the rows."""
    measured = [row for row in rows() if row["spec"]["seed"] != TUNE_SEED]
    text = [(DOCS / "league" / "rivals-head.md").read_text()]
    for where in sorted({where_of(row) for row in measured}, key=lambda where: (where[0] != "hetero-system", where)):
        groups = by_strategy([row for row in measured if where_of(row) == where])
        topology, kill = where
        title = f"{topology}, {kill.partition('@')[0]} is killed" if kill else topology
        picture = f"rivals-{topology}{'-' * bool(kill)}{kill.replace('@', '-')}.png"
        draw(groups, DOCS / "league" / picture)
        text += [f"## {title}\n", *table(groups), "", verdict(groups), "", f"![{title}](league/{picture})", ""]
    (DOCS / "rivals.md").write_text("\n".join(text))


def where_of(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["spec"]["topology"], row["spec"]["kill"]


def table(groups: Mapping[str, Rows]) -> list[str]:
    """Medians over seeds, the fastest first."""
    marks = [f"{100 * target:.3g} % at, s" for target in TARGETS]
    head = ["framework", "lr", "seeds", *marks, "at the end", "worst peer", "WAN MB", "longest pause, s", "death at, s"]
    lines = [head, ["---"] * len(head)]
    for name in sorted(groups, key=lambda n: tuple(reached(groups[n], t) or np.inf for t in TARGETS)):
        of = groups[name]
        ends = [100 * np.median([row[key][-1] for row in of]) for key in ("mean", "worst")]
        lines.append(
            [
                f"**{name}**" if name in OURS else name,
                ", ".join(sorted({f"{row['spec']['rate']:g}" for row in of})),
                f"{len(of)}{' (void)' * any(row['void'] for row in of)}",
                *(f"{at:.1f}" if (at := reached(of, target)) else "–" for target in TARGETS),
                *(f"{end:.1f}" for end in ends),
                f"{np.median([row['wan_bytes'] for row in of]) / 1e6:.0f}",
                f"{max(row['pause_s'] for row in of):.1f}",
                ", ".join(f"{at:.0f}" for row in of for at in row["died_s"].values()) or "–",
            ]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


def verdict(groups: Mapping[str, Rows]) -> str:
    """Times of the others over ours, on the same seeds."""
    said = []
    for name in sorted(groups.keys() - OURS.keys()):
        found, arrived = ratios(groups["pride"], groups[name], TARGETS[0])
        if found:
            sure = f"; 95 %: {ends[0]:.2f} to {ends[1]:.2f}" if (ends := interval(found)) else ""
            said.append(f"{name} ({'' if arrived else 'at least '}{np.exp(np.mean(np.log(found))):.2f}x{sure})")
    return f"Time to {100 * TARGETS[0]:.0f} %, theirs over pride's: {', '.join(said)}."


def draw(groups: Mapping[str, Rows], path: Path) -> None:
    """Accuracy over time, mean over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    for name, of in groups.items():
        times = np.arange(0.0, max(row["times"][-1] for row in of), 1.0)
        mean = np.mean([np.interp(times, *smooth(row)) for row in of], axis=0)
        axes.plot(times, 100 * mean, label=name, lw=2.4 if name in OURS else 1.2, ls="--" if "whole" in name else "-")
    axes.set(xlabel="seconds", ylabel="accuracy, % (mean of the peers)", ylim=(60, 90))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
