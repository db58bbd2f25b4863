"""``streaming``: DiLoCo fragment by fragment, while training goes on, in four bits.

Source: Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free Lunch", 2025. The
model is cut into fragments that take turns; each is synchronised every H steps; a fragment said at t is merged when
the mean is there, as α · local + (1 - α) · global with α = 0.5; outer Nesterov (0.7, 0.9); outer gradients in 4 bits.

Differences from the paper. Fragments are equal ranges of the flat buffer, not strided layers; 4-bit integers with a
scale per 256 instead of E3M0; what rounding leaves out stays with the peer. The merge comes as soon as all parts are
here instead of a fixed τ steps later: a fragment's turn waits until the one before is closed. H is 20 (ours).
"""

from __future__ import annotations

from dlion.blocks import Block, dense
from dlion.exchange.base import Context
from dlion.exchange.rounds import ENCODINGS, Outer, Rounds
from dlion.tensors import Flat


class Streaming(Rounds):
    """``local_steps``: between two turns of the same fragment; ``alpha``: the part of the local weights that stays."""

    name = "streaming"
    overlap = True
    keep_error = True

    def __init__(
        self,
        *,
        local_steps: int = 20,
        fragments: int = 4,
        alpha: float = 0.5,
        bits: int = 4,
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
    ) -> None:
        super().__init__(max(1, local_steps // max(fragments, 1)), 0.0, Outer(outer_learning_rate, outer_momentum))
        if fragments < 1 or not 0 <= alpha < 1 or bits not in ENCODINGS:
            raise ValueError(
                f"streaming: expected fragments >= 1, alpha in [0, 1), bits 4 to 32, got {fragments}, {alpha}, {bits}"
            )
        self.fragments, self.alpha, self.encoding = fragments, alpha, ENCODINGS[bits]

    def fragment(self, ctx: Context) -> slice:
        turn, size = self.round % self.fragments, ctx.layout.size
        return slice(turn * size // self.fragments, (turn + 1) * size // self.fragments)

    def encode(self, values: Flat, start: int) -> Block:
        return dense(values, self.encoding, start=start)

    def merge(self, step: Flat, given: Flat, moved: Flat) -> Flat:
        """From x = anchor + given + moved to α x + (1 - α) (anchor + step)."""
        towards = (step - given - moved) * (1 - self.alpha)
        moved += given - step + towards
        return towards
