"""``sparseloco``: DiLoCo whose parts are the largest 64 of every 4096 entries in a few bits, with error feedback.

Source: Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo", 2025. H = 30; e <- 0.95 e + Δ; of each
chunk of 4096 the 64 largest go out and leave e; plain mean, outer learning rate 1; everybody waits for the round.

Differences from the paper. Values have 4 bits (the paper: 2) and indexes are Elias-Fano codes (the paper: 12 bits), so
a part is about 95 times smaller than float32 (the paper: 146). H is 15: jobs here are short. Between micro-clouds go
sums, of as many entries as their parts have together (the paper: every part to everybody).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dlion.blocks import Block, Encoding, sparse
from dlion.exchange.base import Context
from dlion.exchange.rounds import Outer, Rounds
from dlion.tensors import CHUNK, Flat


class SparseLoCo(Rounds):
    """``keep`` of every ``chunk`` entries are said; ``decay`` is the memory of what was not."""

    name = "sparseloco"

    def __init__(
        self, *, local_steps: int = 15, round_s: float = 0.0, chunk: int = 4096, keep: int = 64, decay: float = 0.95
    ) -> None:
        super().__init__(local_steps, round_s, Outer(1.0, 0.0))
        if not 0 < keep <= chunk or not 0 <= decay <= 1:
            raise ValueError(f"sparseloco: 0 < keep <= chunk and decay in [0, 1], got {keep}, {chunk} and {decay}")
        self.chunk, self.keep, self.decay = chunk, keep, decay

    def setup(self, ctx: Context) -> None:
        super().setup(ctx)
        self._error = np.zeros_like(ctx.weights)

    def part(self, moved: Flat, start: int, ctx: Context) -> Block:
        self._error *= np.float32(self.decay)
        self._error += moved
        block = self.encode(self._error, start)
        block.add_to(self._error, -1.0)
        return block

    def encode(self, values: Flat, start: int) -> Block:
        return self.sum(values, start, 1)

    def sum(self, mean: Flat, start: int, parts: int) -> Block:
        """As many entries as that many parts can have."""
        places = self._largest(mean, min(parts * self.keep, self.chunk))
        return sparse(mean, places, Encoding.I4, start=start, scanned=mean.size)

    def _largest(self, values: Flat, keep: int) -> np.typing.NDArray[np.intp]:
        """Ascending positions of the ``keep`` largest magnitudes of every chunk; the last chunk may be shorter."""
        size = values.size
        whole = size // self.chunk * self.chunk
        places = []
        step = max(1, CHUNK // self.chunk) * self.chunk
        for lo in range(0, whole, step):
            rows = np.abs(values[lo : min(lo + step, whole)]).reshape(-1, self.chunk)
            top = np.argpartition(rows, self.chunk - keep, axis=1)[:, self.chunk - keep :]
            top += np.arange(lo, lo + rows.size, self.chunk)[:, None]
            places.append(top.ravel())
        rest = np.abs(values[whole:])
        count = min(rest.size, max(1, keep * rest.size // self.chunk)) if rest.size else 0
        tail = whole + np.argpartition(rest, rest.size - count)[rest.size - count :] if count else np.empty(0, np.intp)
        return np.sort(np.concatenate((*places, tail)))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "error": self._error.copy()}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        super().restore(state, ctx)
        self._error = np.array(state["error"], dtype=np.float32)
