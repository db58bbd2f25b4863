"""What a neighbour has not been told yet: the accumulator that every strategy with a memory shares.

Law: plain arithmetic on flat buffers. Sent + owed = added, always: what is subtracted is what the receiver will add
(``Block.values``), never what the sender wished to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from dlion.blocks import Block, Encoding, block_bytes, dense, sparse
from dlion.messages import PeerId, Span
from dlion.selection import Spectrum, nonzero
from dlion.tensors import Flat, Layout, add_scaled

SPANS_MAX = 16
"""Named in one message; of more, a quarter if somebody waits to hear of them. The others' turn comes with the next."""


class Piece:
    """One update as it came, shared by all the neighbours that are owed it: encoded once, copied only when merged."""

    def __init__(self, values: Flat | Block, origin: PeerId, size: int) -> None:
        self.values = values
        self.origin = origin
        self.size = size
        self._spectrum: Spectrum | None = None

    @cached_property
    def block(self) -> Block:
        """The whole update, exactly: as it was heard, or float32 without its zeros where these are many."""
        return self.values if isinstance(self.values, Block) else exact(self.values, copy=False)

    @cached_property
    def flat(self) -> Flat:
        """The whole update as an array of the model's size; read only."""
        if not isinstance(self.values, Block):
            return self.values
        flat = np.zeros(self.size, dtype=np.float32)
        self.values.add_to(flat)
        return flat

    def spectrum(self, layout: Layout) -> Spectrum:
        """Its magnitudes per tensor, scanned once however many neighbours choose from them (largest budget first)."""
        if self._spectrum is None:
            self._spectrum = Spectrum(self.flat, layout)
        return self._spectrum


class Owed:
    """An account of one neighbour. ``size``: entries of the model; ``awaited``: a pace waits to hear whose steps came.

    As long as it holds a single update it only refers to it (``latest``); a second one, or saying a part, makes a sum.
    What rounding left of a sum that was said whole is dust: it lies beside the next update, unless that is added to it.
    """

    def __init__(self, size: int, *, awaited: bool = True) -> None:
        self.size = size
        self.awaited = awaited
        self.latest: Piece | None = None
        """An update of which nothing was said; all that is owed but for the sum, which then is dust."""
        self.cursor = (0, 1)
        """Where a strategy that says partitions in turn is: (next, of how many)."""
        self.unsaid = 0
        """At least so many entries were not said since something was added."""
        self._sum: Flat | None = None
        self._dust = False
        """The sum is only what rounding left."""
        self._whole: Block | None = None
        """What ``everything`` gave last."""
        self._spans: dict[PeerId, tuple[int, int]] = {}
        self._coverage: tuple[Span, ...] | None = ()

    def __bool__(self) -> bool:
        return self.latest is not None or self._sum is not None

    @property
    def only(self) -> Piece | None:
        """The single update that is all that is owed; None when more is, or nothing."""
        return self.latest if self._sum is None else None

    @property
    def fresh(self) -> bool:
        """True: holds updates of which nothing was said yet."""
        return bool(self._spans)

    @property
    def coverage(self) -> tuple[Span, ...]:
        """Whose steps were added since they were last named; of many, those whose turn it is."""
        if self._coverage is None:
            named: Iterable[tuple[PeerId, tuple[int, int]]] = self._spans.items()
            if len(self._spans) > SPANS_MAX:
                named = islice(named, max(SPANS_MAX, -(-len(self._spans) // 4) if self.awaited else 0))
            self._coverage = tuple([Span(peer, first, last) for peer, (first, last) in sorted(named)])
        return self._coverage

    @property
    def flat(self) -> Flat:
        """The sum of all that is owed; this account's own array."""
        if self._sum is None:
            self._sum = np.zeros(self.size, dtype=np.float32)
        if self.latest is not None:
            _add(self._sum, self.latest.values)
            self.latest = None
        self._dust = False
        return self._sum

    def spectrum(self, layout: Layout) -> Spectrum:
        """Magnitudes of what is owed, per tensor."""
        return self.only.spectrum(layout) if self.only is not None else Spectrum(self.flat, layout)

    def add(self, piece: Piece, coverage: Iterable[Span] = ()) -> None:
        """One more update is owed."""
        self._whole = None
        self.unsaid = self.size
        if self.latest is None and (self._sum is None or self._dust):
            self.latest = piece
        else:
            _add(self.flat, piece.values)
        spans, self._coverage = self._spans, None
        for peer, first, last in coverage:
            before = spans.get(peer)
            spans[peer] = (first, last) if before is None else (min(first, before[0]), max(last, before[1]))

    def said(self, block: Block, *, keep: bool = True) -> tuple[Span, ...]:
        """``block`` goes out: subtract it, or forget the rest too unless ``keep``. Returns the coverage to name."""
        coverage, self._coverage = self.coverage, None
        self.unsaid = max(0, self.unsaid - block.count)
        for span in coverage:
            del self._spans[span.origin]
        if keep and self.latest is not None and block is self.latest.block:
            self.latest = self._whole = None
        elif not keep or block is self._whole or self._exact(block):
            self._settle()
        else:
            block.add_to(self.flat, -1.0)
            self._dust = block.indices is None and block.size == self.size
        return coverage

    def partition(self, count: int) -> Block:
        """The next of ``count`` equal partitions, with all that is owed there; a new ``count`` holds from the first."""
        turn, of = self.cursor if self.cursor[0] else (0, count)
        self.cursor = ((turn + 1) % of, of)
        if of == 1:
            return self.everything()
        start, stop = turn * self.size // of, (turn + 1) * self.size // of
        return dense(self.flat[start:stop], start=start)

    def everything(self) -> Block:
        """All that is owed, exactly: the update as it came, else float32, sparse where that is smaller. Say it before
        anything is added: it may lie where the sum does."""
        self._whole = self.only.block if self.only is not None else exact(self.flat, copy=False)
        return self._whole

    def strike(self, part: slice) -> None:
        """What is owed there was said in another way."""
        if self.latest is not None or self._sum is not None:
            self.flat[part] = 0

    def clear(self) -> None:
        """Nothing is owed any more, nor to be named."""
        self._settle()
        self._spans.clear()
        self._coverage = None

    def _settle(self) -> None:
        self.latest = self._sum = self._whole = None
        self._dust = False
        self.unsaid = 0

    def twin(self) -> Owed:
        """An account of another neighbour that is owed the same."""
        made = Owed(self.size, awaited=self.awaited)
        made.latest, made.cursor = self.latest, self.cursor
        made.unsaid = self.size if self else 0
        made._sum, made._dust = None if self._sum is None else self._sum.copy(), self._dust
        made._spans, made._coverage = dict(self._spans), None
        return made

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which copies what it keeps."""
        return {
            "latest": None if self.latest is None else self.latest.values,
            "sum": self._sum,
            "dust": self._dust,
            "spans": self._spans,
            "cursor": self.cursor,
            "unsaid": self.unsaid,
        }

    @classmethod
    def of(cls, size: int, me: PeerId, state: Mapping[str, Any], *, awaited: bool = True) -> Owed:
        """Inverse of ``state``, on the peer ``me``."""
        made = cls(size, awaited=awaited)
        if (held := state["latest"]) is not None:
            made.latest = Piece(held if isinstance(held, Block) else np.array(held, dtype=np.float32), me, size)
        if state["sum"] is not None:
            made._sum = np.array(state["sum"], dtype=np.float32)
        made._dust = state["dust"]
        made._spans, made._coverage, made.cursor = dict(state["spans"]), None, tuple(state["cursor"])
        made.unsaid = state["unsaid"]
        return made

    def _exact(self, block: Block) -> bool:
        return block.indices is None and block.size == self.size and block.encoding is Encoding.F32


def exact(flat: Flat, *, start: int = 0, copy: bool = True) -> Block:
    """``flat`` without loss, in the smaller of two forms; an empty block when all is zero. ``copy``: as ``dense``."""
    count = int(np.count_nonzero(flat))
    if block_bytes(Encoding.F32, flat.size, count) < block_bytes(Encoding.F32, flat.size):
        return sparse(flat, nonzero(flat, count), Encoding.F32, start=start, scanned=flat.size)
    return dense(flat, start=start, copy=copy)


def _add(target: Flat, values: Flat | Block) -> None:
    if isinstance(values, Block):
        values.add_to(target)
    else:
        add_scaled(target, values)
