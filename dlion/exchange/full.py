"""``full``: every step the whole update to everybody. The oracle of exactness, and the price of not choosing.

Source: the plain synchronous data-parallel SGD, with the batch shares of DLion (Hong & Chandra, HPDC 2021) as weights:
w += Σ_k share_k · u_k, where u_k is peer k's local step (learning rate and sign applied) and Σ share = 1. With plain
SGD n peers in lockstep are one process that averages the n gradients.

Our choice: a link that cannot keep up (possible at free or bounded pace, and behind a bridge) is owed the sum of what
it missed and hears it in one message; nothing is lost.
"""

from __future__ import annotations

from dlion.exchange.estates import Estates


class Full(Estates):
    """Dense float32, every step, to all; bridges pass on what they hear as it is."""

    name = "full"
    pace = "lockstep"
    paces = ("lockstep", "bounded", "backup", "free")
