"""``toy``: a quadratic whose gradient costs microseconds, for runs with very many peers or steps.

Law: no data, no file. Peer k's loss is 0.5 * mean((w - t_k)^2); the targets' mean, weighted by the peers' shares of
the data, is the common target t, so that the global optimum is known. The curvature is 1/size: a learning rate of
c * size brings the weights nearer to the target by the factor 1 - c per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dlion.learn.partition import apportion
from dlion.learn.workload import Evaluation, Indices, Workload, WorkloadSpec
from dlion.tensors import Flat, Layout, Tensors

TRAIN_SAMPLES = 1 << 16
SPREAD = 0.1
"""Distance of a peer's target from the common one, relative to the common target's size."""
NOISE = 0.5
"""Standard deviation of one sample's target."""
PERIOD = 64
"""Different samples: their noise sums to zero in every dimension."""


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    samples = apportion(spec.train_limit or max(TRAIN_SAMPLES, len(shares)), shares)
    common, own = _targets(spec.size, spec.seed, tuple(samples))
    return Toy(common, own[peer_index], (samples[peer_index], sum(samples)), spec.seed)


@lru_cache(maxsize=2)
def _targets(size: int, seed: int, samples: tuple[int, ...]) -> tuple[Flat, Flat]:
    """The common target, and one row per peer (a pure function; cached for the peers of one process)."""
    rng = np.random.default_rng((seed, 4))
    common = rng.standard_normal(size)
    offsets = SPREAD * rng.standard_normal((len(samples), size))
    offsets -= np.average(offsets, axis=0, weights=samples)
    return common.astype(np.float32), (common + offsets).astype(np.float32)


class Toy:
    """A ``Workload``. ``samples`` are (of this peer, of all)."""

    def __init__(self, common: Flat, target: Flat, samples: tuple[int, int], seed: int) -> None:
        self.layout = Layout(("w",), (common.shape,))
        self.train_size, self.global_train_size = samples
        self._common = common
        self._target = target
        wave = NOISE * np.random.default_rng((seed, 5)).standard_normal(PERIOD)
        wave -= wave.mean()
        self._noise: Flat = np.resize(wave, common.size + PERIOD).astype(np.float32)

    def initial(self, seed: int) -> Tensors:
        rng = np.random.default_rng(seed)
        return Tensors(self.layout, 0.01 * rng.standard_normal(self._common.size, dtype=np.float32))

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        """The first sample's noise, shrunk by the root of the batch, stands for the mean of the batch's."""
        start = int(batch[0]) % PERIOD
        np.multiply(self._noise[start : start + out.size], np.float32(len(batch) ** -0.5), out=out)
        out += self._target
        np.subtract(weights, out, out=out)
        loss = 0.5 * float(np.dot(out, out)) / out.size
        out *= np.float32(1.0 / out.size)
        return loss

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        """Loss against the common target; accuracy 1 / (1 + loss relative to the loss of zero weights)."""
        loss = 0.5 * float(np.mean(np.square(weights - self._common)))
        zero = 0.5 * float(np.mean(np.square(self._common)))
        return Evaluation(1.0 / (1.0 + loss / zero), loss, 1)
