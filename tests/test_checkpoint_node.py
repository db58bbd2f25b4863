"""Checkpoints of a running pride of peers are consistent cuts; a run that goes on from one misses and doubles nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from node_runs import Ran, Softmax, net, run

from dlion.cut import LAST_TURN, Part, pack, unpack
from dlion.learn.workload import Indices
from dlion.node import Node
from dlion.tensors import Flat

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
