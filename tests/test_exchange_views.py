"""Rounds in a mesh of micro-clouds whose peers do not agree on who lives: links go out and come back, peers die, and
each notices in its own time. Whatever the order, the survivors count the same, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from node_runs import net, outages, run

from dlion.exchange import find
from dlion.exchange.base import Context, Exchange, LinkView, Member
from dlion.items import DrainNow, MembersChanged
from dlion.mesh.bridges import plan
from dlion.messages import PeerId
from dlion.tensors import Flat, disagreement
from dlion.testing import Bench

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "diloco": {"local_steps": 1},
    "fedavg": {"local_steps": 1},
    "local-sgd": {},
    "sparseloco": {"local_steps": 1, "chunk": 8, "keep": 2},
    "streaming": {"local_steps": 2, "fragments": 2},
}
EVENTS = 600
"""After so many nobody dies and no link goes out; then all links come back and everybody drains."""


class Views(Bench):
    """A bench whose peers each see for themselves who lives, by ``misses`` and ``hears``; ``out``: links that carry
    nothing now."""

    def __init__(self, make: Callable[[], Exchange], clouds: Mapping[str, str], *, seed: int = 0) -> None:
        self.seen = {PeerId(p): set(map(PeerId, clouds)) for p in clouds}
        self.out: set[frozenset[PeerId]] = set()
        super().__init__(make, clouds, seed=seed)

    def _refresh(self, ctx: Context) -> None:
        super()._refresh(ctx)
        me, cloud_of, seen = ctx.me, self.topology.cloud_of, self.seen[ctx.me]
        gone = [p for p in self.topology.peers if p not in seen]
        ctx.members = {p: Member(p, cloud_of(p), batch=64) for p in sorted(seen)}
        ctx.routes = plan(self.topology, dict.fromkeys(sorted(seen), 1.0), silent=gone).routes(me)
        ctx.links = {p: ctx.links.get(p) or LinkView(p, cloud_of(p), lan=False) for p in sorted(seen - {me})}
        for link in ctx.links.values():
            link.rate_bps, link.rtt_s, link.writable_bytes = 1e9, 0.01, 1 << 40

    def apart(self, *pairs: tuple[str, str]) -> None:
        """These links are out, and both ends notice."""
        self.out |= {frozenset(map(PeerId, pair)) for pair in pairs}
        for a, b in pairs:
            self.misses(a, b)
            self.misses(b, a)

    def together(self, *pairs: tuple[str, str]) -> None:
        self.out.clear()
        for a, b in pairs:
            self.hears(a, b)
            self.hears(b, a)

    def misses(self, who: str, whom: str) -> None:
        self.seen[PeerId(who)].discard(PeerId(whom))
        if PeerId(whom) not in self.live:
            for queue in self.flying[PeerId(whom), PeerId(who)]:
                queue.clear()
        self._handle(self.seats[PeerId(who)], MembersChanged())

    def hears(self, who: str, whom: str) -> None:
        self.seen[PeerId(who)].add(PeerId(whom))
        self._handle(self.seats[PeerId(who)], MembersChanged())

    def die(self, peer: PeerId) -> None:
        """Some of what was on its way from it still arrives; nobody has noticed yet."""
        del self.live[peer]
        for (source, target), queues in self.flying.items():
            for queue in queues if peer in (source, target) else ():
                keep = 0 if target == peer else int(self.rng.integers(len(queue) + 1))
                while len(queue) > keep:
                    queue.pop()

    def carries(self, source: PeerId, target: PeerId) -> bool:
        if target not in self.live or frozenset((source, target)) in self.out:
            return False
        return any(self.flying[source, target]) and (source not in self.live or source in self.seen[target])

    def settle(self, *, but: tuple[str, str] | None = None) -> None:
        """Deliver all that can be, except over one slow link."""
        while [1 for pair in self.flying if pair != but and self.carries(*pair) and self.deliver(*pair)]:
            pass

    def finish(self) -> None:
        for peer in self.live:
            self._handle(self.seats[peer], DrainNow())
        for _ in range(500):
            self.settle()
            for peer in self.live:
                self._handle(self.seats[peer])
            if not self.fire() and not any(self.carries(*pair) for pair in self.flying):
                break
        assert [p for p in self.live if self.seats[p].owes] == []
        assert self.disagreement <= 1e-6


def push(seed: int, peer: str, step: int, weights: Flat) -> Flat:
    return np.random.default_rng([seed, step, *map(ord, peer)]).standard_normal(weights.size).astype(np.float32)


def test_halves_that_were_apart_for_less_than_a_round_count_the_same() -> None:
    """Each half says a sum of A without the other's part; nobody has closed the round when they meet again."""
    bench = Views(partial(find("diloco"), local_steps=1), {"a0": "A", "a1": "A", "b0": "B", "b1": "B"})
    between = [(a, b) for a in ("a0", "b0") for b in ("a1", "b1")]
    for peer in ("a0", "a1"):
        bench.step(peer, partial(push, 0))
    bench.apart(*between)
    bench.settle()
    bench.together(*between)
    bench.settle()
    for peer in ("b0", "b1"):
        bench.step(peer, partial(push, 0))
    bench.settle()
    assert bench.disagreement == 0.0
    bench.finish()


def test_a_shard_said_for_who_was_away_and_its_own_are_never_both_counted() -> None:
    """In four bits they differ, by what the sums of each had left out before."""
    bench = Views(find("local-sgd"), {"a0": "A", "a1": "A", "b0": "B", "b1": "B"})
    for _ in range(2):
        for peer in bench.live:
            bench.step(peer, partial(push, 0))
        bench.settle()
    for peer in ("a0", "a1"):
        bench.step(peer, partial(push, 0))
    bench.deliver("a1", "a0")
    others = [PeerId(p) for p in ("a0", "b0", "b1")]
    bench.out = {frozenset((PeerId("a1"), p)) for p in others}
    for peer in others:  # a1 itself notices nothing
        bench.misses(peer, "a1")
    bench.settle()
    bench.out.clear()
    for peer in others:
        bench.hears(peer, "a1")
    bench.settle()
    for peer in ("b0", "b1"):
        bench.step(peer, partial(push, 0))
    bench.finish()


def test_a_shard_does_not_overtake_the_anchor_of_who_made_it() -> None:
    """b1 hears a1's shard of a new era's first round from b0, before a1's anchor comes over a slow link."""
    bench = Views(partial(find("diloco"), local_steps=1), {"a1": "A", "b0": "B", "b1": "B"})
    a1, b0, b1 = map(PeerId, ("a1", "b0", "b1"))
    bench.apart((a1, b0), (a1, b1))
    for peer in bench.live:
        bench.step(peer, partial(push, 0))
    bench.settle()
    bench.out.clear()
    bench.hears(b0, a1)
    bench.hears(b1, a1)
    bench.seen[a1].add(b0)  # a1 hears both at once: one era for all
    bench.hears(a1, b1)
    for _ in range(3):
        bench.settle(but=(a1, b1))
        for peer in bench.live:
            if bench.may_step(peer):
                bench.step(peer, partial(push, 0))
    bench.finish()


@pytest.mark.parametrize("name", sorted(SETTINGS))
@pytest.mark.parametrize("first", ["it hears of the death", "it is heard again"])
@pytest.mark.parametrize("passed_on", [False, True])
def test_a_sum_whose_maker_died_before_the_silent_one_was_back_is_the_only_one(
    name: str, first: str, passed_on: bool
) -> None:
    """a0 sums A without a1, which has all parts and could make a sum with its own, tells b0 and dies."""
    bench = Views(partial(find(name), **SETTINGS[name]), {"a0": "A", "a1": "A", "b0": "B", "b1": "B"})
    a0, a1, b0, b1 = map(PeerId, ("a0", "a1", "b0", "b1"))

    def all_said(source: PeerId, target: PeerId) -> None:
        while bench.carries(source, target) and bench.deliver(source, target):
            pass

    for peer in (a0, a1):
        bench.step(peer, partial(push, 0))
    bench.deliver(a0, a1)
    bench.out = {frozenset((a1, p)) for p in (a0, b0, b1)}
    for peer in (a0, b0, b1):
        bench.misses(peer, a1)
    for pair in ((b0, a0), (b1, a0), (a0, b0), *([(b0, b1)] if passed_on else [])):
        all_said(*pair)
    bench.die(a0)
    if first == "it hears of the death":
        bench.misses(a1, a0)
    bench.out.clear()
    for peer in (b0, b1):
        bench.hears(peer, a1)
    for peer in (b0, b1):
        bench.misses(peer, a0)
    if first == "it is heard again":
        bench.misses(a1, a0)
    bench.settle()
    for peer in (b0, b1):
        bench.step(peer, partial(push, 0))
    bench.settle()
    assert bench.disagreement <= 1e-6
    bench.finish()


def test_a_fragment_without_entries_is_a_round_like_any_other() -> None:
    bench = Bench(partial(find("streaming"), local_steps=1, fragments=40), {"a0": "A", "a1": "A", "b0": "B"})
    bench.run(60, partial(push, 0))
    bench.drain()
    assert min(seat.exchange.round for seat in bench.seats.values()) > 40  # type: ignore[attr-defined]
    assert bench.disagreement == 0.0


@pytest.mark.parametrize("name", ["diloco", "fedavg", "sparseloco", "local-sgd"])
def test_an_outage_shorter_than_a_round_parts_nobody_for_ever(name: str) -> None:
    """Real nodes: the parts of A are said while a1 b1 and a2 b2 are apart, those of B when they are together again."""
    between = [(a, b) for a in ("a1", "b1") for b in ("a2", "b2")]
    speeds = {"a1": 8.0, "a2": 8.0, "b1": 5.3, "b2": 5.3}
    topology = net("a1 a2 | b1 b2", "mesh", speeds=speeds, up=dict.fromkeys(between, outages((5.0, 9.5))))
    quick = {"status_every_s": 0.3, "lost_after_s": 0.5, "suspect_after_s": 1.0, "drain_s": 6.0}
    ran = run(topology, lambda: find(name)(local_steps=8), until_s=40.0, settings=quick)
    assert disagreement(ran.result.views) == 0.0
    assert not [e for peer in ran.logs for e in ran.events(peer, "end") if "cut short" in e["reason"]]


def play(seed: int) -> None:
    """A world drawn at random: two or three micro-clouds, up to three deaths and three outages, every order."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 4, size=int(draw.integers(2, 4))).tolist()
    clouds = {f"{chr(97 + c)}{i}": chr(65 + c) for c, size in enumerate(sizes) for i in range(size)}
    name = sorted(SETTINGS)[int(draw.integers(len(SETTINGS)))]
    bench = Views(partial(find(name), **SETTINGS[name]), clouds, seed=seed)
    names = list(map(PeerId, clouds))
    pace: dict[Any, float] = {key: float(draw.choice([2.0, 0.5, 0.1])) for key in (*names, *bench.flying)}
    deaths = set(draw.integers(20, 400, size=int(draw.integers(0, min(4, len(names))))).tolist())
    outs = set(draw.integers(20, 400, size=int(draw.integers(0, 4))).tolist())
    for event in range(20 * EVENTS):
        if event in deaths:
            bench.die(list(bench.live)[int(draw.integers(len(bench.live)))])
        if event in outs:
            side = {p for p in names if draw.random() < 0.5} if draw.random() < 0.6 else {names[0]}
            bench.out |= {frozenset((p, q)) for p in names if p in side for q in names if q not in side}
        acts = _possible(bench, pace, ending=event > EVENTS)
        if not acts:
            break
        odds = np.array([act[0] for act in acts])
        act = acts[int(draw.choice(len(acts), p=odds / odds.sum()))][1]
        act()
    else:
        raise AssertionError("they never stop talking")
    bench.finish()


def _possible(bench: Views, pace: Mapping[Any, float], *, ending: bool) -> list[tuple[float, Callable[[], object]]]:
    acts: list[tuple[float, Callable[[], object]]] = []
    for p in bench.live:
        lost = [q for q in sorted(bench.seen[p] - {p}) if q not in bench.live or frozenset((p, q)) in bench.out]
        back = [q for q in bench.live if q not in bench.seen[p] and frozenset((p, q)) not in bench.out]
        acts += [(0.5, partial(bench.misses, p, q)) for q in lost]
        acts += [(2.0, partial(bench.hears, p, q)) for q in back]
        if not ending and bench.may_step(p):
            acts.append((pace[p], partial(bench.step, p, partial(push, 0))))
    acts += [(pace[pair], partial(bench.deliver, *pair)) for pair in bench.flying if bench.carries(*pair)]
    return acts + [(5.0 if ending else 0.3, bench.out.clear)] * bool(bench.out)


def test_whoever_is_seen_by_whom_the_survivors_count_the_same() -> None:
    for seed in range(40):
        play(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whoever_is_seen_by_whom_the_survivors_count_the_same_much_more() -> None:
    for seed in range(40, 2000):
        play(seed)
