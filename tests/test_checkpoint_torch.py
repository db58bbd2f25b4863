"""A torch module with state of its own (batch statistics, a random stream) goes on from a cut bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from test_checkpoint_node import Kept, at, kept_run  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from dlion.cut import name_of  # noqa: E402
from dlion.learn.workload import Indices  # noqa: E402
from dlion.learn.workloads.torch_module import TorchData, TorchWorkload  # noqa: E402
from dlion.tensors import Flat  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
FEATURES, HIDDEN, CLASSES, SAMPLES = 6, 5, 4, 60


class Watched(TorchWorkload):
    """Batch statistics and dropout; notes the weights that each step begins with."""

    def __init__(self, peer: str) -> None:
        inputs = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(sum(peer.encode())))
        data = TensorDataset(inputs, inputs[:, :CLASSES].argmax(1))
        layers = nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.3)
        module = lambda: nn.Sequential(*layers, nn.Linear(HIDDEN, CLASSES))  # noqa: E731
        super().__init__(module, cross_entropy, TorchData(data, data, 4 * SAMPLES))
        self.seen: list[bytes] = []

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        self.seen.append(weights.tobytes())
        return super().gradient(weights, batch, out)


def watched() -> tuple[dict[str, Watched], Callable[[str], Watched]]:
    made: dict[str, Watched] = {}
    return made, lambda peer: made.setdefault(peer, Watched(peer))


def test_a_module_with_batch_statistics_and_dropout_goes_on_bit_by_bit() -> None:
    (went_on, make), kept = watched(), Kept()
    kept_run(kept, workload=make, until_s=3.0, momentum=0.9, each=at(1.3))
    (number,) = (n for n in kept.whole(4) if name_of(n) == "0.1")
    resumed, make = watched()
    kept_run(kept, number, workload=make, until_s=3.0, momentum=0.9, start_s=kept.cuts[number]["a1"].t)
    for peer, workload in went_on.items():
        step = kept.cuts[number][peer].step
        again = resumed[peer].seen
        common = min(len(again), len(workload.seen) - step)
        assert common > 8 and again[:common] == workload.seen[step : step + common]
        assert not np.array_equal(workload.seen[step], workload.seen[step + 1])
