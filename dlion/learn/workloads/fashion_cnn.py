"""``fashion-cnn``: Fashion-MNIST (Xiao et al., 2017) and a convolutional network of 1,199,882 parameters, in torch.

Law: joins the images of ``idx`` to a module. Two 3x3 convolutions (32 and 64 channels), a pool, two dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dlion.learn.data import DataError, Dataset, shards
from dlion.learn.workload import Indices, Workload, WorkloadSpec
from dlion.learn.workloads import idx
from dlion.learn.workloads.torch_module import TorchData, TorchWorkload

SIDE = 28


def build(spec: WorkloadSpec, peer_index: int, peer_names: Sequence[str], shares: Sequence[float]) -> Workload:
    if spec.data_dir is None:
        raise DataError(f"workload {spec.name!r} needs the folder of Fashion-MNIST's IDX files (--data)")
    data = idx.limited(idx.load("fashion-mnist", spec.data_dir), spec.train_limit, spec.seed)
    shard = shards(data, spec.partition, spec.alpha, spec.seed, tuple(shares))[peer_index]
    samples = TorchData(Images(data, shard), Images(data, None), len(data.train_labels), peer_index)
    return TorchWorkload(cnn, cross_entropy, samples)


def cnn() -> nn.Module:
    """(samples, 1, 28, 28) -> (samples, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class Images:
    """The training images numbered in ``rows``, or the held-out set (None); bytes until a batch is asked for."""

    def __init__(self, data: Dataset, rows: Indices | None) -> None:
        self._data = data
        self._rows = rows

    def __len__(self) -> int:
        return len(self._data.test_labels) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.gather(slice(index, index + 1))
        return inputs[0], targets[0]

    def gather(self, indices: Indices | slice) -> tuple[torch.Tensor, torch.Tensor]:
        data = self._data
        if self._rows is None:
            images, labels = data.test_images[indices], data.test_labels[indices]
        else:
            images, labels = data.train_images[self._rows[indices]], data.train_labels[self._rows[indices]]
        return torch.from_numpy(data.normalised(images)).view(-1, 1, SIDE, SIDE), torch.from_numpy(labels)
