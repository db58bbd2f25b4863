"""``local-sgd``: averaging of a few bits every step, while training goes on.

Source: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, and for overlap and 4-bit averages
Douillard et al., "Streaming DiLoCo with overlapping communication", 2025.

Our choices: H = 1 local step, 4 bits with error feedback, weights by samples, plain averaging. A round opens when the
one before it has closed, so slow links stretch the rounds instead of stalling anybody; but one silent peer holds the
rounds of all.
"""

from __future__ import annotations

from dlion.blocks import Block, dense
from dlion.exchange.base import Context
from dlion.exchange.rounds import ENCODINGS, Outer, Rounds
from dlion.tensors import Flat


class LocalSGD(Rounds):
    """``local_steps``: at least so many between two rounds; ``bits`` per value."""

    name = "local-sgd"
    overlap = True
    keep_error = True

    def __init__(self, *, local_steps: int = 1, round_s: float = 0.0, bits: int = 4) -> None:
        super().__init__(local_steps, round_s, Outer(1.0, 0.0))
        if bits not in ENCODINGS:
            raise ValueError(f"{self.name}: bits must be one of {tuple(ENCODINGS)}, got {bits}")
        self.encoding = ENCODINGS[bits]

    def encode(self, values: Flat, start: int) -> Block:
        return dense(values, self.encoding, start=start)

    def weight(self, ctx: Context) -> float:
        return float(max(ctx.batch, 1))
