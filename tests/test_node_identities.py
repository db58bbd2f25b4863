"""What whole runs of real nodes must add up to, in virtual time: averages, equal replicas, mass, exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from node_runs import RATE, Softmax, far_off, learner, net, outages, residual, run

from dlion.exchange.ako import Ako
from dlion.exchange.base import Action, Context, Update
from dlion.exchange.dlion import DLion
from dlion.exchange.full import Full
from dlion.exchange.gaia import Gaia
from dlion.exchange.pride import Pride
from dlion.exchange.spread import Spread
from dlion.exchange.tfako import TFAko
from dlion.net.wan import Rate
from dlion.node import Node
from dlion.tensors import Flat, disagreement

PEERS = "a1 a2 | b1 b2"


def averaged(peers: list[str], steps: int) -> Flat:
    """One process that averages the peers' updates, in float32 and in their order."""
    learners = {p: learner(p) for p in peers}
    weights = Softmax(peers[0]).initial(0).flat.copy()
    for _ in range(steps):
        here = weights.copy()
        for each in learners.values():
            weights += np.float32(1 / len(peers)) * each.trainer.step(here, 8, 0.0).values
    return weights


def test_lockstep_is_one_process_that_averages_and_replicas_are_bit_equal() -> None:
    """Uneven links and delays change nothing: the sums are taken by step and origin on every peer."""
    ran = run(net(PEERS, mbps=0.5, delay_s=0.03))
    steps = set(ran.result.steps.values())
    assert len(steps) == 1 and min(steps) > 10
    oracle = averaged(sorted(ran.replicas), steps.pop())
    replicas = list(ran.replicas.values())
    assert all(np.array_equal(replicas[0], other) for other in replicas)
    assert np.linalg.norm(replicas[0] - oracle) <= 1e-6 * np.linalg.norm(oracle)
    assert np.linalg.norm(oracle - ran.start) > 0.1, "nothing was learnt"


def test_in_lockstep_dlion_that_sends_everything_is_full_exchange() -> None:
    """Links so fast that the budget holds the whole gradient: the same weights, bit by bit."""
    everything = lambda: DLion(n_fixed=100.0, transfer="off")  # noqa: E731
    full, dlion = (run(net(PEERS, mbps=500), how, pace="lockstep") for how in (Full, everything))
    assert full.result.steps == dlion.result.steps
    for peer, weights in full.replicas.items():
        np.testing.assert_allclose(weights, dlion.replicas[peer], rtol=1e-6, atol=1e-7)


OUT = {
    "short": {("a1", "b1"): outages((0.55, 1.2), (2.0, 2.4))},
    "detour": {("a1", "b1"): outages((0.55, 9.2)), ("a2", "b2"): outages((1.0, 4.5))},
    "long": {("a1", p): outages((0.55, 9.2)) for p in PEERS.replace("|", "").split() if p != "a1"},
}


class Mass:
    """What all peers' own steps add up to, each as it is weighed."""

    def __init__(self) -> None:
        self.total: npt.NDArray[np.float64] = np.zeros(())

    def watch(self, node: Node) -> None:
        exchange, inner = node.exchange, node.exchange.after_step
        assert isinstance(exchange, Spread)

        def after_step(update: Update, ctx: Context) -> Iterable[Action]:
            self.total = self.total + exchange.weigh(update, ctx) * update.values.astype(np.float64)
            return inner(update, ctx)

        exchange.after_step = after_step  # type: ignore[method-assign]


KEEP_ALL: dict[str, tuple[Callable[[], Spread], str]] = {
    "full": (Full, "bounded"),
    "residual": (residual, "free"),
    "ako": (partial(Ako, partitions=4), "free"),
    "gaia": (partial(Gaia, threshold=0.05), "bounded"),
    "tfako": (TFAko, "free"),
    "pride": (Pride, "free"),
}
"""Strategies that promise that nothing is lost, and their paces."""


@pytest.mark.parametrize("which", OUT)
@pytest.mark.parametrize("how", KEEP_ALL)
def test_no_gradient_is_lost_when_links_go_out(how: str, which: str) -> None:
    """Every replica holds what each peer added to itself, once, though links were cut in mid-message: for a moment; for
    so long that others passed them on; or of one peer to all others, which took it for silent (and resumed by cursor,
    and said what was owed). The model is so large that who can say less than all of a step does."""
    make, pace = KEEP_ALL[how]
    big = lambda peer: Softmax(peer, features=350)  # noqa: E731
    mass = Mass()
    ran = run(net(PEERS, mbps=0.4, up=OUT[which]), make, pace=pace, until_s=15.0, each=mass.watch, workload=big)
    assert min(ran.result.steps.values()) > 60
    states = [e["state"] for p in ran.logs for e in ran.events(p, "member")]
    assert "link lost" in states and ("silent" in states) == (which == "long")
    assert "detour" in states or which != "detour"
    assert disagreement(ran.result.replicas) <= 1e-5
    assert not far_off(ran), "nobody took over what it had missed"
    assert np.linalg.norm(mass.total) > 0.5
    parts = [0 < e["entries"] < ran.start.size for p in ran.logs for e in ran.events(p, "send")]
    assert how in ("full", "pride") or sum(parts) > len(parts) / 2, "most messages were meant to be of a part"
    for weights in ran.replicas.values():
        assert np.linalg.norm(weights - ran.start - mass.total) <= 1e-5 * np.linalg.norm(mass.total)


def once_each(ran: object) -> None:
    """Every step of everybody was applied exactly once on every other peer."""
    for peer in ran.logs:  # type: ignore[attr-defined]
        heard = Counter((e["origin"], e["step"]) for e in ran.events(peer, "apply"))  # type: ignore[attr-defined]
        want = {(p, n) for p, steps in ran.result.steps.items() if p != peer for n in range(steps)}  # type: ignore[attr-defined]
        assert set(heard) == want, f"{peer}: {sorted(set(heard) ^ want)[:5]}"
        assert set(heard.values()) == {1}


@pytest.mark.parametrize("talk", ["bridges", "tree"])
@pytest.mark.parametrize("peers", ["a1 a2 | b1 b2 b3 | c1 c2", "a1 a2 | b1 b2 | c1 c2 c3 | d1 d2"])
def test_bridged_micro_clouds_make_one_model(talk: str, peers: str) -> None:
    """Whatever way updates travel, each arrives once; at full strength all replicas end alike."""
    ran = run(net(peers, talk, speeds={"a1": 160, "b2": 40, "c1": 53}), Full, pace="bounded", until_s=4.0)  # type: ignore[arg-type]
    once_each(ran)
    assert disagreement(ran.result.replicas) <= 1e-5


def test_bridged_micro_clouds_on_narrow_links_agree_in_the_end() -> None:
    """DLion with residuals, most of it owed most of the time: after the drain nothing is."""
    big = lambda peer: Softmax(peer, features=500)  # noqa: E731
    ran = run(net("a1 a2 | b1 b2 | c1 c2", "tree", mbps=0.2), residual, until_s=6.0, workload=big)
    part = [e["entries"] < ran.start.size for p in ran.logs for e in ran.events(p, "send") if e["wan"]]
    assert sum(part) > len(part) / 4, "the links were meant to be too narrow for everything"
    assert disagreement(ran.result.replicas) <= 1e-5
    assert not any("cut short" in e["reason"] for p in ran.logs for e in ran.events(p, "end"))


def test_the_budget_of_each_send_is_in_the_log() -> None:
    ran = run(net("a1 | b1", mbps=0.2), residual, until_s=4.0, workload=lambda peer: Softmax(peer, features=500))
    sends = ran.events("a1", "send")
    assert sends and all(e["budget"] > 0 for e in sends)
    partial = [e for e in sends[5:] if 0 < e["entries"] < ran.start.size]
    assert partial and all(e["bytes"] <= 1.02 * e["budget"] + 100 for e in partial[:-2])


def test_mass_with_a_varying_learning_signal() -> None:
    """One peer's constant gradient, seen on the other: the sum of its steps, to rounding."""

    class Push(Softmax):
        def gradient(self, weights: Flat, batch: object, out: Flat) -> float:
            out[:] = np.linspace(-1, 1, out.size, dtype=np.float32)
            return 1.0

    ran = run(net("a1 | b1", mbps=0.3, up={("a1", "b1"): outages((1.0, 1.7))}), residual, workload=Push)
    total = sum(ran.result.steps.values())
    moved = -np.float32(RATE) * np.linspace(-1, 1, ran.start.size, dtype=np.float32) * total / 2
    for weights in ran.replicas.values():
        np.testing.assert_allclose(weights - ran.start, moved, atol=1e-5 * np.abs(moved).max())


def test_constant_rates_are_what_outages_are_made_of() -> None:
    """The helper itself: out from each first to each second time."""
    up: Rate = outages((1.0, 2.0), (3.0, 4.0))
    assert [up.at(t) for t in (0.5, 1.5, 2.5, 3.5, 4.5)] == [1, 0, 1, 0, 1]
