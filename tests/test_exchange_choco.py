"""CHOCO after a restart: whose public copy is not here yet still pulls at nobody."""

from __future__ import annotations

import numpy as np
from node_runs import net

from dlion.cut import frozen
from dlion.exchange.base import Add, Context, LinkView, Member, Update
from dlion.exchange.choco import Choco
from dlion.mesh.bridges import PeerRoutes, shared_plan
from dlion.messages import PeerId
from dlion.tensors import Flat, Layout

ME, LATE = PeerId("a1"), PeerId("a2")


def pull(choco: Choco, step: int, ctx: Context) -> Flat:
    """How far a step without a gradient moves us towards our neighbours."""
    actions = choco.after_step(Update(step, np.zeros(4, dtype=np.float32), 0.0, 1, 0.1, 0.1), ctx)
    values = [action.values.copy() for action in actions if isinstance(action, Add) and not action.coverage]  # type: ignore[union-attr]
    return values[-1]


def test_a_neighbour_that_was_not_heard_yet_is_not_pulled_at_after_a_restart() -> None:
    topology, weights = net("a1 a2"), np.zeros(4, dtype=np.float32)
    routes = PeerRoutes(shared_plan(topology, sorted(topology.peers), ()), ME)
    ctx = Context(ME, "a", Layout(("w",), ((4,),)), weights, np.random.default_rng(0), routes, members={})
    choco = Choco(density=1.0)
    choco.setup(ctx)
    weights += 1.0
    assert not pull(choco, 0, ctx).any()
    ctx.members, ctx.links = {p: Member(p, "a") for p in (ME, LATE)}, {LATE: LinkView(LATE, "a", lan=True)}
    list(choco.on_members(ctx))
    state = frozen(choco.state())
    again = Choco(density=1.0)
    again.setup(ctx)
    again.restore(state, ctx)
    assert not pull(choco, 1, ctx).any() and not pull(again, 1, ctx).any()
    ctx.links = {}
    list(again.on_members(ctx))
    assert not again.state()["unheard"]
