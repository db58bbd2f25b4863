"""A peer's checkpoints in the run's directory: parts of cuts on their way to the disk and back.

Law: between ``dlion.cut`` (what a part is) and ``dlion.checkpoint`` (how files become durable). Writes in a thread of
its own; a failure is kept for the status and the log, and training goes on.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from dlion import checkpoint
from dlion.checkpoint import Checkpoint, CheckpointFailed, CheckpointStore, Damaged
from dlion.cli.build import Plan
from dlion.cli.errors import BAD_DATA, CONFIGURATION, Fault
from dlion.config import job_hash
from dlion.cut import Part, Said, name_of, number_of, pack, unpack
from dlion.exchange.base import Update
from dlion.messages import PeerId
from dlion.observe.runlog import Refuse, RunLog, Snapshot
from dlion.tensors import Layout, Tensors

FOLDER = "checkpoints"
ASIDE = "aside-"
STATE_FORMAT = 4
"""Raise it whenever a strategy, the lane or a part saves something else: older checkpoints are then refused by name."""
_TEXT = "state"


@dataclass(frozen=True)
class Start:
    """What to go on from: the cut asked for, else the newest whole one; or afresh, with the old ones set aside."""

    cut: str = ""
    fresh: bool = False


def store_of(plan: Plan, out: Path, peer: str) -> CheckpointStore:
    return CheckpointStore(out / FOLDER / peer, plan.job.checkpoint.keep)


def to_checkpoint(part: Part, layout: Layout, meta: Mapping[str, Any]) -> Checkpoint:
    """``part`` as names, arrays and bytes. Raises TypeError for a state that cannot be saved."""
    heard = [[said.hop, said.stream, said.seq] for said in part.heard]
    under_way = None if part.under_way is None else {k: getattr(part.under_way, k) for k in Update.__annotations__}
    tree = {"state": part.state, "trainer": part.trainer, "node": part.node, "heard": heard, "under_way": under_way}
    text, arrays = pack(tree)
    facts = {"cut": part.number, "name": name_of(part.number), "t": part.t, "step": part.step, "samples": part.samples}
    blobs = {_TEXT: text, **{f"heard/{i}": said.body for i, said in enumerate(part.heard)}}
    return Checkpoint({**meta, **facts}, Tensors(layout, part.weights), arrays, blobs)


def from_checkpoint(saved: Checkpoint) -> Part:
    """Inverse of ``to_checkpoint``."""
    tree = unpack(bytes(saved.blobs[_TEXT]), saved.arrays)
    heard = [
        Said(PeerId(hop), stream, seq, bytes(saved.blobs[f"heard/{i}"]))
        for i, (hop, stream, seq) in enumerate(tree["heard"])
    ]
    facts = {name: saved.meta[name] for name in ("t", "step", "samples")}
    under_way = None if tree["under_way"] is None else Update(**tree["under_way"])
    inner = {name: tree[name] for name in ("state", "trainer", "node")}
    weights = saved.weights.flat
    return Part(saved.meta["cut"], weights=weights, under_way=under_way, heard=heard, **facts, **inner)


class Keeping:
    """``seams.keep`` of one peer, and what it goes on from (``part``). ``close`` waits for what is being written."""

    def __init__(
        self, plan: Plan, peer: PeerId, out: Path, layout: Layout, start: Start, passed_over: Iterable[str] = ()
    ) -> None:
        self.store = store_of(plan, out, peer)
        self.trouble = "\n".join(passed_over)
        """Why the last checkpoint could not be written; at first, what was wrong with those that were there."""
        self.written = ""
        """Name of the last that was."""
        self.log: RunLog | None = None
        self._peer, self._layout = peer, layout
        self._meta: dict[str, str | int] = {"peer": peer, **expected(plan)}
        self._waiting: Part | None = None
        self._lock = Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dlion-checkpoint")
        self.part = None if start.fresh else self._found(start.cut)
        self._begun = False
        """Something was written in this life: what an earlier course left is set aside, and not before."""

    @property
    def notice(self) -> str:
        """What to tell the user of how this peer begins."""
        part = self.part
        if part is None:
            return self.trouble
        begun = (
            f"goes on from checkpoint {name_of(part.number)}, step {part.step}, {part.t:.1f} s (--fresh starts over)"
        )
        return "\n".join(filter(None, (self.trouble, begun)))

    def tell(self) -> None:
        """Say so where there is no terminal of ours; a warning, so that it is seen where nobody set logging up."""
        if self.notice:
            logging.getLogger("dlion").warning("%s: %s", self._peer, self.notice)

    def __call__(self, part: Part) -> None:
        """Never waits: should the disk be slower than checkpoints come, the newest of those that wait is written."""
        with self._lock:
            self._waiting = part
        self._writer.submit(self._write)

    def close(self) -> None:
        self._writer.shutdown(wait=True)

    def _write(self) -> None:
        with self._lock:
            part, self._waiting = self._waiting, None
        if part is None:
            return
        try:
            if not self._begun:
                set_aside(self.store, None if self.part is None else self.part.number)
            path = self.store.write(to_checkpoint(part, self._layout, self._meta))
            self._begun = True
        except (CheckpointFailed, OSError, TypeError, ValueError) as error:
            self.trouble = f"checkpoint {name_of(part.number)}: {error}"
            event: Refuse | Snapshot = Refuse(t=part.t, peer=self._peer, reason=self.trouble)
        else:
            self.trouble, self.written = "", name_of(part.number)
            event = Snapshot(t=part.t, step=part.step, path=f"{FOLDER}/{self._peer}/{path.name}")
        if self.log is not None:
            self.log.write(event)

    def _found(self, cut: str) -> Part | None:
        """The part asked for, or the newest that is whole."""
        check_job(self.store, self._meta["job"])
        known = {name_of(number): path for number, path in sorted(cuts_of(self.store).items(), reverse=True)}
        if cut and cut not in known:
            where, have = str(self.store.directory), ", ".join(known) or "none"
            raise Fault(CONFIGURATION, f"{self._peer} has no checkpoint {cut!r}", where, f"it has {have}")
        for name in [cut] if cut else known:
            try:
                return from_checkpoint(checkpoint.load(known[name], {**self._meta, "model": self._layout.digest}))
            except Damaged as damage:
                if cut:
                    raise
                self.trouble = str(damage)
        return None


def held(plan: Plan, out: Path, peer: str, layout: Layout, start: Start) -> tuple[list[int], list[str]]:
    """The cuts that ``peer`` can begin with: the one asked for, else all that are whole, and what is wrong with the
    others. Reads them in full."""
    if start.fresh or start.cut:
        return [number_of(start.cut)] if start.cut else [], []
    store, wanted = store_of(plan, out, peer), {**expected(plan), "model": layout.digest}
    check_job(store, wanted["job"])
    found, passed_over = [], []
    for number, path in cuts_of(store).items():
        try:
            checkpoint.verify(path, wanted)
            found.append(number)
        except Damaged as damage:
            passed_over.append(str(damage))
    return found, passed_over


def parts_of(plan: Plan, out: Path) -> dict[str, Part]:
    """All peers' parts of the newest cut that they have in common; raises Fault when there is none."""
    common = newest_common(plan, out, plan.peers)
    if not common.number:
        raise Fault(CONFIGURATION, "no checkpoint that all peers have", str(out / FOLDER))
    paths = {peer: cuts_of(store_of(plan, out, peer))[common.number] for peer in plan.peers}
    return {peer: from_checkpoint(checkpoint.load(path)) for peer, path in paths.items()}


def expected(plan: Plan) -> dict[str, str | int]:
    """What a checkpoint must agree on with the run that goes on from it."""
    return {"run": plan.run, "job": job_hash(plan.job)[:16], "state_format": STATE_FORMAT}


def cuts_of(store: CheckpointStore) -> dict[int, Path]:
    """Number of each cut whose manifest can be read -> its folder."""
    return {entry.meta["cut"]: entry.path for entry in store.entries() if not entry.damage and "cut" in entry.meta}


def check_job(store: CheckpointStore, job: str | int) -> None:
    """Raises Fault when the checkpoints are of another job: neither going on nor starting over would be meant."""
    for entry in store.entries():
        if not entry.damage and entry.meta.get("job") != job:
            why = f"its job has the hash {entry.meta.get('job')}, this one {job}"
            advice = "use the same job and settings, another --out, or --fresh to start over"
            raise Fault(CONFIGURATION, "the checkpoints here are of another job", str(entry.path), why, advice)


def set_aside(store: CheckpointStore, newest: int | None) -> None:
    """Rename what is newer than the cut ``newest`` (None: everything): it belongs to a course that is given up."""
    known = {path: number for number, path in cuts_of(store).items()}
    doomed = [path for path in store.paths() if newest is None or known.get(path, newest) > newest]
    for old in store.directory.glob(f"{ASIDE}*") if doomed else ():
        shutil.rmtree(old)
    for path in doomed:
        path.rename(path.with_name(ASIDE + path.name))


@dataclass(frozen=True)
class Common:
    """The newest cut that all peers have whole (0: none), and what was passed over on the way."""

    number: int = 0
    t: float = 0.0
    """Training time at which it was taken, the earliest of the peers'."""
    passed_over: tuple[str, ...] = ()

    @property
    def start(self) -> Start:
        """How each peer is to begin."""
        return Start(name_of(self.number)) if self.number else Start(fresh=True)

    @property
    def notice(self) -> str:
        """What to tell the user; nothing where there is no checkpoint."""
        lines = [f"passed over: {damage}" for damage in self.passed_over]
        if self.number:
            lines.append(f"goes on from checkpoint {name_of(self.number)}, {self.t:.1f} s (--fresh starts over)")
        return "\n".join(lines)


def newest_common(plan: Plan, out: Path, peers: Collection[str]) -> Common:
    """Raises Fault when there are checkpoints of another job, or only damaged ones."""
    wanted = expected(plan)
    stores = {peer: store_of(plan, out, peer) for peer in peers}
    for store in stores.values():
        check_job(store, wanted["job"])
    known = {peer: cuts_of(store) for peer, store in stores.items()}
    numbers = sorted(set.intersection(*(set(cuts) for cuts in known.values())), reverse=True)
    passed_over: list[str] = []
    for number in numbers:
        try:
            metas = [checkpoint.verify(known[peer][number], wanted)["meta"] for peer in peers]
        except Damaged as damage:
            passed_over.append(str(damage))
        else:
            return Common(number, min(meta["t"] for meta in metas), tuple(passed_over))
    if passed_over:
        raise Fault(BAD_DATA, "all checkpoints that the peers have in common are damaged", str(out / FOLDER),
                    "; ".join(passed_over), "--fresh starts over")  # fmt: skip
    return Common()
