"""Optimizers against float64 references, schedules against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from dlion.cut import frozen
from dlion.learn.optimizers import AdamW, Optimizer, Plain, Sgd
from dlion.learn.schedules import Constant, Cosine, Step, WarmUp
from dlion.tensors import CHUNK

SIZE = CHUNK + 17
"""More than one piece, and a ragged last one."""


def run(optimizer: Optimizer, steps: int = 5) -> np.ndarray:
    """Weights after some steps on fixed pseudo-random gradients."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(SIZE, dtype=np.float32)
    for _ in range(steps):
        gradient = rng.standard_normal(SIZE, dtype=np.float32)
        delta = optimizer.step(gradient, weights, 0.01)
        assert delta is gradient
        weights += delta
    return weights


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.1), (0.5, 0.01)])
def test_sgd_with_momentum_equals_the_reference(nesterov: bool, momentum: float, decay: float) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(SIZE, dtype=np.float32).astype(np.float64)
    m = np.zeros(SIZE)
    for _ in range(5):
        g = rng.standard_normal(SIZE, dtype=np.float32) + decay * w
        m = momentum * m + g
        w -= 0.01 * (g + momentum * m if nesterov else m)
    found = run(Sgd(momentum=momentum, nesterov=nesterov, weight_decay=decay))
    np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)


def test_plain_sgd_is_minus_rate_times_gradient_and_keeps_nothing() -> None:
    gradient = np.arange(5, dtype=np.float32)
    optimizer = Sgd()
    np.testing.assert_array_equal(
        optimizer.step(gradient.copy(), np.ones(5, dtype=np.float32), 0.5), np.float32(-0.5) * gradient
    )
    assert optimizer.state() == {}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_the_reference(decay: float) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(SIZE, dtype=np.float32).astype(np.float64)
    m, v, b1, b2 = np.zeros(SIZE), np.zeros(SIZE), 0.9, 0.95
    for t in range(1, 6):
        g = rng.standard_normal(SIZE, dtype=np.float32).astype(np.float64)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        w = w - 0.01 * decay * w - 0.01 * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
    np.testing.assert_allclose(run(AdamW(betas=(b1, b2), weight_decay=decay)), w, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "make", [lambda: Sgd(momentum=0.9, nesterov=True, weight_decay=0.1), lambda: AdamW(weight_decay=0.1), Sgd]
)
def test_what_an_optimizer_foresees_is_its_next_step_and_nothing_of_it_is_remembered(make: type[Sgd]) -> None:
    rng = np.random.default_rng(1)
    gradients = rng.standard_normal((3, SIZE), dtype=np.float32)
    weights = rng.standard_normal(SIZE, dtype=np.float32)
    asked, other = make(), make()
    for gradient in gradients:
        foreseen = asked.foresee(gradient.copy(), weights, 0.1)
        asked.foresee(gradient[::-1].copy(), weights, 0.3)
        for optimizer in (asked, other):
            assert np.array_equal(optimizer.step(gradient.copy(), weights, 0.1), foreseen)


def test_plain_leaves_the_gradient_alone() -> None:
    gradient = np.arange(3, dtype=np.float32)
    assert np.array_equal(Plain().step(gradient.copy(), gradient, 9.0), gradient)


@pytest.mark.parametrize("make", [lambda: Sgd(momentum=0.9, nesterov=True), AdamW, Plain, Sgd])
def test_a_restored_optimizer_goes_on_bit_by_bit(make: type[Optimizer]) -> None:
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((4, 50), dtype=np.float32)
    weights = rng.standard_normal(50, dtype=np.float32)
    first = make()
    first.restore(make().state())
    for gradient in gradients[:2]:
        first.step(gradient.copy(), weights, 0.1)
    state = frozen(first.state())
    expected = [first.step(g.copy(), weights, 0.1) for g in gradients[2:]]
    second = make()
    second.restore(state)
    found = [second.step(g.copy(), weights, 0.1) for g in gradients[2:]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {"momentum": 1.0}),
        ("sgd", {"nesterov": True}),
        ("sgd", {"weight_decay": -1.0}),
        ("adamw", {"betas": (0.9, 1.0)}),
        ("adamw", {"eps": 0.0}),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=name):
        {"sgd": Sgd, "adamw": AdamW}[name](**settings)  # type: ignore[operator]


def test_schedules_follow_their_formulas() -> None:
    assert Constant(0.3)(1e9) == 0.3
    cosine = Cosine(1.0, 100.0, floor=0.2)
    assert [cosine(s) for s in (-5, 0, 50, 100, 1e6)] == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])
    step = Step(1.0, (10, 20), factor=0.5)
    assert [step(s) for s in (0, 9.9, 10, 19, 20, 99)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    warm = WarmUp(10, cosine)
    assert [warm(s) for s in (0, 5, 50)] == pytest.approx([0.0, 0.5 * cosine(5), 0.6])
    assert WarmUp(0, Constant(0.3))(0) == 0.3


def test_cosine_needs_a_length() -> None:
    with pytest.raises(ValueError, match="samples"):
        Cosine(1.0, 0)
