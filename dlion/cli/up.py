"""``dlion up``: every peer of a topology as its own process on this machine, over loopback links shaped to size.

Law: starts, watches and ends processes it started itself; trains nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from dlion import __version__
from dlion.cli.build import Plan, workload_of
from dlion.cli.errors import INTERRUPTED, TEMPORARY, Fault
from dlion.cli.host import check_shareable
from dlion.cli.keep import Common, Start, newest_common
from dlion.cli.measure import measuring
from dlion.cli.options import plan_of, run_options
from dlion.cli.planfile import save_plan
from dlion.cli.show import show_summary
from dlion.observe.live import LiveView
from dlion.observe.read import read_directory
from dlion.observe.status import PeerStatus
from dlion.observe.summary import Summary, summarise
from dlion.tensorfile import read_flat
from dlion.tensors import disagreement

LINE_BYTES_MAX = 1 << 20
REFRESH_S = 0.5
PIPED_REFRESH_S = 5.0
START_S = 120.0
GRACE_S = 15.0
"""After the drain's own limit, before a process that does not end is killed."""


@dataclass
class Child:
    """One peer's process."""

    peer: str
    process: asyncio.subprocess.Process
    listen: asyncio.Future[str]
    status: PeerStatus | None = None
    died: str = ""
    errors: list[str] = field(default_factory=list)

    def order(self, **fields: object) -> None:
        """One JSON line; a process that has ended hears nothing."""
        if self.process.stdin is not None and self.process.returncode is None:
            with suppress(ConnectionError, RuntimeError):
                self.process.stdin.write(msgspec.json.encode(fields) + b"\n")


class Pride:
    """All processes of one run."""

    def __init__(
        self, plan: Plan, out: Path, target: float | None, tell: Callable[[str], None], start: Start | None = None
    ) -> None:
        self.plan, self.out, self.target, self.tell = plan, out, target, tell
        self.start = start or Start(fresh=True)
        self.children: dict[str, Child] = {}
        self.accuracy: dict[str, float] = {}
        self.held: dict[str, float] = {}
        """The least of a peer's last two accuracies."""
        self.stopping = ""
        self.reached = False

    async def run(self, view: LiveView, refresh_s: float) -> None:
        """Start all, watch until all have ended."""
        save_plan(self.plan, self.out)
        begin = ["--fresh"] if self.start.fresh else ["--cut", self.start.cut]
        try:
            async with measuring(self.out, self.measured, self.tell), asyncio.TaskGroup() as group:
                for peer in self.plan.peers:
                    process = await self._spawn("managed", str(self.out), peer, *begin)
                    child = Child(peer, process, asyncio.get_running_loop().create_future())
                    self.children[peer] = child
                    group.create_task(self._listen(child))
                    group.create_task(self._errors(child))
                showing = group.create_task(self._show(view, refresh_s))
                await self._introduce()
                for child in self.children.values():
                    await child.process.wait()
                showing.cancel()
            view.show(self.statuses())
        finally:
            await self._end_all([child.process for child in self.children.values()])

    async def _spawn(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "dlion",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES_MAX,
            start_new_session=True,
        )

    async def _introduce(self) -> None:
        """Everybody learns everybody's address; from then on they find each other."""
        async with asyncio.timeout(START_S):
            addresses = {peer: await child.listen for peer, child in self.children.items()}
        for child in self.children.values():
            child.order(addresses=addresses)

    async def _listen(self, child: Child) -> None:
        assert child.process.stdout is not None
        while line := await child.process.stdout.readline():
            said: dict[str, Any] = msgspec.json.decode(line)
            if "listen" in said:
                child.listen.set_result(said["listen"])
            if "status" in said:
                child.status = said["status"]
                self._complain(child, said["status"].get("reasons", []))
        code = await child.process.wait()
        if not child.listen.done():
            child.listen.set_exception(Fault(code, f"peer {child.peer} did not start", why="\n".join(child.errors)))
            return
        if code:
            child.died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.tell(f"{child.peer} ended by {child.died}" + "".join(f"\n  {line}" for line in child.errors[-12:]))
        if child.status is not None:
            child.status["state"] = "stopped"

    def _complain(self, child: Child, reasons: list[str]) -> None:
        """Tell once of what a peer cannot mend itself: checkpoints that cannot be written."""
        for reason in reasons:
            if reason.startswith("checkpoint") and reason not in child.errors:
                child.errors.append(reason)
                self.tell(f"{child.peer}: {reason}")

    def checkpoint(self) -> None:
        """Ask for a checkpoint of all peers; any of them can start it."""
        for child in [c for c in self.children.values() if c.process.returncode is None][:1]:
            child.order(checkpoint=True)

    async def _errors(self, child: Child) -> None:
        assert child.process.stderr is not None
        while line := await child.process.stderr.readline():
            child.errors.append(line.decode(errors="replace").rstrip())
            del child.errors[:-50]

    def measured(self, peer: str, accuracy: float) -> None:
        """With a target, stop everybody when each living peer has held it twice: once may be chance."""
        before, self.accuracy[peer] = self.accuracy.get(peer, 0.0), accuracy
        self.held[peer] = min(before, accuracy)
        alive = [peer for peer, child in self.children.items() if not child.died]
        if self.target is not None and all(self.held.get(peer, 0.0) >= self.target for peer in alive):
            self.reached = True
            self.stop(f"accuracy {self.target:g} reached")

    async def _show(self, view: LiveView, refresh_s: float) -> None:
        while True:
            await asyncio.sleep(refresh_s)
            if statuses := self.statuses():
                view.show(statuses)

    def statuses(self) -> list[PeerStatus]:
        found = []
        for peer, child in self.children.items():
            if child.status is not None:
                child.status["accuracy"] = self.accuracy.get(peer)
                found.append(child.status)
        return found

    def stop(self, reason: str, *, soon: bool = False) -> None:
        """Everybody drains and ends; ``soon``: though something may still move then."""
        if not self.stopping:
            self.stopping = reason
            for child in self.children.values():
                child.order(stop=reason, soon=soon)

    async def _end_all(self, processes: list[asyncio.subprocess.Process]) -> None:
        """Nothing that we started is left running."""
        running = [p for p in processes if p.returncode is None]
        for process in running:
            with suppress(ProcessLookupError):
                process.terminate()
        for process in running:
            try:
                async with asyncio.timeout(GRACE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def summary(self, wall_seconds: float) -> Summary:
        layout = workload_of(self.plan, self.plan.peers[0]).layout
        views = {
            peer: read_flat(path, layout.size)
            for peer in self.plan.peers
            if (path := self.out / f"{peer}.safetensors").exists()
        }
        return summarise(
            read_directory(self.out),
            wall_seconds=wall_seconds,
            replica_disagreement=disagreement(views),
            targets=self.plan.job.evaluate.targets,
            until_s=self.plan.job.job.until_s,
        )


def default_out(plan: Plan) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stamp}-{plan.job.job.name}-{plan.topology.name}-{plan.job.exchange.name}"


def run_up(
    plan: Plan, out: Path, *, target: float | None = None, quiet: bool = False, fresh: bool = False
) -> tuple[Summary, Pride]:
    """Run ``plan`` with a process per peer; raises Fault when a peer cannot start. Returns what happened.

    Where ``out`` holds checkpoints of it, it goes on from the newest that all peers have, unless ``fresh``.
    """
    check_shareable(plan)
    common = Common() if fresh else newest_common(plan, out, plan.peers)
    console = Console(stderr=quiet, highlight=False)
    console.print(
        f"dlion {__version__}  {plan.run}  exchange {plan.job.exchange.name}  seed {plan.job.job.seed}  "
        f"{len(plan.peers)} peers for {plan.job.job.until_s:g} s; Ctrl-C drains and stops\n"
        f"logs, report and models: {out}",
        soft_wrap=True,
    )
    if common.notice:
        console.print(common.notice, soft_wrap=True)
    pride = Pride(plan, out, target, console.print, common.start)
    started = time.perf_counter()

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def interrupted() -> None:
            if pride.stopping:
                for child in pride.children.values():
                    if child.process.returncode is None:
                        child.process.kill()
                raise SystemExit(INTERRUPTED)
            pride.stop("interrupted", soon=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted)
        loop.add_signal_handler(signal.SIGUSR1, pride.checkpoint)
        with LiveView(console) as view:
            await pride.run(view, REFRESH_S if console.is_terminal else PIPED_REFRESH_S)

    try:
        asyncio.run(main())
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return pride.summary(time.perf_counter() - started), pride


def write_report(out: Path, beside: Sequence[Path] = ()) -> Path | None:
    """The run's report, with other runs overlaid; None where matplotlib is missing."""
    try:
        from dlion.observe.report import build_report
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return None
    return build_report([read_directory(directory) for directory in (out, *beside)], out / "report.html")[0]


@click.command()
@run_options
@click.option("--target", type=click.FloatRange(0, 1), help="Stop when all peers had this accuracy twice running.")
@click.option("--fresh", is_flag=True, help="Start over, though there are checkpoints in --out.")
def command(target: float | None, fresh: bool, **options: Any) -> None:
    """Start every peer of a topology on this machine, one process each, over links shaped as it says."""
    plan = plan_of(options)
    out = options["out"] or default_out(plan)
    summary, pride = run_up(plan, out, target=target, quiet=options["as_json"], fresh=fresh)
    finish(summary, pride, options["as_json"], out)


def finish(summary: Summary, pride: Pride, as_json: bool, out: Path, beside: Sequence[Path] = ()) -> None:
    """Tell how it went, runs ``beside`` it in its report; a peer that failed by itself makes the run fail."""
    (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    show_summary(summary, as_json, out)
    page = write_report(out, beside)
    click.echo(f"report: {page or 'needs matplotlib: pip install dlion[report]'}", err=as_json)
    if pride.target is not None and not pride.reached:
        why = f"not every peer's accuracy reached {pride.target:g} in {summary['virtual_seconds']:.0f} s"
        raise Fault(TEMPORARY, "the target was missed", str(out), why, "train longer (--until), or see the report")
    failed = {c.peer: code for c in pride.children.values() if (code := c.process.returncode or 0) > 0}
    if failed:
        names = ", ".join(failed)
        raise Fault(min(failed.values()), f"{names} failed", str(out), "see the messages above")
