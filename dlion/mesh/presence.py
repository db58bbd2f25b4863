"""When peers leave, from their presence over time.

Law: pure. A peer can leave for good; to come late or to come back is more than this version can play, and is refused
instead of being played wrongly.
"""

from __future__ import annotations

from typing import ClassVar

from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate


class PresenceError(ValueError):
    """A peer's presence cannot be played; the text names the peer and the time."""

    exit_code: ClassVar[int] = 78


def departures(topology: Topology, until_s: float) -> dict[PeerId, float]:
    """Seconds at which peers go, of those that go before ``until_s``. Raises PresenceError."""
    gone = {name: left for name, peer in topology.peers.items() if (left := _left(name, peer.presence, until_s))}
    if gone.keys() == topology.peers.keys():
        raise PresenceError(f"{topology.name}: all peers leave before {until_s:g} s; nobody is left to finish the run")
    return gone


def _left(name: PeerId, presence: Rate | None, until_s: float) -> float | None:
    if presence is None:
        return None
    if presence.at(0.0) == 0:
        raise PresenceError(
            f"{name} is absent at the start and comes later: a late join is not simulated in this version; "
            "begin later in the trace (--start), or leave this peer out"
        )
    left = presence.next_change(0.0)
    if left >= until_s:
        return None
    back = presence.next_change(left)
    if back < until_s:
        raise PresenceError(
            f"{name} leaves at {left:g} s and comes back at {back:g} s: coming back is not simulated in this version; "
            f"end the run before that (--until), or leave this peer out"
        )
    return left
