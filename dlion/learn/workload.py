"""What a peer trains: the protocol a user implements, in about thirty lines.

Law: knows batches, losses and gradients. Knows no peer, no link, no time. Runs in the train lane, never on the loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from dlion.learn.optimizers import Optimizer
from dlion.tensors import Flat, Layout, Tensors

Indices = npt.NDArray[np.int64]


class Ended(Exception):  # noqa: N818 - not an error: there is nothing more to train on
    """Raised by ``Workload.gradient``: the peer drains and leaves; the text says why."""


@dataclass(frozen=True)
class Evaluation:
    """What a set of weights is worth on held-out data."""

    accuracy: float
    """Share of samples classified rightly, 0 to 1 (or another figure of merit that grows to 1)."""
    loss: float
    samples: int
    per_class: tuple[float, ...] = ()
    """Accuracy of each class, where there are classes; nan for one without samples."""


@runtime_checkable
class Workload(Protocol):
    """A model, its loss and this peer's part of the data. All arrays float32; flat buffers are ``layout.size`` long."""

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

        ``weights`` is the train lane's snapshot: it does not change during the call and may not be written. Where the
        loss is no mean over samples (it compares them, or normalises by the batch), the workload has an attribute
        ``separable = False``: else a batch may come in slices.
        """

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        """Accuracy and loss on the held-out set (its first ``limit`` samples)."""


@runtime_checkable
class Stateful(Protocol):
    """A workload that keeps something of its own from step to step (statistics, the place in a random stream)."""

    def state(self) -> dict[str, Any]:
        """Arrays and plain values by name. Whoever keeps it copies it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""


@runtime_checkable
class Choosing(Protocol):
    """A workload that has a say in the optimizer, as those of a framework with optimizers of its own do."""

    def optimizer(self, own: Optimizer) -> Optimizer:
        """What to give the trainer instead of the job's ``own``; raises ValueError for what cannot work."""


@dataclass(frozen=True)
class WorkloadSpec:
    """Which workload, and its settings. A workload reads those that concern it; ``None`` is its own default."""

    name: str
    """A built-in name, or ``package.module:factory`` for a user's own."""
    hidden: tuple[int, ...] | None = None
    """Widths of the hidden layers; ``()`` is softmax regression."""
    size: int = 64
    """Dimensions of the toy quadratic."""
    partition: str = "iid"
    """``iid``, ``dirichlet`` (skewed labels) or ``writer`` (mnist only)."""
    alpha: float = 1.0
    """Concentration of the Dirichlet partition: small is skewed, large is even."""
    seed: int = 0
    """Of the data: split, partition, limit. Must be the same on all peers."""
    data_dir: Path | None = None
    train_limit: int | None = None
    """Use only that many training samples, drawn by ``seed``."""

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"workload: alpha must be above 0, not {self.alpha}")
        if self.size < 1 or (self.train_limit is not None and self.train_limit < 1):
            raise ValueError("workload: size and train_limit must be at least 1")
        if self.hidden is not None and any(width < 1 for width in self.hidden):
            raise ValueError(f"workload: hidden widths must be at least 1, not {self.hidden}")


class Part:
    """The first ``share`` (0 to 1, at least one sample) of a workload's shard; everything else is the workload's."""

    def __init__(self, whole: Workload, share: float) -> None:
        self._whole = whole
        self.layout = whole.layout
        self.global_train_size = whole.global_train_size
        self.train_size = max(1, int(share * whole.train_size))
        self.separable = getattr(whole, "separable", True)
        self.initial, self.gradient, self.evaluate = whole.initial, whole.gradient, whole.evaluate
        if isinstance(whole, Stateful):
            self.state, self.restore = whole.state, whole.restore
        if isinstance(whole, Choosing):
            self.optimizer = whole.optimizer
