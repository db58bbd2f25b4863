"""The others around one node: what makes it wait for them, and what does not."""

from __future__ import annotations

import pytest
from node_runs import net, run

from dlion.exchange.base import Exchange
from dlion.exchange.full import Full
from dlion.exchange.pride import Pride


@pytest.mark.parametrize("kind", [Full, Pride])
@pytest.mark.parametrize("talk", ["mesh", "bridges"])
def test_a_drain_does_not_wait_for_an_end_of_the_news(kind: type[Exchange], talk: str) -> None:
    """Round trips of 0.4 s: at every moment some news is under way."""
    settings = {"status_every_s": 0.3, "drain_s": 20.0}
    ran = run(net("a1 a2 | b1", talk, delay_s=0.2), kind, until_s=2.0, settings=settings)  # type: ignore[arg-type]
    for peer in ("a1", "a2", "b1"):
        assert ran.events(peer, "end")[0]["reason"] == "until" and ran.events(peer, "end")[0]["t"] < 4.5
