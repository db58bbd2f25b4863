"""A loop that is started again goes on from its checkpoint: weights, the user's optimizer and scheduler, statistics."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import nn  # noqa: E402
from torch_attach_kit import BATCH, CLASSES, FEATURES, Meeting, batches, loop, seeded, setups, side_by_side  # noqa: E402

from dlion.config import PeerSetup  # noqa: E402
from dlion.torch import Options, attach  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]
FIRST, ALL = 12, 20


def normed() -> nn.Module:
    """With batch statistics, which stay each peer's own."""
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES))


def run(setup: PeerSetup, meeting: Meeting, until: int, *, fresh: bool = False) -> tuple[nn.Module, int]:
    """Train until ``until`` steps are done in all; returns the model and how many were done before."""
    name, model = setup.peer.name, seeded(normed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    options = Options(addresses=meeting.of(name), keeps={"scheduler": scheduler}, fresh=fresh)
    with attach(model, optimizer, setup, batch_size=BATCH, options=options) as pride:
        before = pride.steps_done
        for batch in islice(batches(name, until), before, None):
            loop(pride, model, [batch])
            scheduler.step()
        assert pride.steps_done == until
    return model, before


def both(directory: Path, until: int, *, fresh: bool = False) -> dict[str, tuple[nn.Module, int]]:
    peers = setups(directory, "ab")
    meeting = Meeting(peers)
    return side_by_side({name: lambda n=name: run(peers[n], meeting, until, fresh=fresh) for name in peers})


def test_a_loop_started_again_goes_on_as_if_it_had_never_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twelve steps, and eight more by new processes' worth of objects, are twenty at a go. ``fresh`` starts over."""
    for part in ("go", "parts"):
        (tmp_path / part).mkdir()
    at_a_go = both(tmp_path / "go", ALL)
    assert all(before == 0 for _, before in both(tmp_path / "parts", FIRST).values())
    with caplog.at_level(logging.WARNING, "dlion"):
        resumed = both(tmp_path / "parts", ALL)
    assert sum(f"goes on from checkpoint 0.end, step {FIRST}" in message for message in caplog.messages) == 2
    for name, (model, before) in resumed.items():
        assert before == FIRST
        for key, tensor in at_a_go[name][0].state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], tensor, atol=1e-6, rtol=0)
    assert all(before == 0 for _, before in both(tmp_path / "parts", 3, fresh=True).values())


def test_what_the_checkpoint_does_not_hold_is_refused(tmp_path: Path) -> None:
    """A scheduler kept now and not then would begin anew unnoticed."""
    setup = setups(tmp_path, ["solo"])["solo"]
    for keeps in ({}, {"scheduler": None}):
        model = seeded(normed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = {name: torch.optim.lr_scheduler.StepLR(optimizer, 5) for name in keeps}
        made = attach(model, optimizer, setup, batch_size=BATCH, options=Options(keeps=kept))
        if keeps:
            with pytest.raises(ValueError, match=r"holds .*'optimizer'\] beside the weights, this loop keeps"), made:
                pytest.fail("the block was entered")
        else:
            with made as pride:
                loop(pride, model, batches("a", 2))
