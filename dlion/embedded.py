"""A peer inside your own asyncio application: its node, and the applications to mount into yours.

Law: part of the composition root: a peer file in, objects out. Starts nothing, touches no signal and no logging.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from dlion.cli.host import Doors, address, assemble, workload_for
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
    """``async with embedded.node: ...`` runs the peer; mount ``links`` where the neighbours' files say."""

    node: Node
    links: web.Application
    """What neighbours dial: GET /link. Mounted at /dlion, this peer's address is "host:port/dlion"."""
    admin: web.Application
    """/livez, /readyz, /status.json, /metrics. No authentication: mount it behind your own doors."""


def embed(
    file: str | Path,
    *,
    workload: Workload | None = None,
    flags: Mapping[str, object] | None = None,
    out: str | Path | None = None,
) -> Embedded:
    """The peer that ``file`` describes, to be run by your event loop (call it there; it does not wait).

    ``workload`` is yours, in place of the job's; ``flags`` overrule keys of the job (``{"train.batch": 32}``). The
    file's ``listen`` and ``admin`` are not used: your application listens. Raises ConfigError, DataError, OSError.
    """
    setup = load_setup(file, flags)
    plan = plan_of_peer(setup)
    name = PeerId(setup.peer.name)
    doors = Doors(address(setup.peer.listen), None, setup.peer.emulate, data_share=setup.peer.data_share or 1.0)
    directory = Path(out or setup.peer.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{name}")
    directory.mkdir(parents=True, exist_ok=True)
    save_plan(plan, directory)
    made = assemble(plan, name, doors, directory, setup.addresses, workload or workload_for(plan, name, doors))
    return Embedded(made.node, peer_application(made.accept), admin_application(made.status))
