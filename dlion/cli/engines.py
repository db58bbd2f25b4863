"""Where simulated runs are computed: processes of this machine, or a Ray cluster that the user has.

Law: ``plan bytes -> outcome bytes``, many at once; a run depends on its plan alone, so where it is computed changes
nothing in it. No scheduler of our own beyond "as many at a time as there are cores".
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from dlion.cli.errors import CONFIGURATION, NO_PEER, Fault

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


def on_processes(plans: Mapping[str, bytes], workers: int) -> Generator[tuple[str, bytes | Failure], None, None]:
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


RAY_PORT_WAIT_S = 5.0
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of gRPC says first: the preface and settings, none of them; the server answers with its own."""
HTTP2_SETTINGS = b"\x04"
RAY_ADVICE = "correct it, start a cluster there (ray start --head), or leave out --on ray to compute here"


def on_ray(
    plans: Mapping[str, bytes], address: str | None = None
) -> Generator[tuple[str, bytes | Failure], None, None]:
    """The same on a Ray cluster: the one at ``address``, or that of RAY_ADDRESS, or a local one.

    dlion must be installed on its nodes. Raises ModuleNotFoundError without the extra ``ray``, Fault without a cluster.
    """
    import ray

    mine = not ray.is_initialized()
    _join(address)
    try:
        remote = ray.remote(run_bytes)
        waiting = {remote.options(max_retries=1).remote(plan): key for key, plan in plans.items()}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            key = waiting.pop(done)
            try:
                yield key, ray.get(done)
            except ray.exceptions.RayError as error:
                yield key, Failure(_telling(str(error)))
    finally:
        if mine:
            _leave()


def _join(address: str | None) -> None:
    """Raises Fault where no cluster answers, soon: Ray itself tries for minutes, deaf to Ctrl-C, and then dies."""
    import ray

    where = f"--ray-address {address}" if address else "environment RAY_ADDRESS"
    named = address or os.environ.get("RAY_ADDRESS") or ""
    if named and named not in ("local", "auto"):
        knock(named, where if address else f"{where}={named}")
    try:
        ray.init(
            address=named or None, runtime_env={"env_vars": THREADS}, log_to_driver=False, ignore_reinit_error=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        place = where if named else ""
        raise Fault(NO_PEER, "no Ray cluster could be joined", place, why, RAY_ADVICE) from error


def knock(address: str, where: str) -> None:
    """Raises Fault where nothing listens at ``address``, or nothing that speaks gRPC, as Ray does."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not host or not colon or not port.isdecimal() or "/" in host:
        expected = "expected HOST:PORT, ray://HOST:PORT, auto or local"
        raise Fault(CONFIGURATION, "no address of a Ray cluster", where, expected, RAY_ADVICE)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=RAY_PORT_WAIT_S) as link:
            link.sendall(HTTP2_HELLO)
            speaks = "RAY_USE_TLS" in os.environ or link.recv(9, socket.MSG_WAITALL)[3:4] == HTTP2_SETTINGS
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise Fault(NO_PEER, "no Ray cluster answers", where, why, RAY_ADVICE) from error
    if not speaks:
        raise Fault(NO_PEER, "no Ray cluster answers", where, "something else listens there", RAY_ADVICE)


def _leave() -> None:
    """The cluster goes on without us, or ends if it is a local one; a Ctrl-C meanwhile would leave it half ended."""
    import ray

    ours = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if ours else None
    try:
        ray.shutdown()
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


def _telling(text: str) -> str:
    """The line of an error that says most."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or ["no reason given"]
    line = next((line for line in reversed(lines) if "Error: " in line), lines[-1])
    if "No module named 'dlion'" in line:
        line = "dlion is not installed on the Ray node that was to run this"
    return line[:ERROR_CHARS]
