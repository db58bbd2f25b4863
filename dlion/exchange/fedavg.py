"""``fedavg``: every round some peers train from the common weights, and what they moved is averaged by data.

Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017;
selection, deadlines and over-selection: Bonawitz et al., "Towards Federated Learning at Scale", SysML 2019.

Differences. No server: the chosen tell their parts to all, and every peer forms the mean. Who is chosen follows from
the round's number, so nobody need say it; the others give an empty part. Who will miss the deadline, transfer
included, leaves itself out the same way. Over-selection chooses more, and all that are in time count. A round is
``local_steps`` steps or ``round_s`` seconds; the paper's E epochs of batch B if ``epochs`` are set, where B is the
peer's own batch, which may change. (Beside a loop of one's own, under ``attach``, nobody knows a peer's part of the
data: an epoch is then over the ``samples`` of all.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from typing import Any

import numpy as np

from dlion.exchange.base import Action, Context, Timer, Update
from dlion.exchange.rounds import Outer, Rounds
from dlion.messages import Message, PeerId


class FedAvg(Rounds):
    """``share``: C, the part of the peers that trains in a round; ``deadline_s``: after a round's start, 0 for none;
    ``epochs``: E, passes over a peer's own data that make its round, 0 to count ``local_steps``."""

    name = "fedavg"

    def __init__(
        self,
        *,
        share: float = 1.0,
        over_selection: float = 1.0,
        local_steps: int = 20,
        round_s: float = 0.0,
        deadline_s: float = 0.0,
        epochs: float = 0.0,
    ) -> None:
        super().__init__(local_steps, round_s, Outer(1.0, 0.0))
        if not 0 < share <= 1 or over_selection < 1 or deadline_s < 0:
            raise ValueError(
                "fedavg: expected share in (0, 1], over_selection >= 1, deadline_s >= 0, "
                f"got {share}, {over_selection}, {deadline_s}"
            )
        if epochs < 0 or (epochs and round_s):
            raise ValueError(f"fedavg: epochs must be 0 or more, and 0 beside round_s, got {epochs} and {round_s}")
        self.share, self.over_selection, self.deadline_s, self.epochs = share, over_selection, deadline_s, epochs
        self._opened = -1
        self._ends_s = float("inf")

    def chosen(self, ctx: Context) -> tuple[PeerId, ...]:
        """Who trains in the open round: the same answer on every peer that sees the same members."""
        members = sorted(ctx.members)
        wanted = self.share * self.over_selection * len(members)
        count = min(len(members), ceil(round(wanted, 9)))  # 0.28 of 25 are seven, however floats see it
        order = np.random.default_rng([2017, self.round]).permutation(len(members))
        return tuple(sorted(members[i] for i in order[:count]))

    def weight(self, ctx: Context) -> float:
        """Samples trained on, or nothing when the part would come too late."""
        sent_s = max((32 * ctx.layout.size / link.rate_bps for link in ctx.links.values() if link.rate_bps), default=0)
        return 0.0 if self.round == self._opened and ctx.now + sent_s > self._ends_s else float(self._samples)

    def steps(self, ctx: Context) -> int:
        """Those that pass over our data ``epochs`` times, the last of them perhaps beyond."""
        return max(1, ceil(self.epochs * ctx.shard / max(ctx.batch, 1))) if self.epochs else super().steps(ctx)

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        yield from super().after_step(update, ctx)
        yield from self._turn(ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        yield from super().on_message(origin, message, ctx)
        yield from self._turn(ctx)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        yield from super().on_members(ctx)
        yield from self._turn(ctx)

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        if self._given is None and self.deadline_s and ctx.now >= self._ends_s:
            yield from self._give(ctx)
        yield from self._turn(ctx)

    def ready(self, step: int, ctx: Context) -> bool:
        return super().ready(step, ctx) and ctx.me in self.chosen(ctx)

    def _turn(self, ctx: Context) -> Iterator[Action]:
        """Set the deadline of a new round; as long as we are not chosen, give an empty part at once."""
        while not self._draining:
            if self.deadline_s and self._opened < self.round:
                self._ends_s = ctx.now + self.deadline_s
                yield Timer(self._ends_s, "deadline")
            self._opened = self.round
            if self._given is not None or ctx.me in self.chosen(ctx):
                return
            yield from self._give(ctx)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "opened": self._opened, "ends_s": self._ends_s}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        self._opened, self._ends_s = int(state["opened"]), float(state["ends_s"])
