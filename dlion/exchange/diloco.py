"""``diloco``: many local steps, then one outer step on the mean of how far everybody came.

Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023. H local steps of
the inner optimizer, whose state never leaves the peer; outer gradient = start - end, averaged over the peers; outer SGD
with Nesterov momentum (0.7, 0.9). Everybody waits until the round is closed.

Differences from the paper. Peers form the mean themselves, in two levels (``parts``). H is 20, not 500: jobs here are
short. ``round_s`` ends rounds by the clock, so that fast peers do more local steps. ``bits`` may be 32 to 4 (the low
ones as in Streaming DiLoCo; what rounding loses is dropped). A dead peer leaves the round.
"""

from __future__ import annotations

from dlion.blocks import Block, dense
from dlion.exchange.rounds import ENCODINGS, Outer, Rounds
from dlion.tensors import Flat


class DiLoCo(Rounds):
    """``round_s`` > 0 overrides ``local_steps``."""

    name = "diloco"

    def __init__(
        self,
        *,
        local_steps: int = 20,
        round_s: float = 0.0,
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
        bits: int = 32,
    ) -> None:
        super().__init__(local_steps, round_s, Outer(outer_learning_rate, outer_momentum))
        if bits not in ENCODINGS:
            raise ValueError(f"{self.name}: bits must be one of {tuple(ENCODINGS)}, got {bits}")
        self.encoding = ENCODINGS[bits]

    def encode(self, values: Flat, start: int) -> Block:
        return dense(values, self.encoding, start=start)
