"""The next step starts once its update is added: what there is to say of it holds up nobody."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from node_runs import net, run

from dlion.exchange.base import Action, Add, Context, Update
from dlion.exchange.full import Full
from dlion.items import Barrier, Item, Outcome, TakeCut
from dlion.messages import Message, PeerId
from dlion.testing import Bench

SAID_S = 0.08


def stepped(pace: str) -> tuple[Bench, Outcome, Outcome]:
    """One peer's update and a cut in one batch: what comes of the first turn of the lane, and of the second."""
    bench = Bench(Full, 2, pace=pace)
    lane = bench.seats[PeerId("a")].replica
    update = Update(0, np.ones(bench.layout.size, dtype=np.float32), 1.0, 64, 0.1, 0.1)
    batch: list[Item] = [update, TakeCut()]
    first = lane.run(batch, 1.0)
    return bench, first, lane.run(first.left, 1.1)


def kinds(outcome: Outcome) -> list[str]:
    said: Iterable[Message] = (spoken.message for spoken in outcome.sends)
    return [message.kind for message in said]


def test_the_update_is_added_first_and_the_rest_comes_before_anything_else() -> None:
    bench, first, second = stepped("free")
    start, now = Bench(Full, 2).seats[PeerId("a")].weights, bench.seats[PeerId("a")].weights
    assert np.array_equal(now, start + np.float32(0.5)), "half of the global batch is ours"
    assert kinds(first) == [] and [type(item).__name__ for item in first.left] == ["Rest", "TakeCut"]
    assert kinds(second)[0] == "update" and set(kinds(second)[1:]) == {"~mark"} and not second.left


def test_in_order_everything_is_one() -> None:
    """Additions wait for a barrier there, and that for the rest: there is nothing to be gained."""
    bench, first, _ = stepped("lockstep")
    assert kinds(first)[0] == "update" and not first.left
    assert not bench.seats[PeerId("a")].replica.run([Barrier(0)], 1.2).left


class Slow(Full):
    """Adds at once what it says, which the modelled lane takes ``SAID_S`` for."""

    def __init__(self, *, ahead: bool) -> None:
        super().__init__()
        self.ahead = ahead

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield from super().after_step(update, ctx)
        for _ in range(100):
            yield Add(np.zeros(ctx.layout.size, dtype=np.float32))


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_waits_for_what_is_said_only_where_the_strategy_wants_that(ahead: bool) -> None:
    topology = net("a1 | b1")
    settings = {"exchange_s_per_byte": SAID_S / (100 * 4 * 32)}
    ran = run(topology, lambda: Slow(ahead=ahead), pace="free", until_s=5.0, settings=settings)
    times = np.array([event["t"] for event in ran.events("a1", "step")])
    step_s = float(np.median(np.diff(times)))
    assert abs(step_s - (0.1 if ahead else 0.1 + SAID_S)) < 0.02, step_s
    assert max(np.abs(ran.replicas["a1"] - ran.replicas["b1"])) < 1e-5
