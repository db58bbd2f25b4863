"""Selection on a device makes the block that selection on the host makes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the torch extra")

from dlion.blocks import Block, Encoding, compress  # noqa: E402
from dlion.learn.workloads.torch_select import select_on_device  # noqa: E402

pytestmark = pytest.mark.torch


def assert_equal(mine: Block | None, theirs: Block | None) -> None:
    assert (mine is None) == (theirs is None)
    if mine is None or theirs is None:
        return
    assert (mine.start, mine.size, mine.encoding) == (theirs.start, theirs.size, theirs.encoding)
    assert (mine.indices is None) == (theirs.indices is None)
    if mine.indices is not None and theirs.indices is not None:
        assert mine.indices.dtype == np.uint32
        np.testing.assert_array_equal(mine.indices, theirs.indices)
    np.testing.assert_array_equal(mine.values, theirs.values)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 7, 300, 20_000, 60_000]),
    levels=st.sampled_from([1, 3, 1000, 0]),
    share=st.floats(0.0, 1.2),
    encoding=st.sampled_from(Encoding),
    seed=st.integers(0, 1000),
)
def test_same_block_as_on_the_host(size: int, levels: int, share: float, encoding: Encoding, seed: int) -> None:
    """Also where many entries are equal or zero (few ``levels``), and whatever the budget."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(size, dtype=np.float32)
    if levels:
        array = np.round(array * levels).astype(np.float32)
    budget = int(share * 4 * size)
    mine = select_on_device(torch.from_numpy(array), budget, encoding=encoding, start=5)
    assert_equal(mine, compress(array, budget, encoding=encoding, start=5))
    assert mine is None or mine.nbytes_max <= budget


def test_a_misleading_sample_does_not_mislead() -> None:
    """All that is large lies exactly where the sample looks, and again exactly where it does not."""
    for offset in (0, 1):
        array = np.full(60_000, 1e-6, dtype=np.float32)
        array[offset::101] = np.linspace(1, 2, len(array[offset::101]))
        assert_equal(select_on_device(torch.from_numpy(array), 4000), compress(array, 4000))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    array = np.ones(100, dtype=np.float32)
    array[50] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        select_on_device(torch.from_numpy(array), 100)
