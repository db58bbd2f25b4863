"""pride: what it says plus what it owes is what was learnt, what it assumes is taken back, and limits are limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion.cli.build import Plan
from dlion.cli.simulate import Played, play
from dlion.config import load_job, load_topology
from dlion.exchange.base import Add, Update
from dlion.exchange.pride import ECHO_PER_SAMPLE, Pride
from dlion.mesh.topology import Speed, Topology
from dlion.messages import PeerId, Stream
from dlion.net.wan import Rate
from dlion.observe.runlog import Send
from dlion.simulation import Death
from dlion.tensors import Flat, Layout, disagreement
from dlion.testing.bench import Bench
from dlion.testing.conformance import check, learn

LAYOUT = Layout(("w",), ((700,),))
CLOUDS = {"a0": "A", "a1": "A", "b0": "B", "b1": "B"}
A, B = PeerId("a"), PeerId("b")


@pytest.mark.parametrize("setting", [{}, {"speculation": 0.0}, {"bits": 32}])
def test_it_conforms_whatever_its_settings(setting: dict[str, float]) -> None:
    check(partial(Pride, **setting))  # type: ignore[arg-type]


def narrow(bench: Bench) -> Bench:
    """Links that take a few hundred bytes at a time, each another number."""
    for pair in bench.flying:
        bench.windows[pair] = int(bench.rng.integers(1, 600))
        bench.rates_bps[pair] = float(bench.rng.integers(4_000, 40_000))
    return bench


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([4, 8, 32]))
def test_heard_plus_owed_is_everything_that_was_learnt(seed: int, speculation: float, bits: int) -> None:
    """On every link, in whatever order: view + what is owed to it = the start + all steps of all."""
    bench = narrow(Bench(partial(Pride, speculation=speculation, bits=bits), 3, layout=LAYOUT, seed=seed))
    learnt = bench.seats[A].weights.astype(np.float64)

    def step(peer: str, number: int, weights: Flat) -> Flat:
        nonlocal learnt
        values = learn(peer, number, weights)
        learnt += values / 3
        return values

    bench.run(6, step)
    bench.deliver_all()
    for seat in bench.seats.values():
        others: list[Pride] = [o.exchange for o in bench.seats.values() if o is not seat]  # type: ignore[misc]
        owed = [other.owed[a] for other in others if (a := (seat.name, "A")) in other.owed]
        gap = learnt - seat.view - sum(o.flat for o in owed if o) - sum(other.state()["rest"] for other in others)
        np.testing.assert_allclose(gap, 0.0, atol=2e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(["mesh", "bridges", "tree"]))
def test_replicas_agree_after_the_drain(seed: int, talk: str) -> None:
    bench = narrow(Bench(Pride, CLOUDS, layout=LAYOUT, talk=talk, seed=seed))  # type: ignore[arg-type]
    bench.run(8, learn)
    bench.drain()
    assert bench.disagreement < 1e-5
    for seat in bench.seats.values():
        assert seat.view is seat.ctx.weights


def test_who_fell_behind_once_is_told_the_same_bytes_as_all_others_again() -> None:
    """What rounding left of its sum is said in the drain; till then it costs no encoding of its own."""
    bench = Bench(Pride, 3, layout=LAYOUT)
    bench.windows["a", "b"] = 0
    bench.step("a", learn)
    bench.step("a", learn)
    bench.open("a", "b")
    bench.deliver_all()
    bench.step("a", learn)
    (_, to_b), (_, to_c) = (bench.flying[A, to][Stream.UPDATE][0] for to in (B, PeerId("c")))
    assert to_b is to_c
    bench.drain()
    assert bench.disagreement < 1e-6


@pytest.mark.parametrize("lane_s, steps_said", [(0.014, 20), (0.028, 11), (0.042, 8), (5.0, 7)])
def test_steps_that_are_shorter_than_lanes_need_are_told_together(lane_s: float, steps_said: int) -> None:
    """A lane that works for ``lane_s`` for what is said has a fifth of the time for that and for hearing as much, steps
    are of 0.1 s. The first words tell what it costs, and nothing waits for more than half of the trusted steps."""
    bench = Bench(Pride, 2, layout=LAYOUT)
    a, b = bench.seats[A], bench.seats[B]
    start, flying = b.weights.copy(), bench.flying[A, B][Stream.UPDATE]
    for step in range(20):
        a.ctx.step_s, a.ctx.lane_s = 0.1, lane_s * len(flying)
        bench.now = 0.1001 * step
        bench.step("a", unit)
    assert len(flying) == steps_said
    bench.drain()
    assert b.replica.applied[A] == 19
    np.testing.assert_allclose(b.view - start, 10.0, rtol=1e-3)


def test_one_long_job_in_the_lane_makes_no_word_wait() -> None:
    bench = Bench(Pride, 2, layout=LAYOUT)
    for step in range(12):
        bench.seats[A].ctx.step_s = 0.1
        bench.seats[A].ctx.lane_s += 3.0 if step % 4 == 2 else 0.01
        bench.now = 0.1 * step
        bench.step("a", unit)
    assert len(bench.flying[A, B][Stream.UPDATE]) == 12


def unit(peer: str, step: int, weights: Flat) -> Flat:
    return np.ones_like(weights)


def test_others_are_assumed_to_move_as_we_do_until_they_are_heard() -> None:
    """From the first step on: with momentum, steps that miss what others do overshoot, and the start decides much."""
    bench = Bench(partial(Pride, foresight=0.0), 2, layout=LAYOUT)
    a, b = bench.seats[A], bench.seats[B]
    start = a.weights.copy()
    for peer in ("a", "b"):
        bench.step(peer, unit)
    np.testing.assert_allclose(a.weights - start, 1.0, atol=1e-6)
    np.testing.assert_allclose(a.view - start, 0.5, atol=1e-6)
    while bench.fire(bench.now):
        pass
    bench.deliver_all()
    np.testing.assert_allclose(a.weights - start, 1.0, atol=1e-2)
    bench.step("a", unit)
    np.testing.assert_allclose(a.weights - start, 2.0, atol=1e-2)
    np.testing.assert_allclose(a.view - start, 1.5, atol=1e-2)
    bench.step("b", unit)
    while bench.fire(bench.now):
        pass
    bench.now += 1.0
    bench.deliver_all()
    for seat in (a, b):
        np.testing.assert_allclose(seat.view - start, 2.0, atol=1e-2)
        np.testing.assert_allclose(seat.weights, seat.view, atol=1e-6)


@pytest.mark.parametrize(("batch", "others"), [(1, ECHO_PER_SAMPLE), (64, 9.0), (320, 1.0)])
def test_a_step_stands_for_what_others_do_meanwhile_and_no_more_than_its_samples_can(batch: int, others: float) -> None:
    """Of 640 samples. A whole local step on one sample would be mostly noise: with momentum it diverged."""
    bench = Bench(partial(Pride, foresight=0.0), 2, layout=LAYOUT, batches={"a": batch, "b": 640 - batch})
    bench.step("b", unit)
    while bench.fire(bench.now):
        pass
    bench.deliver_all()
    ctx, exchange = bench.seats[A].ctx, bench.seats[A].exchange
    ctx.members = {p: replace(m, samples_per_s=float(m.batch)) for p, m in ctx.members.items()}
    assert isinstance(exchange, Pride)
    step = next(iter(exchange.after_step(Update(0, np.ones(700, dtype=np.float32), 1.0, batch, 0.1, 0.1), ctx)))
    assert isinstance(step, Add)
    assert step.scale == pytest.approx(1.0 + others)


def test_foresight_is_a_part_of_a_step_whatever_the_others_said_and_not_in_the_view() -> None:
    bench = Bench(partial(Pride, foresight=0.25), 2, layout=LAYOUT)
    a, start = bench.seats[A], bench.seats[A].weights.copy()
    for _ in range(2):
        for peer in ("a", "b"):
            bench.step(peer, unit)
        while bench.fire(bench.now):
            pass
        bench.now += 1.0
        bench.deliver_all()
    np.testing.assert_allclose(a.view - start, 2.0, atol=1e-2)
    np.testing.assert_allclose(a.weights - a.view, 0.25, atol=1e-6)
    bench.drain()
    assert a.view is a.ctx.weights and bench.disagreement < 1e-6


def test_of_the_silent_nothing_is_assumed_for_long() -> None:
    bench = Bench(partial(Pride, trust_steps=3, foresight=0.0), 2, layout=LAYOUT)
    bench.step("b", unit)
    while bench.fire(bench.now):
        pass
    bench.deliver_all()
    for _ in range(12):
        bench.now += 0.1
        bench.step("a", unit)
    a = bench.seats[A]
    np.testing.assert_allclose(a.weights, a.view, atol=1e-5)


def toy(
    topology: Topology, until_s: float = 8.0, deaths: tuple[Death, ...] = (), flags: Mapping[str, object] = {}
) -> Played:
    job = load_job("toy", {"exchange.name": "pride", "job.until": until_s, "model.size": 3000, **flags})
    return play(Plan(job, topology), deaths)


@pytest.mark.parametrize(
    "clouds", [{"a0": "A", "a1": "B", "b0": "C", "z": "C"}, {"a0": "A", "a1": "A", "b0": "B", "z": "A"}]
)
def test_the_survivors_of_a_death_agree_on_what_it_had_told_only_some(clouds: dict[str, str]) -> None:
    """In a mesh; and in the micro-cloud of one that was no bridge, and beyond."""
    talk = "bridges" if clouds["a1"] == "A" else "mesh"
    bench = narrow(Bench(Pride, clouds, layout=LAYOUT, talk=talk, seed=3))  # type: ignore[arg-type]
    bench.run(6, learn)
    before = bench.routes.neighbours(PeerId("a0"))
    bench.kill("z")
    assert set(bench.routes.neighbours(PeerId("a0"))) == set(before) - {"z"}
    bench.run(8, learn)
    bench.drain()
    assert bench.disagreement < 1e-5


def test_a_death_among_six_peers_is_settled() -> None:
    played = toy(load_topology("hetero-system"), 20.0, (Death(PeerId("b1"), 6.0),))
    assert "b1" not in played.views
    assert disagreement(played.views) < 1e-5


def test_a_neighbour_twenty_times_slower_stalls_nobody() -> None:
    topology = load_topology("hetero-system")
    slow = replace(topology.peers[PeerId("c2")], speed=Speed(Rate.constant(53.3 / 20)))
    played = toy(replace(topology, peers={**topology.peers, PeerId("c2"): slow}), 20.0)
    assert max(played.summary["stalled_share"].values()) < 0.02
    assert disagreement(played.views) < 1e-4


def test_a_link_that_was_out_is_owed_what_it_missed() -> None:
    topology = load_topology("hetero-system")
    up = Rate((0.0, 3.0, 12.0), (1.0, 0.0, 1.0))
    out = {pair: replace(link, up=up) for pair, link in topology.links.items() if "a1" in pair}
    played = toy(replace(topology, links={**topology.links, **out}), 20.0)
    a1 = played.run.peers["a1"][Send]
    assert not ((a1["t"] > 5.0) & (a1["t"] < 11.5)).any()
    assert max(played.summary["stalled_share"].values()) < 0.02
    assert disagreement(played.views) < 1e-4


def test_it_learns_digits_and_serves_one_view() -> None:
    job = load_job(
        "digits", {"exchange.name": "pride", "job.until": 6.0, "batching.growth": False, "model.hidden": [32]}
    )
    played = play(Plan(job, load_topology("demo")))
    assert played.summary["replica_disagreement"] < 1e-4  # type: ignore[operator]
    assert played.summary["accuracy"]["worst"] > 0.6  # type: ignore[operator]


def test_messages_hold_what_a_link_carries_in_a_period() -> None:
    bench = Bench(partial(Pride, period_s=0.5, bits=32), 2, layout=Layout(("w",), ((4000,),)))
    bench.rates_bps["a", "b"], bench.windows["a", "b"] = 8 * 3000 / 0.5, 1
    bench.step("a", learn)
    while bench.fire(bench.now):
        pass
    ((_, body),) = bench.flying[A, B][1]
    assert 2000 < len(body) <= 3000


def test_unusable_settings_are_refused_with_what_was_expected() -> None:
    for wrong in (
        {"period_s": 0.0},
        {"bits": 5},
        {"speculation": 2.0},
        {"trust_steps": 0},
        {"slices": 0},
    ):
        with pytest.raises(ValueError, match="pride: "):
            Pride(**wrong)
