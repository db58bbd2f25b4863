"""When peers leave and come, from their presence over time.

Law: pure. A peer that goes vanishes without a word; one that comes, late or again, comes into the run under way.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate


class PresenceError(ValueError):
    """A peer's presence cannot be played; the text names the peer and the time."""

    exit_code: ClassVar[int] = 78


class Turn(NamedTuple):
    """``peer`` comes or goes at ``at_s`` seconds; who was there at the start does not come then."""

    peer: PeerId
    at_s: float
    comes: bool


def turns(topology: Topology, until_s: float) -> list[Turn]:
    """All comings and goings before ``until_s``, in order. Raises PresenceError when nobody would be left, or begin."""
    found = [turn for name, peer in sorted(topology.peers.items()) for turn in _turns(name, peer.presence, until_s)]
    last = {turn.peer: turn.comes for turn in sorted(found, key=lambda turn: turn.at_s)}
    if last.keys() == topology.peers.keys() and not any(last.values()):
        raise PresenceError(f"{topology.name}: all peers leave before {until_s:g} s; nobody is left to finish the run")
    if all(peer.presence is not None and peer.presence.at(0.0) == 0 for peer in topology.peers.values()):
        raise PresenceError(f"{topology.name}: no peer is there at the start; begin later in the trace (--start)")
    return sorted(found, key=lambda turn: (turn.at_s, turn.peer))


def _turns(name: PeerId, presence: Rate | None, until_s: float) -> list[Turn]:
    found: list[Turn] = []
    if presence is None:
        return found
    here, at = presence.at(0.0) > 0, presence.next_change(0.0)
    while at < until_s:
        if (presence.at(at) > 0) is not here:
            here = not here
            found.append(Turn(name, at, here))
        at = presence.next_change(at)
    return found
