"""A peer inside your own asyncio application: its node, and the applications to mount into yours.

Law: part of the composition root: a peer file in, objects out. Starts nothing, touches no signal; says by ``logging``
("dlion") only from which checkpoint it goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from dlion.cli.agree import Agreement
from dlion.cli.build import exchange_of, learner_of, node_settings
from dlion.cli.host import Doors, Guest, address, assemble, workload_for
from dlion.cli.keep import Keeping, Start
from dlion.cli.peer import plan_of_peer
from dlion.cli.planfile import save_plan
from dlion.config import load_setup
from dlion.learn.workload import Workload
from dlion.messages import PeerId
from dlion.net.upgrade import peer_application
from dlion.node import Node
from dlion.observe.admin import admin_application
from dlion.status import StatusReader


@dataclass(frozen=True)
class Embedded:
    """``async with embedded as node: ...`` runs the peer, once; mount ``links`` where the neighbours' files say.

    The block raises what ends the training, LinkError when no neighbour comes within ``start_wait`` of the job. Left
    otherwise, it drains; an error or cancellation inside it ends the peer at once, as if it had died.
    """

    node: Node
    links: web.Application
    """What neighbours dial: GET /link. Mounted at /dlion, this peer's address is "host:port/dlion"."""
    admin: web.Application
    """/livez, /readyz, /status.json, /metrics. No authentication: mount it behind your own doors."""
    status: StatusReader
    """What ``admin`` shows. Its ``accuracy`` is yours to set: nobody else evaluates the workload."""
    keeping: Keeping
    """Its checkpoints, and how it begins."""

    async def __aenter__(self) -> Node:
        if self.node.state != "starting":
            raise RuntimeError(f"{self.node.me} runs once: for another run, embed it again")
        self.keeping.tell()
        return await self.node.__aenter__()

    async def __aexit__(self, *failure: Any) -> None:
        """Drain, and wait until the last checkpoint is on the disk."""
        try:
            await self.node.__aexit__(*failure)
        finally:
            await asyncio.to_thread(self.keeping.close)


def embed(
    file: str | Path,
    *,
    workload: Workload | None = None,
    flags: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    cut: str = "",
    fresh: bool = False,
) -> Embedded:
    """The peer that ``file`` describes, to be run by your event loop (call it there; it does not wait).

    ``workload`` is yours, in place of the job's; ``flags`` overrule keys of the job (``{"train.batch": 32}``). The
    file's ``listen`` and ``admin`` are not used: your application listens. Where there are checkpoints in ``out`` the
    peer goes on from the newest, or from ``cut`` ("0.8"); ``fresh`` starts over. Raises ConfigError, DataError, Fault,
    OSError, TypeError.
    """
    setup = load_setup(file, flags)
    plan = plan_of_peer(setup)
    name = PeerId(setup.peer.name)
    doors = Doors(address(setup.peer.listen), None, setup.peer.emulate, data_share=setup.peer.data_share or 1.0)
    directory = Path(out or setup.peer.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    does = workload_for(plan, name, doors) if workload is None else workload
    if isinstance(does, type) or not isinstance(does, Workload):
        members = "layout, train_size, global_train_size, initial, gradient, evaluate"
        raise TypeError(f"workload: expected an object with {members}, got {does!r}")
    keeping = Keeping(plan, name, directory, does.layout, Start(cut, fresh))
    guest = Guest(learner_of(plan, name, does, exchange_of(plan)), node_settings(plan.job))
    made = assemble(plan, name, doors, directory, setup.addresses, guest, keeping)
    save_plan(plan, directory)  # not before: a run that lies there keeps its own when this one is refused
    agreement = Agreement(plan, name, () if keeping.part is None else (keeping.part.number,))  # it insists on its own
    links = peer_application(made.accept, answer=agreement.answer)
    links.on_cleanup.extend(links.on_shutdown)  # the peer drains over them, perhaps in the application's cleanup_ctx
    links.on_shutdown.clear()
    return Embedded(made.node, links, admin_application(made.status), made.status, keeping)
