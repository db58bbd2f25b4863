"""Evaluation beside the training: a peer drops snapshots, a low-priority process measures and deletes them.

Law: files in, ``eval`` events out. The node's side is one quick write per snapshot; a snapshot nobody has come for
makes room for the next, so a slow or dead evaluator costs a bounded piece of disk and never a step.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dlion.learn.workload import Workload
from dlion.observe.read import EVAL_SUFFIX
from dlion.observe.runlog import Eval, File, RunLog
from dlion.tensors import Tensors

SUFFIX = ".snapshot"
PENDING_MAX = 4
"""Snapshots of one peer kept on disk by its own store; the oldest goes first."""
BEHIND_MAX = 2
"""Snapshots of one peer that may wait before the evaluator skips to the newest."""
POLL_S = 0.2


class SnapshotStore:
    """One peer's side: ``write`` puts a snapshot where the evaluator looks."""

    def __init__(self, directory: Path, pending_max: int = PENDING_MAX) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._pending_max = pending_max

    def write(self, t: float, step: int, peer: str, weights: Tensors, which: str = "view") -> Path:
        """Write ``weights``; appears under its final name only when complete. Raises OSError when it cannot."""
        path = self._directory / f"{peer}.{step:09d}.{which}{SUFFIX}"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        facts = {"t": repr(t), "step": str(step), "peer": peer, "which": which}
        try:
            save_file(weights.views, temporary, facts)
        except SafetensorError as error:  # of arrays that we know only the disk is a cause
            raise OSError(errno.ENOSPC, str(error), str(temporary)) from error
        temporary.replace(path)
        for stale in sorted(self._directory.glob(f"{peer}.*.{which}{SUFFIX}"))[: -self._pending_max]:
            stale.unlink(missing_ok=True)
        return path


@dataclass(frozen=True)
class Pending:
    """A snapshot on disk."""

    path: Path
    peer: str
    which: str
    step: int

    @classmethod
    def of(cls, path: Path) -> Pending:
        peer, step, which = path.name.removesuffix(SUFFIX).rsplit(".", 2)
        return cls(path, peer, which, int(step))


def due(directory: Path, behind_max: int = BEHIND_MAX, only: str = "") -> list[Pending]:
    """What to evaluate now, oldest step first; of peer ``only``, if given. Of a peer that is more than ``behind_max``
    behind, only the newest; its older ones are deleted."""
    waiting: dict[tuple[str, str], list[Pending]] = {}
    for path in sorted(directory.glob(f"{only}.*{SUFFIX}" if only else f"*{SUFFIX}")):
        one = Pending.of(path)
        waiting.setdefault((one.peer, one.which), []).append(one)
    chosen: list[Pending] = []
    for line in waiting.values():
        line.sort(key=lambda one: one.step)
        kept = line if len(line) <= behind_max else line[-1:]
        for skipped in line[: len(line) - len(kept)]:
            skipped.path.unlink(missing_ok=True)
        chosen.extend(kept)
    return sorted(chosen, key=lambda one: (one.step, one.peer, one.which))


def evaluate_one(pending: Pending, workload: Workload, limit: int | None = None) -> Eval | None:
    """Measure a snapshot; None when its own store has taken it back meanwhile. Raises ValueError on other damage."""
    try:
        with safe_open(pending.path, framework="numpy") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in workload.layout.names}
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{pending.path}: not a snapshot of this model: {error}") from error
    flat = workload.layout.pack(arrays)
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged model is a result, not a fault
        result = workload.evaluate(flat, limit)
    loss = float(result.loss)
    return Eval(
        t=float(facts["t"]),
        step=pending.step,
        accuracy=float(result.accuracy),
        loss=loss if np.isfinite(loss) else None,
        samples=int(result.samples),
        which=pending.which,
    )


def evaluate_directory(
    directory: Path,
    workload: Workload,
    logs: Path,
    *,
    finished: Callable[[], bool] = lambda: True,
    limit: int | None = None,
    only: str = "",
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[str, Eval]]:
    """Evaluate what lies in ``directory`` and what still comes, until ``finished()`` and nothing is left.

    Yields (peer, event) after each is appended to ``logs``/PEER.eval.jsonl and its snapshot is deleted. Call
    ``lower_priority`` first in a process of its own.
    """
    while True:
        last = finished()  # asked before looking: what was written before the end is still seen
        found = due(directory, only=only)
        for pending in found:
            event = evaluate_one(pending, workload, limit)
            if event is not None:
                log = RunLog(File(logs / f"{pending.peer}{EVAL_SUFFIX}"))
                log.write(event)
                log.close()
                pending.path.unlink(missing_ok=True)
                yield pending.peer, event
        if last and not found:
            return
        if not found:
            pause(POLL_S)


def lower_priority() -> None:
    """Give way to everybody else on this host, where the system allows it."""
    with suppress(AttributeError, PermissionError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # who started us may be at a real-time priority
    with suppress(AttributeError, PermissionError):
        os.nice(19)
