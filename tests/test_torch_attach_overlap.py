"""A loop that does not wait for its step to be taken in: it makes the same, and what would spoil it is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import nn  # noqa: E402
from torch_attach_kit import (  # noqa: E402
    BATCH,
    CLASSES,
    FEATURES,
    Meeting,
    batches,
    loop,
    mlp,
    seeded,
    setups,
    side_by_side,
    train,
    values,
)

from dlion.learn.workloads.torch_guest import Guest, Places  # noqa: E402
from dlion.torch import Options, Pride, attach  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread")]
RESIDUAL = 'residual = true, transfer = "off"'


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def solo(directory: Path, model: nn.Module, exchange: str = "dlion", **options: Any) -> Pride:
    buffers, batch = options.pop("buffers", "local"), options.pop("batch", BATCH)
    optimizer = options.pop("optimizer", adamw(model))
    setup = setups(directory, ["solo"], exchange)["solo"]
    return attach(model, optimizer, setup, batch_size=batch, buffers=buffers, options=Options(**options))


def test_alone_it_is_the_plain_loop(tmp_path: Path) -> None:
    """Step by step, not only in the end; and the weights it leaves are the node's, to rounding."""
    model, one = seeded(), seeded()
    optimizer = adamw(one)
    with solo(tmp_path, model) as pride:
        assert pride.overlaps
        for batch in batches("a", 30):
            loop(pride, model, [batch])
            one.zero_grad()
            nn.functional.cross_entropy(one(batch[0]), batch[1]).backward()
            optimizer.step()
            torch.testing.assert_close(values(model), values(one), atol=1e-5, rtol=0)
        before = values(model)
    torch.testing.assert_close(values(model), before, atol=1e-6, rtol=0)
    assert (values(model) - values(seeded())).abs().max() > 0.1


def test_what_others_say_arrives_and_both_end_alike(tmp_path: Path) -> None:
    """With plain SGD at a tiny rate all gradients are of the start, nearly: both models are the sum of all steps."""
    peers = setups(tmp_path, "ab", "dlion", RESIDUAL)
    meeting, rate, steps = Meeting(peers), 1e-4, 40
    slow = lambda model: torch.optim.SGD(model.parameters(), lr=rate)  # noqa: E731
    users = side_by_side({n: lambda n=n: train(peers[n], meeting, steps, optimizer=slow) for n in peers})
    start = seeded()
    goal = values(start)
    for name in peers:
        for inputs, targets in batches(name, steps):
            start.zero_grad()
            nn.functional.cross_entropy(start(inputs), targets).backward()
            goal = goal - rate / 2 * torch.cat([p.grad.flatten() for p in start.parameters()])  # type: ignore[union-attr]
    for model, _ in users.values():
        moved, wanted = values(model) - values(seeded()), goal - values(seeded())
        assert (moved - wanted).norm() < 0.02 * wanted.norm()
    torch.testing.assert_close(values(users["a"][0]), values(users["b"][0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("exchange", "options"),
    [
        ("full", {}),
        ("diloco", {}),
        ("dlion", {"overlap": False}),
        ("dlion", {"batch": None}),
        ("dlion", {"buffers": "averaged"}),
        ("dlion", {"optimizer": None}),
        ("dlion", {"keeps": {"generator": nn.Linear(1, 1)}}),
    ],
)
def test_where_it_cannot_be_the_step_waits(tmp_path: Path, exchange: str, options: dict[str, Any]) -> None:
    """A pace or an exchange that waits; batch advice; what changes between two steps and is exchanged or kept."""
    model = seeded()
    with solo(tmp_path, model, exchange, **options) as pride:
        assert not pride.overlaps
        loop(pride, model, batches("a", 3))
        with torch.no_grad():
            model[0].weight.add_(0.5)  # allowed here
        loop(pride, model, batches("b", 3))


def test_a_parameter_that_somebody_else_changes_is_named(tmp_path: Path) -> None:
    """Part of the change could be lost without a word."""
    model = seeded()
    with pytest.raises(RuntimeError, match=r"parameter '2.weight' was changed .*Options\(overlap=False\)"):  # noqa: SIM117
        with solo(tmp_path, model) as pride:
            loop(pride, model, batches("a", 2))
            with torch.no_grad():
                model[2].weight.clamp_(-0.1, 0.1)
            loop(pride, model, batches("a", 1))


def test_a_cut_holds_statistics_as_the_step_left_them() -> None:
    """The next forward has begun, and has changed them already."""
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES))
    guest = Guest(Places(model, "local"), steps_itself=True)
    guest.ahead = True
    guest.places.rest()
    then = model[1].running_mean.clone()
    model(torch.randn(BATCH, FEATURES))
    assert not torch.equal(model[1].running_mean, then)
    torch.testing.assert_close(torch.tensor(guest.state()["buffers"]["1.running_mean"]), then, atol=0, rtol=0)


def test_a_loop_started_again_goes_on_from_what_it_had(tmp_path: Path) -> None:
    """A drained checkpoint of a loop that ran ahead, and eight more steps, are twenty at a go."""

    def run(directory: Path, first: int, until: int) -> nn.Module:
        directory.mkdir(exist_ok=True)
        model = seeded(mlp)
        data = list(batches("a", until))
        with solo(directory, model) as pride:
            assert (pride.overlaps, pride.steps_done) == (True, first)
            loop(pride, model, data[first:])
        return model

    run(tmp_path / "parts", 0, 12)
    resumed, at_a_go = run(tmp_path / "parts", 12, 20), run(tmp_path / "go", 0, 20)
    torch.testing.assert_close(values(resumed), values(at_a_go), atol=1e-6, rtol=0)
