"""``ako``: every message one partition of the model, holding all that it gathered since that partition was last said.

Source: Watcharapichat, Morales, Fernandez & Pietzuch, "Ako: Decentralised Deep Learning with Partial Gradient
Exchange", SoCC 2016. An own update is added at once; message t carries partition t mod p; a whole update reaches a
peer within p messages. Cost model: p = ceil(m (n - 1) γ / B), for model bytes m, updates per second γ, bandwidth B.

Differences from the paper. Updates are weighed by batch share instead of summed at full strength, so that the learning
rate means the same as in the other strategies. The cost model is fed with the measured rates (B = their sum) and looked
at again whenever a neighbour has heard all p partitions. A link that is full skips no partition: its turn waits.
"""

from __future__ import annotations

from math import ceil

from dlion.blocks import Block
from dlion.exchange.base import Context, LinkView
from dlion.exchange.estates import Estates
from dlion.exchange.owed import Owed


class Ako(Estates):
    """``partitions``: p; 0 lets the cost model choose, up to ``partitions_max``."""

    name = "ako"
    pace = "free"
    paces = ("free", "bounded", "lockstep", "backup")

    def __init__(self, *, partitions: int = 0, partitions_max: int = 64) -> None:
        super().__init__()
        if partitions < 0 or partitions_max < 1:
            raise ValueError(f"ako: partitions must be 0 or more, at most {partitions_max}, got {partitions}")
        self.partitions = partitions
        self.partitions_max = partitions_max

    def count(self, ctx: Context) -> int:
        """The cost model: how many partitions make a message that the links can carry once per step."""
        if self.partitions:
            return min(self.partitions, ctx.layout.size)
        bandwidth_bps = sum(other.rate_bps for other in ctx.links.values())
        if bandwidth_bps <= 0 or ctx.step_s <= 0:
            return 1
        sent_bps = 32 * ctx.layout.size * len(ctx.links) / ctx.step_s
        return min(max(1, ceil(sent_bps / bandwidth_bps)), self.partitions_max, ctx.layout.size)

    def say(self, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        return owed.partition(self.count(ctx)) if owed.fresh else None
