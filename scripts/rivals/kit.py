"""What another framework is given in ``rival_lab``: the model, data, starting weights, speed and clock of one peer of
dlion, and a log that dlion reads.

Law: a place to train in; averages and sends nothing. A program asks ``here()`` for its ``Site``, sets its framework up,
calls ``go`` and then ``step`` for ever. Steps last as long as a paced peer's do; a thread keeps the clock, writes
snapshots and ends the process, whatever the framework hangs in.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dlion.cli.build import identity_of, workload_of, write_header
from dlion.cli.host import SNAPSHOTS
from dlion.cli.planfile import load_plan
from dlion.learn.data import shards
from dlion.learn.trainer import Order, peer_seed
from dlion.learn.workloads import idx
from dlion.messages import PeerId
from dlion.observe.evaluate import SnapshotStore
from dlion.observe.runlog import Begin, End, File, RunLog, Step
from dlion.tensors import Tensors

sys.path.insert(0, str(Path(__file__).parent.parent))
from rivals import READY, began, settings

POLL_S = 0.02


class Site:
    """One peer's place. ``view``: what the framework would save and serve now; its own module where it says nothing."""

    def __init__(self, out: Path, peer: str) -> None:
        said = settings(out)
        plan = load_plan(out)
        self.out, self.peer = out, PeerId(peer)
        self.names: list[str] = list(plan.peers)
        self.rank = plan.peers.index(self.peer)
        self.addresses: dict[str, str] = said["addresses"]
        self.options: dict[str, str] = said["options"]
        job = plan.job
        self.rate, self.momentum, self.batch = job.train.learning_rate, job.train.momentum, job.train.batch
        speeds = [spec.speed for spec in plan.topology.peers.values()]
        if any(speed is None for speed in speeds):
            raise SystemExit(f"{plan.topology.name}: every peer needs a speed")
        if not job.job.workload.startswith("fashion-"):
            raise SystemExit(f"{job.job.workload}: rivals train fashion-mnist and fashion-cnn")
        self.speeds = {name: plan.topology.peers[name].speed.samples_per_s.mean for name in plan.peers}
        """Samples per second of every peer, in the mean."""
        self._until_s, self._every_s = job.job.until_s, job.evaluate.every_s
        workload = workload_of(plan, self.peer)
        self._layout = workload.layout
        data = idx.limited(idx.load("fashion-mnist", Path(job.data.dir)), job.data.train_limit or None, job.job.seed)
        shares = tuple(plan.shares or (1.0,) * len(plan.peers))
        self._data = data
        self._rows = shards(data, job.data.partition, job.data.alpha, job.job.seed, shares)[self.rank]
        self._order = Order(len(self._rows), peer_seed(job.job.seed, peer))
        torch.set_num_threads(1)
        self._turned = all(len(shape) < 4 for shape in workload.layout.shapes)
        """dlion's MLP has weights of (inputs, outputs), torch (outputs, inputs); its CNN is torch's own."""
        self.model = _module(workload.layout.shapes)
        self.fill(workload.initial(job.job.seed).views.values())
        self.view: Callable[[], Sequence[np.ndarray]] = self.weights
        self._log = RunLog(File(out / f"{peer}.jsonl"))
        write_header(plan, identity_of(plan, self.peer, workload, 1), workload, self._log)
        self._store = SnapshotStore(out / SNAPSHOTS)
        self._steps, self._lock, self._origin = 0, threading.Lock(), float("inf")
        self._behind_s = self._given_up_s = self._modelled_s = 0.0

    # -- weights ------------------------------------------------------------------------------------------------

    def weights(self) -> list[np.ndarray]:
        """Copies, in dlion's order and shapes."""
        return self.arrays(self.model.parameters())

    def arrays(self, tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
        """The same of other tensors like the model's parameters."""
        return [self._turn(tensor.detach().numpy()).copy() for tensor in tensors]

    def fill(self, arrays: Iterable[np.ndarray]) -> None:
        """``weights`` the other way."""
        with torch.no_grad():
            for parameter, array in zip(self.model.parameters(), arrays, strict=True):
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(self._turn(array))))

    def _turn(self, array: np.ndarray) -> np.ndarray:
        return array.T if self._turned else array

    # -- time ---------------------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._origin

    def go(self, patience_s: float = 60.0) -> None:
        """Wait until everybody is here (at most so long): that is time 0 of all. Files, not packets, tell."""
        (self.out / f"{self.peer}{READY}").touch()
        limit = time.monotonic() + patience_s
        while not began(self.out, len(self.names)) and time.monotonic() < limit:
            time.sleep(POLL_S)
        self._origin = time.monotonic()
        self._log.write(Begin(t=0.0, clock_s=self._origin))
        threading.Thread(target=self._watch, daemon=True).start()

    def step(self, samples: int = 0, optimizer: torch.optim.Optimizer | None = None) -> float:
        """Gradients of the next ``samples`` (default: the job's batch) into ``.grad``, in the time that this peer takes
        for them; then ``optimizer``'s step. The loss."""
        samples = samples or self.batch
        started, before_s = time.monotonic(), time.thread_time()
        rows = self._rows[self._order.take(samples)]
        inputs = torch.from_numpy(self._data.normalised(self._data.train_images[rows])).view(-1, 1, 28, 28)
        self.model.zero_grad()
        loss = cross_entropy(self.model(inputs), torch.from_numpy(self._data.train_labels[rows]))
        self._pad(samples / self.speeds[self.peer], time.thread_time() - before_s)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        self._note(started, samples, loss.item())
        return loss.item()

    def _pad(self, lasts_s: float, forward_s: float) -> None:
        """Pause so that the backward pass, twice as long as the forward one, ends with the modelled step: what hangs on
        gradients begins when a peer of this speed would have them. What we are late by shortens the next step; more
        than a step is given up."""
        due = time.monotonic() + lasts_s - 3 * forward_s - self._behind_s
        time.sleep(max(0.0, due - time.monotonic()))
        self._modelled_s += lasts_s
        self._behind_s = max(0.0, time.monotonic() - due)
        if self._behind_s > lasts_s:
            self._given_up_s += self._behind_s
            self._behind_s = 0.0

    def _note(self, started: float, samples: int, loss: float) -> None:
        with self._lock:
            self._log.write(
                Step(
                    t=self.now_s,
                    n=self._steps,
                    loss=loss if np.isfinite(loss) else None,
                    samples=samples,
                    lr=self.rate,
                    seconds=time.monotonic() - started,
                )
            )
            self._log.flush()  # who is killed has told it all
            self._steps += 1

    # -- the other thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """A snapshot every now and then; after the last one the process ends, with what it is in the middle of."""
        due = 0.0
        while True:
            time.sleep(POLL_S)
            over = self.now_s >= self._until_s
            if self.now_s >= due or over:
                arrays = dict(zip(self._layout.names, self.view(), strict=True))
                self._store.write(self.now_s, self._steps, self.peer, Tensors(self._layout, self._layout.pack(arrays)))
                due += self._every_s
            if over:
                with self._lock:
                    overrun = (self._given_up_s + self._behind_s) / max(self._modelled_s, 1e-9)
                    end = End(t=self.now_s, steps=self._steps, reason="until", overrun=overrun, void=overrun > 0.02)
                    self._log.write(end)
                    self._log.close()
                    sys.stdout.flush()
                    os._exit(0)


def here() -> Site:
    """The site that the lab named on the command line."""
    return Site(Path(sys.argv[1]), sys.argv[2])


def _module(shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """The convolutional network of ``fashion-cnn``, or an MLP of dlion's ``shapes``."""
    if any(len(shape) == 4 for shape in shapes):
        from dlion.learn.workloads.fashion_cnn import cnn

        return cnn()
    layers: list[nn.Module] = [nn.Flatten()]
    for shape in shapes[::2]:
        layers += [nn.Linear(*shape), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
