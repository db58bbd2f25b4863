"""Virtual time: messages per second, what share of the work is not learning, and how both scale.

    python scripts/bench_simulate.py [--json] [--calls] [--seconds 60]
    python scripts/bench_simulate.py --day pride [--hours 24] --wan DIRECTORY   # 4 bridged micro-clouds of 8, traces
    python scripts/bench_simulate.py --thousand pride [--seconds 600]           # 100 micro-clouds of 10, along a tree
    python scripts/bench_simulate.py --flat docs/simulate.png                   # 10 to 1,000 peers, and a picture
    python scripts/bench_simulate.py --league pride --data DIRECTORY [--job fashion-cnn]    # shares of a league run

CPU seconds of this process throughout, so that a busy machine changes little. ``messages_per_wall_s``: whole messages
delivered to nodes per CPU second of a toy run, building and summary included. ``outside_share``: the part of a digits
run (dlion on hetero-system) that is neither gradient nor selection nor addition; evaluation is left out of the sum.
A step lasts 5 s in the large runs, the toy job's batch does not grow, and weights are measured once a minute.
``--flat`` looks at the middle of one run each, in which all have heard of all. ``--calls`` counts calls of functions,
Python's and C's, which no other process can change; it about trebles the CPU seconds of the same run.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import wraps
from itertools import combinations
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click

from dlion import blocks, lane, selection, tensors
from dlion.cli import simulate as verb
from dlion.cli.build import Plan
from dlion.config import load_job, load_topology
from dlion.exchange import owed
from dlion.learn.trainer import Trainer
from dlion.observe import runlog
from dlion.observe import summary as observe_summary
from dlion.wire import codec

Topology = Any


class Stopwatch:
    """CPU seconds by category; time in an inner category is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[list[float]] = []

    def wrap(self, category: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner = [0.0]
            self._open.append(inner)
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - begin
                self._open.pop()
                self.seconds[category] += taken - inner[0]
                if self._open:
                    self._open[-1][0] += taken

        return timed

    def method(self, category: str, owner: type[Any], *names: str) -> None:
        for name in names:
            setattr(owner, name, self.wrap(category, getattr(owner, name)))

    def function(self, category: str, function: Callable[..., Any]) -> None:
        """Everywhere in dlion where ``function`` was imported."""
        timed = self.wrap(category, function)
        for name, module in list(sys.modules.items()):
            if name.startswith("dlion"):
                for key, value in list(vars(module).items()):
                    if value is function:
                        setattr(module, key, timed)


def instrumented() -> Stopwatch:
    """Every part of a run that has a category of its own; the rest is loop, links, sessions and node."""
    watch = Stopwatch()
    watch.method("gradient", Trainer, "advance")
    watch.method("evaluation", verb.Evaluator, "_measure")
    for function in (blocks.dense, blocks.sparse, blocks.max_n, blocks.compress, owed.exact):
        watch.function("selection", function)
    watch.method("selection", selection.Spectrum, "__init__", "top", "at_least")
    watch.method("apply", blocks.Block, "add_to")
    watch.method("apply", owed.Owed, "add", "said")
    watch.function("apply", tensors.add_scaled)
    watch.function("encode", codec.encode)
    watch.function("decode", codec.decode)
    watch.method("log", runlog.RunLog, "flush")
    watch.function("log", observe_summary.summarise)
    return watch


class Deliveries:
    """Counts the messages that exchange lanes take in; with ``profile`` the calls of functions too."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.count = 0
        self.profile = profile
        self.until_s: float | None = None
        """Virtual time at which a run is ended by Enough; what it cost from SHORT_S on is in ``window``."""
        self.window = (0.0, 0)
        self._began: tuple[float, int] | None = None

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.until_s is not None:
                self._look(asyncio.get_running_loop().time())
            return codec.decode(*args, **kwargs)

        vars(lane)["decode"] = counted

    def _look(self, now_s: float) -> None:
        here = time.process_time(), self.count
        if self._began is None and now_s >= SHORT_S:
            self._began = here
        elif self._began is not None and now_s >= self.until_s:
            self.window = here[0] - self._began[0], here[1] - self._began[1]
            self._began = self.until_s = None
            raise Enough

    def calls(self, messages: int, steps: int) -> dict[str, int]:
        """Calls of functions since the last time this was asked, by message and by local step."""
        if self.profile is None:
            return {}
        calls = sum(entry.callcount for entry in self.profile.getstats())
        self.profile.clear()
        return {"calls_per_message": round(calls / messages), "calls_per_step": round(calls / steps)}


def run(deliveries: Deliveries, job: str, topology: Topology, seconds: float, **settings: Any) -> dict[str, Any]:
    flags = {key.replace("__", "."): value for key, value in settings.items()}
    plan = Plan(load_job(job, {"job.until": seconds, **flags}), topology)
    before, begin, wall = deliveries.count, time.process_time(), time.perf_counter()
    with deliveries.profile or nullcontext():
        summary = verb.run_simulation(plan)
    cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    messages, steps = deliveries.count - before, sum(summary["steps"].values())
    return {
        "exchange": summary["exchange"],
        "topology": plan.topology.name,
        "peers": len(plan.peers),
        "steps": steps,
        "messages": messages,
        **deliveries.calls(messages, steps),
        "cpu_s": round(cpu, 3),
        "wall_s": round(wall, 1),
        "messages_per_cpu_s": round(messages / cpu),
        "us_per_message": round(1e6 * cpu / messages, 1),
        "virtual_per_cpu_s": round(summary["virtual_seconds"] / cpu, 1),
        "wan_bytes_per_peer": round(summary["wan_bytes"] / len(plan.peers)),
        "log_sha256": summary["log_sha256"],
        "rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def grown(clouds: int, members: int, step_s: float, folder: Path) -> Topology:
    """``clouds`` micro-clouds of ``members`` equal peers; bridges between all of them, above eight along a tree with
    three branches at each."""
    names = [f"c{n:03d}" for n in range(clouds)]
    lines = [f'talk = "{"bridges" if clouds <= 8 else "tree"}"', "[clouds]"]
    lines += [f"{c}.members = {json.dumps([f'{c}p{n:02d}' for n in range(members)])}" for c in names]
    lines += ["[compute]"] + [f"{c}.samples_per_s = {64 / step_s}" for c in names]
    lines += ["[lan]", 'bandwidth = "1Gbit"', 'delay = "0.2ms"']
    for n, a in enumerate(names):
        for b in names[n + 1 :] if clouds <= 8 else names[3 * n + 1 : 3 * n + 4]:
            lines += ["[[wan]]", f'between = ["{a}", "{b}"]', 'bandwidth = "50Mbit"', 'delay = "30ms"']
    path = folder / f"{clouds}x{members}.toml"
    path.write_text("\n".join(lines))
    return replace(load_topology(str(path)), name=path.stem)


TRACES = (
    "ATT-LTE-driving.down.xz",
    "TMobile-LTE-driving.down.xz",
    "Verizon-LTE-short.down.xz",
    "TMobile-UMTS-driving.down.xz",
    "ATT-LTE-driving-2016.down.xz",
    "TMobile-LTE-short.down.xz",
)
"""Mahimahi traces, one for each two of four micro-clouds."""
LARGE = {
    "batching__growth": False,
    "evaluate__every": 60.0,
    "node__status_every": 5.0,
    "node__heartbeat": 10.0,
    "node__suspect_after": 20.0,
}
"""Peers look around once a step, and who is silent for four is missed; the defaults are for steps of a second."""
SHORT_S = 20.0
"""After so long all have heard of all."""


def traced(wan: Path, folder: Path) -> Topology:
    """Four micro-clouds of eight, each two joined over a recorded link."""
    names = "abcd"
    lines = ['talk = "bridges"', "[clouds]"]
    lines += [f"{c}.members = {json.dumps([f'{c}{n}' for n in range(8)])}" for c in names]
    lines += ["[compute]"] + [f"{c}.samples_per_s = {64 / 5.0}" for c in names]
    lines += ["[lan]", 'bandwidth = "1Gbit"', 'delay = "0.2ms"']
    for (a, b), trace in zip(combinations(names, 2), TRACES, strict=True):
        rate = f'{{ trace = "{wan.resolve() / "mahimahi" / trace}", format = "mahimahi" }}'
        lines += ["[[wan]]", f'between = ["{a}", "{b}"]', f"bandwidth = {rate}", 'delay = "30ms"']
    path = folder / "day.toml"
    path.write_text("\n".join(lines))
    return load_topology(str(path))


class Enough(Exception):  # noqa: N818 - no error
    """What was to be measured is over."""


def flat(deliveries: Deliveries, picture: Path, folder: Path) -> list[dict[str, Any]]:
    """Cost of a delivered message from 10 to 1,000 peers, without start and end."""
    import matplotlib.pyplot as plt

    rows = []
    for clouds in (1, 3, 10, 30, 100):
        topology = grown(clouds, 10, 5.0, folder)
        deliveries.until_s = SHORT_S + min(2000 / clouds, 300.0)
        begin = time.process_time()
        with suppress(Enough):
            run(deliveries, "toy", topology, 2 * deliveries.until_s, exchange__name="pride", **LARGE)
        cpu, messages = deliveries.window
        row = {"peers": 10 * clouds, "messages": messages, "us_per_message": round(1e6 * cpu / messages, 1)}
        rows.append({**row, "start_cpu_s": round(time.process_time() - begin - cpu, 1)})
        print(json.dumps(rows[-1]), flush=True)
    figure, axes = plt.subplots(figsize=(5.0, 3.0), layout="constrained")
    axes.semilogx([row["peers"] for row in rows], [row["us_per_message"] for row in rows], "o-")
    axes.set(xlabel="peers", ylabel="CPU per delivered message, µs", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=90)
    return rows


LEAGUE = {
    "train__learning_rate": 0.05,
    "train__momentum": 0.9,
    "batching__growth": False,
    "evaluate__every": 5.0,
    "evaluate__samples": 2000,
}
"""As scripts/league.py runs them."""


def shares(deliveries: Deliveries, seconds: float, job: str = "digits", **settings: Any) -> dict[str, float]:
    """Categories of a run on hetero-system, as shares of all but evaluation."""
    watch = instrumented()
    result = run(deliveries, job, load_topology("hetero-system"), seconds, **settings)
    whole = result["cpu_s"] - watch.seconds.pop("evaluation")
    found = {
        name: watch.seconds[name] / whole for name in ("gradient", "selection", "apply", "encode", "decode", "log")
    }
    found["loop, links, sessions, node"] = 1.0 - sum(found.values())
    found["outside"] = 1.0 - found["gradient"] - found["selection"] - found["apply"]
    return {name: round(share, 3) for name, share in found.items()}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object instead of tables.")
@click.option("--calls", is_flag=True, help="Count calls of functions too.")
@click.option("--seconds", default=60.0, help="Virtual seconds of the toy runs.")
@click.option("--day", metavar="STRATEGY", help="32 peers over recorded links, for --hours; needs --wan.")
@click.option("--hours", default=24.0, help="Virtual hours of --day.")
@click.option("--wan", type=click.Path(exists=True, path_type=Path), help="Where the traces are.")
@click.option("--thousand", metavar="STRATEGY", help="1,000 peers for --seconds.")
@click.option("--league", metavar="STRATEGY", help="Shares of a league run of --seconds; needs --data.")
@click.option("--job", default="fashion-mnist", help="Of --league: fashion-mnist or fashion-cnn.")
@click.option("--hidden", default="512,256", help="Of fashion-mnist: hidden layers; 1024,420 are the paper's 5 MB.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Where Fashion-MNIST is.")
@click.option("--flat", "picture", type=click.Path(path_type=Path), help="Draw the cost of a message there.")
def main(as_json: bool, calls: bool, seconds: float, day: str | None, thousand: str | None, **large: Any) -> None:
    deliveries = Deliveries(cProfile.Profile() if calls else None)
    with tempfile.TemporaryDirectory() as folder:
        if day is not None:
            if large["wan"] is None:
                raise click.UsageError("--day needs --wan DIRECTORY with the traces in DIRECTORY/mahimahi")
            topology, lasts_s, name = traced(large["wan"], Path(folder)), 3600 * large["hours"], day
        elif thousand is not None:
            topology, lasts_s, name = grown(100, 10, 5.0, Path(folder)), seconds, thousand
        elif large["league"] is not None:
            if large["data"] is None:
                raise click.UsageError("--league needs --data DIRECTORY with the training sets")
            of = LEAGUE | {"exchange__name": large["league"], "data__dir": str(large["data"])}
            if large["job"] == "fashion-mnist":
                of["model__hidden"] = [int(size) for size in large["hidden"].split(",")]
            print(json.dumps(shares(deliveries, seconds, large["job"], **of), indent=2))
            return
        elif large["picture"] is not None:
            flat(deliveries, large["picture"], Path(folder))
            return
        else:
            small(deliveries, as_json, seconds)
            return
        print(json.dumps(run(deliveries, "toy", topology, lasts_s, exchange__name=name, **LARGE), indent=2))


def small(deliveries: Deliveries, as_json: bool, seconds: float) -> None:
    """The toy runs and the shares of a digits run."""
    rows = [
        run(deliveries, "toy", load_topology(topology), seconds, exchange__name=exchange)
        for exchange, topology in (("full", "homogeneous"), ("dlion", "hetero-system"), ("dlion", "four-clouds"))
    ]
    categories = shares(deliveries, 20.0, exchange__name="dlion")
    ratios = {
        "messages_per_wall_s": max(row["messages_per_cpu_s"] for row in rows[:3]),
        "outside_share": categories["outside"],
    }
    if as_json:
        print(json.dumps({"ratios": ratios, "runs": rows, "digits_shares": categories}))
        return
    print("  ".join(f"{key:>18}" for key in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>18}" for value in row.values()))
    print("\nCPU of a digits run, evaluation apart")
    for name, share in categories.items():
        print(f"  {name:<30} {share:6.1%}")
    print("\n" + "\n".join(f"{name} = {value}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
