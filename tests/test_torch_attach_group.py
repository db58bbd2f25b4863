"""Several processes are one peer: two under gloo, beside two plain peers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch.nn.functional import cross_entropy  # noqa: E402
from torch_attach_kit import StoreMeeting, batches, mlp, setups, sgd, side_by_side, train, values  # noqa: E402
from torch_attach_rank import STEPS  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(100)]
PROGRAM = Path(__file__).parent / "torch_attach_rank.py"
ROOT = PROGRAM.parent.parent


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Both processes of the peer "site"; none outlives the test."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(PROGRAM.parent)]), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, PROGRAM, tmp_path, str(rank)], env=environ, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow
def test_two_processes_are_one_peer_beside_two_others(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Three peers in lockstep, one of them two processes that halve its batches: all four processes' models are what
    one process makes of all samples. And when the node fails, the process beside it hears so instead of waiting."""
    peers = setups(tmp_path, ["site", "x", "y"])
    ranks = request.getfixturevalue("ranks")
    meeting = StoreMeeting(tmp_path / "meeting", peers)
    users = side_by_side({n: lambda n=n: train(peers[n], meeting, STEPS) for n in "xy"})
    for process in ranks:
        finished(process)

    torch.manual_seed(0)
    one = mlp()
    optimizer = sgd(one)
    for parts in zip(*(batches(name, STEPS) for name in peers), strict=True):
        optimizer.zero_grad()
        torch.stack([cross_entropy(one(inputs), targets) for inputs, targets in parts]).mean().backward()
        optimizer.step()
    finals = [values(model).numpy() for model, _ in users.values()]
    finals += [np.load(tmp_path / f"rank{rank}.npy") for rank in range(2)]
    for final in finals:
        np.testing.assert_allclose(final, values(one).numpy(), atol=1e-5)
        np.testing.assert_array_equal(final, finals[0])

    assert (tmp_path / "error0.txt").read_text().startswith("2 Diverged: step 2: ")
    assert (tmp_path / "error1.txt").read_text().startswith("2 RuntimeError: this peer's node has failed; process 0")
