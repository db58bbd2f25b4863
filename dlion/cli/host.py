"""One node hosted by this process: its doors, its signals, its files.

Law: wires a node to real sockets, threads and a directory. Knows no option and prints nothing itself.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from dlion import __version__, tensorfile
from dlion.cli.agree import Agreement, agreed
from dlion.cli.build import Plan, node_of, workload_of
from dlion.cli.errors import CANNOT_WRITE, REFUSED, TEMPORARY, Fault
from dlion.cli.keep import Keeping, Start, held
from dlion.compute import Threads
from dlion.config import ConfigError
from dlion.learn.workload import Part, Workload
from dlion.mesh.topology import LinkSpec
from dlion.messages import PeerId
from dlion.net.shaped import Bottleneck, Route, ShapedDialer
from dlion.net.stream import StreamLink
from dlion.net.upgrade import Site, UpgradeDialer, peer_application, serve
from dlion.net.wan import Rate
from dlion.node import Learner, Node, NodeSettings, Seams
from dlion.observe.admin import admin_application
from dlion.observe.evaluate import SnapshotStore
from dlion.observe.runlog import Event, File, RunLog, next_log_path, write_host
from dlion.status import StatusReader
from dlion.tensors import Flat, Tensors

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Doors:
    """Where this process listens, and whether the links are slowed down to what the topology says."""

    listen: tuple[str, int]
    admin: tuple[str, int] | None = ("127.0.0.1", 0)
    emulate: bool = False
    """Shape links and pad steps as the topology says; False: the network and the machine as they are."""
    paced: bool = False
    """Pad steps, though the links are as they are."""
    insecure_plaintext: bool = False
    data_share: float = 1.0
    """Use only this share of the peer's part of the data."""


def address(text: str) -> tuple[str, int]:
    """``host:port`` -> (host, port)."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def check_shareable(plan: Plan) -> None:
    """A rate that peers in different processes share cannot be kept by any one of them: refuse it. ConfigError."""
    users: dict[str, set[PeerId]] = {}
    for (source, _), link in plan.topology.links.items():
        for name in link.resources:
            users.setdefault(name, set()).add(source)
    for name, sources in sorted(users.items()):
        if len(sources) > 1:
            raise ConfigError(
                plan.topology.name,
                name,
                f"this rate is shared by {', '.join(sorted(sources))}, which run in different processes",
                'a rate per sender (per = "pair-of-hosts", or [[egress]]), or dlion simulate, which shares any rate',
            )


def routes_of(plan: Plan, me: PeerId, zero_s: float, *, emulate: bool) -> dict[str, Route]:
    """How ``me``'s links are slowed down: by the budget, whoever is at the other end, and as the topology says, whose
    time 0 is the loop's ``zero_s``, if that is emulated."""
    topology, links = plan.topology, plan.topology.links if emulate else {}
    bare = {target: LinkSpec(me, target) for target in topology.peers if target != me}
    ours = {(me, target): links.get((me, target), link) for target, link in bare.items()}
    held = replace(topology, links=ours).capped(plan.job.budget.bytes_per_s)
    bottlenecks: dict[str, Bottleneck] = {}
    routes: dict[str, Route] = {}
    for (_, target), link in held.links.items():
        if link == bare[target]:
            continue  # nothing slows it down
        for name in link.resources:
            bottlenecks.setdefault(name, Bottleneck(held.resources[name].rate.shifted(-zero_s)))
        up = None if link.up is None else link.up.shifted(-zero_s)
        way_s = link.delay_s if link.delays_s is None else link.delays_s.shifted(-zero_s)
        routes[target] = Route(tuple(bottlenecks[name] for name in link.resources), way_s, up)
    return routes


class Snapshots:
    """The node's observer: writes its view where an evaluator looks for it. Called in the exchange lane."""

    def __init__(self, directory: Path, peer: PeerId, workload: Workload) -> None:
        self._store, self._peer, self._layout = SnapshotStore(directory / SNAPSHOTS), peer, workload.layout

    def __call__(self, t: float, step: int, view: Flat, replica: Flat) -> Iterable[Event]:
        self._store.write(t, step, self._peer, Tensors(self._layout, view))
        return ()


@dataclass(frozen=True)
class Guest:
    """What the caller brings and evaluates itself, in place of the job's: a loop of its own, an application's model."""

    learner: Learner
    settings: NodeSettings


@dataclass(frozen=True)
class Assembled:
    """A node with its files, not yet running, and the door for its incoming links."""

    node: Node
    accept: Callable[[StreamLink], None]
    status: StatusReader


def assemble(
    plan: Plan,
    peer: PeerId,
    doors: Doors,
    out: Path,
    addresses: Mapping[Any, str],
    does: Workload | Guest,
    keeping: Keeping,
) -> Assembled:
    """``peer``'s node over real links, its log and snapshots in ``out``. Call it on the running loop.

    Of a guest no snapshots are written: nobody else could evaluate them. ``keeping``: the peer's checkpoints.
    """
    zero_s = asyncio.get_running_loop().time() - (0.0 if keeping.part is None else keeping.part.t)
    learner, settings = (does.learner, does.settings) if isinstance(does, Guest) else (None, None)
    workload = does.learner.trainer.workload if isinstance(does, Guest) else does
    log_path = _open_directory(out, peer, doors)
    routes = routes_of(plan, peer, zero_s, emulate=doors.emulate)
    dialer = ShapedDialer(UpgradeDialer(addresses, timeout_s=plan.job.node.hello_timeout_s, name=peer), routes)
    log = RunLog(File(log_path))
    compute = Threads(paced=doors.emulate or doors.paced)
    observer = None if learner else Snapshots(out, peer, workload)
    keep = keeping if plan.job.checkpoint.every_s else None
    seed, spool = plan.job.job.seed, keeping.store.spool
    seams = Seams(dialer, compute, seed, log, observer, keep, spool, clock=time.time, resume=keeping.part)
    keeping.log = log
    born = time.time_ns() // 1_000_000
    try:
        node = node_of(plan, peer, seams, workload=workload, incarnation=born, settings=settings, learner=learner)
    except BaseException:
        log.close()
        raise

    mates = set(plan.topology.clouds[plan.topology.cloud_of(peer)]) - {peer}
    limit = plan.job.budget.bytes_per_s
    stray = Route((Bottleneck(Rate.constant(8 * limit)),)) if limit else None

    def accept(link: StreamLink) -> None:
        """Slowed down like a link that we dialled; the name is what the other end says it is. Strangers share what one
        neighbour would have."""
        route = routes.get(link.name, None if link.name in mates else stray)
        node.accept(link if route is None else route.shape(link))

    return Assembled(node, accept, StatusReader(node, keeping))


def workload_for(plan: Plan, peer: PeerId, doors: Doors) -> Workload:
    """The peer's workload, cut down to the share of its data that it may use."""
    workload = workload_of(plan, peer)
    return Part(workload, doors.data_share) if doors.data_share < 1.0 else workload


@dataclass(frozen=True)
class Hosted:
    node: Node
    status: StatusReader
    listen: str
    admin: str
    keeping: Keeping


@asynccontextmanager
async def hosted(
    plan: Plan,
    peer: PeerId,
    doors: Doors,
    out: Path,
    addresses: Callable[[str], Awaitable[Mapping[str, str]]] | Mapping[Any, str],
    guest: Guest | None = None,
    *,
    start: Start | None = None,
) -> AsyncIterator[Hosted]:
    """``peer``'s node, running, with its doors open and its files in ``out``; leaving drains and closes all.

    ``addresses``: of the neighbours; or a callable that is told where we listen and answers with them later.
    ``start``: which of the checkpoints in ``out`` to go on from; None: the newest that all peers have.
    """
    if doors.listen[0] not in LOOPBACK and not doors.insecure_plaintext:
        raise Fault(
            REFUSED,
            f"{peer} would speak plaintext on {doors.listen[0]}",
            why="links are neither encrypted nor authenticated in this version",
            advice="listen on loopback behind a tunnel, or set insecure_plaintext = true in the peer file",
        )
    does: Guest | Workload
    does = guest if guest is not None else await asyncio.to_thread(workload_for, plan, peer, doors)
    start = start or Start()
    layout = (does.learner.trainer.workload if isinstance(does, Guest) else does).layout
    have, damages = await asyncio.to_thread(held, plan, out, peer, layout, start)
    door, agreement = _Door(), Agreement(plan, peer, have)
    site = await _open(peer_application(door.knock, answer=agreement.answer), doors.listen, "listen")
    keeping: Keeping | None = None
    try:
        here = f"{doors.listen[0]}:{site.port}"
        known = addresses if isinstance(addresses, Mapping) else await addresses(here)
        wait_s = plan.job.node.start_wait_s if guest is None else guest.settings.start_wait_s
        start = await agreed(agreement, known.values(), start, has=bool(have), wait_s=wait_s)
        keeping = await asyncio.to_thread(Keeping, plan, peer, out, layout, start, damages)
        doors = replace(doors, listen=(doors.listen[0], site.port))
        made = assemble(plan, peer, doors, out, known, does, keeping)
        agreement.training = lambda: made.node.state in ("training", "draining")
        async with _admin(doors, made.status) as admin, made.node:
            door.open(made.accept)
            yield Hosted(made.node, made.status, here, admin, keeping)
    finally:
        door.close()
        await site.close()
        if keeping is not None:
            await asyncio.to_thread(keeping.close)


class _Door:
    """Links that come before the node is there wait for it."""

    def __init__(self) -> None:
        self._waiting: list[StreamLink] = []
        self._accept: Callable[[StreamLink], None] = self._waiting.append

    def knock(self, link: StreamLink) -> None:
        self._accept(link)

    def open(self, accept: Callable[[StreamLink], None]) -> None:
        self._accept = accept
        while self._waiting:
            accept(self._waiting.pop(0))

    def close(self) -> None:
        """Nobody is there any more, or never was."""
        self.open(lambda link: link.abort())


def _open_directory(out: Path, peer: PeerId, doors: Doors) -> Path:
    """Where ``peer`` logs; raises Fault when nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        log_path = next_log_path(out, peer)
        write_host(
            out,
            peer,
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "host": platform.node(),
                "pid": os.getpid(),
                "listen": f"{doors.listen[0]}:{doors.listen[1]}",
                "dlion": __version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "cores": os.cpu_count() or 0,
            },
        )
    except OSError as error:
        raise Fault(CANNOT_WRITE, "cannot write the run's files", str(out), error.strerror or str(error)) from error
    return log_path


async def _open(app: web.Application, at: tuple[str, int], key: str) -> Site:
    """Raises Fault where nobody can listen ``at``: it is taken, not ours, or a name that does not resolve."""
    try:
        return await serve(app, *at)
    except OSError as error:
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror or str(error)
        advice = "end whoever listens there, or name a free port of an address of this host"
        raise Fault(TEMPORARY, f"cannot listen on {at[0]}:{at[1]}", key, why, advice) from error


@asynccontextmanager
async def _admin(doors: Doors, status: StatusReader) -> AsyncIterator[str]:
    if doors.admin is None:
        yield ""
        return
    site = await _open(admin_application(status), doors.admin, "admin")
    try:
        yield f"{doors.admin[0]}:{site.port}"
    finally:
        await site.close()


def save_model(node: Node, out: Path) -> Path:
    """The strategy's view of the model as ``PEER.safetensors``; appears only when complete."""
    view = node.exchange.view(node.ctx.weights)
    path = out / f"{node.me}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    tensorfile.write(temporary, node.ctx.layout.views(view))
    temporary.replace(path)
    return path


class Signals:
    """First SIGINT or SIGTERM: ``drain``. A second SIGINT ends the process at once. SIGUSR1: ``checkpoint``."""

    def __init__(self, drain: Callable[[str], None], checkpoint: Callable[[], object] = bool) -> None:
        self._drain = drain
        self._checkpoint = checkpoint
        self._asked = False

    def __enter__(self) -> Signals:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        loop.add_signal_handler(signal.SIGUSR1, self._checkpoint)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._asked and number == signal.SIGINT:
            os._exit(130)
        self._asked = True
        self._drain(signal.Signals(number).name)
