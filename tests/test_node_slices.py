"""A step's gradient in slices, in whole runs: what is heard meanwhile counts, and a step takes no longer."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from dlion.exchange.pride import Pride
from dlion.learn.workload import Indices
from dlion.messages import PeerId
from dlion.node import Node
from dlion.simulation import Death
from dlion.tensors import Flat
from tests.node_runs import BATCH, Softmax, net, run


class Seen(Softmax):
    """Notes the samples and the weights of each gradient."""

    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self.seen: list[tuple[int, Flat]] = []

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        self.seen.append((len(batch), weights.copy()))
        return super().gradient(weights, batch, out)


class Still(Pride):
    """Counts on nothing that was not heard, nor on own steps that are not done."""

    reach = property(lambda _: 0.0, lambda *_: None)  # type: ignore[assignment]


def test_what_is_heard_during_a_step_counts_in_its_later_slices() -> None:
    """One word of the other's, under way for 0.03 s, in each step of 0.1 s."""
    workloads: dict[str, Seen] = {}
    run(
        net("a1 a2", delay_s=0.03),
        partial(Still, speculation=0.0, foresight=0.0),
        workload=lambda peer: workloads.setdefault(peer, Seen(peer)),
        until_s=2.0,
    )
    for subject in workloads.values():
        late = [(size, at) for size, at in subject.seen if size == BATCH // 4][-16:]
        for step in range(0, 16, 4):
            moved = [bool((a != b).any()) for (_, a), (_, b) in pairwise(late[step : step + 4])]
            assert sum(moved) == 1


def test_slices_take_no_more_time_than_the_whole_and_are_told_as_one_step() -> None:
    whole, sliced = (run(net("a1 a2 | b1"), partial(Pride, slices=slices)) for slices in (1, 4))
    for peer in whole.replicas:
        one, other = ([(e["n"], e["samples"], e["t"]) for e in ran.events(peer, "step")] for ran in (whole, sliced))
        assert len(one) > 20 and one == other
        assert (whole.replicas[peer] != sliced.replicas[peer]).any()


def test_pride_counts_on_a_whole_local_step_while_it_trusts_the_others_and_on_its_part_when_they_are_silent() -> None:
    reaches: dict[str, list[float]] = {}

    def watch(node: Node) -> None:
        inner, found = node.exchange.after_step, reaches.setdefault(node.me, [])

        def after_step(update, ctx):  # type: ignore[no-untyped-def]
            yield from inner(update, ctx)
            found.append(node.exchange.reach)

        node.exchange.after_step = after_step  # type: ignore[method-assign]

    run(net("a1 a2"), Pride, until_s=4.0, each=watch, deaths=[Death(PeerId("a2"), 1.0)])
    assert reaches["a1"][5] == pytest.approx(1.0)
    assert reaches["a1"][22] == pytest.approx(0.5)  # silent for longer than eight steps, not yet dead
    assert np.isfinite(reaches["a1"]).all()
