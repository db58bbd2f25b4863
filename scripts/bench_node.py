"""What exchanging costs a peer that really computes: training speed kept, lane, loop and memory.

    python scripts/bench_node.py [--json] [--seconds 8] [--batch 256] [--rounds 3]

Two processes, one BLAS thread each, train a 784-512-512-10 MLP (0.67 million parameters) on random images, unpadded.
They do so alone, and as neighbours that exchange with ``dlion`` at free pace over shaped links (50 Mbit/s, 30 ms each
way). Alone and together take turns, so that a busy machine slows both. The step is a hard case: an MLP has the fewest
operations per parameter of all usual models, and it is parameters that are exchanged.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np

from dlion.cli.build import Plan
from dlion.cli.host import Doors, Hosted, hosted
from dlion.config import load_job, load_topology
from dlion.learn.data import Dataset
from dlion.learn.workload import Workload, WorkloadSpec
from dlion.learn.workloads.classifier import Classifier
from dlion.messages import PeerId

IMAGES, PIXELS = 4096, 784
HIDDEN = (512, 512)
WARM_UP_S = 2.0
LATENESS_EVERY_S = 0.005
SPAWN = multiprocessing.get_context("spawn")
TOPOLOGY = """
talk = "mesh"
[clouds]
a.members = ["a1"]
b.members = ["b1"]
[[wan]]
between = ["a", "b"]
bandwidth = "50Mbit"
delay = "30ms"
"""
ALONE = """
talk = "mesh"
[clouds]
a.members = ["a1"]
"""


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    return Classifier.of(spec, images(), HIDDEN, (peer_index, shares))


@lru_cache(maxsize=1)
def images() -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, PIXELS), dtype=np.uint8)
    labels = rng.integers(0, 10, IMAGES)
    return Dataset(pixels, labels, pixels[:256], labels[:256], 127.5, 74.0)


def plan_of(topology: str, batch: int, folder: Path) -> Plan:
    path = folder / "net.toml"
    path.write_text(topology)
    flags = {
        "job.workload": "bench_node:build",
        "train.batch": batch,
        "batching.mode": "fixed",
        "exchange.name": "dlion",
        "pace.name": "free",
        "evaluate.every": 3600.0,
    }
    return Plan(load_job("digits", flags), load_topology(str(path)))


def lane_cpu_s(name: str) -> float:
    """CPU seconds of this process's threads called ``name``..."""
    return sum(
        time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident is not None and thread.name.startswith(name)
    )


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def stated_mb(plan: Plan, node: Any) -> float:
    """Arrays that a peer has by design: data, weights, snapshot, gradient and what recycling keeps, activations."""
    data = images().train_images.nbytes + images().test_images.nbytes
    parameters = 4 * node.ctx.layout.size
    activations = 4 * plan.job.train.batch * (PIXELS + 3 * sum(HIDDEN))
    return float(data + 8 * parameters + node.exchange.state_bytes + activations) / 1e6


async def measure(host: Hosted, plan: Plan, seconds: float, bare_mb: float) -> dict[str, float]:
    node, loop = host.node, asyncio.get_running_loop()
    await asyncio.sleep(WARM_UP_S)
    step, begin, cpu = node.step, loop.time(), time.process_time()
    exchange = lane_cpu_s("dlion-exchange")
    train = lane_cpu_s("dlion-train")
    sent = sum(link.sent_bytes for link in node.meter.links.values())
    late: list[float] = []
    while (now := loop.time()) < begin + seconds:
        await asyncio.sleep(LATENESS_EVERY_S)
        late.append(loop.time() - now - LATENESS_EVERY_S)
    taken = loop.time() - begin
    return {
        "steps_per_s": (node.step - step) / taken,
        "exchange_core": (lane_cpu_s("dlion-exchange") - exchange) / taken,
        "train_core": (lane_cpu_s("dlion-train") - train) / taken,
        "all_core": (time.process_time() - cpu) / taken,
        "late_p99_ms": 1e3 * float(np.quantile(late, 0.99)),
        "sent_mbit": 8e-6 * (sum(link.sent_bytes for link in node.meter.links.values()) - sent) / taken,
        "beyond_mb": resident_mb() - bare_mb - stated_mb(plan, node),
    }


def peer_process(topology: str, peer: str, batch: int, seconds: float, pipe: Pipe) -> None:
    import uvloop

    bare_mb = resident_mb()

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            plan = plan_of(topology, batch, Path(folder))

            async def addresses(here: str) -> Mapping[str, str]:
                pipe.send(here)
                found: Mapping[str, str] = await asyncio.to_thread(pipe.recv)
                return found

            doors = Doors(("127.0.0.1", 0), admin=None, emulate=True)
            async with hosted(plan, PeerId(peer), doors, Path(folder) / "out", addresses) as host:
                while host.node.state != "training":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                found = await measure(host, plan, seconds, bare_mb)
                host.node.stop("measured", leaving=False)
            pipe.send(found)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def together(topologies: Mapping[str, str], batch: int, seconds: float) -> list[dict[str, float]]:
    """One process per peer, name -> topology, all at the same time."""
    ends = {peer: SPAWN.Pipe() for peer in topologies}
    workers = [
        SPAWN.Process(target=peer_process, args=(topology, peer.split("@")[0], batch, seconds, ends[peer][1]))
        for peer, topology in topologies.items()
    ]
    for worker in workers:
        worker.start()
    try:
        here = {peer.split("@")[0]: pipe.recv() for peer, (pipe, _) in ends.items()}
        for pipe, _ in ends.values():
            pipe.send(here)
        return [pipe.recv() for pipe, _ in ends.values()]
    finally:
        for worker in workers:
            worker.join(20)
            worker.kill()


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object instead of a table.")
@click.option("--seconds", default=6.0, help="Measured seconds per turn.")
@click.option("--batch", default=256, help="Samples per step.")
@click.option("--rounds", default=2, help="Turns of alone and together.")
def main(as_json: bool, seconds: float, batch: int, rounds: int) -> None:
    turns = [
        (
            together({"a1@1": ALONE, "a1@2": ALONE}, batch, seconds),
            together({"a1": TOPOLOGY, "b1": TOPOLOGY}, batch, seconds),
        )
        for _ in range(rounds)
    ]
    alone = {key: statistics.fmean(p[key] for turn, _ in turns for p in turn) for key in turns[0][0][0]}
    pair = {key: statistics.fmean(p[key] for _, turn in turns for p in turn) for key in turns[0][1][0]}
    kept = [sum(p["steps_per_s"] for p in b) / sum(p["steps_per_s"] for p in a) for a, b in turns]
    ratios = {
        "training_speed_kept": statistics.median(kept),
        "exchange_lane_core": pair["exchange_core"],
        "loop_late_p99_ms": pair["late_p99_ms"],
        "resident_beyond_mb": pair["beyond_mb"],
    }
    ratios = {name: round(value, 3) for name, value in ratios.items()}
    if as_json:
        print(json.dumps({"ratios": ratios, "alone": alone, "pair": pair, "cores": os.cpu_count()}))
        return
    print(f"{'mean of two peers':<22}{'alone':>10}{'exchanging':>12}")
    for key, value in alone.items():
        print(f"{key:<22}{value:>10.3f}{pair[key]:>12.3f}")
    for name, bound in (
        ("training_speed_kept", ">= 0.95"),
        ("exchange_lane_core", "<= 0.20"),
        ("loop_late_p99_ms", "<= 20"),
        ("resident_beyond_mb", "<= 80"),
    ):
        print(f"{name} = {ratios[name]}  ({bound})")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
