"""Checkpoints of a running pride of peers are consistent cuts; who goes on from one misses and doubles nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from node_runs import RATE, Ran, Softmax, net, residual, run

from dlion.cut import LAST_TURN, Part, first_of, life_of, name_of, pack, unpack
from dlion.exchange.full import Full
from dlion.learn.workload import Indices
from dlion.node import Node
from dlion.tensors import Flat, disagreement

PEERS = "a1 a2 | b1 b2"


@dataclass
class Kept:
    """The parts of all cuts of a run; only what survives a trip through bytes."""

    cuts: dict[int, dict[str, Part]] = field(default_factory=lambda: defaultdict(dict))

    def keeper(self, peer: str) -> Callable[[Part], None]:
        def keep(part: Part) -> None:
            self.cuts[part.number][peer] = through_bytes(part)

        return keep

    def whole(self, peers: int) -> list[int]:
        return sorted(number for number, parts in self.cuts.items() if len(parts) == peers)


def through_bytes(part: Part) -> Part:
    text, arrays = pack({"state": part.state, "trainer": part.trainer, "node": part.node})
    tree = unpack(text, {name: array.copy() for name, array in arrays.items()})
    return replace(part, **tree)


def kept_run(kept: Kept, resume: int | None = None, **options: Any) -> Ran:
    """``run`` with every part of every cut kept, perhaps going on from the cut ``resume``."""
    topology = options.pop("topology", net(PEERS))

    def seams(peer: str) -> dict[str, Any]:
        return {"keep": kept.keeper(peer), "resume": None if resume is None else kept.cuts[resume][peer]}

    return run(topology, seams=seams, **options)


class Watched(Softmax):
    """Notes the weights that each step begins with."""

    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self.peer, self.seen = peer, list[bytes]()

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        self.seen.append(weights.tobytes())
        return super().gradient(weights, batch, out)


def watched() -> tuple[dict[str, Watched], Callable[[str], Watched]]:
    made: dict[str, Watched] = {}
    return made, lambda peer: made.setdefault(peer, Watched(peer))


def at(*times_s: float) -> Callable[[Node], None]:
    """Every node starts a checkpoint at these times of the loop's clock, if it is the first."""

    def each(node: Node) -> None:
        begin = node.company.begin

        def begun() -> None:
            begin()
            if node.me == "a1":
                for time_s in times_s:
                    node._loop.call_at(time_s, node.checkpoint)

        node.company.begin = begun  # type: ignore[method-assign]

    return each


@pytest.mark.parametrize("cut_at_s", [0.5, 1.013, 1.131, 1.57])
def test_lockstep_goes_on_from_a_cut_bit_by_bit(cut_at_s: float) -> None:
    """The weights before every step, and what each step logs of loss and data, are those of the run that went on."""
    kept, (went_on, make) = Kept(), watched()
    before = kept_run(kept, workload=make, until_s=4.0, momentum=0.9, each=at(cut_at_s))
    (number,) = (n for n in kept.whole(4) if n != LAST_TURN)
    resumed, make = watched()
    after = kept_run(kept, number, workload=make, until_s=4.0, momentum=0.9, start_s=kept.cuts[number]["a1"].t)
    for peer in went_on:
        step = kept.cuts[number][peer].step
        again = resumed[peer].seen
        assert 2 < step < len(went_on[peer].seen) - 10 and len(again) > 10
        assert went_on[peer].seen[step : step + len(again)] == again[: len(went_on[peer].seen) - step]
        lines = [
            [{k: e[k] for k in ("n", "loss", "samples", "lr", "epoch", "position")} for e in ran.events(peer, "step")]
            for ran in (before, after)
        ]
        count = min(len(lines[0]) - step, len(lines[1]))
        assert lines[0][step : step + count] == lines[1][:count]


PUSHES = {peer: np.random.default_rng(list(peer.encode())).standard_normal(32) for peer in ("a1", "a2", "b1", "b2", "c1")}


class Push(Softmax):
    """A gradient of the peer's own, always the same: so weights say how often each peer's step was added."""

    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self._push = PUSHES[peer].astype(np.float32)

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        out[:] = self._push
        return 1.0


def added(ran: Ran, peer: str) -> dict[str, float]:
    """How often each peer's step is in the weights of ``peer``, by least squares: exact for linear pushes."""
    peers = sorted(ran.replicas)
    moved = (ran.replicas[peer] - ran.start).astype(np.float64)
    found = np.linalg.lstsq(np.stack([PUSHES[p] for p in peers], axis=1), moved * -len(peers) / RATE, rcond=None)[0]
    return dict(zip(peers, found, strict=True))


FLIGHTS = [
    ("mesh", "bounded", residual),
    ("mesh", "free", residual),
    ("bridges", "bounded", residual),
    ("bridges", "free", residual),
    ("mesh", "bounded", Full),
    ("bridges", "bounded", Full),
    ("bridges", "free", Full),
    ("tree", "lockstep", Full),
]


def in_full_flight(seed: int) -> None:
    """A run on narrow links, killed as a whole at a random time after a cut; then one that goes on from the cut."""
    rng = np.random.default_rng(seed)
    talk, pace, exchange = FLIGHTS[seed % len(FLIGHTS)]
    speeds = dict(zip(PEERS.replace("|", "").split(), rng.uniform(40, 200, 4), strict=True))
    topology = net("a1 a2 | b1 | b2", talk, mbps=rng.uniform(0.02, 0.2), delay_s=rng.uniform(0.0, 0.2), speeds=speeds)
    kept, common = Kept(), {"topology": topology, "exchange": exchange, "pace": pace, "workload": Push, "seed": seed}
    kept_run(kept, until_s=3.0, each=at(rng.uniform(0.8, 2.5)), settings={"drain_s": 0.0}, **common)
    (number,) = kept.whole(4)
    parts = kept.cuts[number]
    after = kept_run(kept, number, until_s=4.5, start_s=parts["a1"].t, settings={"drain_s": 60.0}, **common)
    assert disagreement(after.result.replicas) <= 1e-5
    steps = {str(peer): count for peer, count in after.result.steps.items()}
    assert all(steps[peer] > part.step > 0 for peer, part in parts.items())
    for peer in steps:
        assert added(after, peer) == pytest.approx(steps, abs=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_a_cut_in_full_flight_conserves_mass_and_replicas_agree(seed: int) -> None:
    in_full_flight(seed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10, 210))
def test_cuts_in_full_flight_over_many_seeds(seed: int) -> None:
    in_full_flight(seed)
