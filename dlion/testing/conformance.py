"""What every strategy must hold to, whoever wrote it.

Law: each demand is one small scenario on a bench, told apart by name; a breach raises Nonconforming with its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from dlion.cut import Array, pack, unpack
from dlion.exchange.base import Exchange
from dlion.exchange.pace import PACES
from dlion.tensors import Flat
from dlion.testing.bench import Bench, Make, Seat
from dlion.testing.watched import Nonconforming, Watched, demand

CLOUDS: Mapping[str, str] = {"a0": "A", "a1": "A", "b0": "B", "b1": "B", "c0": "C"}
STEPS = 12
SILENT_STEPS = 20 * STEPS
"""No round is that long unless it was made so."""
AGREE = 1e-4
"""Relative distance between replicas that counts as agreement."""


def check(make: Make) -> None:
    """Put a strategy (its class, or a function that makes one) through every demand.

    Raises Nonconforming on the first that it does not meet.
    """
    demands = (
        _describes_itself,
        _trains,
        _speaks,
        _repeats,
        _agrees,
        _survives_a_death,
        _leaves_a_full_link,
        _restores,
    )
    for one in demands:
        try:
            one(make)
        except Nonconforming as error:
            raise Nonconforming(f"{one.__name__.strip('_').replace('_', ' ')}: {error}") from error


def learn(peer: str, step: int, weights: Flat, *, sign: float = -0.1) -> Flat:
    """A noisy quadratic: every peer pulls towards a point of its own."""
    noise = np.random.default_rng([step, *map(ord, peer)]).standard_normal(weights.size).astype(np.float32)
    goal = np.float32(ord(peer[0]) - ord("a"))
    return np.float32(sign) * (weights - goal + np.float32(0.1) * noise)


def _bench(make: Make, *, seed: int = 0, flat: bool = False) -> Bench:
    return Bench(make, 4, seed=seed) if flat else Bench(make, CLOUDS, talk="bridges", seed=seed)


def _learning(exchange: Exchange) -> partial[Flat]:
    return partial(learn, sign=1.0 if exchange.consumes == "gradient" else -0.1)


def _describes_itself(make: Make) -> None:
    made = make()
    demand(isinstance(made, Exchange), f"expected an Exchange, got {type(made).__name__}")
    demand(made.name, "name is empty")
    demand(made.pace in made.paces, f"pace {made.pace!r} is not among its paces {made.paces}")
    demand(set(made.paces) <= set(PACES), f"paces {made.paces}: expected some of {tuple(PACES)}")
    demand(made.consumes in ("delta", "gradient"), f"consumes {made.consumes!r}: expected delta or gradient")
    for kind, fields in made.speaks.items():
        demand(not kind.startswith("~"), f"kind {kind!r}: a leading ~ is the node's")
        odd = [name for name, of in fields.items() if of not in (bool, int, float, str)]
        demand(not odd, f"kind {kind!r}: fields {odd} are not of type bool, int, float or str")


def _trains(make: Make) -> None:
    for flat in (True, False):
        bench = _bench(make, flat=flat)
        bench.run(STEPS, _learning(make()))
        bench.drain()
        for seat in bench.seats.values():
            before = seat.ctx.weights.copy()
            demand(seat.view.shape == before.shape, f"view has shape {seat.view.shape}; expected {before.shape}")
            demand(np.isfinite(seat.view).all(), f"the view of {seat.name} is not finite")
            demand(np.array_equal(before, seat.ctx.weights), "view changes the weights it is shown")


def _speaks(make: Make) -> None:
    """Who declares kinds of messages says one, if only once in a long round."""
    bench = _bench(make, flat=True)
    for steps in range(STEPS, SILENT_STEPS + 1, STEPS):
        bench.run(steps, _learning(make()))
        if not make().speaks or any(" -> " in line for line in bench.transcript):
            return
    raise Nonconforming(f"nobody says anything in {SILENT_STEPS} steps: no hook yields a Send")


def _repeats(make: Make) -> None:
    runs = []
    for _ in range(2):
        bench = _bench(make)
        bench.run(STEPS, _learning(make()))
        bench.drain()
        runs.append((bench.transcript, [seat.weights.tobytes() for seat in bench.seats.values()]))
    demand(runs[0] == runs[1], "two equal runs differ: a hidden source of chance, time or order")


def _agrees(make: Make) -> None:
    for seed in range(3):
        bench = _bench(make, seed=seed, flat=seed == 0)
        bench.run(STEPS, _learning(make()))
        bench.drain()
        _agree(bench, "after the drain")


def _agree(bench: Bench, when: str) -> None:
    if next(iter(bench.seats.values())).exchange.consensus:
        gap = bench.disagreement
        demand(gap <= AGREE, f"promises consensus, but replicas differ by {gap:.1e} {when}")


def _survives_a_death(make: Make) -> None:
    for flat in (True, False):
        bench = _bench(make, flat=flat)
        bench.run(STEPS // 2, _learning(make()))
        bench.kill(min(bench.live))
        bench.run(STEPS, _learning(make()))
        bench.drain()


def _leaves_a_full_link(make: Make) -> None:
    """A link that takes nothing is not used, costs no growing memory, and gets what is owed once it opens."""
    bench = _bench(make, flat=True)
    bench.windows["a", "b"] = 0
    bench.run(2 * STEPS, _learning(make()), stall=True)
    held = bench.seats[min(bench.seats)].exchange.state_bytes
    bench.run(4 * STEPS, _learning(make()), stall=True)
    grown = bench.seats[min(bench.seats)].exchange.state_bytes - held
    few = 16 * 4 * bench.layout.size  # what one open round or guess takes; one message a step would be more
    demand(grown <= few, f"state grew by {grown} bytes behind a full link")
    bench.open("a", "b")
    bench.run(4 * STEPS, _learning(make()))
    bench.drain()


def _restores(make: Make) -> None:
    """Made anew from what ``state`` holds it is what it was, and goes on so; or, having given up what it only guessed,
    keeps its promise of consensus."""
    runs = []
    for anew in (False, True):
        bench = _bench(make)
        bench.run(STEPS // 2, _learning(make()))
        for seat in bench.seats.values() if anew else ():
            _restart(seat, make())
        bench.run(STEPS, _learning(make()))
        bench.drain()
        runs.append((bench.transcript, [seat.weights.tobytes() for seat in bench.seats.values()]))
    if runs[0] != runs[1]:
        demand(make().consensus, "after a restart in between it goes on otherwise: `state` lacks something")
        _agree(bench, "after a restart in between: `state` lacks something")


def _restart(seat: Seat, twin: Exchange) -> None:
    text, arrays = _packed(seat.exchange)
    twin.setup(seat.ctx)
    twin.restore(unpack(text, {name: array.copy() for name, array in arrays.items()}), seat.ctx)
    again, copies = _packed(twin)
    odd = [name for name, array in arrays.items() if name not in copies or not np.array_equal(copies[name], array)]
    odd += [f"{text.decode()} became {again.decode()}"] * (again != text)
    demand(not odd, f"a restored strategy has another state than the one that was saved: {'; '.join(odd)[:500]}")
    watched = seat.replica.exchange
    assert isinstance(watched, Watched)
    seat.exchange = watched.inner = twin


def _packed(exchange: Exchange) -> tuple[bytes, dict[str, Array]]:
    try:
        return pack(exchange.state())
    except TypeError as error:
        raise Nonconforming(str(error)) from error
