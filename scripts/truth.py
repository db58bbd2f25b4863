"""Virtual time tells the truth: the same job live and simulated, side by side.

    python scripts/truth.py [--exchange dlion --exchange ako] [--topology hetero-system] [--trace LTE.down.xz]
                            [--until 30s] [--after 15s] [--way up --way lab] [--seeds 5] [--lives 1] [--out DIR]

``up``: a process per peer, links shaped in the process. ``lab``: hosts of their own, kernel TCP, the WAN outside the
program (needs root, see wan_lab). ``--trace``: hetero-system over again, with this Mahimahi trace between a and c. Only
what happened before ``--until`` counts, so that the drain does not; each ``--after`` is a table of its own, without the
start.

What must agree, live run against its replay in virtual time (the same seed and network; peers begin as far apart as
they did, for how old updates are in whole steps follows from that):
- steps of each peer, and bytes of each directed link and of all together: within 5 % (or one step: the one that was
  under way at the end);
- quantiles of staleness: within 5 %, or less than one step, as they are whole numbers;
- time to each target: the mean of the live runs against that of simulated seeds, which know no live run, within the
  larger of 10 % and the 95 % interval of that mean.
A live run is void when the machine missed the modelled pace of steps, or of the work between steps, by more than 2 %,
or was late as a network. It is repeated, up to ``--tries`` times, and never counted. Nothing is averaged away: the
table shows the worst peer, the worst link, the worst run.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import dlion
from dlion.config.find import find
from dlion.config.units import seconds
from dlion.observe.read import read_directory
from dlion.observe.runlog import Apply, End, Send, Step
from dlion.observe.summary import mean_accuracy, stalled_share, time_to

SCRIPTS = Path(__file__).parent
QUANTILES = (0.5, 0.9, 0.99)
NEAR = 0.05
TIME_NEAR = 0.10
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantile of Student's t for 1, 2, ... degrees of freedom."""
LINK_SHARE_MIN = 0.005
"""A link that carries less than this share of all bytes is judged with the total only: a message more is a tenth."""
BUSY_MAX = 0.02
"""A live run of which some peer spent this share more than the simulated one in work between steps is void."""


@dataclass(frozen=True)
class Facts:
    """What one run did in the time that counts."""

    way: str
    exchange: str
    topology: str
    seed: int
    steps: Mapping[str, int]
    link_bytes: Mapping[str, int]
    staleness: Mapping[str, float]
    time_to: Mapping[str, float | None]
    overrun: float
    between: float
    """Share of its time that the worst peer waited for its own exchange lane between steps."""
    directory: str
    void: str
    """Why it says nothing about time; empty when it does."""

    @property
    def all_bytes(self) -> int:
        return sum(self.link_bytes.values())


@dataclass(frozen=True)
class Line:
    """One comparison: simulated, live, their difference as a share, and whether it is within the limit."""

    what: str
    simulated: float | None
    live: float | None
    difference: float
    limit: float
    near: bool
    about: str = ""


def facts(directory: Path, way: str, span_s: tuple[float, float], targets: Sequence[float]) -> Facts:
    """A run in figures: what lies in ``span_s``, and times to targets from its start."""
    run = read_directory(directory)
    after_s, until_s = span_s
    steps: dict[str, int] = {}
    sent: dict[str, int] = {}
    gaps: list[Any] = []
    for peer, log in run.peers.items():
        ends = log[Step]["t"]
        steps[peer] = int(((ends > after_s) & (ends <= until_s)).sum())
        sends, applies = log[Send], log[Apply]
        counts = (sends["t"] > after_s) & (sends["t"] <= until_s)
        for to in np.unique(sends["to"]):
            sent[f"{peer}>{to}"] = int(sends["bytes"][counts & (sends["to"] == to)].sum())
        heard = (applies["t"] > after_s) & (applies["t"] <= until_s) & (applies["origin"] != peer)
        gaps.append(np.maximum(applies["mine"][heard] - 1 - applies["step"][heard], 0))
    every = np.concatenate(gaps)
    quantiles = {f"p{100 * q:g}": float(np.quantile(every, q)) if every.size else 0.0 for q in QUANTILES}
    curve = mean_accuracy(run)
    overrun = max((float(o) for log in run.peers.values() for o in log[End]["overrun"]), default=0.0)
    broken = any(bool(v) for log in run.peers.values() for v in log[End]["void"])
    void = f"missed the modelled pace by {overrun:.1%}" if broken else ""
    return Facts(
        way=way,
        exchange=run.header.exchange,
        topology=run.header.topology,
        seed=run.header.seed,
        steps=steps,
        link_bytes=sent,
        staleness=quantiles | {"mean": float(every.mean()) if every.size else 0.0},
        time_to={f"{target:.2f}": time_to(curve, target) for target in targets},
        overrun=overrun,
        between=max(stalled_share(log)["room"] for log in run.peers.values()),
        directory=str(directory),
        void=void,
    )


@dataclass(frozen=True)
class Case:
    """A job over a topology with a strategy; ``run`` makes its runs."""

    job: str
    topology: str
    exchange: str
    until: str
    sets: tuple[str, ...]
    out: Path
    targets: tuple[float, ...]
    realtime: bool = False

    def run(self, way: str, seed: int) -> Facts:
        """Run once. Raises CalledProcessError with the run's own words on stderr."""
        directory = self._new(way, seed)
        verb = [str(SCRIPTS / "wan_lab.py")] if way == "lab" else ["-m", "dlion", way]
        before = ["chrt", "--rr", "1"] if self.realtime and way != "simulate" else []
        words = ["--job", self.job, "--topology", self.topology, "--exchange", self.exchange, "--until", self.until]
        words += [word for text in self.sets for word in ("--set", text)]
        self._dlion([*before, sys.executable, *verb, *words, "--seed", str(seed)], directory)
        found = facts(directory, way, (0.0, seconds(self.until)), self.targets)
        if not found.void and json.loads((directory / "summary.json").read_text())["void"]:
            return replace(found, void="the router was late")
        return found

    def replayed(self, live: Facts) -> Facts:
        """The same run in virtual time. Raises CalledProcessError."""
        directory = self._new(f"{live.way}-replayed", live.seed)
        self._dlion([sys.executable, "-m", "dlion", "replay", live.directory], directory)
        return facts(directory, "replay", (0.0, seconds(self.until)), self.targets)

    def _new(self, way: str, seed: int) -> Path:
        name = f"{Path(self.topology).stem}-{self.exchange}-{way}-{seed}"
        return next(path for n in itertools.count() if not (path := self.out / f"{name}-{n}").exists())

    def _dlion(self, command: Sequence[str], out: Path) -> None:
        source = str(Path(dlion.__file__).parent.parent)
        subprocess.run(
            [*command, "--out", str(out), "--json"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": source, "OPENBLAS_NUM_THREADS": "1"},
        )

    def later(self, found: Facts, after: str) -> Facts:
        """The same run, counted from ``after`` on."""
        span_s = seconds(after), seconds(self.until)
        return replace(facts(Path(found.directory), found.way, span_s, self.targets), void=found.void)


def share(live: float, simulated: float) -> float:
    return abs(live / simulated - 1) if simulated else float(live != simulated)


def worst(
    what: str, live: Mapping[str, float], simulated: Mapping[str, float], names: Sequence[str], grain: float = 0.0
) -> Line:
    """The peer or link whose figures differ most; a difference of ``grain`` is none."""
    name = max(names, key=lambda n: share(live.get(n, 0), simulated.get(n, 0)))
    a, b = simulated.get(name, 0), live.get(name, 0)
    middle = float(np.median([share(live.get(n, 0), simulated.get(n, 0)) for n in names]))
    about = f"worst is {name}; median difference {middle:.1%}"
    near = all(abs(live.get(n, 0) - (s := simulated.get(n, 0))) <= max(NEAR * s, grain) for n in names)
    return Line(what, a, b, share(b, a), NEAR, near, about)


def lines_of(live: Facts, simulated: Facts) -> Iterator[Line]:
    """One live run against its replay; times are compared over all runs."""
    yield worst("steps per peer", live.steps, simulated.steps, sorted(simulated.steps), grain=1)
    both = sorted(live.link_bytes.keys() | simulated.link_bytes.keys())
    big = [k for k in both if simulated.link_bytes.get(k, 0) >= LINK_SHARE_MIN * simulated.all_bytes]
    yield worst("bytes per link", live.link_bytes, simulated.link_bytes, big)
    a, b = simulated.all_bytes, live.all_bytes
    yield Line("bytes of all links", a, b, share(b, a), NEAR, share(b, a) <= NEAR)
    for name, a_q in simulated.staleness.items():
        b_q = live.staleness[name]
        near = share(b_q, a_q) <= NEAR or (name != "mean" and abs(a_q - b_q) < 1)
        yield Line(f"staleness {name}", a_q, b_q, share(b_q, a_q), NEAR, near)


def times_of(lives: Sequence[Facts], simulated: Sequence[Facts]) -> Iterator[Line]:
    """Time to each target that every run reached: means against each other."""
    for target in simulated[0].time_to:
        a = [t for f in simulated if (t := f.time_to[target]) is not None]
        b = [t for f in lives if (t := f.time_to[target]) is not None]
        if len(a) < len(simulated) or len(b) < len(lives):
            if a or b:
                about = f"reached by {len(a)}/{len(simulated)} simulated, {len(b)}/{len(lives)} live"
                yield Line(f"time to {target}", None, None, float("nan"), TIME_NEAR, bool(a and b), about)
            continue
        mean, deviation = float(np.mean(a)), float(np.std(a, ddof=1)) if len(a) > 1 else 0.0
        interval = STUDENT[min(len(a), len(STUDENT) + 1) - 2] * deviation / len(a) ** 0.5 if len(a) > 1 else 0.0
        limit = max(TIME_NEAR, interval / mean if mean else 0.0)
        difference = share(float(np.mean(b)), mean)
        about = f"{len(a)} seeds {min(a):.1f} to {max(a):.1f} s; {len(b)} live {min(b):.1f} to {max(b):.1f} s"
        yield Line(f"time to {target}", mean, float(np.mean(b)), difference, limit, difference <= limit, about)


def tell(console: Console, title: str, lines: Sequence[Line]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("what", "simulated", "live", "differs", "limit", "", ""):
        table.add_column(name, justify="left" if name in ("what", "") else "right")
    for line in lines:
        a, b = ("-" if v is None else f"{v:,.4g}" if v < 1e5 else f"{v:,.0f}" for v in (line.simulated, line.live))
        verdict = "ok" if line.near else "MISS"
        table.add_row(line.what, a, b, f"{line.difference:.1%}", f"{line.limit:.0%}", verdict, line.about)
    console.print(table)


def traced(trace: Path, out: Path) -> str:
    """hetero-system with ``trace`` in place of 35 Mbit/s between a and c; where it was written."""
    text = find("topology", "hetero-system").path.read_text()
    table = f'{{ trace = {json.dumps(str(trace.resolve()))}, format = "mahimahi" }}'
    path = out / f"{trace.name.partition('.')[0].lower()}.toml"
    path.write_text(text.replace('"35Mbit"', table))
    return str(path)


COMMON = ("job", "until", "sets", "targets", "realtime")


@click.command()
@click.option("--job", default="digits", show_default=True)
@click.option("--topology", "topologies", multiple=True, default=("hetero-system",), show_default=True)
@click.option("--exchange", "exchanges", multiple=True, default=("dlion",), show_default=True)
@click.option("--until", default="30s", show_default=True)
@click.option("--after", "afters", multiple=True, help="One more table, of what came later.", metavar="DURATION")
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Of Mahimahi.")
@click.option("--way", "ways", multiple=True, default=("up",), type=click.Choice(["up", "lab"]), show_default=True)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A key of the job.")
@click.option("--target", "targets", multiple=True, type=float, default=(0.8, 0.9), show_default=True)
@click.option("--seeds", default=5, show_default=True, help="Simulated seeds.")
@click.option("--lives", default=1, show_default=True, help="Live runs that count, of seeds 0, 1, ...")
@click.option("--tries", default=3, show_default=True, help="How often a void run is repeated.")
@click.option("--realtime", is_flag=True, help="Live processes before all others, on a machine shared with others.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where runs and truth.json go.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def main(topologies: tuple[str, ...], exchanges: tuple[str, ...], ways: tuple[str, ...], **options: Any) -> None:
    """Run every case live and simulated, and compare. Exit code 1 when something misses its limit."""
    console = Console(stderr=options["as_json"], highlight=False, width=140)
    out = options["out"] or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-truth"
    out.mkdir(parents=True, exist_ok=True)
    if options["trace"]:
        topologies = (*topologies, traced(options["trace"], out))
    cases: list[dict[str, Any]] = []
    for topology, exchange in itertools.product(topologies, exchanges):
        case = Case(topology=topology, exchange=exchange, out=out, **{k: options[k] for k in COMMON})
        simulated = [case.run("simulate", seed) for seed in range(max(options["seeds"], options["lives"]))]
        for way in ways:
            lives, void = live_runs(case, way, simulated[: options["lives"]], options["tries"])
            title = (
                f"{exchange} on {Path(topology).stem}, {way}: {len(lives)} live runs of {case.until}, {len(void)} void"
            )
            replays = [case.replayed(live) for live in lives]
            for after in ("0s", *options["afters"]):
                models, alive, again = ([case.later(f, after) for f in some] for some in (simulated, lives, replays))
                lines = compared(alive, again, models)
                tell(console, f"{title}; from {after} on", lines)
                everything = [*map(asdict, (*models, *alive, *again, *void))]
                cases.append({"title": title, "after": after, "lines": [*map(asdict, lines)], "runs": everything})
            for one in void:
                console.print(f"void: seed {one.seed}, {one.void}; overrun {one.overrun:.1%}")
            (out / "truth.json").write_text(json.dumps(cases, indent=1) + "\n")
    if options["as_json"]:
        click.echo(json.dumps(cases))
    console.print(f"figures of every run: {out / 'truth.json'}")
    if not all(line["near"] for case in cases for line in case["lines"]):
        sys.exit(1)


def compared(lives: Sequence[Facts], replays: Sequence[Facts], simulated: Sequence[Facts]) -> list[Line]:
    """Each live run against its replay, the worst of them per line; then the times."""
    if not lives:
        return [Line("a run fit for timing", None, None, float("nan"), 0.0, False, "all were void")]
    runs = [lines_of(live, again) for live, again in zip(lives, replays, strict=True)]
    worst_of = [max(same, key=lambda line: (not line.near, line.difference)) for same in zip(*runs, strict=True)]
    return [*worst_of, *times_of(lives, simulated)]


def live_runs(case: Case, way: str, simulated: Sequence[Facts], tries: int) -> tuple[list[Facts], list[Facts]]:
    """A run that counts for each simulated one, and the void ones."""
    good: list[Facts] = []
    void: list[Facts] = []
    for model in simulated:
        for _ in range(tries):
            found = case.run(way, model.seed)
            if not found.void and (more := found.between - model.between) > BUSY_MAX:
                found = replace(found, void=f"{more:.1%} more of its time than modelled went into work between steps")
            (void if found.void else good).append(found)
            if not found.void:
                break
    return good, void


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}\n{error.stderr.decode(errors='replace')}")
