"""An MLP that classifies one peer's shard of a data set: the body of ``digits``, ``mnist`` and ``fashion-mnist``.

Law: joins model and data; loads nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlion.learn.data import Dataset, shards
from dlion.learn.models import Mlp, cross_entropy
from dlion.learn.workload import Evaluation, Indices, WorkloadSpec
from dlion.tensors import Flat, Layout, Tensors

EVALUATION_PIECE = 256
"""Samples evaluated at a time: activations stay small however large the held-out set."""


class Classifier:
    """A ``Workload``. ``shard`` holds this peer's indices into the training set."""

    def __init__(self, data: Dataset, shard: Indices, hidden: tuple[int, ...]) -> None:
        self._data = data
        self._shard = shard
        self._model = Mlp((data.train_images.shape[1], *hidden, data.classes))

    @classmethod
    def of(
        cls, spec: WorkloadSpec, data: Dataset, hidden: tuple[int, ...], cut: tuple[int, Sequence[float]]
    ) -> Classifier:
        """For ``cut`` = (peer index, all shares); ``hidden`` is used where ``spec`` names no widths."""
        index, shares = cut
        dealt = shards(data, spec.partition, spec.alpha, spec.seed, tuple(shares))
        return cls(data, dealt[index], hidden if spec.hidden is None else spec.hidden)

    @property
    def layout(self) -> Layout:
        return self._model.layout

    @property
    def train_size(self) -> int:
        return len(self._shard)

    @property
    def global_train_size(self) -> int:
        return len(self._data.train_labels)

    def initial(self, seed: int) -> Tensors:
        return self._model.initial(seed)

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        rows = self._shard[batch]
        inputs = self._data.normalised(self._data.train_images[rows])
        return self._model.gradient(weights, inputs, self._data.train_labels[rows], out)

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        images, labels = self._data.test_images[:limit], self._data.test_labels[:limit]
        right = np.zeros(len(labels), dtype=np.bool_)
        loss = 0.0
        for start in range(0, len(labels), EVALUATION_PIECE):
            piece = slice(start, start + EVALUATION_PIECE)
            logits = self._model.logits(weights, self._data.normalised(images[piece]))
            right[piece] = logits.argmax(axis=1) == labels[piece]
            loss += float(cross_entropy(logits, labels[piece]).sum(dtype=np.float64))
        of_class = np.bincount(labels, minlength=self._data.classes)
        right_of_class = np.bincount(labels[right], minlength=self._data.classes)
        per_class = tuple(
            int(hits) / int(all_) if all_ else float("nan") for hits, all_ in zip(right_of_class, of_class, strict=True)
        )
        return Evaluation(float(right.mean()), loss / len(labels), len(labels), per_class)
