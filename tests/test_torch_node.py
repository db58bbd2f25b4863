"""A torch module and the NumPy MLP make the same run through the same node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from dlion.cli.build import Plan, node_of  # noqa: E402
from dlion.compute import Compute  # noqa: E402
from dlion.config import load_job, load_topology  # noqa: E402
from dlion.learn.models import Mlp  # noqa: E402
from dlion.learn.workload import Evaluation, Indices, Workload  # noqa: E402
from dlion.learn.workloads.torch_module import TorchData, TorchWorkload  # noqa: E402
from dlion.messages import PeerId  # noqa: E402
from dlion.net.link import Dialer  # noqa: E402
from dlion.node import Node, Seams  # noqa: E402
from dlion.observe.runlog import Memory, RunLog  # noqa: E402
from dlion.simulation import Result, simulate  # noqa: E402
from dlion.tensors import Flat, Layout, Tensors  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
FEATURES, HIDDEN, CLASSES, SAMPLES = 6, 5, 4, 60


def shard(peer: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(sum(peer.encode())))
    return inputs, inputs[:, :CLASSES].argmax(1)


def torch_peer(peer: str) -> TorchWorkload:
    data = TensorDataset(*shard(peer))
    mlp = lambda: nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))  # noqa: E731
    return TorchWorkload(mlp, cross_entropy, TorchData(data, data, 6 * SAMPLES))


def transposed(layout: Layout, flat: Flat) -> Flat:
    """torch keeps weights as (outputs, inputs), the NumPy model as (inputs, outputs)."""
    return np.concatenate([v.T.ravel() if v.ndim == 2 else v for v in layout.views(flat.copy()).values()])


class NumpyPeer:
    """The spine's MLP on the same shard, from the same start."""

    train_size, global_train_size = SAMPLES, 6 * SAMPLES

    def __init__(self, peer: str) -> None:
        self._model = Mlp((FEATURES, HIDDEN, CLASSES))
        self.layout = self._model.layout
        inputs, labels = shard(peer)
        self._inputs, self._labels = inputs.numpy(), labels.numpy()
        self._like = torch_peer(peer)

    def initial(self, seed: int) -> Tensors:
        return Tensors(self.layout, transposed(self._like.layout, self._like.initial(seed).flat))

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        return self._model.gradient(weights, self._inputs[batch], self._labels[batch], out)

    def evaluate(self, weights: Flat, limit: int | None = None) -> Evaluation:
        return Evaluation(0.0, 0.0, 0)


def run(kind: Any, directory: Path) -> Result:
    flags = {"exchange.name": "full", "train.momentum": "0.9", "job.until": "2s", "train.batch": "8"}
    job = load_job("digits", flags, environ={}, directory=directory)
    plan = Plan(job, load_topology("homogeneous"))

    def make(peer: PeerId, dialer: Dialer, compute: Compute) -> Node:
        workload: Workload = kind(peer)
        return node_of(plan, peer, Seams(dialer, compute, 0, RunLog(Memory())), workload=workload)

    return simulate(plan.topology, make)


def test_torch_and_numpy_make_the_same_run(tmp_path: Path) -> None:
    """Six peers in lockstep, full exchange, momentum: as many steps, and weights equal to 1e-5 on every peer."""
    ours, theirs = run(torch_peer, tmp_path), run(NumpyPeer, tmp_path)
    assert ours.steps == theirs.steps and min(ours.steps.values()) >= 20
    layout = torch_peer("a1").layout
    for peer, weights in ours.replicas.items():
        np.testing.assert_allclose(transposed(layout, weights), theirs.replicas[peer], atol=1e-5)
    start = torch_peer("a1").initial(0).flat
    assert np.abs(ours.replicas[PeerId("a1")] - start).max() > 0.05, "nothing was learnt"
