"""Optimizers on a flat float32 buffer: a gradient goes in, the delta to be *added* to the weights comes out.

Law: pure arrays; knows no workload and no strategy. Works in place and in cache-sized pieces, so a step makes no
model-sized temporary. State is allocated at the first step. Strategies use the same classes as outer optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dlion.tensors import CHUNK, Flat


class Optimizer(Protocol):
    def step(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        """Turn ``gradient`` in place into the delta to be added (rate and sign applied) and return it."""

    def state(self) -> dict[str, Any]:
        """All that must survive a restart: flat arrays and plain numbers by name. Whoever keeps it copies it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""


@runtime_checkable
class Foreseeing(Protocol):
    """An optimizer that can be asked what it would do."""

    def foresee(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        """As ``step``, but it remembers nothing of it."""


class Plain:
    """The gradient itself, for strategies that consume gradients and apply the rate themselves."""

    def step(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        return gradient

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


class Sgd:
    """Gradient descent, with momentum m ← μ·m + g, Nesterov's look-ahead g + μ·m, and weight decay g ← g + λ·w."""

    def __init__(self, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"sgd: momentum must lie in [0, 1), not {momentum}")
        if weight_decay < 0:
            raise ValueError(f"sgd: weight_decay must be at least 0, not {weight_decay}")
        if nesterov and momentum == 0:
            raise ValueError("sgd: nesterov needs a momentum")
        self._momentum = np.float32(momentum)
        self._nesterov = nesterov
        self._decay = np.float32(weight_decay)
        self._velocity: Flat | None = None

    def step(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        return self._moved(gradient, weights, learning_rate, keep=True)

    def foresee(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        return self._moved(gradient, weights, learning_rate, keep=False)

    def _moved(self, gradient: Flat, weights: Flat, learning_rate: float, *, keep: bool) -> Flat:
        descent = np.float32(-learning_rate)
        if self._momentum and self._velocity is None:
            self._velocity = np.zeros_like(gradient)
        scratch = np.empty(min(CHUNK, gradient.size), dtype=np.float32)
        for piece in _pieces(gradient.size):
            g = gradient[piece]
            spare = scratch[: g.size]
            if self._decay:
                np.multiply(weights[piece], self._decay, out=spare)
                g += spare
            if self._velocity is not None:
                v = self._velocity[piece] if keep else self._velocity[piece].copy()
                v *= self._momentum
                v += g
                if self._nesterov:
                    np.multiply(v, self._momentum, out=spare)
                    g += spare
                else:
                    g[...] = v
            g *= descent
        return gradient

    def state(self) -> dict[str, Any]:
        return {} if self._velocity is None else {"velocity": self._velocity}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._velocity = np.array(state["velocity"], dtype=np.float32) if "velocity" in state else None


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019).

    Keeps Σ β1^age·g and Σ β2^age·g² rather than the means; the factors (1 - β) and both bias corrections go into the
    step's scalars, which saves a quarter of the passes over memory.
    """

    def __init__(
        self, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"adamw: betas must lie in [0, 1), not {betas}")
        if eps <= 0 or weight_decay < 0:
            raise ValueError(f"adamw: eps must be above 0 and weight_decay at least 0, not {eps} and {weight_decay}")
        self._betas = betas
        self._eps = eps
        self._decay = weight_decay
        self._steps = 0
        self._sum: Flat | None = None
        self._squares: Flat | None = None

    def step(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        self._steps += 1
        return self._moved(gradient, weights, learning_rate, self._steps, keep=True)

    def foresee(self, gradient: Flat, weights: Flat, learning_rate: float) -> Flat:
        return self._moved(gradient, weights, learning_rate, self._steps + 1, keep=False)

    def _moved(self, gradient: Flat, weights: Flat, learning_rate: float, steps: int, *, keep: bool) -> Flat:
        if self._sum is None or self._squares is None:
            self._sum, self._squares = np.zeros_like(gradient), np.zeros_like(gradient)
        beta1, beta2 = self._betas
        of_mean = (1 - beta1) / (1 - beta1**steps)
        of_root = sqrt((1 - beta2) / (1 - beta2**steps))
        descent = np.float32(-learning_rate * of_mean / of_root)
        eps = np.float32(self._eps / of_root)
        decay = np.float32(-learning_rate * self._decay)
        scratch = np.empty(min(CHUNK, gradient.size), dtype=np.float32)
        for piece in _pieces(gradient.size):
            g, m, v = gradient[piece], self._sum[piece], self._squares[piece]
            if not keep:
                m, v = m.copy(), v.copy()
            root = scratch[: g.size]
            m *= np.float32(beta1)
            m += g
            g *= g
            v *= np.float32(beta2)
            v += g
            np.sqrt(v, out=root)
            root += eps
            np.divide(m, root, out=g)
            g *= descent
            if decay:
                np.multiply(weights[piece], decay, out=root)
                g += root
        return gradient

    def state(self) -> dict[str, Any]:
        if self._sum is None or self._squares is None:
            return {"steps": 0}
        return {"steps": self._steps, "sum": self._sum, "squares": self._squares}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        self._sum = np.array(state["sum"], dtype=np.float32) if self._steps else None
        self._squares = np.array(state["squares"], dtype=np.float32) if self._steps else None


def _pieces(size: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, size, CHUNK))
