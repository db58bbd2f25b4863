"""For those who write strategies: a bench without a network, and the conformance kit.

from dlion.testing import check

def test_mine() -> None:
    check(MyExchange)
"""

from dlion.testing.bench import Bench
from dlion.testing.conformance import check
from dlion.testing.watched import Nonconforming

__all__ = ["Bench", "Nonconforming", "check"]
