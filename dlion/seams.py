"""What a node is given: limits and periods, what it learns, and the seams between a real and a simulated one.

Law: plain values and protocols' holders; no behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from dlion.compute import Compute
from dlion.cut import Part, Spool
from dlion.learn.batching import Batcher
from dlion.learn.trainer import Trainer
from dlion.neighbours import DialSettings
from dlion.net.link import Dialer
from dlion.observe.runlog import Event, RunLog
from dlion.tensors import Flat


@dataclass(frozen=True)
class NodeSettings:
    """Limits and periods."""

    until_s: float | None = None
    """Training time after which everybody finishes; None: until stopped."""
    status_every_s: float = 1.0
    evaluate_every_s: float = 5.0
    checkpoint_every_s: float = 0.0
    """From one cut to the next; 0: none are started by the clock."""
    suspect_after_s: float = 5.0
    """A peer of which no news came for so long is silent: not counted, until it is heard again. A link on which
    nothing came for so long is given up."""
    lost_after_s: float = 2.0
    """A neighbour whose link is lost and cannot be dialled again counts as silent after this."""
    start_wait_s: float = 60.0
    """How long to wait for all neighbours before training starts without the missing; a bridge in place of a
    missing one is dialled for some seconds more."""
    begin_at_s: float = 0.0
    """Training does not begin before that, by the loop's clock: as in a run that is played again."""
    drain_s: float = 20.0
    """How long a drain goes on though no update moves, and 30 times that at most; of who leaves the others, in all."""
    refusals_max: int = 16
    """Inadmissible messages from one peer before it is quarantined."""
    unacked_bytes_max: int = 64 << 20
    queue_s: float = 0.09
    wan_bytes_per_s: float = 0.0
    """What links between micro-clouds are held to; 0: nothing holds them. (The dialer and the door do it.)"""
    exchange_s_per_byte: float = 4e-10
    exchange_s_per_item: float = 7e-5
    """Modelled cost of the exchange lane, per byte read or written and per item (simulation only). Measured by
    scripts/bench_exchange.py."""
    dial: DialSettings = field(default_factory=DialSettings)


@dataclass(frozen=True)
class Seams:
    """What differs between a real and a simulated node (the fourth is the running event loop)."""

    dialer: Dialer
    compute: Compute
    seed: int
    log: RunLog
    observer: Callable[[float, int, Flat, Flat], Iterable[Event]] | None = None
    """Called in the exchange lane with (t, step, view, replica) every ``evaluate_every_s``; keeps neither."""
    keep: Callable[[Part], None] | None = None
    """Given our part of every cut that is whole here; must not wait. None: no checkpoints are started."""
    spool: Spool = np.copy
    """Called in the exchange lane: copies an array for a part of a cut."""
    clock: Callable[[], float] | None = None
    """Seconds on a clock that all peers share; None: the loop's own is one, as in virtual time."""
    resume: Part | None = None
    """Go on from here; all peers of the run from the same cut."""


@dataclass(frozen=True)
class Learner:
    """What this peer computes, and with how many samples a step."""

    trainer: Trainer
    batcher: Batcher
