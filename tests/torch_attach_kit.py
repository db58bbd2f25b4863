"""Peer files, a meeting of peers on free ports, and a plain training loop: for the tests of ``dlion.torch.attach``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from dlion.config import PeerSetup, load_setup
from dlion.learn.workload import Ended, Indices
from dlion.tensors import Flat
from dlion.torch import Options, Pride, TorchData, TorchWorkload, attach

FEATURES, CLASSES, BATCH = 6, 3, 8
MEET_S = 30.0
SEEDING = threading.Lock()

JOB = """
[job]
workload = "the caller's own"
[exchange]
name = "{exchange}"
settings = {{ {settings} }}
[batching]
growth = false
[node]
drain = "15s"
"""
TOPOLOGY = """
[clouds]
here.members = [{names}]
"""


def setups(directory: Path, names: Iterable[str], exchange: str = "full", settings: str = "") -> dict[str, PeerSetup]:
    """One peer file per name, all on one LAN, each on a free port."""
    names = list(names)
    (directory / "job.toml").write_text(JOB.format(exchange=exchange, settings=settings))
    (directory / "net.toml").write_text(TOPOLOGY.format(names=", ".join(f'"{n}"' for n in names)))
    found = {}
    for name in names:
        others = "\n".join(f'{other} = ""' for other in names if other != name)
        text = (
            f'name = "{name}"\ntopology = "net.toml"\njob = "job.toml"\nout = "{directory / name}"\n[peers]\n{others}\n'
        )
        (directory / f"{name}.toml").write_text(text)
        found[name] = load_setup(directory / f"{name}.toml", environ={})
    return found


class Meeting:
    """Where peers tell each other the ports that they were given."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._known: dict[str, str] = {}
        self._news = threading.Condition()

    def of(self, name: str) -> Callable[[str], Mapping[str, str]]:
        def introduce(here: str) -> Mapping[str, str]:
            with self._news:
                self._known[name] = here
                self._news.notify_all()
                assert self._news.wait_for(lambda: self._names <= self._known.keys(), MEET_S), self._known
                return {peer: where for peer, where in self._known.items() if peer != name}

        return introduce


class StoreMeeting(Meeting):
    """The same between processes: over a file that they all see."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        super().__init__(names)
        self._store = torch.distributed.FileStore(str(path))
        self._store.set_timeout(timedelta(seconds=MEET_S))

    def of(self, name: str) -> Callable[[str], Mapping[str, str]]:
        def introduce(here: str) -> Mapping[str, str]:
            self._store.set(name, here)
            return {peer: self._store.get(peer).decode() for peer in self._names - {name}}

        return introduce


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def seeded(make: Callable[[], nn.Module] = mlp) -> nn.Module:
    """The model that all peers start with; torch's generator is shared by all threads."""
    with SEEDING:
        torch.manual_seed(0)
        return make()


def batches(name: str, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(sum(name.encode()))
    for _ in range(steps):
        inputs = torch.randn(BATCH, FEATURES, generator=draw)
        yield inputs, inputs[:, :CLASSES].argmax(1)


def loop(pride: Pride, model: nn.Module, data: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """A plain training loop; returns its losses."""
    losses = []
    for inputs, targets in data:
        model.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        pride.step(loss)
        losses.append(float(loss.detach()))
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)


def train(
    setup: PeerSetup,
    meeting: Meeting,
    steps: int,
    make: Callable[[], nn.Module] = mlp,
    optimizer: Callable[[nn.Module], Any] = sgd,
    **options: Any,
) -> tuple[nn.Module, list[float]]:
    """One user: makes a model, attaches, trains, leaves. Returns the model and its losses."""
    name, model = setup.peer.name, seeded(make)
    with attach(
        model, optimizer(model), setup, batch_size=BATCH, options=Options(addresses=meeting.of(name)), **options
    ) as pride:
        assert pride.batch_size == BATCH
        losses = loop(pride, model, batches(name, steps))
    return model, losses


def side_by_side(users: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Each user on a thread of its own; what each returned, or the first thing that one raised."""
    with ThreadPoolExecutor(len(users), thread_name_prefix="user") as pool:
        futures = {name: pool.submit(user) for name, user in users.items()}
        return {name: future.result() for name, future in futures.items()}


def values(model: nn.Module) -> torch.Tensor:
    """Trainable values, flat."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


class Finite(TorchWorkload):
    """A peer that dlion's own loop trains: all its samples are alike, and after ``steps`` steps it leaves."""

    def __init__(self, steps: int) -> None:
        data = TensorDataset(*(part[:1].repeat(BATCH, *[1] * (part.ndim - 1)) for part in next(batches("b", 1))))
        super().__init__(mlp, cross_entropy, TorchData(data, data))
        self._left = steps

    def gradient(self, weights: Flat, batch: Indices, out: Flat) -> float:
        if not self._left:
            raise Ended("enough")
        self._left -= 1
        return super().gradient(weights, batch, out)
