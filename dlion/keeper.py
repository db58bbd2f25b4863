"""When a node starts a checkpoint of all peers, what it adds to its part of one, and what it goes on from.

Law: on the loop, except ``others`` (train lane) and ``trainer_state`` (exchange lane); knows no lane, no file and no
clock. The cut itself is the exchange lane's; writing it down is for whoever gave ``seams.keep``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dlion.cut import Cuts, Part
from dlion.learn.workload import Stateful
from dlion.membership import Membership
from dlion.seams import Learner, Seams
from dlion.tensors import Flat


class Keeper:
    """``every_s``: from one checkpoint to the next, of which the lowest living peer starts all; 0: never."""

    def __init__(self, seams: Seams, every_s: float, membership: Membership, learner: Learner) -> None:
        self.resume = seams.resume
        self.keep = seams.keep
        self._seed = seams.seed
        self.cuts = Cuts(self.trainer_state, seams.spool)
        """For the lane."""
        self.zero_s = 0.0 if self.resume is None else self.resume.t
        """Time of the node's clock at which training begins."""
        self._every_s = every_s
        self._due_s = self.zero_s + every_s
        self._roster = membership.roster
        self._membership = membership
        self._batcher, self._trainer = learner.batcher, learner.trainer
        self._others = 0
        start = learner.trainer.workload.initial(seams.seed).flat  # resets the workload: so it comes before restoring
        self.weights: Flat = (start if self.resume is None else self.resume.weights).copy()
        """To begin with; the caller's own."""
        if self.resume is not None:
            assert self.resume.trainer is not None
            learner.trainer.restore(self.resume.trainer)
            self._others = int(self.resume.node.get("others", 0))
            if self.resume.node.get("missed"):
                self._roster.missed_at = 0.0
            if isinstance(learner.batcher, Stateful) and "batcher" in self.resume.node:
                learner.batcher.restore(self.resume.node["batcher"])

    def start_over(self) -> Flat:
        """We come into a run under way: of what was saved only the learner's part is ours. Returns the weights that
        everybody began with."""
        trainer, workload = self._trainer, self._trainer.workload
        start = workload.initial(self._seed).flat.copy()
        if self.resume is not None and self.resume.trainer is not None:
            trainer.restore(self.resume.trainer)
            self.resume = None
        elif isinstance(self._batcher, Stateful) and "started_at" in (held := self._batcher.state()):
            self._batcher.restore({**held, "started_at": 0.0})
        return start

    @property
    def begun(self) -> tuple[int, int]:
        """Own steps and samples done before."""
        return (0, 0) if self.resume is None else (self.resume.step, self.resume.samples)

    def trainer_state(self) -> Mapping[str, Any]:
        """In the exchange lane: what a checkpoint holds of the trainer. One that cannot be saved (a scheduler made of
        functions) fails the checkpoint when it is written, and not the training."""
        if self.keep is None:
            return {}
        try:
            return self._trainer.state()
        except TypeError as error:
            return {"": error}

    def others(self) -> int:
        """Samples that the others have processed, as far as was ever heard."""
        self._others = max(self._others, self._membership.samples - self._roster.me.samples)
        return self._others

    @property
    def able(self) -> bool:
        """Is there somebody to keep our part, and do all peers live? A cut that lacks one can never be gone on from."""
        return self.keep is not None and len(self._roster.live) == len(self._membership.topology.peers)

    def due(self, now: float) -> bool:
        """Is it time, and ours to start?"""
        if not self._every_s or now < self._due_s:
            return False
        self._due_s = max(self._due_s + self._every_s, now)
        return self.able and min(self._roster.live) == self._roster.me.peer

    def hand_over(self, part: Part | None) -> None:
        """Our part of a cut, if one is whole."""
        if part is not None and self.keep is not None:
            part.node = {"others": self.others(), "missed": self._roster.missed_at > -math.inf}
            if isinstance(self._batcher, Stateful):
                part.node["batcher"] = self._batcher.state()
            self.keep(part)
