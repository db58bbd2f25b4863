"""The league: every strategy of the family on the same links, data and gradients, in virtual time.

    python scripts/league.py tune --data ../shared/data/training             # learning rates, on another seed
    python scripts/league.py run --data ../shared/data/training SCENARIO...  # resumable: finished runs are skipped
    python scripts/league.py page                                            # docs/league.md and its pictures

Law: the experiment, and nothing that the program itself needs. Each run is a process of its own (``league.py one``),
its row one line of docs/league/results.jsonl; the page is a function of those lines. Every strategy gets the same
model, batches, optimizer, links and the same few learning rates to choose from; all other settings are its defaults.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import league_page
import numpy as np
from league_scenarios import SCENARIOS

from dlion.cli.build import Plan, node_settings, workload_of
from dlion.cli.simulate import Played, play
from dlion.config import load_job
from dlion.mesh.topology import Topology
from dlion.observe.runlog import Send
from dlion.observe.summary import evaluations, together

RESULTS = Path(__file__).parent.parent / "docs" / "league" / "results.jsonl"
RATES = (0.02, 0.05, 0.1)
"""Learning rates to choose from; half the least or twice the greatest is tried too where that is the best, ..."""
BEYOND_MAX = 2
"""... and so on, so often."""
TUNE_SCENARIOS, TUNE_S = ("hetero-system", "homogeneous"), 40.0
TUNE_SEEDS = (100, 101)
"""Of the first all rates run, of the second the two that were best."""

ORACLE = "oracle"
STRATEGIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ORACLE: ("full", {}),
    **{name: (name, {}) for name in ("full", "hop", "gaia", "ako", "tfako", "dlion", "maxn", "choco", "fedavg")},
    **{name: (name, {}) for name in ("diloco", "sparseloco", "noloco", "streaming", "local-sgd", "pride")},
    "pride-whole": ("pride", {"exchange.settings.slices": 1}),
    "dlion-residual": ("dlion", {"exchange.settings.residual": True, "exchange.settings.transfer": "off"}),
}
"""Rows of the table: strategy and what differs from its defaults."""
LENT = ("full", "gaia", "hop", "ako", "diloco", "streaming")
PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{f"{name}-fixed": (name, {"batching.mode": "fixed"}) for name in LENT},
    "dlion-ratio": ("dlion", {"exchange.settings.weighting": "ratio"}),
    "dlion-unweighted": ("dlion", {"exchange.settings.weighting": "none"}),
    "dlion-ratio-growing": ("dlion", {"exchange.settings.weighting": "ratio", "batching.growth": True}),
}
"""Others as their papers ran them (batches dealt by speed are DLion's, which weighs by ratio and lets the batch grow),
and the three weightings. Learning rates are those of the strategy itself."""
ABLATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "pride, speculation 0": ("pride", {"exchange.settings.speculation": 0.0}),
    "pride, speculation 0.5": ("pride", {"exchange.settings.speculation": 0.5}),
    "pride, foresight 0": ("pride", {"exchange.settings.foresight": 0.0}),
    "pride, foresight 0.5": ("pride", {"exchange.settings.foresight": 0.5}),
    "pride, 2 slices": ("pride", {"exchange.settings.slices": 2}),
    "pride, trust_steps 2": ("pride", {"exchange.settings.trust_steps": 2}),
    "pride, trust_steps 32": ("pride", {"exchange.settings.trust_steps": 32}),
    "pride, 8 bits": ("pride", {"exchange.settings.bits": 8}),
    "pride, 16 bits": ("pride", {"exchange.settings.bits": 16}),
    "pride, period 0.05 s": ("pride", {"exchange.settings.period_s": 0.05}),
    "pride, period 1 s": ("pride", {"exchange.settings.period_s": 1.0}),
    "pride, bounded": ("pride", {"pace.name": "bounded"}),
    "pride, batch grows": ("pride", {"batching.growth": True}),
    "pride, momentum 0": ("pride", {"train.momentum": 0.0}),
    "pride, batch fixed": ("pride", {"batching.mode": "fixed"}),
}
"""Ours with one thing changed."""
ROWS = {**STRATEGIES, **PUBLISHED, **ABLATIONS}


@dataclass(frozen=True)
class Spec:
    """One run."""

    strategy: str
    scenario: str
    seed: int
    rate: float
    until_s: float
    partition: str = "iid"
    workload: str = "fashion-mnist"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def flags(self, data: Path) -> dict[str, object]:
        name, changes = ROWS.get(self.strategy, (self.strategy, {}))  # else a stranger's, by its name
        return {
            "exchange.name": name,
            "job.until": self.until_s,
            "job.seed": self.seed,
            "data.dir": str(data),
            "data.partition": self.partition,
            "model.hidden": [512, 256],
            "train.learning_rate": self.rate,
            "train.momentum": 0.9,
            "batching.growth": False,
            "evaluate.every": 5.0,
            "evaluate.samples": 2000,
            **SCENARIOS[self.scenario].flags,
            **changes,
        }


@dataclass(frozen=True)
class Row:
    """What one run came to. Times in seconds, bytes as sent between micro-clouds; ``curve`` of the deployable view."""

    spec: dict[str, Any]
    times: list[float]
    mean: list[float]
    worst: list[float]
    wan_bytes: list[float]
    full_mean: float
    full_worst: float
    full_of_mean: float
    """On the full test set, as those two: of the mean of the training replicas."""
    stalled: float
    steps: tuple[int, int]
    disagreement: float | None
    cpu_s: float
    """Of the whole process, from its imports to the last evaluation."""
    log_sha256: str
    parameters: int
    replica: list[float]
    """Accuracy of the first peer's training replica, beside its deployable view in ``first``."""
    first: list[float]
    commit: str
    failed: str = field(default="")


def plan_of(spec: Spec, data: Path) -> Plan:
    scenario = SCENARIOS[spec.scenario]
    topology = scenario.topology()
    job = load_job(spec.workload, spec.flags(data))
    return Plan(job, ideal(topology) if spec.strategy == ORACLE else topology)


def ideal(topology: Topology) -> Topology:
    """The same peers, and links without limit or delay."""
    return replace(
        topology,
        links={e: replace(link, resources=(), delay_s=0.0, up=None) for e, link in topology.links.items()},
        resources={},
    )


def perform(spec: Spec, data: Path) -> Row:
    """Simulate; the oracle's exchange lane is free of charge, and nobody dies on it."""
    plan = plan_of(spec, data)
    if spec.strategy == ORACLE:
        free = replace(node_settings(plan.job), exchange_s_per_byte=0.0, exchange_s_per_item=0.0)
        return row_of(spec, plan, play(plan, settings=free, replica_of=plan.peers[0]))
    return row_of(spec, plan, play(plan, SCENARIOS[spec.scenario].deaths, replica_of=plan.peers[0]))


def row_of(spec: Spec, plan: Plan, played: Played) -> Row:
    times, values = together([evaluations(played.run.peers[peer], "accuracy") for peer in played.views])
    seen_at, seen = evaluations(played.run.peers[plan.peers[0]], "accuracy", "replica")
    beside = np.interp(times, seen_at, seen) if seen.size else ()
    sends = [log[Send] for log in played.run.peers.values()]
    sent_at = np.concatenate([s["t"][s["wan"]] for s in sends])
    order = np.argsort(sent_at)
    total = np.concatenate(([0.0], np.cumsum(np.concatenate([s["bytes"][s["wan"]] for s in sends])[order])))
    workload = workload_of(plan, plan.peers[0])
    disagreement = played.summary["replica_disagreement"]
    views = list(played.views.values())
    one = disagreement is not None and disagreement < 1e-4
    full = [workload.evaluate(view).accuracy for view in (views[:1] if one else views)]
    centre = np.mean(list(played.replicas.values()), axis=0, dtype=np.float32)
    steps = [played.summary["steps"][peer] for peer in played.views]
    return Row(
        spec=asdict(spec),
        times=[round(float(t), 3) for t in times],
        mean=[round(float(a), 5) for a in np.nanmean(values, axis=0)],
        worst=[round(float(a), 5) for a in np.nanmin(values, axis=0)],
        wan_bytes=[float(total[i]) for i in np.searchsorted(sent_at[order], times, side="right")],
        full_mean=float(np.mean(full)),
        full_worst=float(min(full)),
        full_of_mean=float(workload.evaluate(centre).accuracy),
        stalled=max(played.summary["stalled_share"][peer] for peer in played.views),
        steps=(min(steps), max(steps)),
        disagreement=disagreement,
        cpu_s=round(time.process_time(), 1),
        log_sha256=played.summary["log_sha256"] or "",
        parameters=workload.layout.size,
        replica=[round(float(a), 5) for a in beside],
        first=[round(float(a), 5) for a in values[0]],
        commit=commit(),
    )


def commit() -> str:
    """The code that ran, "+" if it was changed since."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "dlion"], check=False)
    return head.stdout.strip() + "+" * bool(changed.returncode)


def rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines() if line]


def run_all(specs: Iterable[Spec], data: Path, jobs: int, limit_s: float) -> None:
    """Run what has no row yet, ``jobs`` processes at a time, each at most ``limit_s`` real seconds."""
    have = {json.dumps(row["spec"], sort_keys=True) for row in rows()}
    todo = [spec for spec in specs if spec.key not in have]

    def one(spec: Spec) -> None:
        command = [sys.executable, __file__, "one", "--data", str(data), spec.key]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
            line, error = done.stdout.strip(), done.stderr.strip()[-300:]
        except subprocess.TimeoutExpired:
            line, error = "", f"more than {limit_s:g} s"
        why = error.splitlines()[-1] if error else "no word of why"
        row: dict[str, Any] = json.loads(line) if line else {"spec": asdict(spec), "failed": why}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["failed"]:
            click.echo(f"FAILED {spec.key}: {error}", err=True)
            return
        click.echo(
            f"{spec.scenario} {spec.partition} {spec.strategy} seed {spec.seed} rate {spec.rate}: "
            f"{row['mean'][-1]:.4f} after {row['cpu_s']} s of processor time",
            err=True,
        )

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))


def tuned() -> dict[str, float]:
    """Each strategy's learning rate, the best of its rates."""
    return {strategy: ranked[0] for strategy, ranked in rates_ranked().items()}


def rates_ranked(tune_seeds: tuple[int, ...] = TUNE_SEEDS) -> dict[str, list[float]]:
    """Each strategy's learning rates that were tried in every tuning scenario, best first: those that ran on more
    seeds, then by the mean accuracy over the second half of all their tuning runs."""
    late: dict[tuple[str, float], dict[tuple[int, str], float]] = {}
    for row in rows():
        spec = row["spec"]
        if spec["seed"] in tune_seeds:
            second = [0.0] if row["failed"] else row["mean"][len(row["mean"]) // 2 :]
            of_rate = late.setdefault((spec["strategy"], spec["rate"]), {})
            of_rate[spec["seed"], spec["scenario"]] = sum(second) / len(second)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for (strategy, rate), runs in late.items():
        seeds = [seed for seed in tune_seeds if all((seed, scenario) in runs for scenario in TUNE_SCENARIOS)]
        if seeds:
            whole = [late for (seed, _), late in runs.items() if seed in seeds]
            found.setdefault(strategy, []).append((len(seeds), sum(whole) / len(whole), rate))
    return {strategy: [rate for *_, rate in sorted(of, reverse=True)] for strategy, of in found.items()}


def beyond(ranked: list[float]) -> list[float]:
    """What to try next where the best is the least or the greatest that was tried."""
    if not ranked or min(ranked) < ranked[0] < max(ranked):
        return []
    return [ranked[0] / 2 if ranked[0] == min(ranked) else ranked[0] * 2]


def rate_of(strategy: str, scenario: str, rates: Mapping[str, float]) -> float | None:
    """The scenario's, else the row's own or its strategy's; None: not tuned yet."""
    base = ROWS.get(strategy, (strategy,))[0]
    return SCENARIOS[scenario].rate or rates.get(strategy) or rates.get(base)


data_option = click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
jobs_option = click.option("--jobs", default=1, show_default=True, help="Processes at a time.")
limit_option = click.option("--limit", "limit_s", default=600.0, show_default=True, help="Real seconds per run.")
strategies_option = click.option("--strategies", default=",".join(STRATEGIES), help="Comma-separated; default: all.")


@click.group()
def league() -> None:
    """Rank the strategies."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)


@league.command()
@data_option
@jobs_option
@limit_option
@strategies_option
def tune(data: Path, jobs: int, limit_s: float, strategies: str) -> None:
    """Try every learning rate on two scenarios, then the best two on another seed; neither counts for anything else."""

    def specs(names: Iterable[str], rate: float, seed: int = TUNE_SEEDS[0]) -> list[Spec]:
        return [Spec(s, scenario, seed, rate, TUNE_S) for s in names for scenario in TUNE_SCENARIOS]

    names = strategies.split(",")
    run_all([spec for rate in RATES for spec in specs(names, rate)], data, jobs, limit_s)
    for _ in range(BEYOND_MAX):
        ranked = rates_ranked(TUNE_SEEDS[:1])
        run_all([spec for s in names for r in beyond(ranked.get(s, [])) for spec in specs([s], r)], data, jobs, limit_s)
    ranked = rates_ranked(TUNE_SEEDS[:1])
    best = [spec for s in names for r in ranked.get(s, [])[:2] for spec in specs([s], r, TUNE_SEEDS[1])]
    run_all(best, data, jobs, limit_s)


@league.command()
@data_option
@jobs_option
@limit_option
@strategies_option
@click.option("--seeds", default="0", show_default=True, help="Comma-separated.")
@click.option("--until", "until_s", default=80.0, show_default=True, help="Virtual seconds.")
@click.option("--partition", default="iid", show_default=True)
@click.option("--workload", default="fashion-mnist", show_default=True)
@click.option("--ablations", is_flag=True, help="Ours with one thing changed at a time, instead of --strategies.")
@click.argument("scenarios", nargs=-1, required=True, type=click.Choice(list(SCENARIOS)))
def run(data: Path, jobs: int, limit_s: float, scenarios: tuple[str, ...], **of: Any) -> None:
    """Run strategies on scenarios with their tuned learning rates."""
    rates = tuned()
    names = list(ABLATIONS) if of["ablations"] else of["strategies"].split(",")
    specs = []
    for scenario, seed, strategy in product(scenarios, of["seeds"].split(","), names):
        if (rate := rate_of(strategy, scenario, rates)) is None:
            raise click.ClickException(f"{strategy} has no learning rate yet: run tune --strategies {strategy} first")
        specs.append(Spec(strategy, scenario, int(seed), rate, of["until_s"], of["partition"], of["workload"]))
    run_all(specs, data, jobs, limit_s)


@league.command()
@data_option
@click.argument("spec")
def one(data: Path, spec: str) -> None:
    """One run, given as the JSON of its row's ``spec``; prints the row."""
    click.echo(json.dumps(asdict(perform(Spec(**json.loads(spec)), data))))


@league.command()
def page() -> None:
    """Write docs/league.md and its pictures from the results."""
    about, rates = {name: scenario.about for name, scenario in SCENARIOS.items()}, tuned()
    league_page.write(rows(), rates, lambda *who: rate_of(*who, rates), about, TUNE_SEEDS, RESULTS.parent)


if __name__ == "__main__":
    league()
