"""``dlion peer``: one peer on this host, from its peer file.

Law: options and signals in, progress lines out; hosting is ``host``'s.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dlion import __version__
from dlion.cli.build import Plan, check
from dlion.cli.errors import CANNOT_READ, DRAIN_CUT_SHORT, Fault
from dlion.cli.host import Doors, Hosted, Signals, address, hosted, save_model
from dlion.cli.keep import Start
from dlion.cli.measure import measuring
from dlion.cli.options import flags_of
from dlion.cli.planfile import load_plan, save_plan
from dlion.config import PeerSetup, load_setup
from dlion.mesh.roster import State as Presence
from dlion.messages import PeerId
from dlion.observe.live import LiveView

REFRESH_S = 0.5
PIPED_REFRESH_S = 10.0
MISMATCH = "mismatch"
"""In a refusal that time does not mend."""


def plan_of_peer(setup: PeerSetup) -> Plan:
    """What this peer runs: its job over its topology, with its own emulated speed if its file gives one."""
    job, topology, name = setup.job, setup.topology, PeerId(setup.peer.name)
    if setup.speed is not topology.peers[name].speed:
        topology = replace(topology, peers={**topology.peers, name: replace(topology.peers[name], speed=setup.speed)})
    return check(Plan(job, topology, run=f"{job.job.name}@{topology.name}", origins=setup.origins))


@dataclass(frozen=True)
class Described:
    """A peer as its file, or the run that it was in, describes it."""

    plan: Plan
    peer: PeerId
    doors: Doors
    addresses: Mapping[PeerId, str]
    out: Path
    advertise: str = ""
    evaluate: bool = True
    """Nobody else measures the snapshots in ``out``."""


def described(setup: PeerSetup, out: Path | None) -> Described:
    """By a peer file."""
    doors = Doors(
        address(setup.peer.listen),
        address(setup.peer.admin),
        emulate=setup.peer.emulate,
        paced=setup.peer.speed is not None,
        insecure_plaintext=setup.peer.insecure_plaintext,
        data_share=setup.peer.data_share or 1.0,
    )
    directory = out or Path(setup.peer.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{setup.peer.name}")
    plan = plan_of_peer(setup)
    return Described(plan, PeerId(setup.peer.name), doors, setup.addresses, directory, setup.peer.advertise or "")


def again(place: Path) -> Described:
    """By ``RUN/PEER``, where RUN is the directory of a ``dlion up`` that goes on: that peer, where it listened before.

    Raises Fault when that does not say where the peers listen.
    """
    plan, peer = load_plan(place.parent), PeerId(place.name)
    try:
        hosts = {p: json.loads((place.parent / f"{p}.host.json").read_bytes()) for p in plan.peers}
        listen = {p: str(host["listen"]) for p, host in hosts.items()}
        doors = Doors(address(listen.pop(peer)), emulate=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, advice = f"no run in which {peer} could come again", "name RUN/PEER of a dlion up that goes on"
        raise Fault(CANNOT_READ, what, str(place), f"{type(error).__name__}: {error}", advice) from error
    return Described(plan, peer, doors, listen, place.parent, evaluate=False)


async def _run(who: Described, start: Start) -> int:
    plan, peer, doors, out = who.plan, who.peer, who.doors, who.out
    console = Console(stderr=True, highlight=False)
    async with hosted(plan, peer, doors, out, who.addresses, start=start) as host:
        save_plan(plan, out)  # not before: a run that lies here keeps its own when this one is refused
        dialled = f" (neighbours dial {who.advertise})" if who.advertise else ""
        console.print(
            f"dlion {__version__}  run {plan.run}  peer {peer}  seed {plan.job.job.seed}  "
            f"exchange {plan.job.exchange.name}  {plan.job.job.until_s:g} s once all are there\n"
            f"links on {host.listen}{dialled}, status on http://{host.admin}/status.json; log, model: {out}\n"
            "Ctrl-C or SIGTERM drains and stops",
            soft_wrap=True,
        )
        if doors.insecure_plaintext:
            console.print(f"[yellow]warning:[/] {host.listen} speaks plaintext: anybody on the way can read and forge")
        if host.keeping.notice:
            console.print(host.keeping.notice, soft_wrap=True)
        with LiveView(console) as view:
            news = News(host, who.addresses, view.say)
            with Signals(host.node.stop, news.asked):
                async with _measured(who, host, view):
                    await _watch(host, view, news, REFRESH_S if console.is_terminal else PIPED_REFRESH_S)
                    model = save_model(host.node, out)
        reason = host.node.ended
    reached = "" if host.status.accuracy is None else f"accuracy {host.status.accuracy:.4f}, "
    console.print(f"{peer}: {host.node.step} steps, {reached}{reason}; model: {model}", soft_wrap=True)
    return DRAIN_CUT_SHORT if "cut short" in reason else 0


def _measured(who: Described, host: Hosted, view: LiveView) -> AbstractAsyncContextManager[None]:
    """With the accuracy in the peer's status, unless somebody else measures its snapshots."""

    def heard(_: str, accuracy: float) -> None:
        host.status.accuracy = accuracy

    return measuring(who.out, heard, view.say, who.peer) if who.evaluate else nullcontext()


class News:
    """What happens to a peer once in a while, told when ``look`` finds it."""

    def __init__(self, host: Hosted, addresses: Mapping[PeerId, str], say: Callable[[str], None]) -> None:
        self._host, self._node, self._addresses, self._say = host, host.node, addresses, say
        self._entered, self._awaits = False, ""
        self._away: list[PeerId] = []
        self._refusals: set[str] = set()
        self._trouble = host.keeping.trouble
        self._before: str | None = None
        """The last checkpoint when one was asked for."""

    def asked(self) -> None:
        """A signal asks for a checkpoint: tell what becomes of it."""
        if self._node.checkpoint():
            self._before = self._host.keeping.written
        else:
            self._say("no checkpoint now: that takes all peers, in training")

    def look(self) -> None:
        node, keeping = self._node, self._host.keeping
        if (entered := node.company.porch.entered) is not None and not (entered.fault or self._entered):
            self._entered = True
            self._say(f"{node.me}: the run was under way; came in at step {entered.step}, {entered.t:.1f} s")
        if node.state == "joining":
            self._wait()
        elif node.state == "training":
            self._miss()
        refusals = {f"{p}: {why}" for p, reasons in node.meter.refusals.items() for why in reasons if MISMATCH in why}
        for refusal in sorted(refusals - self._refusals):
            self._say(f"refused: {refusal} (both values are in {node.me}.jsonl)")
        self._refusals |= refusals
        if keeping.trouble not in ("", self._trouble):
            self._say(keeping.trouble)
        self._trouble = keeping.trouble
        if self._before not in (None, keeping.written):
            self._before = None
            self._say(f"checkpoint {keeping.written} is written")

    def _absent(self) -> list[PeerId]:
        company = self._node.company
        return sorted(p for p in company.membership.neighbours if not company.neighbours.connected(p))

    def _wait(self) -> None:
        """Before training: who is awaited, and where it is dialled."""
        awaits = ", ".join(f"{p} ({self._addresses.get(p) or 'dials us'})" for p in self._absent())
        if awaits and awaits != self._awaits and not self._node.company.porch.under_way:
            self._say(f"waits for {awaits}; {self._node.settings.start_wait_s:g} s at most")
        self._awaits = awaits

    def _miss(self) -> None:
        """Afterwards: who has no link to us, and when it has again."""
        away, states = self._absent(), self._node.company.membership.roster.states
        for peer in sorted({*away} ^ {*self._away}):
            why = states[peer] if states[peer] in (Presence.FINISHED, Presence.LEFT) else "not reached"
            self._say(f"goes on without {peer} ({why})" if peer in away else f"{peer} is there")
        self._away = away


async def _watch(host: Hosted, view: LiveView, news: News, refresh_s: float) -> None:
    """Show the status, and what is new, until the node has finished."""
    finished, loop = asyncio.create_task(host.node.wait()), asyncio.get_running_loop()
    due = loop.time() + refresh_s
    try:
        while not finished.done():
            news.look()
            await asyncio.wait([finished], timeout=REFRESH_S)
            if finished.done() or loop.time() >= due:
                due += refresh_s
                view.show([host.status()])
        await finished
    finally:
        finished.cancel()


@click.command()
@click.argument("file", metavar="FILE")
@click.option("--until", help="How long to train, in place of the job's.", metavar="DURATION")
@click.option("--exchange", help="The strategy, in place of the job's.", metavar="NAME")
@click.option("--data", type=click.Path(file_okay=False), help="Where the job's data files are.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any key of the job: train.batch=32.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="In place of the file's.")
@click.option(
    "--cut", default="", help="The checkpoint in --out to go on from, in place of the newest.", metavar="NAME"
)
@click.option("--fresh", is_flag=True, help="Start over, though there are checkpoints in --out.")
@click.option(
    "--evaluate/--no-evaluate", default=True, help="Measure accuracy, in a process that gives way to all others."
)
def command(file: str, out: Path | None, cut: str, fresh: bool, evaluate: bool, **options: Any) -> int:
    """Start the peer that FILE describes (a TOML file, or the name of a packaged one such as a1).

    Or start a peer of ``dlion up`` that has died once more, while the others go on: FILE is RUN/PEER.

    Peers may be started in any order; they wait for each other, and go on when one dies. SIGUSR1 asks for a checkpoint
    of all of them; started again, all of them go on from it.
    """
    if Path(f"{file}.host.json").exists():
        if given := sorted(flags_of(options)) or ["--out"] * (out is not None):
            raise click.UsageError(f"{file} goes on as its run was started: leave {', '.join(given)} out")
        who = again(Path(file))
    else:
        who = described(load_setup(file, flags_of(options)), out)
    try:
        import uvloop

        exact = who.doors.emulate or who.doors.paced
        factory = None if exact else uvloop.new_event_loop  # whose clock ticks in whole milliseconds
    except ModuleNotFoundError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_run(replace(who, evaluate=who.evaluate and evaluate), Start(cut, fresh)))
