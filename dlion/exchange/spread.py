"""Common ground of the strategies whose peers tell each other their updates: full, DLion, Ako, Gaia, TFAko, pride.

Law: routes and accounts. An own update is weighed and added; whoever must hear it is owed it; a link that can take
more is told what the strategy chooses to ``say``. What is heard is added and passed on along the routes, never echoed.
Which part is said, and when, is the strategy's; but a bridge gathers what a crowd says, and passes on sums: else the
messages that each peer hears would grow with the square of the peers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from dlion.blocks import Block
from dlion.exchange.base import Action, Add, Context, Exchange, LinkView, Member, Send, Speech, Timer, Update
from dlion.exchange.owed import Owed, Piece, exact
from dlion.messages import Message, PeerId, Span
from dlion.tensors import Flat

Account = tuple[PeerId, str]
"""A neighbour, and from whose side the updates came: our own micro-cloud, or another one, of which we tell our mates
(who must not bridge that)."""
CROWD_MIN = 5
"""Members of a micro-cloud whose bridges gather."""
SUMS_PER_STEP = 4
"""What a bridge says per own step, at most (four times as much in the end)."""
GATHER_SHARE = 1 / 16
"""Part of a step in which it gathers what was said at the same time."""
FIRST_STEP_S = 1.0
"""Taken for a step before we have done one."""
CALM_S = 15.0
"""Nothing is gathered for so long after somebody's state changed: of updates that come over two routes, twins are
told by their steps, but sums have no twins."""


class Spread(Exchange):
    """Base: every own update to all, weighed by the share of the global batch. Subclasses choose what to ``say``."""

    speaks: ClassVar[Speech] = {"update": {"cloud": str, "plan?": str}}
    """``plan``: by whose routes it goes on, where these are not those that everybody began with."""
    additive: ClassVar[tuple[str, ...]] = ("update",)
    ahead = True
    keep = True
    """What was not said stays owed (error feedback per link); False: it is dropped."""
    sums = True
    """Bridges may sum what they pass on."""
    newcomers = True
    handed_on: ClassVar[tuple[str, ...]] = ("update",)

    def __init__(self) -> None:
        self.owed: dict[Account, Owed] = {}
        self._elder: dict[tuple[str, PeerId, str], Owed] = {}
        """What goes on by another plan than the present one: its name, to whom, from which micro-cloud's side."""
        self._plan = ""
        self._last: dict[PeerId, int] = {}
        """Last step of each origin that was added here."""
        self._beside: set[PeerId] = set()
        """Whom we told our updates until now."""
        self._said_at: dict[PeerId, float] = {}
        self._due: dict[PeerId, float] = {}
        """When the bridges that gather now will say it."""
        self._calm_at = 0.0
        self._crowded = False
        self._living: set[PeerId] = set()

    # -- what a strategy decides ---------------------------------------------------------------------------------

    def weigh(self, update: Update, ctx: Context) -> float:
        """Factor of an own update before it is added and told."""
        return ctx.share

    def hear(self, ctx: Context) -> float:
        """Factor of every told update, our own included, when it is added here."""
        return 1.0

    def say(self, owed: Owed, link: LinkView, ctx: Context) -> Block | None:
        """The part of ``owed`` to say to a link that can take something now; None: nothing yet."""
        return owed.everything()

    def budget_bytes(self, link: LinkView, ctx: Context) -> int:
        """How much ``say`` allows a message to that link; 0: no bound."""
        return 0

    # -- hooks ---------------------------------------------------------------------------------------------------

    def setup(self, ctx: Context) -> None:
        self._beside = set(ctx.routes.onward(None, ctx.cloud))

    def after_step(self, update: Update, ctx: Context) -> Iterable[Action]:
        values = update.values
        if (weight := self.weigh(update, ctx)) != 1.0:
            values *= np.float32(weight)
        coverage = (Span(ctx.me, update.step, update.step),)
        self._last[ctx.me] = update.step
        yield Add(values, self.hear(ctx), coverage)
        yield from self.spread(values, coverage, ctx)

    def on_message(self, origin: PeerId, message: Message, ctx: Context) -> Iterable[Action]:
        for who, _, last in message.coverage:
            if last > self._last.get(who, -1):
                self._last[who] = last
        for block in message.blocks:
            yield Add(block, self.hear(ctx), message.coverage, message)
            yield from self.spread(block, message.coverage, ctx, message)

    def on_writable(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        return self._tell([a for a in self.owed if a[0] == link.peer], ctx)

    def on_timer(self, key: str, ctx: Context) -> Iterable[Action]:
        """A bridge has gathered for long enough."""
        return self._tell([a for a in self.owed if a[0] in self._due], ctx)

    def on_leave(self, link: LinkView, ctx: Context) -> Iterable[Action]:
        self._calm_at = ctx.now + CALM_S
        for account in [a for a in self.owed if a[0] == link.peer]:
            link.writable_bytes = max(link.writable_bytes, 1)  # what was said on the other account took the room
            yield from self._tell([account], ctx, everything=True)

    def on_members(self, ctx: Context) -> Iterable[Action]:
        """Drop the accounts of who is gone. A new neighbour (a bridge that moved, or whose other end is heard again)
        first hears how far we are: what was said meanwhile will not come, and nobody may wait for it."""
        if self._last and ctx.members.keys() != self._living:
            self._calm_at = ctx.now + CALM_S
        self._living = set(ctx.members)
        self._crowded = sum(m.cloud == ctx.cloud for m in ctx.members.values()) >= CROWD_MIN
        told = {*ctx.links, *ctx.silent} & set(ctx.routes.onward(None, ctx.cloud))
        self._set_apart(ctx)
        self._move_accounts(told, ctx)
        there = {*ctx.members, *ctx.silent, *ctx.former}
        self.owed = {account: owed for account, owed in self.owed.items() if account[0] in there}
        for plan, peer, cloud in [key for key in self._elder if key[1] not in there]:
            self._redirect(self._elder.pop((plan, peer, cloud)), plan, peer, cloud, ctx)
        fresh = sorted((told & ctx.links.keys()) - self._beside) if self._last else []
        self._beside = told & (ctx.links.keys() | self._beside)
        nothing = Piece(exact(np.zeros(ctx.layout.size, dtype=np.float32)), ctx.me, ctx.layout.size)
        for peer in fresh:
            theirs = {p for p, member in ctx.members.items() if member.cloud == ctx.links[peer].cloud and p != ctx.me}
            coverage = tuple(Span(p, last, last) for p, last in sorted(self._last.items()) if p not in theirs)
            self._account(peer, ctx.cloud, ctx).add(nothing, coverage)
        yield from self._tell([(peer, ctx.cloud) for peer in fresh], ctx)

    def _set_apart(self, ctx: Context) -> None:
        """Who left is in no route any more. What is owed so far goes on from neighbour to neighbour by the plan under
        which it was begun; where the new plan makes a difference, that is said with it."""
        before, self._plan = self._plan, ctx.routes.name
        if before == self._plan:
            return
        for account, owed in list(self.owed.items()):
            if owed and not self._alike(before, *account, ctx):
                elder = self._elder.setdefault((before, *account), owed)
                if elder is not owed:  # that plan was the present one before, and came again
                    elder.add(_piece(owed, ctx), owed.coverage)
                del self.owed[account]

    def _alike(self, plan: str, to: PeerId, cloud: str, ctx: Context) -> bool:
        """Does what we say to ``to`` go on alike from there by that plan and by the present one?"""
        routes = ctx.routes
        return plan == routes.name or routes.downstream(to, cloud, plan) == routes.downstream(to, cloud)

    def _move_accounts(self, told: set[PeerId], ctx: Context) -> None:
        """What a former other end of a bridge is still owed, the new one is told."""
        seen: dict[PeerId, Member | LinkView] = {**ctx.members, **ctx.silent}
        ends = {link.cloud: peer for peer in sorted(told) if (link := ctx.links.get(peer) or ctx.silent[peer])}
        left = seen.keys() - told - ctx.former.keys()
        for account in [a for a in self.owed if a[0] in left and self.owed[a]]:
            cloud = seen[account[0]].cloud
            if cloud != ctx.cloud and cloud in ends:
                owed = self.owed.pop(account)
                self._account(ends[cloud], ctx.cloud, ctx).add(_piece(owed, ctx), owed.coverage)

    def _redirect(self, owed: Owed, plan: str, gone: PeerId, cloud: str, ctx: Context) -> None:
        """``gone`` left before there was a link to it: whoever is now the first of the same receivers hears it."""
        routes = ctx.routes
        meant = {gone, *(to for _, to in routes.downstream(gone, cloud, plan))} & ctx.members.keys()
        for peer in routes.onward(None, ctx.cloud):
            reached = {peer, *(to for _, to in routes.downstream(peer, cloud))} & ctx.members.keys()
            if reached == meant and (_link(peer, ctx) or ctx.silent.get(peer)) is not None:
                self._account(peer, cloud, ctx).add(_piece(owed, ctx), owed.coverage)

    def drain(self, ctx: Context) -> Iterable[Action]:
        return self._tell(list(self.owed), ctx, everything=True)

    def owes(self, ctx: Context) -> bool:
        return self.lags(ctx) or any(bool(owed) for (peer, _), owed in self.owed.items() if _link(peer, ctx))

    def lags(self, ctx: Context) -> bool:
        return bool(self._elder) and any(_link(peer, ctx) is not None for _, peer, _ in self._elder)

    # -- the machinery -------------------------------------------------------------------------------------------

    def spread(
        self, values: Flat | Block, coverage: tuple[Span, ...], ctx: Context, heard: Message | None = None
    ) -> Iterator[Action]:
        """Owe ``values`` to all who must hear them from us, and tell those whose links can take it."""
        came_from, cloud, plan = None, ctx.cloud, ctx.routes.name
        if heard is not None:
            came_from, cloud = heard.hop, str(heard.fields["cloud"])
            plan = str(heard.fields.get("plan", "")) if heard.kind == "update" else plan
        onward = ctx.routes.onward(came_from, cloud, plan)
        if not onward and not self._elder:
            return
        piece = Piece(values, heard.origin if heard else ctx.me, ctx.layout.size)
        accounts = []
        for peer in onward:
            link = _link(peer, ctx) or ctx.silent.get(peer)
            there = link or ctx.members.get(peer)
            if there is None:
                continue
            side = cloud if there.cloud == ctx.cloud else ctx.cloud
            if plan != ctx.routes.name and (link is None or not self._alike(plan, peer, side, ctx)):
                elder = self._elder.setdefault((plan, peer, side), Owed(ctx.layout.size, awaited=self.awaited))
                elder.add(piece, coverage)
            elif link is not None:
                self._account(peer, cloud, ctx).add(piece, coverage)
                accounts.append((peer, side))
        if accounts or self._elder:
            yield from self._tell(accounts, ctx)

    def _account(self, peer: PeerId, cloud: str, ctx: Context) -> Owed:
        """The account on which ``peer`` is owed updates of ``cloud``."""
        link = _link(peer, ctx) or ctx.silent[peer]
        side = cloud if link.cloud == ctx.cloud else ctx.cloud
        owed = self.owed.get((peer, side))
        if owed is None:
            owed = self.owed[peer, side] = Owed(ctx.layout.size, awaited=self.awaited)
        return owed

    def _tell(self, accounts: Iterable[Account], ctx: Context, *, everything: bool = False) -> Iterator[Action]:
        """Say something on each account whose link can take it: what passes through first, it is older."""
        accounts = list(accounts)
        if self._elder:
            yield from self._tell_elder(ctx)
        if self.sums and self._crowded and ctx.now >= self._calm_at:
            gathering = {a for a in accounts if a[0] in ctx.links and self._gathers(a, ctx, everything)}
            yield from (Timer(self._due[peer], f"pass {peer}") for peer, _ in sorted(gathering))
            accounts = [a for a in accounts if a not in gathering]
        for side in sorted({side for _, side in accounts}, key=lambda side: (side == ctx.cloud, side)):
            links = [link for peer, of in accounts if of == side and (link := _link(peer, ctx)) is not None]
            if links:
                links.sort(key=lambda k: (-k.rate_bps, k.peer))
                yield from self._tell_side(links, side, ctx, everything)

    def _tell_elder(self, ctx: Context) -> Iterator[Action]:
        """What goes on by another plan goes first, and all of it: somebody waits for that to be over."""
        for plan, peer, cloud in list(self._elder):
            link = _link(peer, ctx)
            if link is not None and link.writable_bytes > 0:
                owed = self._elder.pop((plan, peer, cloud))
                block = owed.everything()
                yield Send((peer,), self._message(owed, block, cloud, plan, ctx))

    def _gathers(self, account: Account, ctx: Context, everything: bool) -> bool:
        """Does the bridge to this neighbour wait for more to say?"""
        link, owed = ctx.links[account[0]], self.owed[account]
        if link.cloud == ctx.cloud or not (owed.fresh or owed.unsaid):
            return False
        due = self._due.get(link.peer)
        if due is None:
            step_s = ctx.step_s or FIRST_STEP_S
            pause_s = step_s / SUMS_PER_STEP / (4 if everything else 1)
            earliest = self._said_at.get(link.peer, -pause_s) + pause_s
            self._due[link.peer] = due = max(ctx.now + step_s * GATHER_SHARE, earliest)
        if ctx.now < due:
            return True
        if link.writable_bytes > 0:
            del self._due[link.peer]
            self._said_at[link.peer] = ctx.now
        return False

    def _tell_side(self, links: list[LinkView], side: str, ctx: Context, everything: bool) -> Iterator[Action]:
        """The same thing to many is one Send, encoded once."""
        sends: dict[tuple[int, tuple[Span, ...]], tuple[Message, list[LinkView]]] = {}
        for link in links:
            owed = self.owed[link.peer, side]
            if link.writable_bytes <= 0 or not owed:
                continue
            block = owed.everything() if everything else self.say(owed, link, ctx)
            if block is None:
                continue
            message = self._message(owed, block, side, ctx.routes.name, ctx)
            sends.setdefault((id(block), message.coverage), (message, []))[1].append(link)
        for message, to in sends.values():
            to.sort(key=lambda link: link.peer)
            yield Send(tuple(k.peer for k in to), message, tuple(self.budget_bytes(k, ctx) for k in to))

    def _message(self, owed: Owed, block: Block, side: str, plan: str, ctx: Context) -> Message:
        """``block`` of ``owed``, from that side, goes out."""
        origin = owed.latest.origin if owed.latest is not None and block is owed.latest.block else ctx.me
        coverage = owed.said(block, keep=self.keep)
        step = max((span.last for span in coverage), default=ctx.step)
        fields = {"cloud": side, "plan": plan} if plan else {"cloud": side}
        return Message("update", step, 0, fields, (block,), coverage, origin=origin)

    # -- newcomers -----------------------------------------------------------------------------------------------

    def introduce(
        self, peer: PeerId, sponsor: PeerId | None, life: int, ctx: Context, message: Message | None = None
    ) -> Iterable[Action]:
        if sponsor is not None:
            kept = {account: owed for account, owed in self.owed.items() if account[0] != peer}
            self.owed = kept | {(peer, side): owed.twin() for (p, side), owed in kept.items() if p == sponsor}
        self._last.pop(peer, None)
        self._beside.discard(peer)
        return ()

    # -- snapshots -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        owed = {account: owed.state() for account, owed in self.owed.items()}
        elder = {key: owed.state() for key, owed in self._elder.items()}
        return {"owed": owed, "elder": elder, "last": dict(self._last), "beside": set(self._beside)}

    def restore(self, state: Mapping[str, Any], ctx: Context) -> None:
        size, awaited = ctx.layout.size, self.awaited
        self.owed = {a: Owed.of(size, ctx.me, held, awaited=awaited) for a, held in state["owed"].items()}
        self._elder = {key: Owed.of(size, ctx.me, held, awaited=awaited) for key, held in state["elder"].items()}
        self._last, self._beside = dict(state["last"]), set(state["beside"])


def _link(peer: PeerId, ctx: Context) -> LinkView | None:
    """Over which something can be said to ``peer`` now, be it a neighbour or have it been one."""
    return ctx.links.get(peer) or ctx.former.get(peer)


def _piece(owed: Owed, ctx: Context) -> Piece:
    """All of an account, as one update."""
    return owed.only or Piece(exact(owed.flat), ctx.me, ctx.layout.size)
