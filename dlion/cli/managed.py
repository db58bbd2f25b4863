"""One peer of ``dlion up``, as its own process, steered by its parent over stdin and stdout (JSON lines).

Law: says where it listens, is told all addresses, reports its status, stops when told to or when its parent is gone.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec

from dlion.cli.host import Doors, hosted, save_model
from dlion.cli.keep import Start
from dlion.cli.planfile import load_plan
from dlion.messages import PeerId

STATUS_S = 0.5


def _say(**fields: object) -> None:
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
    sys.stdout.flush()


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _main(out: Path, peer: PeerId, start: Start) -> None:
    plan = load_plan(out)
    orders = await _stdin()

    async def introduce(here: str) -> Mapping[str, str]:
        _say(listen=here)
        line = await orders.readline()
        if not line:
            raise SystemExit(0)
        addresses: dict[str, str] = msgspec.json.decode(line)["addresses"]
        return {p: a for p, a in addresses.items() if p != peer}

    doors = Doors(("127.0.0.1", 0), admin=None, emulate=True)
    async with hosted(plan, peer, doors, out, introduce, start=start) as host:
        node = host.node

        async def obey() -> None:
            while line := await orders.readline():
                order = msgspec.json.decode(line)
                if "checkpoint" in order:
                    node.checkpoint()
                    continue
                node.stop(order["stop"], leaving=False)
                if order.get("soon"):
                    node.stop(order["stop"])  # it drains with the others, but not for as long as it would
            node.stop("the parent is gone", leaving=True)

        async def report() -> None:
            while True:
                _say(status=host.status())
                await asyncio.sleep(STATUS_S)

        beside = [asyncio.create_task(obey()), asyncio.create_task(report())]
        try:
            await node.wait()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        save_model(node, out)
        _say(status=host.status())


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("peer")
@click.option("--cut", default="", help="The checkpoint to go on from.")
@click.option("--fresh", is_flag=True, help="Set aside the checkpoints that are there.")
def command(out: Path, peer: str, cut: str, fresh: bool) -> None:
    """One peer of ``dlion up``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    asyncio.run(_main(out, PeerId(peer), Start(cut, fresh)))
