"""Checkpoints of a running pride of peers are consistent cuts; who goes on from one misses and doubles nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from node_runs import RATE, Ran, Softmax, Talk, net, residual, run

from dlion.cut import LAST_TURN, Part, first_of, life_of, name_of, number_of, pack, unpack
from dlion.exchange.base import Exchange
from dlion.exchange.full import Full
from dlion.exchange.pride import Pride
from dlion.learn.workload import Indices
from dlion.messages import PeerId
from dlion.node import Node
from dlion.simulation import Death
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

        def begun(end: float | None) -> None:
            begin(end)
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


PUSHES = {
    peer: np.random.default_rng(list(peer.encode())).standard_normal(32) for peer in ("a1", "a2", "b1", "b2", "c1")
}


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


FLIGHTS: list[tuple[Talk, str, Callable[[], Exchange]]] = [
    ("mesh", "bounded", residual),
    ("mesh", "free", residual),
    ("bridges", "bounded", residual),
    ("bridges", "free", residual),
    ("mesh", "bounded", Full),
    ("bridges", "bounded", Full),
    ("bridges", "free", Full),
    ("tree", "lockstep", Full),
    ("mesh", "free", Pride),
    ("bridges", "free", Pride),
]


def in_full_flight(seed: int) -> None:
    """A run on narrow links, killed as a whole at a random time after a cut; then one that goes on from the cut."""
    rng = np.random.default_rng(seed)
    talk, pace, exchange = FLIGHTS[seed % len(FLIGHTS)]
    flight: dict[str, Any] = {"exchange": exchange, "pace": pace, "workload": Push, "seed": seed}
    speeds = dict(zip(PEERS.replace("|", "").split(), rng.uniform(40, 200, 4), strict=True))
    topology = net("a1 a2 | b1 | b2", talk, mbps=rng.uniform(0.02, 0.2), delay_s=rng.uniform(0.0, 0.2), speeds=speeds)
    kept, common = Kept(), flight | {"topology": topology}
    kept_run(kept, until_s=12.0, each=at(rng.uniform(0.8, 2.5)), settings={"drain_s": 0.0}, **common)
    (number,) = kept.whole(4)
    parts = kept.cuts[number]
    until_s = max(part.t for part in parts.values()) + 2.0
    after = kept_run(kept, number, until_s=until_s, start_s=parts["a1"].t, settings={"drain_s": 60.0}, **common)
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


def test_marks_cost_a_run_nothing_but_their_own_bytes() -> None:
    """In lockstep a run that takes checkpoints has the weights of one that takes none, bit by bit."""
    kept, plain = Kept(), run(net(PEERS), until_s=3.0)
    with_cuts = kept_run(kept, until_s=3.0, settings={"checkpoint_every_s": 0.4})
    assert len(kept.whole(4)) >= 3
    assert plain.result.steps == with_cuts.result.steps
    for peer, weights in plain.replicas.items():
        assert np.array_equal(weights, with_cuts.replicas[peer])


def test_the_lowest_peer_starts_one_cut_a_period_and_all_have_every_one() -> None:
    kept = Kept()
    kept_run(kept, until_s=5.5, settings={"checkpoint_every_s": 1.0})
    numbers = kept.whole(4)
    assert numbers == sorted(kept.cuts), "somebody lacks a part"
    assert [name_of(number) for number in numbers] == ["0.1", "0.2", "0.3", "0.4", "0.end"]
    times = [kept.cuts[number]["b2"].t for number in numbers[:-1]]
    assert np.allclose(np.diff(times), 1.0, atol=0.1)


def test_what_has_drained_holds_nothing_under_way_and_goes_on_bit_by_bit() -> None:
    """A run of 2 s and one of 9 s that goes on from its end, against one of 9 s at a go."""
    (at_a_go, make), kept = watched(), Kept()
    kept_run(Kept(), until_s=9.0, momentum=0.9, workload=make)
    kept_run(kept, until_s=2.0, momentum=0.9)
    (number,) = kept.whole(4)
    parts = kept.cuts[number]
    assert name_of(number) == "0.end" and len({part.step for part in parts.values()}) == 1
    assert not any(part.heard or part.under_way for part in parts.values())
    assert len({part.weights.tobytes() for part in parts.values()}) == 1
    resumed, make = watched()
    kept_run(kept, number, until_s=9.0, momentum=0.9, workload=make, start_s=parts["a1"].t)
    step = parts["a1"].step
    for peer, seen in resumed.items():
        common = min(len(seen.seen), len(at_a_go[peer].seen) - step)
        assert common > 10
        assert seen.seen[:common] == at_a_go[peer].seen[step : step + common]


def test_two_who_start_at_once_start_one_cut() -> None:
    def each(node: Node) -> None:
        begin = node.company.begin

        def begun(end: float | None) -> None:
            begin(end)
            if node.me in ("a1", "b2"):
                node._loop.call_at(1.2, node.checkpoint)

        node.company.begin = begun  # type: ignore[method-assign]

    kept = Kept()
    kept_run(kept, until_s=2.5, each=each)
    assert [name_of(number) for number in kept.whole(4)] == ["0.1", "0.end"]


def test_no_cut_without_everybody_and_one_that_somebody_dies_in_is_given_up() -> None:
    """b2 dies when the second cut has just begun: nobody keeps its part, the log says why, and no other follows."""
    kept = Kept()
    death = Death(PeerId("b2"), 5.1)
    ran = kept_run(kept, topology=net(PEERS, delay_s=0.3), until_s=12.0, each=at(3.0, 5.0, 9.0), deaths=[death])
    assert [name_of(number) for number in kept.cuts] == ["0.1"] and kept.whole(4)
    given_up = [e["reason"] for e in ran.events("a1", "refuse") if "given up" in e["reason"]]
    assert len(given_up) == 1 and "b2" in given_up[0]
    assert min(ran.result.steps[PeerId(peer)] for peer in ran.replicas) > 20, "training went on"


def test_peers_that_go_on_from_unequal_cuts_refuse_each_other() -> None:
    kept = Kept()
    kept_run(kept, until_s=3.2, settings={"checkpoint_every_s": 1.0})
    older, newer = kept.whole(4)[:2]
    halves = {peer: kept.cuts[newer if peer[0] == "a" else older][peer] for peer in kept.cuts[newer]}
    ran = kept_run(Kept({7: halves}), 7, until_s=4.0, settings={"start_wait_s": 2.0})
    (reason, *_) = [e["reason"] for e in ran.events("a1", "refuse") if e["peer"] == "b2"]
    assert "'0.1'" in reason and "'0.2'" in reason and "--cut" in reason


def test_numbers_and_names() -> None:
    assert [name_of(first_of(3) + turn) for turn in (1, 2, LAST_TURN)] == ["3.1", "3.2", "3.end"]
    assert all(number_of(name_of(n)) == n for n in (1, 5, first_of(2) + 1, first_of(2) + LAST_TURN))
    assert life_of(number_of("4.17")) == 4
    with pytest.raises(ValueError, match=r"expected a name such as 0\.3"):
        number_of("newest")


def test_a_state_that_cannot_be_saved_says_where() -> None:
    with pytest.raises(TypeError, match=r"state /trainer/workload: a object cannot be saved"):
        pack({"trainer": {"workload": object()}})


def test_an_optimizer_that_cannot_be_saved_fails_the_checkpoint_and_not_the_training() -> None:
    def each(node: Node) -> None:
        def refuse() -> dict[str, Any]:
            raise TypeError("the scheduler is a function")

        node.learner.trainer.state = refuse  # type: ignore[method-assign]
        at(1.0)(node)

    parts: list[Part] = []
    ran = run(net("a1 | b1"), each=each, seams=lambda peer: {"keep": parts.append})
    assert min(ran.result.steps.values()) > 20 and parts
    with pytest.raises(TypeError, match="state /trainer/: the scheduler is a function"):
        through_bytes(parts[0])
