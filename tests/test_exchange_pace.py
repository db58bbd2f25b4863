"""Paces: whom each waits for, how two make one, and which make no sense with a strategy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_runs import net, run

from dlion.cli.build import Plan, check
from dlion.config import ConfigError, load_job, load_topology
from dlion.exchange.full import Full
from dlion.exchange.pace import Backup, Bounded, BoundedBackup, Free, Lockstep, Pace, Progress
from dlion.messages import PeerId
from dlion.tensors import disagreement

SEEN = st.lists(st.integers(-1, 30), max_size=6)


def verdict(pace: Pace, step: int, seen: list[int]) -> str:
    return str(pace.may_start(step, Progress(step - 1, {PeerId(f"p{n}"): s for n, s in enumerate(seen)})))


TRIED = [[9, 9, 9], [8, 9, 9], [9, 9, 8], [8, 8, 9], [7, 9, 9], [7, 7, 9], [0, 0, 9]]


@pytest.mark.parametrize(
    ("pace", "waits"),
    [
        (Free(), []),
        (Lockstep(), TRIED[1:]),
        (Bounded(1), [[7, 9, 9], [7, 7, 9], [0, 0, 9]]),
        (Backup(1), [[8, 8, 9], [7, 7, 9], [0, 0, 9]]),
        (BoundedBackup(1, spare=1), [[7, 7, 9], [0, 0, 9]]),
    ],
)
def test_step_ten_waits_for_these_and_for_no_others(pace: Pace, waits: list[list[int]]) -> None:
    assert [seen for seen in TRIED if verdict(pace, 10, seen) == "wait"] == waits


@given(seen=SEEN, step=st.integers(0, 30), n=st.integers(0, 5))
def test_without_spares_or_without_staleness_two_paces_are_one(seen: list[int], step: int, n: int) -> None:
    assert verdict(BoundedBackup(n, spare=0), step, seen) == verdict(Bounded(n), step, seen)
    assert verdict(BoundedBackup(0, spare=n), step, seen) == verdict(Backup(n), step, seen)


def test_nobody_waits_for_the_slowest_and_all_agree_in_the_end() -> None:
    """One peer of four takes twenty times as long."""
    topology = net("a1 a2 | b1 b2", speeds={"b2": 8})
    steps = {}
    for pace in ("bounded", "bounded+backup"):
        ran = run(topology, Full, pace=pace, until_s=10.0)
        steps[pace] = len(ran.events("a1", "step"))
        assert disagreement(ran.result.replicas) <= 1e-5
    assert steps["bounded+backup"] > 5 * steps["bounded"]


@pytest.mark.parametrize(
    ("exchange", "pace", "expected"),
    [
        ("gaia", "bounded+backup", ""),
        ("full", "bounded+backup", ""),
        ("pride", "bounded+backup", "expected one of free, bounded"),
        ("local-sgd", "bounded", "expected one of free"),
        ("full", "lockstep+free", "expected one of free, lockstep, bounded, backup, bounded+backup"),
        ("full", "backup+bounded", "bounded, backup, bounded+backup. Did you mean"),
    ],
)
def test_nonsense_is_refused_with_what_makes_sense(exchange: str, pace: str, expected: str) -> None:
    flags = {"exchange.name": exchange, "pace.name": pace}
    plan = Plan(load_job("toy", flags, environ={}), load_topology("homogeneous"))
    if not expected:
        check(plan)
        return
    with pytest.raises(ConfigError) as error:
        check(plan)
    assert expected in str(error.value)
