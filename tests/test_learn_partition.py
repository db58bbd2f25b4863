"""Partitions are exact covers, follow the shares, and depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlion.learn.partition import apportion, by_writer, dirichlet, iid

Shares = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_cover(shards: list[np.ndarray], count: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(count))
    assert min(map(len, shards)) >= 1


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=20), st.integers(0, 1000))
def test_apportion_sums_exactly_and_leaves_nobody_out(weights: list[float], extra: int) -> None:
    total = len(weights) + extra
    parts = apportion(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 1
    for heavy in range(len(weights)):
        for light in range(len(weights)):
            if weights[heavy] > weights[light] * (1 + 1e-9):
                assert parts[heavy] >= parts[light]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10))
def test_apportion_is_exact_where_parts_are_whole(weights: list[int]) -> None:
    assert apportion(3 * sum(weights), weights) == [3 * w for w in weights]


def test_apportion_by_largest_remainder_with_ties_to_the_earlier() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(10, [5.4, 3.2, 1.4]) == [6, 3, 1]
    assert apportion(6, [1e-9, 1e-9, 1.0]) == [1, 1, 4]


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [float("nan")], [float("inf"), 1.0], [1.0] * 5])
def test_apportion_refuses_the_impossible(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights|at least 1"):
        apportion(4, weights)


@settings(max_examples=40, deadline=None)
@given(Shares, st.integers(8, 500), st.integers(0, 5))
def test_iid_covers_exactly_in_proportion(shares: list[float], count: int, seed: int) -> None:
    shards = iid(count, shares, rng(seed))
    assert_cover(shards, count)
    assert [len(s) for s in shards] == apportion(count, shares)
    assert all(map(np.array_equal, shards, iid(count, shares, rng(seed))))


@settings(max_examples=40, deadline=None)
@given(Shares, st.integers(8, 500), st.sampled_from([0.01, 0.1, 1.0, 100.0]), st.integers(0, 5))
def test_dirichlet_covers_exactly_and_gives_everybody_a_minimum(
    shares: list[float], count: int, alpha: float, seed: int
) -> None:
    labels = rng(seed).integers(0, 10, count)
    shards = dirichlet(labels, shares, alpha, rng(seed))
    assert_cover(shards, count)
    assert min(map(len, shards)) >= min(8, count // len(shares))
    assert all(map(np.array_equal, shards, dirichlet(labels, shares, alpha, rng(seed))))


def test_dirichlet_skews_more_for_smaller_alpha_and_keeps_the_shares() -> None:
    """Mean share of a peer's commonest label falls with alpha; sizes stay within 15 % of 1:1:2."""
    labels = rng(1).integers(0, 10, 20_000)

    def skew(alpha: float) -> float:
        shards = dirichlet(labels, [1, 1, 2], alpha, rng(2))
        np.testing.assert_allclose([len(s) for s in shards], [5000, 5000, 10_000], rtol=0.15)
        return float(np.mean([np.bincount(labels[s]).max() / len(s) for s in shards]))

    assert skew(0.1) > skew(1.0) + 0.05 > skew(100.0) + 0.05
    assert skew(1000.0) < 0.13


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(6, 60), st.integers(0, 5))
def test_writers_stay_whole_and_all_are_dealt(shares: list[float], writer_count: int, seed: int) -> None:
    writers = np.concatenate([np.arange(writer_count), rng(seed).integers(0, writer_count, 300)]) * 7
    shards = by_writer(writers, shares, rng(seed))
    assert_cover(shards, len(writers))
    owners = [set(writers[s].tolist()) for s in shards]
    assert sum(map(len, owners)) == len(set().union(*owners)) == writer_count


def test_writers_follow_the_shares_to_within_a_writer() -> None:
    writers = np.repeat(np.arange(60), 20)
    sizes = [len(s) for s in by_writer(writers, [1, 2, 3], rng())]
    np.testing.assert_allclose(sizes, [200, 400, 600], atol=20)


def test_too_few_writers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 writers cannot serve 3 peers"):
        by_writer(np.array([0, 0, 1, 1]), [1, 1, 1], rng())
