"""Gradients are exact, and training with them works."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlion.learn.models import Mlp, cross_entropy
from dlion.learn.optimizers import Sgd
from dlion.learn.schedules import Constant
from dlion.learn.trainer import Trainer
from dlion.learn.workload import WorkloadSpec
from dlion.learn.workloads import build


def mean_loss(model: Mlp, weights: Any, inputs: Any, labels: Any) -> float:
    return float(cross_entropy(model.logits(weights, inputs), labels).mean())


@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3), (4, 6, 5, 3)])
def test_gradient_equals_central_differences_in_float64(widths: tuple[int, ...]) -> None:
    """Softmax regression and MLPs: every entry of the gradient, to 1e-7 of finite differences."""
    rng = np.random.default_rng(1)
    model = Mlp(widths)
    weights: Any = rng.standard_normal(model.layout.size)
    inputs: Any = rng.standard_normal((6, widths[0]))
    labels = rng.integers(0, widths[-1], 6)
    gradient: Any = np.full_like(weights, np.nan)
    loss = model.gradient(weights, inputs, labels, gradient)
    assert loss == pytest.approx(mean_loss(model, weights, inputs, labels), rel=1e-12)
    h = 1e-6
    for k in range(weights.size):
        step = np.zeros_like(weights)
        step[k] = h
        slope = (
            mean_loss(model, weights + step, inputs, labels) - mean_loss(model, weights - step, inputs, labels)
        ) / (2 * h)
        assert gradient[k] == pytest.approx(slope, abs=1e-7)


def test_gradient_in_float32_agrees_with_float64_and_leaves_weights_alone() -> None:
    rng = np.random.default_rng(2)
    model = Mlp((20, 30, 4))
    weights = model.initial(3).flat
    before = weights.copy()
    weights.flags.writeable = False
    inputs = rng.standard_normal((16, 20), dtype=np.float32)
    labels = rng.integers(0, 4, 16)
    single, double = np.empty_like(weights), np.empty(weights.size)
    model.gradient(weights, inputs, labels, single)
    model.gradient(weights.astype(np.float64), inputs.astype(np.float64), labels, double)  # type: ignore[arg-type]
    np.testing.assert_allclose(single, double, atol=1e-6)
    np.testing.assert_array_equal(weights, before)


def test_loss_stays_finite_for_huge_scores() -> None:
    logits = np.array([[1e4, -1e4, 0.0]], dtype=np.float32)
    assert cross_entropy(logits, np.array([1]))[0] == pytest.approx(2e4)


def test_initial_is_a_function_of_the_seed_alone() -> None:
    model = Mlp((8, 8, 2))
    assert np.array_equal(model.initial(5).flat, Mlp((8, 8, 2)).initial(5).flat)
    assert not np.array_equal(model.initial(5).flat, model.initial(6).flat)


@pytest.mark.parametrize("widths", [(3,), (3, 0, 2)])
def test_impossible_widths_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths"):
        Mlp(widths)


def test_one_process_learns_the_digits() -> None:
    """The default model passes 0.93 held-out accuracy within 200 steps of 32 samples."""
    pytest.importorskip("sklearn", reason="needs the data extra")
    workload = build(WorkloadSpec("digits"), 0, ["a"], [1.0])
    trainer = Trainer(workload, Sgd(), Constant(0.1), rng_seed=0)
    weights = workload.initial(0).flat
    assert workload.evaluate(weights).accuracy < 0.3
    for _ in range(200):
        result = trainer.step(weights, 32, 0.0)
        weights += result.values
    assert workload.evaluate(weights).accuracy > 0.93
