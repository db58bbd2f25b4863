"""A WAN budget is a hard limit on every link, in every window of time, for every strategy that takes one."""

from __future__ import annotations

from functools import partial
from inspect import signature
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_runs import net, outages, run

from dlion.exchange import EXCHANGES, find
from dlion.exchange.pride import SAVINGS_S

THRIFTY = [name for name in EXCHANGES if "wan_bytes_per_s" in signature(find(name)).parameters]


def test_who_keeps_a_budget_is_said_in_the_readme() -> None:
    assert THRIFTY == ["pride"]


@pytest.mark.parametrize("name", THRIFTY)
@settings(max_examples=4, derandomize=True)
@given(
    limit=st.integers(300, 5000),
    talk=st.sampled_from(["mesh", "bridges", "tree"]),
    mbps=st.sampled_from([0.1, 1.0, 50.0]),
    delay_s=st.sampled_from([0.001, 0.08]),
    speeds=st.lists(st.sampled_from([20, 80, 300]), min_size=5, max_size=5),
    out=st.tuples(st.floats(0.5, 2.5), st.floats(0.2, 3.0)),
)
def test_no_window_carries_more_than_it_earned_and_what_was_saved(
    name: str, limit: int, talk: str, mbps: float, delay_s: float, speeds: list[int], out: tuple[float, float]
) -> None:
    """From any message to any later one on the same link: bytes <= limit * (time between them + savings)."""
    peers = ("a1", "a2", "b1", "b2", "c1")
    topology = net(
        "a1 a2 | b1 b2 | c1",
        talk,  # type: ignore[arg-type]
        mbps=mbps,
        delay_s=delay_s,
        speeds=dict(zip(peers, speeds, strict=True)),
        up={("a1", "b1"): outages((out[0], out[0] + out[1]))},
    )
    ran = run(topology, partial(find(name), wan_bytes_per_s=limit), until_s=6.0)
    for peer in ran.logs:
        sends = [send for send in ran.events(peer, "send") if send["wan"]]
        for to in {send["to"] for send in sends}:
            mine = [(send["t"], send["bytes"]) for send in sends if send["to"] == to]
            before = [0, *accumulate(nbytes for _, nbytes in mine)]
            for first, (t0, _) in enumerate(mine):
                for last in range(first, len(mine)):
                    said, t1 = before[last + 1] - before[first], mine[last][0]
                    assert said <= limit * (t1 - t0 + SAVINGS_S) + 1, (peer, to, t0, t1)
