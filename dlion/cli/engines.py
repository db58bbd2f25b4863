"""Where simulated runs are computed: processes of this machine, or a Ray cluster that the user has.

Law: ``plan bytes -> outcome bytes``, many at once; a run depends on its plan alone, so where it is computed changes
nothing in it. No scheduler of our own beyond "as many at a time as there are cores".
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

THREADS: Mapping[str, str] = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""One thread makes sums reproducible; and cells are the parallelism."""
ERROR_CHARS = 300


@dataclass(frozen=True)
class Failure:
    """A run that gave no result, and why."""

    why: str


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_bytes(plan: bytes) -> bytes:
    """Simulate an encoded plan in this process; the summary and the accuracy curve as JSON."""
    import msgspec

    from dlion.cli.planfile import decode_plan
    from dlion.cli.simulate import play
    from dlion.observe.summary import mean_accuracy

    played = play(decode_plan(plan))
    times, values = mean_accuracy(played.run)
    curve = list(zip(times.tolist(), values.tolist(), strict=True))
    return msgspec.json.encode({"summary": played.summary, "curve": curve})


def on_processes(plans: Mapping[str, bytes], workers: int) -> Iterator[tuple[str, bytes | Failure]]:
    """(key, result) of every plan as they finish; ``workers`` processes at a time."""
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = {pool.submit(_in_a_process, plan): key for key, plan in plans.items()}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _in_a_process(plan: bytes) -> bytes | Failure:
    command = [sys.executable, "-m", "dlion", "cell"]
    done = subprocess.run(command, input=plan, capture_output=True, check=False, env={**os.environ, **THREADS})
    if done.returncode == 0:
        return done.stdout
    why = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    lines = done.stderr.decode(errors="replace").splitlines()
    telling = [line for line in lines if line.startswith("error:") or "Error:" in line] or lines[-1:]
    return Failure(": ".join([why, *telling[-1:]])[:ERROR_CHARS])


def on_ray(plans: Mapping[str, bytes], address: str | None = None) -> Iterator[tuple[str, bytes | Failure]]:
    """The same on a Ray cluster: the one at ``address``, or that of RAY_ADDRESS, or a local one.

    dlion must be installed on its nodes. Raises ModuleNotFoundError without the extra ``ray``.
    """
    import ray

    ray.init(address=address, runtime_env={"env_vars": THREADS}, log_to_driver=False, ignore_reinit_error=True)
    remote = ray.remote(run_bytes)
    waiting = {remote.options(max_retries=1).remote(plan): key for key, plan in plans.items()}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        key = waiting.pop(done)
        try:
            yield key, ray.get(done)
        except ray.exceptions.RayError as error:
            yield key, Failure(str(error).strip().splitlines()[-1][:ERROR_CHARS])
