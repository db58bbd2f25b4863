"""What a peer trains: the protocol a user implements, in about thirty lines.

Law: knows batches, losses and gradients. Knows no peer, no link, no time. Runs in the train lane, never on the loop.
"""

from __future__ import annotations

from typing import Protocol

import numpy.typing as npt
import numpy as np

from dlion.tensors import Flat, Layout, Tensors

Indices = npt.NDArray[np.int64]


class Workload(Protocol):
    """A model, its loss and this peer's part of the data. All arrays float32; the flat buffer is ``layout.size`` long."""

    @property
    def layout(self) -> Layout: ...

    @property
    def train_size(self) -> int:
        """Samples in this peer's shard."""

    @property
    def global_train_size(self) -> int:
        """Samples of all peers together (the batch controllers' thresholds refer to it)."""

    def initial(self, seed: int) -> Tensors:
        """Initial parameters: equal on all peers for equal ``seed``."""

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        """Write the mean gradient over samples ``batch`` (indices into the shard) to ``out``; return the mean loss.

        ``weights`` is the train lane's snapshot: it does not change during the call and may not be written.
        """

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        """Accuracy and loss on the held-out set (its first ``limit`` samples)."""


class Evaluation(Protocol):
    accuracy: float
    loss: float
    samples: int
