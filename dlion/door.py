"""Whom a peer talks to: those that began with it, and those that were shown into the run.

Law: pure; ``now`` is an argument. Judges hellos; knows neither links nor sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dlion.identity import JOINING, LATE, TRAINING, UNDER_WAY, Identity
from dlion.messages import Hello, PeerId


@dataclass
class Door:
    """What one node knows of those who may come."""

    open_to_new: bool = True
    """False once training runs: a peer that was not there at the start must be introduced by its sponsor."""
    unmet_until: float = -math.inf
    """Until when those are waited for nevertheless of whose micro-cloud nobody was heard yet."""
    admitted: dict[PeerId, int] = field(default_factory=dict)
    """Present lives of those who came into the run, as their sponsors said."""
    sponsors: Callable[[PeerId], str] = lambda peer: "it takes nobody"
    """Why we do not take this newcomer (empty: we do)."""
    sponsor: PeerId | None = None
    """While we come into a run: who shows us in. Nobody else is talked to."""
    life_of: Callable[[PeerId], int] = lambda peer: 0
    """The incarnation of a peer that we know, maybe from others: it is no newcomer, but a bridge that moved."""
    near: Callable[[PeerId], bool] = lambda peer: True
    """Is it one that others would introduce to us?"""
    unmet: Callable[[PeerId], bool] = lambda peer: False
    """Is it beyond a bridge, where nobody was ever heard of? It began as we did, when that bridge was missing."""

    def begin(self, unmet_until: float = -math.inf) -> None:
        """Training begins. Beyond a bridge that is missing they may begin as much later."""
        self.open_to_new, self.unmet_until = False, unmet_until

    def waits_for(self, peer: PeerId, now: float) -> bool:
        """May ``peer`` begin with us, be it later?"""
        return self.open_to_new or (now < self.unmet_until and self.unmet(peer))

    def _known(self, peer: PeerId, life: int) -> bool:
        return self.admitted.get(peer, self.life_of(peer)) == life

    def objection(self, me: Identity, hello: Hello, met: int, now: float) -> str:
        """Who was not there at the start, or has been replaced since, needs a sponsor, or to be introduced by one.
        ``met``: its incarnation that we have met, 0 if none."""
        peer, life, joining = PeerId(hello.peer), hello.incarnation, JOINING in hello.capabilities
        if life < met:
            return f"{peer} was replaced: incarnation {life} is older than {met}"
        if self.sponsor is not None and peer != self.sponsor:
            return f"{me.peer} comes into the run, and talks to {self.sponsor} only until it is in"
        knows = [c for c in hello.capabilities if c.startswith(TRAINING)]
        if self.open_to_new or peer == self.sponsor:
            late = self.sponsor is None and knows and knows != [f"{TRAINING}{me.incarnation}"]
            asked = f"{me.peer} is not in the run itself, and cannot show {peer} in" if joining else ""
            return f"{peer} {UNDER_WAY}" if late else asked
        unheard = not (self.near(peer) or self.life_of(peer) or LATE in hello.capabilities)
        beyond = bool(knows) and unheard  # it began as we did, and news of it had no way yet
        if 0 < life == met or (not joining and (self._known(peer, life) or beyond or self.waits_for(peer, now))):
            return ""
        if joining:
            shown = self.admitted.get(peer) == life
            return f"{peer} is shown in by somebody else already" if shown else self.sponsors(peer)
        return f"{me.peer} {UNDER_WAY}, and nobody has shown {peer} in yet"
