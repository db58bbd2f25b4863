"""JOINs that overtake each other, or reach only some: whoever hears of the last one holds what its sponsor holds."""

from __future__ import annotations

import numpy as np
import pytest
from node_runs import net

from dlion.blocks import dense
from dlion.exchange.base import Add, Context, LinkView, Member, Send
from dlion.exchange.pride import Pride
from dlion.mesh.bridges import PeerRoutes, shared_plan
from dlion.messages import Message, PeerId
from dlion.newcomers import JOIN, JOINED, Newcomers
from dlion.tensors import Flat, Layout

ME, DEAD, FIRST, SECOND = map(PeerId, ("a", "d", "s", "t"))
SIZE = 4


class Neighbour:
    """One that hears JOINs: its strategy, its newcomers, and all that was added to its replica."""

    def __init__(self) -> None:
        topology = net("a d s t")
        self.ctx = Context(
            me=ME,
            cloud=topology.cloud_of(ME),
            layout=Layout(("w",), ((SIZE,),)),
            weights=np.zeros(SIZE, dtype=np.float32),
            rng=np.random.default_rng(0),
            routes=PeerRoutes(shared_plan(topology, sorted(topology.peers), ()), ME),
            members={p: Member(p, topology.cloud_of(p)) for p in sorted(topology.peers)},
            links={p: LinkView(p, topology.cloud_of(p), lan=True) for p in (DEAD, FIRST, SECOND)},
        )
        self.pride = Pride()
        self.pride.setup(self.ctx)
        self.newcomers = Newcomers(self.pride, self.ctx, lambda peer: None, lambda *copy: None, lambda: 0)
        self.replica = np.zeros(SIZE)
        self.answers: list[tuple[PeerId, int]] = []

    def tell(self, message: Message) -> None:
        """Hear a message; of a strategy's kind or of the node's."""
        if message.kind == JOIN:
            actions = list(self.newcomers.hear(message))
        else:
            actions = list(self.pride.on_message(message.origin, message, self.ctx))
        for action in actions:
            if isinstance(action, Add):
                values = action.values
                assert isinstance(values, np.ndarray) or values.indices is None
                self.replica += action.scale * (values if isinstance(values, np.ndarray) else values.values)
            if isinstance(action, Send) and action.message.kind == JOINED:
                self.answers.append((action.to[0], int(action.message.fields["life"])))


def flat(value: float) -> Flat:
    return np.full(SIZE, value, dtype=np.float32)


def update(hop: PeerId, value: float) -> Message:
    return Message("update", fields={"cloud": hop}, blocks=(dense(flat(value)),), origin=hop, hop=hop)


def join(sponsor: PeerId, life: int, estate: float | None) -> Message:
    blocks = () if estate is None else (dense(flat(estate)),)
    fields = {"peer": DEAD, "life": life, "cloud": DEAD, "asks": True}
    return Message(JOIN, fields=fields, blocks=blocks, origin=sponsor, hop=sponsor)


@pytest.mark.parametrize("reached", [True, False])
@pytest.mark.parametrize("said", [2.0, None])
def test_what_a_sponsor_settled_before_it_died_is_settled_again(reached: bool, said: float | None) -> None:
    """The dead had told us 1; its first sponsor, which died, 3; its second one holds 2, or has heard nothing."""
    us = Neighbour()
    us.tell(update(DEAD, 1.0))
    if reached:
        us.tell(join(FIRST, 2, 3.0))
        assert us.replica == pytest.approx(3.0)
    us.tell(join(SECOND, 3, said))
    assert us.replica == pytest.approx(said or 0.0), "as much of the dead as the second sponsor holds, and once"
    us.tell(update(DEAD, 5.0))
    estate = us.pride.estate(DEAD)
    assert estate is not None and estate == pytest.approx((said or 0.0) + 5.0)


def test_an_overtaken_join_changes_nothing_but_is_answered() -> None:
    us = Neighbour()
    us.tell(update(DEAD, 1.0))
    us.tell(join(SECOND, 3, 2.0))
    us.ctx.links[DEAD] = us.ctx.silent.pop(DEAD)  # it is in, and speaks to us
    us.tell(update(DEAD, 5.0))
    us.tell(join(FIRST, 2, 3.0))
    assert us.replica == pytest.approx(7.0) and DEAD in us.ctx.links
    us.tell(update(DEAD, 1.0))
    estate = us.pride.estate(DEAD)
    assert estate is not None and estate == pytest.approx(8.0)
    assert us.answers == [(SECOND, 3), (FIRST, 2)]
