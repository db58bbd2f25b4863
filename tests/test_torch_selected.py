"""Selection on the device: only the largest part of each gradient comes home, and nothing is ever lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from test_torch_module import classes, gradient, mlp, snapshot, workload  # noqa: E402
from torch import nn  # noqa: E402

from dlion.cut import frozen  # noqa: E402
from dlion.learn.optimizers import Sgd  # noqa: E402
from dlion.learn.schedules import Constant  # noqa: E402
from dlion.learn.trainer import Trainer  # noqa: E402
from dlion.learn.workloads.torch_memory import Device, Selected  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]
TENTH = Device("cpu", 0.1)


def test_what_came_home_and_what_is_left_are_the_gradients() -> None:
    """Over steps with equal weights, each time a tenth of the entries, the largest of all that is there."""
    subject, whole = workload(mlp, device=TENTH), workload(mlp)
    weights = snapshot(subject)
    came, all_of_it = (np.zeros(subject.layout.size, dtype=np.float64) for _ in range(2))
    for step in range(12):
        before = subject._memory.left.numpy().copy() if step else np.zeros_like(weights)  # type: ignore[attr-defined]
        _, some = gradient(subject, weights)
        _, everything = gradient(whole, weights)
        came, all_of_it = came + some, all_of_it + everything
        count, there = round(0.1 * len(some)), before + everything
        assert np.count_nonzero(some) == count
        least = np.sort(np.abs(there))[-count]
        np.testing.assert_allclose(some, np.where(np.abs(there) >= least, there, 0.0), atol=1e-6)
        left = subject._memory.left.numpy()  # type: ignore[attr-defined]
        np.testing.assert_allclose(came + left, all_of_it, atol=1e-5)
    assert np.abs(left).max() > 0


@pytest.mark.parametrize("resumed", [False, True])
def test_it_learns_nearly_as_well_and_goes_on_from_its_state(resumed: bool) -> None:
    """A tenth of each gradient, error feedback: the same accuracy a little later. A restart keeps what was kept."""

    def trainer(device: Device | str) -> tuple[Trainer, Any]:
        subject = workload(mlp, device=device)
        return Trainer(subject, Sgd(), Constant(0.3), 0), subject

    found = {}
    for device in (TENTH, Device("cpu")):
        mine, subject = trainer(device)
        weights = subject.initial(1).flat.copy()
        for step in range(400):
            if resumed and step == 200:
                state = frozen(mine.state())
                mine, subject = trainer(device)
                subject.initial(1)
                mine.restore(state)
            weights += mine.step(weights, 16, 0.0).values
        found[device.gradient_share] = subject.evaluate(weights).accuracy, weights.copy()
    assert found[0.1][0] >= found[1.0][0] - 0.05 and found[1.0][0] > 0.8
    if resumed:
        at_a_go, subject = trainer(TENTH)
        weights = subject.initial(1).flat.copy()
        for _ in range(400):
            weights += at_a_go.step(weights, 16, 0.0).values
        np.testing.assert_array_equal(weights, found[0.1][1])


def test_only_the_chosen_entries_cross() -> None:
    """Three of them, places and numbers; what is left stays where it is."""
    memory, host = Selected(torch.device("cpu"), 0.3), np.full(10, np.nan, dtype=np.float32)
    memory.gradient(host).add_(torch.arange(10.0) - 4.0)
    memory.fetch(memory.gradient(host), host)
    assert host.tolist() == [-4.0, 0, 0, 0, 0, 0, 0, 0, 4.0, 5.0]
    assert memory.left.tolist() == [0, -3.0, -2.0, -1.0, 0, 1.0, 2.0, 3.0, 0, 0]


def test_what_cannot_be_selected_is_refused() -> None:
    for options in (
        {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)},
        {"buffers": "averaged"},
        {"dtype": torch.float16},
    ):
        with pytest.raises(ValueError, match="gradient_share below 1"):
            workload(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), device=TENTH, **options)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="gradient_share lies above 0"):
            Device("cpu", share)
    assert len(classes()) > 0
