"""A peer around the user's own loop: it learns with others, agrees with them, and ends cleanly however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the torch extra")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from torch_attach_kit import (  # noqa: E402
    BATCH,
    CLASSES,
    FEATURES,
    Finite,
    Meeting,
    batches,
    loop,
    mlp,
    seeded,
    setups,
    sgd,
    side_by_side,
    train,
    values,
)

from dlion.cli import host  # noqa: E402
from dlion.cli.build import exchange_of, learner_of, node_settings  # noqa: E402
from dlion.cli.errors import Fault  # noqa: E402
from dlion.cli.peer import plan_of_peer  # noqa: E402
from dlion.config import ConfigError, PeerSetup, load_setup  # noqa: E402
from dlion.exchange.base import Exchange  # noqa: E402
from dlion.lane import Diverged  # noqa: E402
from dlion.messages import PeerId  # noqa: E402
from dlion.net.link import LinkError  # noqa: E402
from dlion.observe import runlog  # noqa: E402
from dlion.observe.read import parse  # noqa: E402
from dlion.torch import Options, attach  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(60)]
JOIN_S = 5.0


@pytest.fixture(autouse=True)
def clean(one_thread: None) -> Iterator[None]:
    """One thread for sums; and no thread of ours is left behind."""
    others = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - others:
        thread.join(JOIN_S)
        assert not thread.is_alive(), thread


class Averages(Exchange):
    """Wants gradients; does nothing with them."""

    name = "averages"
    consumes = "gradient"


def alone(directory: Path, exchange: str = "full", settings: str = "") -> PeerSetup:
    return setups(directory, ["solo"], exchange, settings)["solo"]


def logged(directory: Path) -> list[runlog.Event]:
    (path,) = directory.glob("*.jsonl")
    return parse(path.read_bytes())


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[list[tuple[torch.Tensor, ...]]]) -> None:
    """The loop that attach is compared with: each step on the mean of the losses of several batches."""
    for parts in data:
        optimizer.zero_grad()
        torch.stack([cross_entropy(model(inputs), targets) for inputs, targets in parts]).mean().backward()
        optimizer.step()


# -- learning with others ---------------------------------------------------------------------------------------


def test_two_loops_in_lockstep_are_one_loop_over_both_batches(tmp_path: Path) -> None:
    """Full exchange, plain SGD: after every step both models are what one process makes of all samples."""
    peers = setups(tmp_path, "ab")
    meeting = Meeting(peers)
    users = side_by_side({n: lambda n=n: train(peers[n], meeting, 30) for n in peers})
    one = seeded()
    plain(one, sgd(one), map(list, zip(batches("a", 30), batches("b", 30), strict=True)))
    for model, losses in users.values():
        torch.testing.assert_close(values(model), values(one), atol=1e-5, rtol=0)
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), "nothing was learnt"
    assert torch.equal(values(users["a"][0]), values(users["b"][0]))


def test_adamw_of_the_user_and_sparse_messages_agree_after_the_drain(tmp_path: Path) -> None:
    """DLion with residuals says a part at a time; what is owed at the end is settled before the block is left."""
    peers = setups(tmp_path, "ab", "dlion", 'residual = true, transfer = "off"')
    meeting = Meeting(peers)
    adamw = lambda model: torch.optim.AdamW(model.parameters(), lr=0.02)  # noqa: E731
    users = side_by_side({n: lambda n=n: train(peers[n], meeting, 40, optimizer=adamw) for n in peers})
    torch.testing.assert_close(values(users["a"][0]), values(users["b"][0]), atol=1e-5, rtol=0)
    assert (values(users["a"][0]) - values(seeded())).abs().max() > 0.1
    assert all(sum(losses[-5:]) < 0.7 * sum(losses[:5]) for _, losses in users.values())


def test_alone_it_is_the_plain_loop(tmp_path: Path) -> None:
    """No neighbour: momentum, groups and a scheduler of the user's do what they do without dlion."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
        return torch.optim.SGD(groups, lr=0.3, momentum=0.9, weight_decay=1e-3)

    model, one = seeded(), seeded()
    with attach(model, optimizer(model), alone(tmp_path), batch_size=BATCH) as pride:
        loop(pride, model, batches("a", 20))
    plain(one, optimizer(one), ([pair] for pair in batches("a", 20)))
    torch.testing.assert_close(values(model), values(one), atol=1e-5, rtol=0)


def test_the_jobs_optimizer_steps_where_the_user_has_none(tmp_path: Path) -> None:
    """optimizer=None: learning rate and momentum of the job file."""
    settings = {"train.learning_rate": "0.2", "train.momentum": "0.9"}
    alone(tmp_path)
    model, one = seeded(), seeded()
    path = tmp_path / "solo.toml"
    with attach(model, None, path, batch_size=BATCH, options=Options(settings)) as pride:
        loop(pride, model, batches("a", 10))
    plain(one, torch.optim.SGD(one.parameters(), 0.2, 0.9), ([pair] for pair in batches("a", 10)))
    torch.testing.assert_close(values(model), values(one), atol=1e-5, rtol=0)


def test_a_loop_trains_with_a_peer_that_dlion_runs(tmp_path: Path) -> None:
    """The other peer is a TorchWorkload in an asyncio application: the same steps, and the loop's model is what one
    process makes of both batches. The other one ends by itself."""
    flags = {"train.batch": BATCH, "train.learning_rate": 0.3, "batching.mode": "fixed", "job.until": "50s"}
    setups(tmp_path, "ab")
    peers = {name: load_setup(tmp_path / f"{name}.toml", flags, {}) for name in "ab"}
    meeting, steps = Meeting(peers), 10

    async def application() -> int:
        plan, finite = plan_of_peer(peers["b"]), Finite(steps)
        learner = learner_of(plan, PeerId("b"), finite, exchange_of(plan))
        introduce = partial(asyncio.to_thread, meeting.of("b"))
        guest = host.Guest(learner, node_settings(plan.job))
        doors = host.Doors(("127.0.0.1", 0), None)
        async with host.hosted(plan, PeerId("b"), doors, tmp_path / "b", introduce, guest) as running:
            await running.node.wait()
        return running.node.step

    users = side_by_side({"a": lambda: train(peers["a"], meeting, steps), "b": lambda: asyncio.run(application())})
    one, (inputs, targets) = seeded(), next(batches("b", 1))
    plain(one, sgd(one), ([own, (inputs[:1], targets[:1])] for own in batches("a", steps)))
    torch.testing.assert_close(values(users["a"][0]), values(one), atol=1e-5, rtol=0)
    assert users["b"] == steps


def test_the_log_has_the_users_loss_and_learning_rate(tmp_path: Path) -> None:
    setup, model = alone(tmp_path), seeded()
    with attach(model, sgd(model), setup, batch_size=BATCH) as pride:
        losses = loop(pride, model, batches("a", 4))
    steps = [event for event in logged(tmp_path / "solo") if isinstance(event, runlog.Step)]
    assert [event.loss for event in steps] == pytest.approx(losses, rel=1e-5)
    assert [(event.samples, event.lr) for event in steps] == [(BATCH, 0.3)] * 4


def test_batch_size_is_the_advice_of_the_job(tmp_path: Path) -> None:
    """Weighted batching tries several sizes, then deals by measured power: all of it to a peer that is alone."""
    model, advice = seeded(), []
    with attach(model, sgd(model), alone(tmp_path)) as pride:
        for inputs, targets in batches("a", 5):
            advice.append(pride.batch_size)
            cross_entropy(model(inputs), targets).backward()
            pride.step()
    assert len(set(advice[:3])) == 3 and advice[3:] == [64, 64]


# -- what is exchanged ------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A frozen layer, a weight used twice, a parameter never used, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(FEATURES, CLASSES)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.relu(self.first(self.norm(self.frozen(inputs)))))
        found: torch.Tensor = self.head(torch.relu(hidden))
        return found


@pytest.mark.parametrize("buffers", ["local", "averaged"])
def test_frozen_tied_unused_and_batchnorm(tmp_path: Path, buffers: str) -> None:
    """Frozen stays, tied stays tied, unused stays; statistics are each peer's own, or on request everybody's mean."""
    peers = setups(tmp_path, "ab")
    meeting = Meeting(peers)
    users = side_by_side({n: lambda n=n: train(peers[n], meeting, 12, Odd, buffers=buffers) for n in peers})
    start, a, b = seeded(Odd), users["a"][0], users["b"][0]
    assert torch.equal(values(a), values(b))
    for model in (a, b):
        assert model.second.weight is model.first.weight
        assert torch.equal(model.frozen.weight, start.frozen.weight)
        assert torch.equal(model.idle, start.idle)
        assert (model.first.weight - start.first.weight).abs().max() > 0.01
    assert torch.equal(a.norm.running_mean, b.norm.running_mean) == (buffers == "averaged")
    assert a.norm.running_mean.abs().max() > 0.01
    assert int(a.norm.num_batches_tracked) == 12


def test_what_cannot_be_exchanged_is_refused(tmp_path: Path) -> None:
    """Before anything is started, with a text that says what to do."""
    setup = alone(tmp_path)
    with pytest.raises(ValueError, match=r"must be float32; compute in bfloat16 or float16 with torch\.autocast"):
        attach(mlp().bfloat16(), None, setup)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        attach(mlp().requires_grad_(False), None, setup)
    with pytest.raises(ValueError, match="no shape yet"):
        attach(nn.LazyLinear(3), None, setup)
    with pytest.raises(ValueError, match="'local' or 'averaged'"):
        attach(mlp(), None, setup, buffers="mean")
    wants = alone(tmp_path, f"{__name__}:Averages")
    model = mlp()
    with pytest.raises(ConfigError, match="consumes gradients and steps by itself: attach with optimizer=None"):
        attach(model, sgd(model), wants)
    with pytest.raises(ConfigError, match="cannot be used with averaged buffers"):
        attach(Odd(), None, wants, buffers="averaged")
    with attach(model, None, wants, batch_size=BATCH) as pride:
        loop(pride, model, batches("a", 2))


# -- how it ends ------------------------------------------------------------------------------------------------


def test_an_error_in_the_node_surfaces_in_the_loop(tmp_path: Path) -> None:
    """A gradient that is not finite is found in the exchange lane; the loop's next step raises what was found."""
    model = seeded()
    steps = 0
    with pytest.raises(Diverged, match="not finite"), attach(model, sgd(model), alone(tmp_path)) as pride:
        for inputs, targets in batches("a", 9):
            loss = cross_entropy(model(inputs), targets) * (float("nan") if steps == 3 else 1.0)
            loss.backward()
            pride.step(loss)
            steps += 1
    assert steps == 3


def test_peers_that_start_from_other_values_refuse_each_other(tmp_path: Path) -> None:
    """Their replicas would never agree, and nobody would notice."""
    peers = setups(tmp_path, "ab")
    meeting = Meeting(peers)

    def joins(name: str) -> None:
        model, options = seeded(), Options(addresses=meeting.of(name), start_wait_s=0.5)
        if name == "b":
            nn.init.uniform_(model[2].weight)
        with attach(model, sgd(model), peers[name], options=options) as pride:
            loop(pride, model, batches(name, 1))

    with pytest.raises(LinkError):
        side_by_side({n: lambda n=n: joins(n) for n in peers})
    reasons = [e.reason for e in logged(tmp_path / "a") if isinstance(e, runlog.Refuse)]
    assert any("model mismatch" in reason for reason in reasons), reasons


def test_a_parameter_that_changes_shape_is_found(tmp_path: Path) -> None:
    model = seeded()
    with (
        pytest.raises(ValueError, match="trainable parameters changed"),
        attach(model, sgd(model), alone(tmp_path)) as pride,
    ):
        loop(pride, model, batches("a", 1))
        model[0].requires_grad_(False)
        loop(pride, model, batches("a", 1))


def test_an_error_while_starting_surfaces_in_the_with_statement(tmp_path: Path) -> None:
    """The port is taken, say: entering raises, and the loop never runs."""
    (tmp_path / "solo").write_text("a file where the directory should be")
    with pytest.raises(Fault, match="cannot write the run's files"), attach(mlp(), None, alone(tmp_path)):
        pytest.fail("the block was entered")


def test_an_error_in_the_loop_leaves_politely(tmp_path: Path) -> None:
    """The block is left by the user's own error; the other peer carries on alone and ends well."""
    peers = setups(tmp_path, "ab")
    meeting = Meeting(peers)

    def breaks() -> None:
        def data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            yield from batches("a", 3)
            raise LookupError("the data are gone")

        model, options = seeded(), Options(addresses=meeting.of("a"))
        lost = pytest.raises(LookupError, match="the data are gone")
        with lost, attach(model, sgd(model), peers["a"], options=options) as pride:
            loop(pride, model, data())

    users = side_by_side({"a": breaks, "b": lambda: train(peers["b"], meeting, 12)})
    assert len(users["b"][1]) == 12
    members = [e.state for e in logged(tmp_path / "b") if isinstance(e, runlog.Member) and e.peer == "a"]
    assert "left" in members, members


def test_ctrl_c_ends_a_step_that_waits(tmp_path: Path) -> None:
    """Lockstep with a neighbour that does not step: the signal interrupts the wait, and the block drains."""
    peers = setups(tmp_path, "ab")
    meeting, waiting, over = Meeting(peers), threading.Event(), threading.Event()

    def idles() -> None:
        model = seeded()
        with attach(model, sgd(model), peers["b"], options=Options(addresses=meeting.of("b"), together=False)):
            assert waiting.wait(30)
            os.kill(os.getpid(), signal.SIGINT)
            assert over.wait(30)

    other = threading.Thread(target=idles)
    other.start()
    model, options = seeded(), Options(addresses=meeting.of("a"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), attach(model, sgd(model), peers["a"], options=options) as pride:
            waiting.set()
            loop(pride, model, batches("a", 3))
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        other.join(30)
    assert not other.is_alive()


def test_a_step_outside_the_block_is_refused(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="use attach in a with statement"):
        attach(model, sgd(model), alone(tmp_path)).step()
    with attach(model, sgd(model), alone(tmp_path)) as pride:
        loop(pride, model, batches("a", 1))
    with pytest.raises(RuntimeError, match="run is over"):
        pride.step()


def test_dlion_itself_never_imports_torch() -> None:
    program = (
        "import sys, dlion, dlion.cli, dlion.node, dlion.cli.build, dlion.cli.host; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
