"""A torch module in a job: the composition root gives it its own optimizer and one thread, or refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402
from torch_attach_kit import batches, mlp, setups  # noqa: E402

from dlion.cli.build import exchange_of, learner_of, workload_of  # noqa: E402
from dlion.cli.peer import plan_of_peer  # noqa: E402
from dlion.config import ConfigError, load_setup  # noqa: E402
from dlion.exchange.base import Exchange  # noqa: E402
from dlion.learn.workload import Choosing, Part, Stateful, Workload, WorkloadSpec  # noqa: E402
from dlion.messages import PeerId  # noqa: E402
from dlion.torch import TorchData, TorchWorkload  # noqa: E402

pytestmark = pytest.mark.torch
RATE = 0.25
PEER = PeerId("solo")


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=RATE)


def build(spec: WorkloadSpec, index: int, names: Sequence[str], shares: Sequence[float]) -> Workload:
    data = TensorDataset(*next(iter(batches("a", 1))))
    return TorchWorkload(mlp, cross_entropy, TorchData(data, data), adam)


class Averages(Exchange):
    """Wants gradients."""

    name = "averages"
    consumes = "gradient"


def test_the_modules_own_optimizer_makes_the_step(tmp_path: Path) -> None:
    """Adam's first step is the learning rate in the direction of the gradient's sign, whatever the job's optimizer."""
    plan = plan_of_peer(setups(tmp_path, [PEER])[PEER])
    workload = build(WorkloadSpec("mine"), 0, (), ())
    learner = learner_of(plan, PEER, workload, exchange_of(plan))
    moved = learner.trainer.step(workload.initial(0).flat, 4, 0.0).values
    assert np.isclose(np.abs(moved[moved != 0]), RATE, rtol=1e-3).mean() > 0.9


def test_an_exchange_of_gradients_refuses_it(tmp_path: Path) -> None:
    plan = plan_of_peer(setups(tmp_path, [PEER], f"{__name__}:Averages")[PEER])
    with pytest.raises(ConfigError, match="cannot be used with a torch optimizer"):
        learner_of(plan, PEER, build(WorkloadSpec("mine"), 0, (), ()), exchange_of(plan))


def test_a_torch_job_computes_on_one_thread(tmp_path: Path) -> None:
    setups(tmp_path, [PEER])
    plan = plan_of_peer(load_setup(tmp_path / "solo.toml", {"job.workload": f"{__name__}:build"}, {}))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        workload_of(replace(plan, job=load_setup(tmp_path / "solo.toml", {"job.workload": "toy"}, {}).job), PEER)
        assert torch.get_num_threads() == 2, "no business of a workload without torch"
        workload_of(plan, PEER)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_part_of_the_data_keeps_optimizer_and_state(tmp_path: Path) -> None:
    """``data_share`` below 1 changes the data only."""
    part = Part(build(WorkloadSpec("mine"), 0, (), ()), 0.5)
    assert isinstance(part, Choosing) and isinstance(part, Stateful)
    plan = plan_of_peer(setups(tmp_path, [PEER])[PEER])
    toy = Part(
        workload_of(replace(plan, job=load_setup(tmp_path / "solo.toml", {"job.workload": "toy"}, {}).job), PEER), 0.5
    )
    assert not isinstance(toy, Choosing)
