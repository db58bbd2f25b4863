"""Virtual time: messages per second, what share of the work is not learning, and how both scale.

    python scripts/bench_simulate.py [--json] [--seconds 60] [--scale]

CPU seconds of this process throughout, so that a busy machine changes little. ``messages_per_wall_s``: whole messages
delivered to nodes per CPU second of a toy run, building and summary included. ``outside_share``: the part of a digits
run (dlion on hetero-system) that is neither gradient nor selection nor addition; evaluation is left out of the sum.
``--scale``: the same toy job on more and more peers, and the rate of a day of 32 peers.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
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
    watch.method("gradient", Trainer, "step")
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
    """Counts the messages that exchange lanes take in."""

    def __init__(self) -> None:
        self.count = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return codec.decode(*args, **kwargs)

        vars(lane)["decode"] = counted


def run(deliveries: Deliveries, job: str, topology: Topology, seconds: float, **settings: Any) -> dict[str, Any]:
    flags = {key.replace("__", "."): value for key, value in settings.items()}
    plan = Plan(load_job(job, {"job.until": seconds, **flags}), topology)
    before, begin = deliveries.count, time.process_time()
    summary = verb.run_simulation(plan)
    cpu = time.process_time() - begin
    messages = deliveries.count - before
    return {
        "exchange": summary["exchange"],
        "topology": plan.topology.name,
        "peers": len(plan.peers),
        "steps": sum(summary["steps"].values()),
        "messages": messages,
        "cpu_s": round(cpu, 3),
        "messages_per_cpu_s": round(messages / cpu),
        "us_per_message": round(1e6 * cpu / messages, 1),
        "virtual_per_cpu_s": round(summary["virtual_seconds"] / cpu, 1),
        "rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def grown(clouds: int, members: int, step_s: float, folder: Path) -> Topology:
    """``clouds`` micro-clouds of ``members`` equal peers; bridges between all of them, along a tree above eight."""
    names = [f"c{n:03d}" for n in range(clouds)]
    lines = [f'talk = "{"bridges" if clouds <= 8 else "tree"}"', "[clouds]"]
    lines += [f"{c}.members = {json.dumps([f'{c}p{n:02d}' for n in range(members)])}" for c in names]
    lines += ["[compute]"] + [f"{c}.samples_per_s = {64 / step_s}" for c in names]
    lines += ["[lan]", 'bandwidth = "1Gbit"', 'delay = "0.2ms"']
    for n, a in enumerate(names):
        for b in names[n + 1 :] if clouds <= 8 else names[n + 1 : n + 2]:
            lines += ["[[wan]]", f'between = ["{a}", "{b}"]', 'bandwidth = "50Mbit"', 'delay = "30ms"']
    path = folder / f"{clouds}x{members}.toml"
    path.write_text("\n".join(lines))
    return replace(load_topology(str(path)), name=path.stem)


def shares(deliveries: Deliveries, seconds: float) -> dict[str, float]:
    """Categories of the digits run, as shares of all but evaluation."""
    watch = instrumented()
    result = run(deliveries, "digits", load_topology("hetero-system"), seconds, exchange__name="dlion")
    whole = result["cpu_s"] - watch.seconds.pop("evaluation")
    found = {
        name: watch.seconds[name] / whole for name in ("gradient", "selection", "apply", "encode", "decode", "log")
    }
    found["loop, links, sessions, node"] = 1.0 - sum(found.values())
    found["outside"] = 1.0 - found["gradient"] - found["selection"] - found["apply"]
    return {name: round(share, 3) for name, share in found.items()}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object instead of tables.")
@click.option("--seconds", default=60.0, help="Virtual seconds of the toy runs.")
@click.option("--scale", is_flag=True, help="Also grow the topology.")
def main(as_json: bool, seconds: float, scale: bool) -> None:
    deliveries = Deliveries()
    rows = [
        run(deliveries, "toy", load_topology(topology), seconds, exchange__name=exchange)
        for exchange, topology in (("full", "homogeneous"), ("dlion", "hetero-system"), ("dlion", "four-clouds"))
    ]
    if scale:
        rows += scaled(deliveries)
    categories = shares(deliveries, 20.0)
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


def scaled(deliveries: Deliveries) -> list[dict[str, Any]]:
    import tempfile

    settings = {"exchange__name": "dlion", "pace__name": "free", "evaluate__every": 60.0}
    with tempfile.TemporaryDirectory() as folder:
        return [
            run(deliveries, "toy", grown(clouds, 10, 5.0, Path(folder)), seconds, **settings)
            for clouds, seconds in ((1, 120.0), (3, 60.0), (10, 15.0))
        ]


if __name__ == "__main__":
    main()
