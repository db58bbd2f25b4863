"""Rounds whose parts are said in few bits, or in part: what rounding may cost, and what error feedback keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from dlion.blocks import GROUP
from dlion.exchange import find
from dlion.exchange.base import Exchange
from dlion.messages import PeerId
from dlion.tensors import Flat, Layout
from dlion.testing import Bench

STEPS = 2
"""Local steps of a round."""
LAYOUT = Layout(("w", "b"), ((40, 25), (50,)))
"""Ten whole chunks of 100 and half of one; four whole groups of one scale each and a bit."""
TOP = 7
"""The largest code of four bits: what rounding leaves is at most half a code, 1/14 of the group's largest."""
FLAT, CLOUDS = dict.fromkeys("abcd", "A"), {"a0": "A", "a1": "A", "b0": "B", "b1": "B"}

averaging = partial(find("diloco"), local_steps=STEPS, outer_learning_rate=1.0, outer_momentum=0.0)
everything = partial(find("sparseloco"), local_steps=STEPS, chunk=100, keep=100)


def push(peer: str, step: int, weights: Flat) -> Flat:
    """A step that does not depend on the weights, of another size in every round and on every peer."""
    rng = np.random.default_rng([step, *map(ord, peer)])
    return (rng.standard_normal(weights.size) * (1 + step)).astype(np.float32)


def moved(peer: str, number: int) -> Flat:
    """What a peer's round adds up to."""
    blank = np.zeros(LAYOUT.size, dtype=np.float32)
    for step in range(number * STEPS, (number + 1) * STEPS):
        blank += push(peer, step, blank)
    return blank


def left_at_most(values: Flat) -> Flat:
    """The most that rounding to four bits may leave of each entry."""
    peaks = [np.abs(values[lo : lo + GROUP]).max() for lo in range(0, values.size, GROUP)]
    return np.repeat(peaks, GROUP)[: values.size] / (2 * TOP) * 1.0001


def played(make: Callable[[], Exchange], rounds: int, *, clouds: dict[str, str] | None = None) -> Bench:
    """Every round begun and closed by all."""
    bench = Bench(make, clouds or FLAT, layout=LAYOUT, talk="bridges" if clouds else "mesh")
    for _ in range(rounds * STEPS):
        for peer in bench.seats:
            assert bench.may_step(peer)
            bench.step(peer, push)
        bench.deliver_all()
    assert all(bench.may_step(peer) for peer in bench.seats), "all rounds are closed"
    return bench


def anchors(bench: Bench) -> list[Flat]:
    return [seat.view for seat in bench.seats.values()]


@pytest.mark.parametrize("clouds", [None, CLOUDS], ids=["mesh", "bridges"])
def test_sparseloco_that_says_every_entry_and_forgets_what_rounding_left_is_dense_bit_by_bit(
    clouds: dict[str, str] | None,
) -> None:
    """Density 1 = dense: only the encoding is between them, and here it is the same."""
    sparse = played(partial(everything, decay=0.0), 3, clouds=clouds)
    dense = played(partial(averaging, bits=4), 3, clouds=clouds)
    assert {flat.tobytes() for flat in anchors(sparse)} == {flat.tobytes() for flat in anchors(dense)}
    fewer = played(partial(everything, decay=0.0, keep=99), 1, clouds=clouds)
    assert not np.array_equal(anchors(fewer)[0], anchors(played(partial(averaging, bits=4), 1, clouds=clouds))[0])


@pytest.mark.parametrize("decay", [0.95, 1.0])
def test_sparseloco_that_says_every_entry_is_dense_in_float32_up_to_one_rounding(decay: float) -> None:
    """However many rounds: what rounding left of one goes into the next, as far as ``decay`` remembers it."""
    rounds = 4
    sparse, dense = played(partial(everything, decay=decay), rounds), played(averaging, rounds)
    bound, forgotten = np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for peer in FLAT:
        left = np.zeros(LAYOUT.size, dtype=np.float32)
        for number in range(rounds):
            forgotten += (1 - decay) * left / len(FLAT)
            left = left_at_most(np.abs(moved(peer, number)) + left)
        bound += left / len(FLAT)
    apart = np.abs(anchors(sparse)[0] - anchors(dense)[0])
    assert (apart <= bound + forgotten + 1e-5).all()
    assert apart.max() > 0.1 * bound.max(), "four bits leave something"


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_what_sparseloco_said_and_its_error_are_all_that_was_moved_as_decay_forgets_it(decay: float) -> None:
    """After t rounds: error = sum over rounds of decay^(t - round) * (moved - said), as the receiver heard it."""
    bench = Bench(partial(find("sparseloco"), local_steps=STEPS, chunk=100, keep=10, decay=decay), 2, layout=LAYOUT)
    a, b = (bench.seats[PeerId(p)] for p in "ab")
    rest, heard_entries = np.zeros(LAYOUT.size), 0
    for number in range(4):
        for _ in range(STEPS):
            bench.step("a", push)
        assert bench.deliver("a", "b")
        (part,) = [m for m in b.exchange.state()["parts"]["known"] if m.origin == "a" and m.epoch == number]
        said = np.zeros(LAYOUT.size, dtype=np.float32)
        part.blocks[0].add_to(said)
        heard_entries += np.count_nonzero(said)
        rest = decay * rest + moved("a", number) - said
        np.testing.assert_allclose(a.exchange.state()["error"], rest, atol=1e-5)
        for _ in range(STEPS):
            bench.step("b", push)
        bench.deliver_all()
    assert 0 < heard_entries <= 4 * 105 and np.abs(rest).max() > 1


@pytest.mark.parametrize("clouds", [None, CLOUDS], ids=["mesh", "bridges"])
def test_a_round_of_diloco_in_four_bits_ends_where_float32_does_to_the_rounding_and_is_the_same_everywhere(
    clouds: dict[str, str] | None,
) -> None:
    """A part is rounded once, and over bridges a micro-cloud's mean once more; the outer step stretches both."""
    make = partial(find("diloco"), local_steps=STEPS, outer_learning_rate=0.7, outer_momentum=0.9)
    coarse, fine = (played(partial(make, bits=bits), 1, clouds=clouds) for bits in (4, 32))
    peers = list(coarse.seats)
    bound = np.mean([left_at_most(moved(peer, 0)) for peer in peers], axis=0)
    if clouds:
        means = [np.mean([moved(p, 0) for p in peers if p[0] == cloud], axis=0) for cloud in "ab"]
        bound += np.mean([left_at_most(np.abs(mean) + bound.max()) for mean in means], axis=0)
    apart = np.abs(anchors(coarse)[0] - anchors(fine)[0])
    assert (apart <= 0.7 * (1 + 0.9) * bound + 1e-5).all()
    assert apart.max() > 0.1 * bound.max(), "four bits leave something"
    more = played(partial(make, bits=4), 3, clouds=clouds)
    for bench in (coarse, more):
        assert len({flat.tobytes() for flat in anchors(bench)}) == 1
        for seat in bench.seats.values():
            np.testing.assert_allclose(seat.weights, seat.view, atol=1e-4)
