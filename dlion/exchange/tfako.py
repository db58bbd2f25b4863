"""``tfako``: Ako with the size of what is said fitted to each node's bandwidth and compute, and work-scaled updates.

Source: Hong & Chandra, "TFAko", SoCC 2018 poster, and its code. Partition t mod p of the sum of the last p updates goes
to every peer at step t, and a peer's contribution is scaled by the data it trains per unit time. The formulas are our
choice: p_ij = ceil(M rate_i / BW_ij) per link, from measured rates; scale = throughput_k / Σ throughput.

Differences from the poster's code. There gradients travel: a receiver sums those it hears with its own and gives the
sum to its one Adam (1e-3), which undoes the scale. Here each peer's optimizer, whichever it is, acts on its own
gradient before anything is said: its steps travel, and are averaged (Σ scale = 1), not summed. What gathers since a
partition was last said is the ring buffer's sum of the last p updates.
"""

from __future__ import annotations

from math import ceil

from dlion.blocks import Block
from dlion.exchange.base import Context, LinkView, Update
from dlion.exchange.estates import Estates
from dlion.exchange.owed import Owed


class TFAko(Estates):
    """``partitions_max`` bounds how long a whole update may take to reach a peer, in messages."""

    name = "tfako"
    pace = "free"
    paces = ("free", "bounded", "lockstep", "backup")

    def __init__(self, *, partitions_max: int = 64) -> None:
        super().__init__()
        if partitions_max < 1:
            raise ValueError(f"tfako: partitions_max must be at least 1, got {partitions_max}")
        self.partitions_max = partitions_max

    def weigh(self, update: Update, ctx: Context) -> float:
        """Our part of all samples trained per second; the batch share until that is known of everybody."""
        rates = {peer: member.samples_per_s for peer, member in ctx.members.items()}
        if ctx.me not in rates or min(rates.values()) <= 0:
            return ctx.share
        return rates[ctx.me] / sum(rates.values())

    def say(self, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        return owed.partition(self.count(link, ctx)) if owed.fresh else None

    def count(self, link: LinkView, ctx: Context) -> int:
        """Partitions such that one of them fits what the link carries in a step."""
        if link.rate_bps <= 0 or ctx.step_s <= 0:
            return 1
        wanted = ceil(32 * ctx.layout.size / ctx.step_s / link.rate_bps)
        return min(max(1, wanted), self.partitions_max, ctx.layout.size)
