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
from dlion.cli.host import Doors, address, assemble, workload_for
from dlion.cli.keep import Keeping, Start
from dlion.cli.peer import plan_of_peer
from dlion.cli.planfile import save_plan
from dlion.config import load_setup
from dlion.learn.workload import Workload
from dlion.messages import PeerId
from dlion.net.upgrade import peer_application
from dlion.node import Node
from dlion.observe.admin import admin_application


@dataclass(frozen=True)
class Embedded:
    """``async with embedded as node: ...`` runs the peer; mount ``links`` where the neighbours' files say."""

    node: Node
    links: web.Application
    """What neighbours dial: GET /link. Mounted at /dlion, this peer's address is "host:port/dlion"."""
    admin: web.Application
    """/livez, /readyz, /status.json, /metrics. No authentication: mount it behind your own doors."""
    keeping: Keeping
    """Its checkpoints, and how it begins."""

    async def __aenter__(self) -> Node:
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
    OSError.
    """
    setup = load_setup(file, flags)
    plan = plan_of_peer(setup)
    name = PeerId(setup.peer.name)
    doors = Doors(address(setup.peer.listen), None, setup.peer.emulate, data_share=setup.peer.data_share or 1.0)
    directory = Path(out or setup.peer.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    directory.mkdir(parents=True, exist_ok=True)
    save_plan(plan, directory)
    does = workload or workload_for(plan, name, doors)
    keeping = Keeping(plan, name, directory, does.layout, Start(cut, fresh))
    made = assemble(plan, name, doors, directory, setup.addresses, does, keeping)
    agreement = Agreement(plan, name, () if keeping.part is None else (keeping.part.number,))  # it insists on its own
    links = peer_application(made.accept, answer=agreement.answer)
    return Embedded(made.node, links, admin_application(made.status), keeping)
