"""``dlion simulate``: all peers of a topology in one process, in virtual time.

Law: builds the nodes, runs them, sums up. Wall time is measured here and nowhere below.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from dlion.cli.build import Plan, exchange_of, modelled, node_of, node_settings, pace_of, workload_of
from dlion.cli.errors import writing
from dlion.cli.keep import parts_of
from dlion.cli.options import plan_of, run_options
from dlion.cli.planfile import save_plan
from dlion.cli.show import show_summary
from dlion.compute import Compute
from dlion.cut import Part
from dlion.learn.workload import Evaluation, Workload
from dlion.mesh.presence import PresenceError, turns
from dlion.messages import PeerId
from dlion.node import Node, NodeSettings, Seams
from dlion.observe import read
from dlion.observe.runlog import Digest, Eval, Event, Memory, RunLog, run_digest
from dlion.observe.summary import Summary, summarise
from dlion.simulation import Birth, Death, MemoryDialer, simulate
from dlion.tensors import Flat, disagreement


class Measured:
    """What was measured lately, by the weights' hash: replicas that are equal are measured once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[bytes, Evaluation] = {}

    def of(self, weights: Flat, measure: Callable[[], Evaluation]) -> Evaluation:
        key = hashlib.blake2b(weights.data, digest_size=16).digest()
        if key not in self._known:
            self._known[key] = measure()
            while len(self._known) > self._most:
                del self._known[next(iter(self._known))]
        return self._known[key]


class Evaluator:
    """Measures weights on the spot; virtual time charges nothing for it."""

    def __init__(self, workload: Workload, limit: int | None, measured: Measured, replicas: bool = False) -> None:
        self._workload, self._limit, self._measured, self._replicas = workload, limit, measured, replicas

    def __call__(self, t: float, step: int, view: Flat, replica: Flat) -> Iterable[Event]:
        yield self._measure(t, step, view, "view")
        if self._replicas and view is not replica:
            yield self._measure(t, step, replica, "replica")

    def _measure(self, t: float, step: int, weights: Flat, which: str) -> Eval:
        with np.errstate(over="ignore", invalid="ignore"):
            found = self._measured.of(weights, lambda: self._workload.evaluate(weights, self._limit))
        loss = float(found.loss)
        return Eval(
            t=t,
            step=step,
            accuracy=float(found.accuracy),
            loss=loss if np.isfinite(loss) else None,
            samples=found.samples,
            which=which,
        )


class Logs(Mapping[PeerId, bytes]):
    """The lines of each peer's log, unpacked when they are asked for."""

    def __init__(self, memories: Mapping[PeerId, Memory]) -> None:
        self._memories = memories

    def __getitem__(self, peer: PeerId) -> bytes:
        return self._memories[peer].data

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._memories)

    def __len__(self) -> int:
        return len(self._memories)


@dataclass(frozen=True)
class Played:
    """A simulated run: its events in memory, what they come to, and the lines of each peer's log."""

    run: read.Run
    summary: Summary
    logs: Mapping[PeerId, bytes]
    views: Mapping[PeerId, Flat]
    """What each peer that lived to the end would save and serve."""
    replicas: Mapping[PeerId, Flat]
    """The weights that it trained."""


ABSENT_WAIT_S = 2.0
"""Where peers come late, the others wait no longer for them to begin."""


GREETINGS = 5
"""So many of the longest delays after their start, all peers know each other."""


def _incarnation(life: int) -> int:
    """Far enough from the last one: a newcomer begins a new life with every sponsor that it asks."""
    return 1 + 1000 * (life - 1)


def _presence(plan: Plan) -> tuple[tuple[Death, ...], tuple[Birth, ...]]:
    """Who goes and who comes when, by the topology; PresenceError where the strategy takes nobody who comes."""
    found = turns(plan.topology, plan.job.job.until_s)
    coming = [turn for turn in found if turn.comes]
    strategy, pace = exchange_of(plan), pace_of(plan, exchange_of(plan))
    if coming and (pace.staged or not strategy.newcomers):
        raise PresenceError(
            f"{coming[0].peer} comes at {coming[0].at_s:g} s, but {strategy.name} at pace {pace.name} takes nobody "
            "into a run under way; use another (--exchange pride, --pace free), end the run before that (--until), or "
            "leave this peer out"
        )
    return (
        tuple(Death(turn.peer, turn.at_s) for turn in found if not turn.comes),
        tuple(Birth(turn.peer, turn.at_s) for turn in coming),
    )


def play(
    plan: Plan,
    deaths: tuple[Death, ...] = (),
    settings: NodeSettings | None = None,
    parts: Mapping[str, Part] | None = None,
    replica_of: PeerId | None = None,
    begins: Mapping[PeerId, float] | None = None,
) -> Played:
    """Simulate ``plan``; peers come and go as their presence says. ``settings``: in place of the job's. ``parts``:
    of the checkpoint to go on from. ``replica_of``: this peer's training replica is measured beside its view.
    ``begins``: seconds by which each peer begins later than the first one.

    The summary's hash covers every line of every peer's log.
    """
    parts = parts or {}
    start_s = min((part.t for part in parts.values()), default=0.0)
    started = time.perf_counter()
    job = plan.job
    leave, come = _presence(plan)
    settings, begins = settings or node_settings(job), begins or {}
    met_s = GREETINGS * max((link.delay_s for link in plan.topology.links.values()), default=0.0)
    if come:
        settings = replace(settings, start_wait_s=min(settings.start_wait_s, ABSENT_WAIT_S))
    memories = {peer: Memory() for peer in plan.peers}
    digests = {peer: Digest(memories[peer]) for peer in plan.peers}
    measured = Measured(2 * len(plan.peers))

    def make(peer: PeerId, dialer: MemoryDialer, compute: Compute) -> Node:
        workload = workload_of(plan, peer)
        own = replace(settings, begin_at_s=met_s + begins[peer]) if peer in begins else settings
        observer = Evaluator(workload, job.evaluate.samples or None, measured, replicas=peer == replica_of)
        seams = Seams(dialer, compute, job.job.seed, RunLog(digests[peer]), observer, resume=parts.get(peer))
        return node_of(plan, peer, seams, workload=workload, incarnation=_incarnation(dialer.life), settings=own)

    result = simulate(plan.network, make, (*deaths, *leave), births=come, start_s=start_s)
    logs = Logs(memories)
    run = read.from_memory(plan.run, logs)
    summary = summarise(
        run,
        wall_seconds=time.perf_counter() - started,
        log_sha256=run_digest({peer: digest.hexdigest for peer, digest in digests.items()}),
        replica_disagreement=disagreement(result.views),
        targets=job.evaluate.targets,
        until_s=job.job.until_s,
    )
    return Played(run, summary, logs, result.views, result.replicas)


def run_simulation(
    plan: Plan,
    out: Path | None = None,
    deaths: tuple[Death, ...] = (),
    settings: NodeSettings | None = None,
    parts: Mapping[str, Part] | None = None,
) -> Summary:
    """``play``; plan, logs and summary go to ``out`` if given, in place of an earlier run's."""
    if out is not None:
        writable(out)
    played = play(plan, deaths, settings, parts)
    if out is not None:
        write_run(plan, played, out)
    return played.summary


def writable(out: Path) -> None:
    """Nobody wants to hear it after the run. Raises Fault."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)


def write_run(plan: Plan, played: Played, out: Path) -> None:
    """Everything that ``replay``, ``report`` and ``explain`` need, in one directory."""
    with writing(out):
        save_plan(plan, out)
        for peer, data in played.logs.items():
            (out / f"{peer}.jsonl").write_bytes(data)
        (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(played.summary), indent=2))


def parse_death(text: str) -> Death:
    """``PEER@SECONDS``."""
    peer, _, seconds = text.rpartition("@")
    try:
        return Death(PeerId(peer), float(seconds))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not PEER@SECONDS", param_hint="--kill") from None


@click.command()
@run_options
@click.option(
    "--resume",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Go on from the newest checkpoint that all peers of a run of `dlion up` have in this directory.",
)
@click.option("--kill", "kills", multiple=True, metavar="PEER@SECONDS", help="That peer vanishes at that time.")
def command(kills: tuple[str, ...], resume: Path | None, **options: Any) -> None:
    """Run every peer of a topology in one process, in virtual time.

    The same node, strategy, session and links as a live run; gradients are real, durations are modelled.
    """
    plan = modelled(plan_of(options))
    deaths = tuple(map(parse_death, kills))
    for death in deaths:
        if death.peer not in plan.topology.peers:
            raise click.BadParameter(f"{plan.topology.name} has no peer {death.peer!r}", param_hint="--kill")
    parts = None if resume is None else parts_of(plan, resume)
    summary = run_simulation(plan, options["out"], deaths, parts=parts)
    show_summary(summary, options["as_json"], options["out"])
