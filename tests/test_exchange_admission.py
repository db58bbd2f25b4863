"""What a neighbour may say to a strategy: whatever fits its declaration is heard or refused, and never raises."""

from __future__ import annotations

import numpy as np
import pytest

from dlion.blocks import dense
from dlion.exchange import EXCHANGES, find
from dlion.exchange.base import Exchange
from dlion.items import Heard
from dlion.messages import Message, PeerId, Scalar
from dlion.testing import Bench
from dlion.testing.conformance import learn
from dlion.wire.codec import encode

SAMPLES: dict[type, Scalar] = {str: "b", int: 1, float: 1.0, bool: True}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [*map(find, EXCHANGES)])
def test_any_number_of_blocks_is_heard_or_refused(kind: type[Exchange], count: int) -> None:
    """Blocks of any place in the model, too: a part of it, where the whole is expected."""
    bench = Bench(kind, 3)
    bench.run(2, learn)
    a, b = list(bench.seats.values())[:2]
    blocks = tuple(dense(np.ones(3, dtype=np.float32), start=start) for start in range(count))
    for name, fields in kind.speaks.items():
        values = {field: SAMPLES[of] for field, of in fields.items() if not field.endswith("?")}
        for epoch in (a.ctx.step, 1 << 40):
            message = Message(name, 1 << 40, epoch, values, blocks, origin=b.name, hop=b.name)
            outcome = a.replica.run([Heard(PeerId(b.name), message.stream, 1, encode(message))], bench.now)
            expected = kind.blocks.get(name, count)
            assert bool(outcome.refused) == (expected != count)
    for _ in range(25):
        bench.now += 1.0
        if a.ready:
            bench.step(a.name, learn)
    assert np.isfinite(a.weights).all()
