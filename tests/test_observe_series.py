"""What the report draws of a run that was gone on with: several lives of a peer, one after the other in its log."""

from __future__ import annotations

import numpy as np

from dlion.observe.report.series import link_series


def test_a_links_lives_are_counted_apart() -> None:
    """1000 B/s for 4 s; then, from a checkpoint at 2 s, a new life that counts from 0 and sends 3000 B/s."""
    columns = {
        "t": np.array([1.0, 2.0, 3.0, 4.0, 2.5, 3.5, 4.5]),
        "sent_bytes": np.array([1000, 2000, 3000, 4000, 300, 3300, 6300]),
        "available_bps": np.full(7, np.nan),
        "rate_bps": np.full(7, 50_000.0),
    }
    link = link_series(columns)
    assert link.t.tolist() == [2.0, 3.0, 3.5, 4.0, 4.5]
    assert link.used_bps.tolist() == [8000.0, 8000.0, 24000.0, 8000.0, 24000.0]
    assert link.sent_bytes == 4000 + 6300 and not link.known
    assert set(link.available_bps) == {50_000.0}


def test_a_new_life_that_has_sent_more_already_is_no_burst() -> None:
    columns = {
        "t": np.array([1.0, 2.0, 1.5, 2.5]),
        "sent_bytes": np.array([10, 20, 500, 510]),
        "available_bps": np.full(4, 1e3),
        "rate_bps": np.full(4, 1e3),
    }
    assert link_series(columns).used_bps.tolist() == [80.0, 80.0]
