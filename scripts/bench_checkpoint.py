"""What a checkpoint costs: the copy in the exchange lane, and the writing beside it.

    python scripts/bench_checkpoint.py [PARAMETERS] [LINKS]

DLion with residuals owes something on every link, the trainer has AdamW. Files go below the working directory: choose
one on a disk. The ratio to an update's own time in the lane is what to keep.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from dlion.checkpoint import CheckpointStore
from dlion.cli.keep import to_checkpoint
from dlion.company import NODE_KINDS
from dlion.cut import Cuts, Part
from dlion.exchange.base import Context, LinkView, Member, Update
from dlion.exchange.dlion import DLion
from dlion.lane import Replica, TakeCut
from dlion.learn.optimizers import AdamW
from dlion.messages import PeerId, Stream
from dlion.tensors import Flat, Layout
from dlion.wire.admit import Admit
from dlion.wire.limits import Limits

ME = PeerId("me")


class Everybody:
    """Routes to all of them."""

    def __init__(self, peers: list[PeerId]) -> None:
        self._peers = tuple(peers)

    def onward(self, came_from: PeerId | None, origin_cloud: str) -> tuple[PeerId, ...]:
        return self._peers if came_from is None else ()


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def write(store: CheckpointStore, part: Part) -> None:
    layout = Layout(("all",), (part.weights.shape,))
    store.write(to_checkpoint(part, layout, {}))


def anonymous_mb() -> float:
    """Memory of this process that no file stands behind."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


class Watch:
    """The most anonymous memory while the block runs, over what there was before; looked at every millisecond."""

    def __enter__(self) -> Watch:
        self._before = self._most = anonymous_mb()
        self._over = Event()
        self._thread = Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(1e-3):
            self._most = max(self._most, anonymous_mb())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.mb = self._most - self._before


def main(parameters: int = 1_200_000, links: int = 4) -> None:
    layout = Layout(("all",), ((parameters,),))
    rng = np.random.default_rng(0)

    def noise() -> Flat:
        return rng.standard_normal(parameters, dtype=np.float32)

    peers = [PeerId(f"p{i}") for i in range(links)]
    weights, optimizer, strategy = noise(), AdamW(), DLion(residual=True, transfer="off")
    optimizer.step(noise(), weights, 0.1)
    ctx = Context(ME, "x", layout, weights, rng, Everybody(peers))
    ctx.members = {peer: Member(peer, "x") for peer in (ME, *peers)}
    ctx.links = {peer: LinkView(peer, "x", True, 1e6, 0.1, 0) for peer in peers}
    admit = Admit(parameters, strategy.speaks, NODE_KINDS)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        store = CheckpointStore(directory)
        cuts = Cuts(lambda: {"optimizer": optimizer.state()}, store.spool)
        lane = Replica(strategy, ctx, weights, admit, Limits.of(parameters), cuts=cuts)
        updates = [Update(step, noise(), 1.0, 1, 0.1, 0.1) for step in range(4)]
        own = [timed(partial(lane.run, [update], 0.0)) for update in updates][-1]
        del updates
        taken, writes = [], []
        with Watch() as watch:
            for _ in range(4):
                taken.append(timed(partial(lane.run, [TakeCut()], 0.0)))
                for peer in peers:
                    for stream in Stream:
                        cuts.mark(cuts.newest, peer, stream, 0)
                part = lane.run([], 0.0).part
                assert part is not None
                writes.append(timed(partial(write, store, part)))
                del part
        nbytes = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file()) / 3
    print(f"{parameters / 1e6:g} million parameters, {links} links owed, {nbytes / 1e6:.0f} MB a checkpoint")
    print(f"an own update in the lane   {own:7.1f} ms")
    print("a cut in the lane           " + " ".join(f"{ms:7.1f}" for ms in taken) + " ms")
    print("writing, in its own thread  " + " ".join(f"{ms:7.1f}" for ms in writes) + " ms")
    print(f"anonymous memory meanwhile  {watch.mb:7.1f} MB more at most")


if __name__ == "__main__":
    main(*(int(float(text)) for text in sys.argv[1:]))
