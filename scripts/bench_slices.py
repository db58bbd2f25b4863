"""What a local step costs when its gradient is taken in slices: seconds in so many, over seconds as a whole.

    python scripts/bench_slices.py [--data ../shared/data/training] [--rounds 15] [--json]

One thread. Each round takes one step in each way, whole steps first and last; the figure is the median over the rounds
of the ratio to the two whole steps beside it. All that the train lane does is in it: snapshots, looking ahead, the
optimizer. Without ``--data`` only ``digits``. Where the ratio is above 1.1 a peer takes fewer (``learn/slices.py``).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np

from dlion.cli.build import Plan, optimizer_of, schedule_of, workload_of
from dlion.config import load_job, load_topology
from dlion.learn.trainer import Trainer

BATCHES, SLICES = (16, 64, 128), (2, 4)


def step_s(trainer: Trainer, weights: np.ndarray, batch: int, slices: int) -> float:
    snapshot = np.empty_like(weights)
    started = time.perf_counter()
    trainer.begin(batch, 0.0)
    for k in range(slices):
        np.copyto(snapshot, weights)
        trainer.advance(snapshot, batch * (k + 1) // slices - batch * k // slices, reach=1.0)
    return time.perf_counter() - started


def ratios(trainer: Trainer, weights: np.ndarray, batch: int, rounds: int) -> tuple[float, dict[int, float]]:
    """Seconds of a whole step, and the ratio for each number of slices."""
    whole, found = list[float](), {slices: list[float]() for slices in SLICES}
    before_s = step_s(trainer, weights, batch, 1)
    for _ in range(rounds):
        took_s = {slices: step_s(trainer, weights, batch, slices) for slices in SLICES}
        after_s = step_s(trainer, weights, batch, 1)
        for slices, seconds in took_s.items():
            found[slices].append(2 * seconds / (before_s + after_s))
        whole.append(after_s)
        before_s = after_s
    return statistics.median(whole), {slices: statistics.median(values) for slices, values in found.items()}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def main(data: Path | None, rounds: int, as_json: bool) -> None:
    jobs: dict[str, dict[str, object]] = {"digits": {}}
    if data is not None:
        jobs |= {
            "fashion-mnist": {"data.dir": str(data), "model.hidden": [512, 256]},
            "fashion-cnn": {"data.dir": str(data)},
        }
    rows = []
    for name, flags in jobs.items():
        plan = Plan(load_job(name, flags), load_topology("demo"))
        workload = workload_of(plan, plan.peers[0])
        trainer = Trainer(workload, optimizer_of(plan.job, "delta"), schedule_of(plan.job), 1)
        weights = workload.initial(0).flat
        for batch in BATCHES:
            whole_s, found = ratios(trainer, weights, batch, rounds)
            rows.append({"job": name, "parameters": weights.size, "batch": batch, "whole_s": whole_s, "ratios": found})
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        shown = "  ".join(f"{slices} slices x{ratio:.2f}" for slices, ratio in row["ratios"].items())  # type: ignore[attr-defined]
        click.echo(
            f"{row['job']:<14} {row['parameters']:>9,} parameters  batch {row['batch']:>4}  "
            f"{1e3 * row['whole_s']:8.2f} ms  {shown}"  # type: ignore[operator]
        )


if __name__ == "__main__":
    main()
