"""The strategy interface: hooks in, actions out. What is said, to whom, when, and what hearing it does.

Law: synchronous and pure. Time arrives as ``ctx.now``, chance as ``ctx.rng``; no socket, no wire, no node, no sleep.
Hooks run in the exchange lane, one at a time, in the order in which things happened. Only ``Add`` changes weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from msgspec import Struct

from dlion.blocks import Block
from dlion.messages import Message, PeerId, Span
from dlion.tensors import Flat, Layout, held_bytes


class Send(Struct, frozen=True):
    """Say ``message`` to the neighbours ``to``. Encoded once however many they are.

    Never waits and is never lost: look at ``LinkView.writable_bytes`` first, and keep what does not fit as owed.
    """

    to: tuple[PeerId, ...]
    message: Message
    budgets_bytes: tuple[int, ...] = ()
    """How many bytes each of ``to`` was allowed, for the run log; () = the strategy sets no budgets."""


class Add(Struct, frozen=True):
    """weights += scale * values: the only door to the weights.

    ``values`` is a flat array of the whole model or a Block. ``coverage`` says whose steps these are: it feeds the
    pace, the staleness figures and the run log. A lockstep pace holds Adds back and applies them, ordered by origin,
    when the step is complete, so arrays may not be changed by the strategy afterwards.
    """

    values: Flat | Block
    scale: float = 1.0
    coverage: tuple[Span, ...] = ()
    message: Message | None = None
    """The message heard that caused this, None for the peer's own doing."""


class Timer(Struct, frozen=True):
    """Call ``on_timer(key)`` at time ``at`` (seconds, as ``ctx.now``). A later one of the same key replaces it."""

    at: float
    key: str


Action = Send | Add | Timer
Speech = Mapping[str, Mapping[str, type]]
"""Message kinds, each with its fields and their types."""


class Update(Struct, frozen=True):
    """What one local step produced.

    ``values``: flat float32, this strategy's own from now on (the trainer does not touch it again): the optimizer's
    full local step (to be *added*, learning rate and sign applied) or, for ``consumes = "gradient"``, the gradient.
    """

    step: int
    values: Flat
    loss: float
    samples: int
    learning_rate: float
    seconds: float


@dataclass
class LinkView:
    """A link to a neighbour, or to one that was, as a strategy sees it. Read-only for strategies."""

    peer: PeerId
    cloud: str
    lan: bool
    rate_bps: float = 0.0
    """Measured delivery rate towards it, bits per second, scaled down where several links share an egress."""
    rtt_s: float = 0.0
    writable_bytes: int = 0
    """What the link can take now without building a queue; falls as the current hook sends."""


@dataclass(slots=True)
class Member:
    """A living peer (ourselves included), as last heard of. Read-only for strategies."""

    peer: PeerId
    cloud: str
    step: int = 0
    samples_per_s: float = 0.0
    batch: int = 0
    loss: float = float("inf")
    """Mean loss of the last steps."""
    life: int = 0
    """Which of its lives; a later one has a larger number."""


class Routes(Protocol):
    """Who carries what to whom (``mesh.bridges``)."""

    @property
    def mesh(self) -> bool:
        """True: everybody tells everybody, and nothing is passed on."""

    @property
    def tree(self) -> bool:
        """True: not every two micro-clouds have a bridge; what they say to each other is passed on by those between."""

    @property
    def clouds(self) -> int:
        """How many micro-clouds there are, whoever lives."""

    @property
    def name(self) -> str:
        """Of the plan that they are part of: who has left. A word travels by the plan under which it was first said."""

    def onward(self, came_from: PeerId | None, origin_cloud: str, plan: str | None = None) -> tuple[PeerId, ...]:
        """Neighbours that must hear an update of ``origin_cloud`` which came from ``came_from`` (None: our own), by
        the plan of that name (None: the present one)."""

    def downstream(self, to: PeerId, origin_cloud: str, plan: str | None = None) -> frozenset[tuple[PeerId, PeerId]]:
        """All links (from, to) over which an update of ``origin_cloud`` goes on from ``to``, when we say it there."""


@dataclass
class Context:
    """All that a hook may know. One object per node, brought up to date between batches of hooks."""

    me: PeerId
    cloud: str
    layout: Layout
    weights: Flat
    """The replica; read-only view."""
    rng: np.random.Generator
    routes: Routes
    now: float = 0.0
    step: int = 0
    """Local steps done."""
    step_s: float = 0.0
    """Seconds from one local step to the next, smoothed."""
    lane_s: float = 0.0
    """Processor time that the exchange lane has taken so far."""
    batch: int = 0
    global_batch: int = 0
    shard: int = 0
    """Samples in our part of the data."""
    members: dict[PeerId, Member] = field(default_factory=dict)
    """Living peers by name, in sorted order, ourselves included."""
    links: dict[PeerId, LinkView] = field(default_factory=dict)
    """Living neighbours by name, in sorted order."""
    silent: dict[PeerId, LinkView] = field(default_factory=dict)
    """Neighbours that are dead, merely cut off, or not connected yet: nothing can be said to them now, they may come
    (as they were), and who promises that nothing is lost keeps what they are owed."""

    former: dict[PeerId, LinkView] = field(default_factory=dict)
    """Connected peers that are neighbours no more: what was first said under an earlier plan may have to go there."""

    @property
    def share(self) -> float:
        """Our part of the global batch: LBS / GBS."""
        return self.share_of(self.me)

    def share_of(self, peer: PeerId) -> float:
        """A living peer's part of the global batch; an equal part while its batch is not known yet."""
        member = self.members.get(peer)
        batch = self.batch if peer == self.me else member.batch if member is not None else 0
        total = self.global_batch or sum(m.batch for m in self.members.values())
        if not total or not batch:
            return 1.0 / max(len(self.members), 1)
        return batch / total


class Exchange:
    """Base of all strategies. Every hook has a do-nothing default, so a simple strategy stays small.

    Class attributes say what the node must know beforehand; ``__init__`` takes the strategy's own settings as keyword
    arguments with defaults (they come from ``[exchange]`` of the job or ``--set``), and checks them (ValueError).
    """

    name: ClassVar[str] = ""
    pace: ClassVar[str] = "free"
    """Pace used unless the job says otherwise."""
    paces: ClassVar[tuple[str, ...]] = ("free", "bounded", "lockstep")
    """Paces that make sense with this strategy; any other is refused."""
    consumes: ClassVar[str] = "delta"
    """``delta``: updates arrive as the optimizer's step; ``gradient``: as the plain gradient."""
    bridged: ClassVar[bool] = False
    """True: where the topology leaves it open how peers talk, bridges join the micro-clouds; else a mesh does."""
    ahead: bool = False
    """True: once ``after_step`` has yielded the ``Add`` that covers the step, the next one may start; what else it does
    goes on beside that."""
    slices: int = 1
    """In how many slices, at most, a step's gradient is taken: each where the replica is by then, and with what the
    slices before it have done of the step."""
    reach: float = 0.0
    """By how much of a local step an own step moves the replica, as far as that is known: for those slices."""
    sums: bool = False
    """True: what is passed on may be summed with what comes later. Set to False where additions are put in order."""
    awaited: bool = True
    """False: nobody's pace waits until it hears of others' steps, so a message need not name all that it sums."""
    consensus: bool = False
    """True: after a drain all replicas agree to rounding. May depend on the settings."""
    speaks: ClassVar[Speech] = {}
    """Message kinds this strategy understands, each with its fields and their types; others are refused unheard. A text
    called ``peer`` names peers of the topology."""
    blocks: ClassVar[Mapping[str, int]] = {}
    """How many blocks a message of a kind holds, where the strategy counts on that; others are refused unheard."""
    additive: ClassVar[tuple[str, ...]] = ()
    """Kinds whose blocks are added when heard: one that comes again over another route is dropped unheard."""

    def setup(self, ctx: Context) -> None:
        """Called once, before anything else: allocate state. ``ctx.weights`` holds the initial weights."""

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        """The peer's own update is ready; nothing has been added yet."""
        return ()

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        """A message that passed admission, exactly once and in order per session."""
        return ()

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        """The link had been full, or a hook had said all that it took, and it can take more now. Links that are not
        full are yours to use in any hook."""
        return ()

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        return ()

    def on_members(self, ctx: Context) -> Iterable[Action]:
        """Somebody came, left, fell silent or died, or a bridge moved: ``members``, ``links``, ``routes`` are new."""
        return ()

    def on_leave(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        """This neighbour leaves, and passes on what it still hears from us: say all that it is owed, room or not."""
        return ()

    def ready(self, step: int, ctx: Context) -> bool:
        """May local step ``step`` (0-based) start, as far as this strategy's round goes? Asked after every hook."""
        return True

    def view(self, weights: Flat) -> Flat:
        """Flat weights to evaluate, save and serve. The result may be ``weights`` itself and is not changed."""
        return weights

    def drain(self, ctx: Context) -> Iterable[Action]:
        """Training is over: say what is still owed to links that can take it. Called again, after each message and
        as links take more, until it yields nothing and ``owes`` is False."""
        return ()

    def owes(self, ctx: Context) -> bool:
        """True while ``drain`` has more to say to a living neighbour (or waits for one)."""
        return False

    def lags(self, ctx: Context) -> bool:
        """True while something that was first said under an earlier plan has to be passed on."""
        return False

    # -- newcomers (``dlion.newcomers``) -------------------------------------------------------------------------

    newcomers: bool = False
    """Can somebody come into a run under way? Then the hooks below mean something."""
    handed_on: ClassVar[tuple[str, ...]] = ()
    """Kinds that a newcomer must hear too which were said to its sponsor before their senders spoke to it."""

    def estate(self, peer: PeerId) -> Flat | None:
        """What was heard of the former life of ``peer``, if anybody must hear of that: its sponsor is asked."""
        return None

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        """``peer`` begins a new life and counts when it is heard. It is owed what ``sponsor`` is owed (nothing if we
        are that ourselves), or keeps its account where there is none. ``message`` brings the estate, as a block."""
        return ()

    def bequeath(self, peer: PeerId, ctx: Context) -> dict[str, Flat]:
        """Copies of what a newcomer must hold to take our place beside our common neighbours; in sum, the weights."""
        return {"": self.view(ctx.weights).copy()}

    def inherit(self, sponsor: PeerId, bequest: Mapping[str, Flat], ctx: Context) -> None:
        """The newcomer's side; ``ctx.weights`` are still those that everybody began with. Raises ValueError."""

    @property
    def last_view(self) -> bool:
        """Could everybody take over another peer's view when the drain is over, should it be needed?"""
        return self.consensus

    def conclude(self, view: Flat, ctx: Context) -> Iterable[Add]:
        """All is said, and somebody may have taken along what others never heard: ``view`` is everybody's from now on.
        Nothing will be heard or asked any more."""
        yield Add(view - self.view(ctx.weights))

    def state(self) -> dict[str, Any]:
        """All that must survive a restart: arrays, Blocks, Messages and plain values in nested containers. Whoever
        keeps it copies it (``cut.frozen``) before anything else happens."""
        return {}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        """Inverse of ``state``."""

    @property
    def state_bytes(self) -> int:
        """Memory that this strategy keeps in arrays, for the memory account: all that it can reach, once."""
        return held_bytes(self)
