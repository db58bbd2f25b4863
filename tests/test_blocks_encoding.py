"""Blocks: what is quantised is what the receiver adds, for every encoding, size and magnitude."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dlion import blocks
from dlion.blocks import GROUP, Encoding, dense, sparse

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.integers(0, 700), elements=FINITE)
RELATIVE_STEP = {Encoding.F32: 0.0, Encoding.F16: 2**-11, Encoding.I8: 0.5 / 127, Encoding.I4: 0.5 / 7}


@given(ARRAYS, st.sampled_from(Encoding))
def test_values_are_finite_and_as_near_as_the_encoding_can_be(array: np.ndarray, encoding: Encoding) -> None:
    array = np.clip(array, -6e4, 6e4)
    block = dense(array, encoding)
    assert block.count == len(block.values) == array.size and block.values.dtype == np.float32
    assert np.isfinite(block.values).all()
    for lo in range(0, array.size, GROUP):
        group = array[lo : lo + GROUP].astype(np.float64)
        error = np.abs(group - block.values[lo : lo + GROUP]).max()
        assert error <= RELATIVE_STEP[encoding] * np.abs(group).max() * 1.0001 + 1e-7


@given(ARRAYS, st.sampled_from(Encoding))
def test_magnitudes_at_the_end_of_float32_stay_finite(array: np.ndarray, encoding: Encoding) -> None:
    assert np.isfinite(dense(array, encoding).values).all()


@pytest.mark.parametrize("encoding", Encoding)
def test_half_precision_clips_and_a_zero_group_stays_zero(encoding: Encoding) -> None:
    array = np.zeros(3 * GROUP, dtype=np.float32)
    array[0] = 1e30
    values = dense(array, encoding).values
    assert values[0] == pytest.approx(blocks.F16_MAX if encoding is Encoding.F16 else 1e30, rel=1e-6)
    assert not values[1:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", Encoding)
def test_what_is_not_finite_is_refused(encoding: Encoding, bad: float) -> None:
    array = np.ones(600, dtype=np.float32)
    array[333] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        dense(array, encoding)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sparse(array, np.array([3, 333]), encoding)


def test_a_sum_of_squares_beyond_float32_is_still_finite() -> None:
    assert blocks.all_finite(np.full(5, 3e38, dtype=np.float32))


@given(ARRAYS, st.sampled_from(Encoding), st.floats(-3, 3, width=32), st.data())
def test_adding_touches_the_named_entries_only(
    array: np.ndarray, encoding: Encoding, scale: float, data: st.DataObject
) -> None:
    array = np.clip(array, -1e4, 1e4)
    picked = np.flatnonzero(data.draw(hnp.arrays(np.bool_, array.size)))
    before = np.ones(array.size + 10, dtype=np.float32)
    for block, where in (
        (dense(array, encoding, start=5), slice(None)),
        (sparse(array, picked, encoding, start=5), picked),
    ):
        flat, expected = before.copy(), before.copy()
        block.add_to(flat, scale)
        expected[5:-5][where] += block.values * np.float32(scale)
        assert np.array_equal(flat, expected)


@given(ARRAYS, st.sampled_from(Encoding), st.data())
def test_sent_and_residual_make_up_what_was_accumulated(
    array: np.ndarray, encoding: Encoding, data: st.DataObject
) -> None:
    """Error feedback: subtracting ``values`` leaves exact zeros in F32, and else loses nothing but rounding."""
    array = np.clip(array, -1e4, 1e4)
    picked = np.flatnonzero(data.draw(hnp.arrays(np.bool_, array.size)))
    block = sparse(array, picked, encoding)
    residual = array.copy()
    block.add_to(residual, -1.0)
    if encoding is Encoding.F32:
        assert not residual[picked].any()
    received = np.zeros_like(array)
    block.add_to(received)
    assert np.allclose(
        received.astype(np.float64) + residual, array, rtol=1e-6, atol=1e-7 * np.abs(array).max(initial=0)
    )


def test_a_block_does_not_alias_what_it_was_made_from() -> None:
    array = np.ones(10, dtype=np.float32)
    block = dense(array)
    array[:] = 7
    assert (block.values == 1).all()
