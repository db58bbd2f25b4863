"""Selection: the largest entries, exactly as many as fit, without looking twice; against sorting as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dlion.blocks import Encoding, block_bytes, compress, index_bytes, max_n
from dlion.selection import SAMPLE_ALL_BELOW, Spectrum
from dlion.tensors import Layout

LARGE = 300_000


def nasty(name: str, size: int = LARGE) -> np.ndarray:
    rng = np.random.default_rng(7)
    array = rng.standard_normal(size).astype(np.float32)
    if name == "constant":
        array[:] = -0.25
    elif name == "few levels":
        array = np.rint(array)
    elif name == "mostly zeros":
        array[rng.random(size) < 0.995] = 0
    elif name == "one huge":
        array[size // 3] = 3e38
    elif name == "clustered":
        array[: size // 50] *= 1e6
    elif name == "heavy tail":
        array = (array**9).astype(np.float32)
    elif name == "against the sample":
        array *= 1e-3
        array[::101] = np.arange(1, len(array[::101]) + 1)
    elif name == "tiny numbers":
        array = (array * np.float32(1e-42)).astype(np.float32)
    return array


NASTY = [
    "normal",
    "constant",
    "few levels",
    "mostly zeros",
    "one huge",
    "clustered",
    "heavy tail",
    "against the sample",
    "tiny numbers",
]


def check_top(array: np.ndarray, count: int, positions: np.ndarray) -> None:
    magnitude = np.abs(array)
    assert len(positions) == min(count, np.count_nonzero(array))
    assert (np.diff(positions) > 0).all() and magnitude[positions].all()
    if len(positions):
        best = np.sort(magnitude)[::-1][: len(positions)]
        assert np.array_equal(np.sort(magnitude[positions])[::-1], best)


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("count", [1, 30, 3_000, 100_000, 299_999])
def test_top_is_what_sorting_would_choose(name: str, count: int) -> None:
    array = nasty(name)
    check_top(array, count, Spectrum(array).top(count)[0])


@given(
    hnp.arrays(np.float32, st.integers(0, 300), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])),
    st.integers(0, 310),
)
def test_top_of_small_arrays_full_of_ties(array: np.ndarray, count: int) -> None:
    check_top(array, count, Spectrum(array).top(count)[0])


def test_equal_entries_are_taken_from_the_front() -> None:
    positions, _ = Spectrum(nasty("constant")).top(1000)
    assert np.array_equal(positions, np.arange(1000))


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("budget", [2_000, 30_000, 250_000])
def test_the_budget_is_met_and_used(name: str, encoding: Encoding, budget: int) -> None:
    """At least 0.95 of the budget, unless everything that is not zero went; and never a byte more."""
    array = nasty(name)
    block = compress(array, budget, encoding=encoding)
    assert block is not None and block.nbytes_max <= budget
    assert block.nbytes_max >= 0.95 * budget or block.count >= np.count_nonzero(array)
    again = compress(array.copy(), budget, encoding=encoding)
    assert again is not None and np.array_equal(again.values, block.values)


@settings(max_examples=200)
@given(st.integers(1, 5000), st.integers(0, 6000), st.sampled_from(Encoding), st.floats(0, 1))
def test_small_budgets(size: int, budget: int, encoding: Encoding, filled: float) -> None:
    """None only where nothing fits or nothing is there; else one entry more would have been too many."""
    array = np.arange(1, size + 1, dtype=np.float32)
    array[int(filled * size) :] = 0
    nonzero = np.count_nonzero(array)
    block = compress(array, budget, encoding=encoding, start=3)
    if block is None:
        assert nonzero == 0 or min(block_bytes(encoding, size, 1), block_bytes(encoding, size)) > budget
        return
    assert block.nbytes_max <= budget and block.start == 3 and block.size == size
    assert block.count >= nonzero or block_bytes(encoding, size, block.count + 1) > budget


def test_dense_is_chosen_when_smaller() -> None:
    array = nasty("normal", 10_000)
    block = compress(array, 1 << 20, encoding=Encoding.F32)
    assert block is not None and block.indices is None
    array[100:] = 0
    block = compress(array, 1 << 20, encoding=Encoding.F32)
    assert block is not None and block.count == 100


@pytest.mark.parametrize("size", [50, SAMPLE_ALL_BELOW + 1, LARGE])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_is_noticed_wherever_it_is(size: int, bad: float) -> None:
    array = nasty("normal", size)
    array[size - 2] = bad
    for budget in (150, 1 << 24):
        with pytest.raises(ValueError, match="NaN or infinite"):
            compress(array, budget, encoding=Encoding.F16)
    with pytest.raises(ValueError, match="NaN or infinite"):
        max_n(array, Layout(("w",), ((size,),)), 150)


def test_weights_change_what_is_compared_not_what_is_sent() -> None:
    array = np.array([1, 2, 3, 4], dtype=np.float32)
    block = compress(array, 52, encoding=Encoding.F32, scales=np.array([9, 9, 1, 1], dtype=np.float32))
    assert block is not None and block.indices is not None
    assert block.indices.tolist() == [0, 1] and block.values.tolist() == [1, 2]


def three_tensors() -> tuple[np.ndarray, Layout]:
    rng = np.random.default_rng(1)
    layout = Layout(("a", "b", "zero", "c"), ((200, 300), (7,), (50,), (4000, 10)))
    array = rng.standard_normal(layout.size).astype(np.float32)
    array[:60_000] *= 1e-4
    array[60_007:60_057] = 0
    return array, layout


def normalised(array: np.ndarray, layout: Layout) -> np.ndarray:
    keys = np.abs(array)
    for view in layout.views(keys).values():
        if view.max() > 0:
            np.divide(view, view.max(), out=view)
    return keys


@pytest.mark.parametrize("budget", [100, 5_000, 60_000, 300_000])
def test_max_n_is_the_largest_n_that_fits(budget: int) -> None:
    array, layout = three_tensors()
    keys = normalised(array, layout)
    block, n_used = max_n(array, layout, budget, n_min=0.0)
    assert block is not None and block.nbytes_max <= budget and block.indices is not None
    assert np.array_equal(block.indices, np.flatnonzero(keys >= np.float32(1 - n_used / 100)))
    assert block_bytes(Encoding.F32, layout.size, block.count + 1) > budget


def test_max_n_sends_all_when_all_fits_and_never_less_than_the_floor() -> None:
    array, layout = three_tensors()
    assert max_n(array, layout, 1 << 20)[1] == 100.0
    block, n_used = max_n(array, layout, 0, n_min=30.0)
    fixed, n_fixed = max_n(array, layout, 1 << 20, n_fixed=30.0)
    assert n_used == n_fixed == 30.0 and block is not None and fixed is not None and fixed.indices is not None
    assert np.array_equal(fixed.indices, np.flatnonzero(normalised(array, layout) >= np.float32(0.7)))
    assert np.array_equal(block.values, fixed.values)
    assert max_n(np.zeros(layout.size, np.float32), layout, 1000)[0] is None


def test_a_second_link_reads_only_what_the_first_found() -> None:
    array, layout = three_tensors()
    shared = Spectrum(array, layout)
    first, _ = max_n(array, layout, 60_000, spectrum=shared)
    second, n_second = max_n(array, layout, 20_000, spectrum=shared)
    alone, n_alone = max_n(array, layout, 20_000)
    assert first is not None and second is not None and alone is not None
    assert np.array_equal(second.values, alone.values) and n_second == n_alone
    assert second.scanned < array.size / 4 < alone.scanned


def test_positions_cost_close_to_their_entropy() -> None:
    size = 1_000_000
    for share in np.geomspace(0.001, 0.1, 60):
        entropy_bits = -size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
        assert index_bytes(int(share * size), size) <= 1.15 * entropy_bits / 8
