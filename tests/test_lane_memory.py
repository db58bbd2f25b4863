"""What a peer keeps in memory: what it says that it keeps, one message, and nothing more for a checkpoint."""

from __future__ import annotations

import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from dlion.blocks import Encoding, sparse
from dlion.checkpoint import CheckpointStore
from dlion.cli.keep import to_checkpoint
from dlion.company import NODE_KINDS
from dlion.cut import Cuts
from dlion.exchange import EXCHANGES, find
from dlion.exchange.base import Context, Exchange, LinkView, Member, Update
from dlion.items import Fired, Heard, Item, Spoken, TakeCut, Writable
from dlion.lane import Replica
from dlion.learn.optimizers import Sgd
from dlion.learn.schedules import Constant
from dlion.learn.trainer import Trainer
from dlion.learn.workload import Evaluation, Indices
from dlion.messages import Message, PeerId, Stream
from dlion.selection import nonzero
from dlion.tensors import Flat, Layout, Tensors
from dlion.wire.admit import Admit
from dlion.wire.codec import decode, encode
from dlion.wire.limits import Limits

SIZE, STEPS, STEP_S = 400_000, 5, 0.1
MODEL_BYTES = 4 * SIZE
ME, OTHERS = PeerId("me"), (PeerId("p1"), PeerId("p2"), PeerId("p3"))
SETTINGS: dict[str, dict[str, Any]] = {
    "dlion": {"residual": True, "transfer": "off"},
    "streaming": {"local_steps": 2, "fragments": 2},
    **{name: {"local_steps": 1} for name in ("diloco", "fedavg", "noloco", "sparseloco")},
}
"""So that rounds close within the steps."""


class Noise:
    """A ``Workload`` that needs no memory of its own."""

    layout = Layout(("a", "b"), ((SIZE // 2,), (SIZE // 2,)))
    train_size = global_train_size = 1000

    def __init__(self) -> None:
        self._rng = np.random.default_rng(1)

    def initial(self, seed: int) -> Tensors:
        return Tensors(self.layout, np.zeros(SIZE, dtype=np.float32))

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        self._rng.standard_normal(out=out, dtype=np.float32)
        return 1.0

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        return Evaluation(0.0, 1.0, 0)


class Everybody:
    mesh = True
    clouds = 4
    name = ""

    def __init__(self, peers: tuple[PeerId, ...]) -> None:
        self._peers = peers

    def onward(self, came_from: PeerId | None, origin_cloud: str, plan: str | None = None) -> tuple[PeerId, ...]:
        return self._peers if came_from is None else ()


class Peer:
    """Both lanes of one peer, without a loop: replica, snapshot, momentum, strategy."""

    def __init__(self, me: PeerId, others: tuple[PeerId, ...], exchange: Exchange, room: int):
        self.exchange, self.room = exchange, room
        weights = np.zeros(SIZE, dtype=np.float32)
        seen = weights.view()
        seen.flags.writeable = False
        self.ctx = ctx = Context(me, me, Noise.layout, seen, np.random.default_rng(0), Everybody(others))
        ctx.members = {peer: Member(peer, peer, samples_per_s=100.0, batch=8) for peer in sorted((me, *others))}
        ctx.links = {peer: LinkView(peer, peer, False, 8e6, 0.05, room) for peer in others}
        ctx.batch, ctx.global_batch, ctx.step_s = 8, 8 * (1 + len(others)), STEP_S
        self.trainer = Trainer(Noise(), Sgd(momentum=0.9), Constant(0.1), 1)
        self.cuts, admit = Cuts(self.trainer.state), Admit(SIZE, exchange.speaks, NODE_KINDS)
        self.replica = Replica(exchange, ctx, weights, admit, Limits.of(SIZE), cuts=self.cuts)
        self.snapshot = np.empty(SIZE, dtype=np.float32)
        self.ready = True
        self.state_bytes = 0
        """The most that the strategy declared between two items."""
        self.message_bytes = 0
        """The largest that was said."""

    def step(self, number: int) -> list[Spoken]:
        """One local step; what is said, which from then on is the links'."""
        for link in self.ctx.links.values():
            link.writable_bytes = self.room
        self.replica.snapshot_into(self.snapshot)
        result = self.trainer.step(self.snapshot, 8, 0.0)
        update = Update(number, result.values, result.loss, result.samples, 0.1, STEP_S)
        del result
        said = self.do(number, update)
        return [*said, *(spoken for peer in self.ctx.links for spoken in self.do(number, Writable(peer)))]

    def do(self, number: int, *items: Item) -> list[Spoken]:
        said, waiting = list[Spoken](), list(items)
        del items
        while waiting:
            outcome = self.replica.run([waiting.pop(0)], STEP_S * number)
            assert not outcome.refused
            waiting = [*outcome.left, *waiting, *(Fired(timer.key) for timer in outcome.timers)]
            self.ready = outcome.ready
            said += outcome.sends
            self.message_bytes = max([self.message_bytes, *(len(spoken.body) for spoken in outcome.sends)])
            self.state_bytes = max(self.state_bytes, self.exchange.state_bytes)
            del outcome
        return said


def made(name: str) -> Exchange:
    return find(name)(**SETTINGS.get(name, {}))


def rehearsed(name: str) -> list[list[Heard]]:
    """What ``ME`` hears in each step while all four peers train."""
    names = (ME, *OTHERS)
    peers = {p: Peer(p, tuple(q for q in names if q != p), made(name), 4_000_000) for p in names}
    heard: list[list[Heard]] = []
    for number in range(STEPS):
        heard.append([])
        flying = deque((p, said) for p, peer in peers.items() if peer.ready for said in peer.step(number))
        while flying:
            hop, (to, body, message, _) = flying.popleft()
            item = Heard(hop, message.stream, number, body)
            if ME in to:
                heard[-1].append(item)
            flying.extend((p, said) for p in to for said in peers[p].do(number, item))
    return heard


# replica, snapshot, gradient (then the update), momentum: beside the strategy's own
@pytest.mark.parametrize("room", [100_000, 4_000_000])
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_peer_keeps_what_it_declares_and_a_tenth(name: str, room: int) -> None:
    """Whether links are slow (``room`` bytes a step) or not; beside the bytes of a message, which are its link's."""
    heard = rehearsed(name)
    assert any(heard)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        peer = Peer(ME, OTHERS, made(name), room)
        for number in range(STEPS):
            peer.step(number)
            for item in heard[number]:
                peer.do(number, replace(item, body=bytes(memoryview(item.body))))
        used = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    bound = 4 * MODEL_BYTES + peer.state_bytes
    allowed = 1.1 * bound + peer.message_bytes
    assert 4 * MODEL_BYTES <= used <= allowed, (used / MODEL_BYTES, bound / MODEL_BYTES)


def test_a_sparse_message_takes_no_wider_positions() -> None:
    """On its way it costs what it is and, as one byte each, which entries it names; here half of the model's."""
    size = 1 << 21
    array, chosen = np.ones(size, dtype=np.float32), np.arange(0, size, 2, dtype=np.uint32)
    block = sparse(array, chosen, Encoding.F32)
    body = encode(Message("update", blocks=(block,)))
    ways: tuple[tuple[float, Callable[[], object]], ...] = (
        (0.5, lambda: sparse(array, chosen, Encoding.F32)),
        (0.5, lambda: nonzero(block.codes, size // 2)),
        (0.5 + 1 / 32, lambda: encode(Message("update", blocks=(block,)))),
        (0.5, lambda: decode(body, Limits.of(size))),
        (0.0, lambda: block.add_to(array, -1.0)),
    )
    for kept, way in ways:
        tracemalloc.start()
        try:
            way()
            used = tracemalloc.get_traced_memory()[1] / array.nbytes
        finally:
            tracemalloc.stop()
        assert used < kept + 0.35, (used, kept)


def test_a_checkpoint_adds_no_array_of_the_models_size(tmp_path: Path) -> None:
    """From the cut in the lane until it is on the disk: weights, momentum, three sums owed."""
    store = CheckpointStore(tmp_path)
    peer = Peer(ME, OTHERS, made("dlion"), 0)
    peer.cuts.spool = store.spool
    for number in range(3):
        peer.step(number)
    tracemalloc.start()
    try:
        peer.replica.run([TakeCut()], 1.0)
        cut = tracemalloc.get_traced_memory()[1]
        weights = peer.ctx.weights.copy()
        peer.step(3)
        for other in OTHERS:
            for stream in Stream:
                peer.cuts.mark(peer.cuts.newest, other, stream, 0)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        part = peer.replica.run([], 1.0).part
        assert part is not None
        store.write(to_checkpoint(part, Noise.layout, {}))
        written = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert max(cut, written) < MODEL_BYTES / 4
    found = store.latest().checkpoint
    assert found is not None and sum(array.nbytes for array in found.arrays.values()) >= 4 * MODEL_BYTES
    assert np.array_equal(found.weights.flat, weights), "what was spooled moved on with the training"
