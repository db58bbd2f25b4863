"""A run's plan survives its file exactly: the same job, the same topology, the same rates bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlion.cli.build import Plan
from dlion.cli.errors import BAD_DATA, CANNOT_READ, Fault
from dlion.cli.planfile import load_plan, save_plan
from dlion.config import load_job, load_topology
from dlion.config.find import known
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Speed, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

A, B = PeerId("a"), PeerId("b")


@pytest.mark.parametrize("name", known("topology"))
def test_packaged_topologies_survive(name: str, tmp_path: Path) -> None:
    plan = Plan(load_job("digits", {"job.seed": 7, "exchange.name": "gaia"}, environ={}), load_topology(name), "r1")
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path) == plan


finite = st.floats(0, 1e12, allow_nan=False)
rates = st.builds(
    lambda widths, values, looped, origin: Rate(
        tuple(sum(widths[:i]) for i in range(len(values))), tuple(values), sum(widths) if looped else math.inf, origin
    ),
    st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
    st.lists(finite, min_size=4, max_size=4),
    st.booleans(),
    st.floats(-1e3, 1e3),
)


@given(rates, rates, st.one_of(st.none(), rates))
def test_any_rate_survives_exactly(tmp_path_factory: pytest.TempPathFactory, fast: Rate, slow: Rate, up: Rate) -> None:
    directory = tmp_path_factory.mktemp("plan")
    topology = Topology(
        "t",
        {A: PeerSpec(A, "c", Speed(fast, 0.1)), B: PeerSpec(B, "c", None, up)},
        {(A, B): LinkSpec(A, B, ("p",), 0.012, up), (B, A): LinkSpec(B, A)},
        {"p": Resource("p", "egress", slow, A)},
        addresses={A: "127.0.0.1:80"},
    )
    plan = Plan(load_job("digits", environ={}), topology, shares=(0.1, 0.9))
    save_plan(plan, directory)
    assert load_plan(directory) == plan


def test_missing_and_damaged_plans_say_so(tmp_path: Path) -> None:
    with pytest.raises(Fault) as missing:
        load_plan(tmp_path)
    assert missing.value.code == CANNOT_READ
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(Fault) as damaged:
        load_plan(tmp_path)
    assert damaged.value.code == BAD_DATA
