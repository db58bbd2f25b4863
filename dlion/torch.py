"""dlion beside a training loop of your own: the public entry for PyTorch.

    with dlion.torch.attach(model, optimizer, peer="peers/a1.toml") as pride:
        for inputs, targets in loader:
            ...
            loss.backward()
            pride.step(loss)  # in place of optimizer.step()

Law: a composition root. Hosts a node on a background thread with an event loop of its own, and hands weights between
it and the caller's thread. ``import dlion`` never imports this file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dlion.cli import host
from dlion.cli.build import Plan, batcher_of, exchange_of, node_settings, optimizer_of, pace_of, schedule_of
from dlion.cli.keep import Start
from dlion.cli.peer import plan_of_peer
from dlion.cli.planfile import save_plan
from dlion.config import PeerSetup, load_setup
from dlion.learn.batching import Fixed
from dlion.learn.trainer import Trainer, peer_seed
from dlion.learn.workloads.torch_guest import SIGNALS_EVERY_S, Buffers, Guest, Keepable, Places, Turn
from dlion.learn.workloads.torch_memory import Device, alias
from dlion.learn.workloads.torch_module import TorchData, TorchWorkload
from dlion.learn.workloads.torch_site import Site
from dlion.messages import PeerId
from dlion.node import Learner, Node
from dlion.tensors import Flat

__all__ = ("Device", "Options", "Pride", "TorchData", "TorchWorkload", "attach")

ABANDON_S = 5.0
"""How long a second Ctrl-C waits for the thread that it cancelled."""


class Steps(Protocol):
    """What is called in the place of the optimizer: any ``torch.optim.Optimizer``."""

    def step(self) -> Any: ...


@dataclass(frozen=True)
class Options:
    """What a loop seldom needs to say."""

    settings: Mapping[str, object] = field(default_factory=dict)
    """Keys of the job to overrule, as after ``--set``: ``{"exchange.name": "full"}``."""
    addresses: Callable[[str], Mapping[str, str]] | None = None
    """Told where we listen (host:port), answers where the neighbours do; may block. None: the files say it."""
    samples: int | None = None
    """Training samples of all peers together: with it the global batch grows as the job says."""
    together: bool = True
    """Leaving waits until the other peers leave too, and all end with the same weights, where the exchange promises
    that. False: say goodbye and go; the others carry on."""
    drain_s: float | None = None
    """How long leaving goes on though nothing moves (30 times that at most), and with ``together=False`` in all; None:
    as the job says."""
    start_wait_s: float | None = None
    """How long to wait for all neighbours before training starts without the missing; None: a minute."""
    keeps: Mapping[str, Keepable] = field(default_factory=dict)
    """What checkpoints hold beside weights, optimizer and buffers, by names of yours: ``{"scheduler": scheduler}``."""
    fresh: bool = False
    """Start over, though there are checkpoints in the peer file's ``out``."""
    overlap: bool = True
    """``step`` hands its update over and returns at once; what the others say meanwhile is merged in the next step.
    Where that cannot be (see ``Pride.overlaps``), or False: ``step`` waits until all is merged."""


def attach(
    model: nn.Module,
    optimizer: Steps | None,
    peer: str | Path | PeerSetup,
    *,
    batch_size: int | None = None,
    buffers: Buffers = "local",
    process_group: torch.distributed.ProcessGroup | None = None,
    options: Options | None = None,
) -> Pride:
    """A peer around ``model`` and the loop that trains it; use it in a ``with`` statement.

    All peers must start from equal values: the same seed before the model is made, or the same file. ``optimizer``
    makes the local step; None: the optimizer and learning rate of the job file do. ``peer`` is a peer file. The job's
    ``until`` is not used: your loop decides. ``batch_size``: samples per step of this process, where it follows no
    advice. ``process_group``: the processes of this one peer (DDP): its rank 0 holds the node.

    Raises ValueError for a model that cannot be exchanged and ConfigError for files that make no sense.
    """
    return Pride(_inner(model), optimizer, peer, batch_size, buffers, process_group, options or Options())


class Pride:
    """The other peers, as a training loop sees them. Not thread-safe: use it in the thread that trains.

    Entering waits for the neighbours. Leaving drains: what is owed is sent, the last updates of the others are merged,
    and the model then holds the weights to evaluate and to keep.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Steps | None,
        peer: str | Path | PeerSetup,
        batch_size: int | None,
        buffers: Buffers,
        group: torch.distributed.ProcessGroup | None,
        options: Options,
    ) -> None:
        self._places = Places(model, buffers)
        self._optimizer = optimizer
        self._together = options.together
        self._site = None if group is None else Site(group, next(model.parameters()).device, self._places.layout.size)
        self.batch_size = 0
        """Samples that this process should take in its next step. Advice: with ``batch_size`` given it is that."""
        self.steps_done = 0
        """Steps of this peer until now, with those before the checkpoint that it went on from."""
        self.overlaps = False
        """``step`` does not wait: the loop has an optimizer, a fixed ``batch_size`` and nothing in ``keeps``, buffers
        are local, the peer is one process, and neither exchange nor pace has a step wait for another peer's."""
        self._host: _Host | None = None
        if self._site is None or self._site.rank == 0:
            guest = Guest(self._places, optimizer is not None, options.samples, _kept(optimizer, options))
            setup = peer if isinstance(peer, PeerSetup) else load_setup(peer, options.settings)
            plan = plan_of_peer(setup)
            processes = 1 if self._site is None else self._site.size
            fixed = None if batch_size is None else batch_size * processes
            learner = _learner(plan, PeerId(setup.peer.name), guest, optimizer, fixed)
            ours = options.overlap and self._site is None and buffers == "local" and not options.keeps
            self.overlaps = ours and None not in (optimizer, batch_size) and not _steps_wait(plan)
            self._host = _Host(plan, setup, guest, learner, options)

    def __enter__(self) -> Pride:
        if self._host is not None:
            self._host.start()
        try:
            self._next()
            if self.overlaps and self._host is not None:
                self._places.rest()
                self._host.guest.ahead = True
            self.steps_done = 0 if self._host is None else self._host.begun_at
            if self._site is not None:
                self.steps_done = self._site.told(self.steps_done)
        except BaseException:
            if self._host is not None:
                self._host.abandon()
            raise
        return self

    def step(self, loss: float | torch.Tensor | None = None) -> None:
        """In place of ``optimizer.step()``: make the local step, tell it, and take the merged weights.

        ``loss`` of this step is for the log and for exchanges that compare peers (``transfer`` of dlion); 0 if absent.
        Raises what went wrong in the node, in whichever thread that was; RuntimeError once the run is over.
        """
        if self.overlaps:
            self._step_ahead(loss)
        else:
            if self._optimizer is not None:
                self._optimizer.step()
            if self._host is not None:
                self._host.guest.answer(_number(loss))
            self._next()
        self.steps_done += 1

    def _step_ahead(self, loss: float | torch.Tensor | None) -> None:
        """Our step, and what the others did while we computed it; then go on while the node takes ours in."""
        host, places, optimizer = self._host, self._places, self._optimizer
        assert host is not None and optimizer is not None
        others = host.turn().weights if self.steps_done > host.begun_at else None  # the first turn came by entering
        places.unmoved()
        optimizer.step()
        if others is not None:
            places.add(others)
        places.rest()
        host.guest.answer(_number(loss))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        final = None
        try:
            if self._host is not None:
                final = self._host.leave(together=self._together and kind is None, caused_by=error)
        except BaseException:
            self._warn_others(kind is None)
            raise
        if self._site is not None and kind is None:
            final, _ = self._site.share(final, 0)
        if final is not None:
            self._places.fill(final)

    def _next(self) -> None:
        """Take the next weights: from the node, or from the process that has it."""
        turn = None
        try:
            if self._host is not None:
                turn = self._host.turn()
        except BaseException:
            self._warn_others(True)
            raise
        if self._site is None:
            assert turn is not None
            weights, self.batch_size = turn
        else:
            weights, batch = self._site.share(turn and turn.weights, 0 if turn is None else turn.batch)
            self.batch_size = self._site.part(batch)
        self._places.fill(weights)

    def _warn_others(self, they_wait: bool) -> None:
        if self._site is not None and self._host is not None and they_wait:
            self._site.fail()


class _Host:
    """A node on a thread of its own."""

    def __init__(self, plan: Plan, setup: PeerSetup, guest: Guest, learner: Learner, options: Options) -> None:
        self.guest = guest
        self._plan, self._setup, self._learner, self._options = plan, setup, learner, options
        self._thread = Thread(target=self._run, name=f"dlion-{setup.peer.name}", daemon=True)
        self._failure: BaseException | None = None
        self._final: Flat | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._node: Node | None = None
        self._begun, self._known = Event(), Event()
        self._begun_at = 0

    # -- the caller's thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()
        self._begun.wait()

    @property
    def begun_at(self) -> int:
        """Steps done before, in the checkpoint that the node goes on from."""
        self._known.wait()
        return self._begun_at

    def turn(self) -> Turn:
        """Wait for the next snapshot; raises what ended the node, RuntimeError if nothing did."""
        if self._thread.ident is None:
            raise RuntimeError("nothing runs yet: use attach in a with statement")
        found = self.guest.turn()
        if found is None:
            raise self._failure or RuntimeError("this peer's run is over")
        return found

    def leave(self, *, together: bool, caused_by: BaseException | None) -> torch.Tensor | None:
        """Drain and end the thread; a second Ctrl-C ends it at once. Returns the weights to keep, if any.

        Raises what ended the node, unless the block is left for just that.
        """
        reason = "the loop has ended" if caused_by is None else f"the loop raised {type(caused_by).__name__}"
        if self._node is not None:
            self._post(partial(self._node.stop, reason, leaving=not together))
        self.guest.end()
        try:
            while self._thread.is_alive():
                self._thread.join(SIGNALS_EVERY_S)
        except KeyboardInterrupt:
            self.abandon()
            raise
        if self._failure is not None and self._failure is not caused_by:
            raise self._failure
        return None if self._final is None else alias(self._final)

    def abandon(self) -> None:
        """End at once, telling nobody."""
        if self._task is not None:
            self._post(self._task.cancel)
        self.guest.end()
        self._thread.join(ABANDON_S)

    def _post(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nothing is left to tell
            self._loop.call_soon_threadsafe(call)

    # -- the background thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._live())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # whatever it is, it belongs to the caller
            self._failure = error
        finally:
            self._known.set()
            self.guest.end()

    async def _live(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._begun.set()
        plan, peer, options = self._plan, self._setup.peer, self._options
        out = Path(peer.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{peer.name}")
        doors = host.Doors(
            host.address(peer.listen),
            host.address(peer.admin),
            emulate=peer.emulate,
            insecure_plaintext=peer.insecure_plaintext,
        )
        settings = replace(node_settings(plan.job), until_s=None)
        if options.drain_s is not None:
            settings = replace(settings, drain_s=options.drain_s)
        if options.start_wait_s is not None:
            settings = replace(settings, start_wait_s=options.start_wait_s)
        known = self._setup.addresses if options.addresses is None else self._introduce
        guest = host.Guest(self._learner, settings)
        start = Start(fresh=options.fresh)
        async with host.hosted(plan, PeerId(peer.name), doors, out, known, guest, start=start) as running:
            self._node = node = running.node
            self._begun_at = 0 if running.keeping.part is None else running.keeping.part.step
            self._known.set()
            await asyncio.to_thread(save_plan, plan, out)  # a run that is refused leaves the plan that lies there
            running.keeping.tell()
            await node.wait()
        self._final = node.exchange.view(node.ctx.weights)

    async def _introduce(self, here: str) -> Mapping[str, str]:
        assert self._options.addresses is not None
        return await asyncio.to_thread(self._options.addresses, here)


def _kept(optimizer: Steps | None, options: Options) -> dict[str, Keepable]:
    """What is saved of the user's: the optimizer, if it can be, and what they named."""
    able = hasattr(optimizer, "state_dict") and hasattr(optimizer, "load_state_dict")
    return {**({"optimizer": optimizer} if able else {}), **options.keeps}  # type: ignore[dict-item]


def _inner(model: nn.Module) -> nn.Module:
    """The model under what PyTorch wraps around it, whose names all peers know."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    assert isinstance(inner, nn.Module)
    return inner


def _number(loss: float | torch.Tensor | None) -> float:
    return 0.0 if loss is None else float(loss.detach() if isinstance(loss, torch.Tensor) else loss)


def _steps_wait(plan: Plan) -> bool:
    """Does the next step depend on what becomes of the last one?"""
    strategy = exchange_of(plan)
    return not strategy.ahead or pace_of(plan, strategy).staged


def _learner(plan: Plan, peer: PeerId, guest: Guest, optimizer: Steps | None, batch: int | None) -> Learner:
    """What the node learns: what the loop gives it; raises ConfigError when the exchange cannot use that."""
    job = plan.job
    strategy = exchange_of(plan)
    try:
        applied = guest.optimizer(optimizer_of(job, strategy.consumes))
    except ValueError as error:
        raise plan.wrong("exchange.name", f'"{strategy.name}": {error}') from error
    schedule = schedule_of(job)
    groups = getattr(optimizer, "param_groups", None)
    if groups:
        schedule = lambda _: float(groups[0]["lr"])  # noqa: E731
    trainer = Trainer(guest, applied, schedule, peer_seed(job.job.seed, peer))
    return Learner(trainer, Fixed(batch) if batch is not None else batcher_of(plan, peer, guest.global_train_size))
