"""Virtual time: same seed, same bits; deadlocks and failures end the run; the dead do not hold up the living."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from node_runs import BATCH, Softmax, net, outages, residual, run

from dlion import clock
from dlion.exchange.base import Context, Exchange
from dlion.exchange.full import Full
from dlion.messages import PeerId
from dlion.node import Node
from dlion.patience import STILL_S
from dlion.simulation import Death, Stuck
from dlion.tensors import Flat

HERE = Path(__file__).parent
ONE_RUN = """
from node_runs import net, residual, run
print(run(net("a1 a2 | b1", "bridges", mbps=0.3), residual, seed={seed}).digest)
"""


def in_process(seed: int, hash_seed: str) -> str:
    """The run's hash in a process of its own."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environ = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_RUN.format(seed=seed)], env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_same_seed_same_run_in_this_process_and_in_others() -> None:
    here = run(net("a1 a2 | b1", "bridges", mbps=0.3), residual, seed=5)
    again = run(net("a1 a2 | b1", "bridges", mbps=0.3), residual, seed=5)
    assert here.digest == again.digest and here.logs == again.logs
    assert all(np.array_equal(w, again.replicas[p]) for p, w in here.replicas.items())
    assert [in_process(5, hash_seed) for hash_seed in ("1", "77")] == [here.digest] * 2
    assert run(net("a1 a2 | b1", "bridges", mbps=0.3), residual, seed=6).digest != here.digest


class Obstinate(Exchange):
    """Never ready for step 3, and waits for nothing that could change that."""

    name = "obstinate"

    def ready(self, step: int, ctx: Context) -> bool:
        return step < 3


def test_a_run_in_which_nobody_steps_is_stuck() -> None:
    with pytest.raises(Stuck, match=r"a1 at step 3, b1 at step 3"):
        run(net("a1 | b1"), Obstinate, until_s=1000.0)


def test_a_loop_in_which_nothing_can_wake_is_a_deadlock() -> None:
    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(clock.Deadlock):
        clock.run(wait_for_ever())


def broken(where: str) -> Callable[[Node], None]:
    """Breaks b1's node in a callback of the loop, in the lane, or in the workload."""

    def bad(*_: object, **__: object) -> None:
        raise ZeroDivisionError(where)

    def change(node: Node) -> None:
        if node.me == "b1":
            target, name = {
                "message callback": (node.company, "heard"),
                "exchange lane": (node.exchange, "after_step"),
                "train lane": (node.learner.trainer.workload, "gradient"),
            }[where]
            setattr(target, name, bad)

    return change


@pytest.mark.parametrize("where", ["message callback", "exchange lane", "train lane"])
def test_an_exception_anywhere_in_a_node_fails_the_run(where: str) -> None:
    """Not logged and lost, and not dressed in a group: the run raises that very exception."""
    with pytest.raises(ZeroDivisionError, match=where):
        run(net("a1 | b1"), Full, each=broken(where))


DEAD_AT = 2.05


@pytest.mark.parametrize("talk", ["mesh", "bridges", "tree"])
@pytest.mark.parametrize("pace", ["lockstep", "bounded"])
def test_survivors_go_on_and_agree(talk: str, pace: str) -> None:
    """SIGKILL of a bridge in mid-run: a pause of lost_after_s (2 s) at most, then everybody steps on. All that the
    survivors did themselves is everywhere; only what the dead peer said to some but not to others may differ."""
    ran = run(
        net("a1 a2 | b1 b2 | c1 c2", talk),  # type: ignore[arg-type]
        pace=pace,
        until_s=10.0,
        deaths=[Death(PeerId("b1"), DEAD_AT)],
    )
    assert "b1" not in ran.replicas
    for peer in ran.replicas:
        times = [e["t"] for e in ran.events(peer, "step")]
        assert np.diff(times).max() < 2.0 + 0.1 + 0.5
        assert sum(t > DEAD_AT + 3 for t in times) > 30
        silent = [e["t"] for e in ran.events(peer, "member") if e["peer"] == "b1" and e["state"] == "silent"]
        assert silent and silent[0] <= DEAD_AT + 5.0 + 1.1
    own = {p: {(p, n) for n in range(ran.result.steps[PeerId(p)])} for p in ran.replicas}
    for peer in ran.replicas:
        applied = [(e["origin"], e["step"]) for e in ran.events(peer, "apply") if e["origin"] != "b1"]
        heard = [each for each in applied if each[1] < ran.result.steps[PeerId(each[0])]]  # not the estate of b1
        if talk == "mesh":
            assert sorted(heard) == sorted(set().union(*(own[p] for p in own if p != peer)))
    gaps = [np.abs(ran.replicas[p] - ran.replicas["a1"]).max() for p in ran.replicas]
    assert max(gaps) < 0.2, "at most a few steps of the dead peer"


def test_a_slow_peers_long_step_holds_up_nobody() -> None:
    """b1's step lasts 3 s; it is the only way from a to c, and what it carries there arrives at the links' pace."""
    topology = net("a1 | b1 | c1", "tree", speeds={"b1": BATCH / 3.0}, delay_s=0.01)
    only_b = {ends: link for ends, link in topology.links.items() if set(ends) != {"a1", "c1"}}
    topology = type(topology)("test", topology.peers, only_b, topology.resources, "tree")
    ran = run(topology, Full, pace="free", until_s=6.0)
    said = {e["step"]: e["t"] for e in ran.events("c1", "apply") if e["origin"] == "a1"}
    made = {e["n"]: e["t"] for e in ran.events("a1", "step")}
    assert len(said) > 50 and len(ran.events("b1", "step")) <= 3
    zero = min(said[n] - made[n] for n in said)  # the peers' clocks start a moment apart
    assert max(said[n] - made[n] for n in said) < zero + 0.05
    unacked = [e["unacked"] for e in ran.events("a1", "link")]
    assert max(unacked) < 10 * 200, "acknowledgements waited for b1's step"


def test_a_message_that_arrives_in_mid_step_is_merged_before_the_step_ends() -> None:
    ran = run(net("a1 | b1", speeds={"b1": BATCH / 2.0}), Full, pace="free", until_s=5.0)
    ends = [e["t"] for e in ran.events("b1", "step")]
    merged = [e["t"] for e in ran.events("b1", "apply")]
    assert sum(t < ends[0] for t in merged) > 10 and sum(ends[0] < t < ends[1] for t in merged) > 10


LIMITS = {"drain_s": 6.0, "start_wait_s": 3.0}
PAIRS = [("a1", "a2"), ("a1", "b1"), ("a2", "b1"), ("b1", "c1"), ("a2", "c1")]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    talk=st.sampled_from(["mesh", "bridges", "tree"]),
    how=st.sampled_from([("lockstep", Full), ("bounded", Full), ("bounded", residual), ("free", residual)]),
    mbps=st.sampled_from([0.05, 1.0, 20.0]),
    delay_s=st.sampled_from([0.0, 0.003, 0.15]),
    speeds=st.lists(st.integers(10, 300), min_size=4, max_size=4),
    death=st.none() | st.tuples(st.sampled_from(["a1", "b1"]), st.floats(1.5, 3.0)),
    out=st.none() | st.tuples(st.sampled_from(PAIRS), st.floats(1.5, 3.0), st.floats(0.05, 6.0)),
    seed=st.integers(0, 99),
)
@example(  # a calm after a long drain
    talk="bridges",
    how=("free", residual),
    mbps=0.05,
    delay_s=0.0,
    speeds=[10, 207, 208, 10],
    death=None,
    out=None,
    seed=1,
)
@example(  # a2's drain is cut short, and b1 waits for its last view
    talk="bridges",
    how=("lockstep", Full),
    mbps=0.05,
    delay_s=0.0,
    speeds=[10] * 4,
    death=("a1", 2.0),
    out=(("b1", "c1"), 2.0, 6.0),
    seed=0,
)
def test_whatever_the_network_runs_end_well(
    *,
    talk: str,
    how: tuple[str, Callable[[], Exchange]],
    mbps: float,
    delay_s: float,
    speeds: list[int],
    death: tuple[str, float] | None,
    out: tuple[tuple[str, str], float, float] | None,
    seed: int,
) -> None:
    """No deadlock, finite weights, and no link carries more than the topology gives it; every drain ends in time and a
    calm after it, and where somebody fell silent behind a bridge so does the last view, which has a drain's time of its
    own."""
    names = ["a1", "a2", "b1", "c1"]
    up = {} if out is None else {out[0]: outages((out[1], out[1] + out[2]))}
    topology = net(
        "a1 a2 | b1 | c1",
        talk,  # type: ignore[arg-type]
        mbps=mbps,
        delay_s=delay_s,
        speeds=dict(zip(names, map(float, speeds), strict=True)),
        up=up,
    )
    deaths = [Death(PeerId(death[0]), death[1])] if death else []
    ran = run(topology, how[1], pace=how[0], until_s=4.0, seed=seed, deaths=deaths, settings=LIMITS)
    for weights in ran.replicas.values():
        assert np.isfinite(weights).all()
    drains = 2 if talk != "mesh" and (deaths or out) else 1
    for peer in ran.replicas:
        (end,) = ran.events(peer, "end")
        assert end["t"] <= 4.0 + drains * 6.0 + STILL_S + max(BATCH / min(speeds), 0.1) + 0.5
        for link in ran.events(peer, "link"):
            capacity = mbps * 1e6 / 8 * (link["t"] + 0.5) + 64 * 1024  # what waits in the shaper was sent, too
            assert link["acked_bytes"] <= link["sent_bytes"] <= capacity + 1e6 / 8 * mbps
    if not deaths and out is None and mbps >= 1.0:
        first, *others = ran.replicas.values()
        assert all(np.allclose(first, other, atol=1e-4) for other in others)


def test_a_killed_peer_says_nothing() -> None:
    """As by SIGKILL: no goodbye, the links break."""
    ran = run(net("a1 | b1"), until_s=4.0, deaths=[Death(PeerId("b1"), 1.0)])
    (lost,) = (e for e in ran.events("a1", "member") if e["state"] == "link lost")
    assert "goodbye" not in lost["why"] and "abort" in lost["why"]


def test_evaluation_is_free_in_virtual_time() -> None:
    """A workload that takes long to evaluate changes nothing: the seam of compute says what work costs."""

    class Slow(Softmax):
        def gradient(self, weights: Flat, batch: object, out: Flat) -> float:
            sum(range(20_000))
            return super().gradient(weights, batch, out)  # type: ignore[arg-type]

    assert run(net("a1 | b1")).digest == run(net("a1 | b1"), workload=Slow).digest
