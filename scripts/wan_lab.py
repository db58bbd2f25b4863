"""Peers as separate hosts on this machine: own addresses, kernel TCP, and a WAN between them outside the program.

    sudo python scripts/wan_lab.py [--topology hetero-system] [--until 30s] [--kill b1@20] [--begin b1@40] [--json]

Linux, root. Each ``dlion peer`` runs in a network namespace of its own with one address; between them lies
``wan_router`` with the topology's rates, delays, outages and shared resources. The peers' own shaping is off; their
steps are still slowed down to the topology's speeds. Logs, plan, summary and report are gathered as by ``dlion up``;
``router.json`` says what each link carried and how late the router was.

``--rival NAME`` runs another framework in the same hosts instead, over the same links, with the same model, data and
speeds: the program ``rivals/on_NAME.py``, in a virtual environment of its own.

Law: makes namespaces, devices and processes, and removes each one it made, also on failure and Ctrl-C. Touches no
address or device outside its own namespaces.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import click
import msgspec

import dlion
from dlion.cli.build import Plan
from dlion.cli.errors import CONFIGURATION, DRAIN_CUT_SHORT, INTERRUPTED, REFUSED, Fault
from dlion.cli.host import SNAPSHOTS
from dlion.cli.options import changes_of, flags_of, plan_of
from dlion.cli.planfile import save_plan
from dlion.cli.show import show_summary
from dlion.cli.simulate import parse_death
from dlion.cli.up import Pride, default_out, write_report
from dlion.config.find import find
from dlion.config.units import seconds
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate
from dlion.observe.summary import Summary
from dlion.patience import DRAINS_MAX
from dlion.simulation import Death

sys.path.insert(0, str(Path(__file__).parent))
from rivals import RIVALS, began, command, named, save_settings
from wan_router import DEVICE, Router, move_device, open_device

NETWORK = IPv4Address("10.66.0.0")
PORT = 7100
START_S = 120.0
GRACE_S = 15.0
"""After the drain's own limit, before a process that does not end is killed."""
LATE_S_MAX = 0.005
"""A run in which more than 1 % of the packets were later than this is void: the machine was too busy to be a WAN."""


def forbidden() -> str:
    """Why namespaces and TUN devices cannot be had here; empty when they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is missing (package iproute2)"
    name = f"dlion-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    try:
        os.close(open_device(f"dlp{os.getpid()}"))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


@dataclass
class Host:
    """One peer's namespace, directory and process."""

    peer: PeerId
    address: IPv4Address
    namespace: str
    directory: Path
    device: int = -1
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False
    cpu_s: float = 0.0
    """Processor time of its process, as last seen; of the last life."""

    def look(self) -> bool:
        """Is its process at an end (or not begun)?"""
        if self.process is None or self.process.poll() is not None:
            return True
        with suppress(OSError):
            words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            self.cpu_s = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        return False


@dataclass
class Lab:
    """The hosts of one run, and what lies between them."""

    plan: Plan
    out: Path
    job: str
    topology_file: Path
    flags: list[str]
    """Options of ``dlion peer``."""
    deaths: tuple[Death, ...] = ()
    begins: tuple[Death, ...] = ()
    """When a killed peer is started again; one that was not killed before comes only then."""
    queue_s: float = 0.2
    congestion: str = ""
    rival: tuple[str, ...] = ()
    """Interpreter and program of another framework, in place of ``dlion peer``."""
    began_s: float = 0.0
    """From when deaths and late beginnings are counted, on the router's clock."""
    hosts: dict[PeerId, Host] = field(default_factory=dict)
    stopping: str = ""

    def __post_init__(self) -> None:
        for number, peer in enumerate(self.plan.peers, start=1):
            namespace = f"dlion-{os.getpid()}-{peer}"
            self.hosts[peer] = Host(peer, NETWORK + number, namespace, self.out / "hosts" / peer)

    # -- hosts --------------------------------------------------------------------------------------------------

    @contextmanager
    def built(self) -> Iterator[None]:
        """The namespaces and their devices are there; afterwards they and every process in them are gone."""
        try:
            for number, host in enumerate(self.hosts.values()):
                subprocess.run(["ip", "netns", "add", host.namespace], check=True)
                name = f"dl{os.getpid()}x{number}"
                host.device = open_device(name)
                move_device(name, host.namespace, host.address)
                if self.congestion:
                    congestion(host.namespace, self.congestion)
            yield
        finally:
            for host in self.hosts.values():
                end(host.process)
                if host.device >= 0:
                    os.close(host.device)
                subprocess.run(["ip", "netns", "del", host.namespace], check=False, capture_output=True)

    def start(self) -> None:
        """All peers but those that come late, in any order."""
        (self.out / SNAPSHOTS).mkdir(parents=True)
        killed = {death.peer for death in self.deaths}
        late = {begin.peer for begin in self.begins} - killed
        for host in self.hosts.values():
            host.directory.mkdir(parents=True)
            (host.directory / SNAPSHOTS).symlink_to(Path("../..") / SNAPSHOTS)  # one evaluator serves all
            (host.directory / "peer.toml").write_text(self.peer_file(host))
            if host.peer not in late:
                self.begin(host)

    def begin(self, host: Host) -> None:
        words = [sys.executable, "-m", "dlion", "peer", str(host.directory / "peer.toml")]
        words += ["--out", str(host.directory), "--no-evaluate", *self.flags]
        if self.rival:
            words = [*self.rival, str(self.out.resolve()), host.peer]
        words = ["ip", "netns", "exec", host.namespace, *words]
        with (host.directory / "output.txt").open("ab") as output:
            host.process = spawn(words, output)
        host.killed = False

    def peer_file(self, host: Host) -> str:
        """TOML: links as they are, steps slowed down."""
        speed = self.plan.topology.peers[host.peer].speed
        lines = {
            "name": json.dumps(host.peer),
            "listen": json.dumps(f"{host.address}:{PORT}"),
            "topology": json.dumps(str(self.topology_file.resolve())),
            "job": json.dumps(self.job),
            "insecure_plaintext": "true # inside namespaces that nobody else can reach",
        }
        if speed is not None:
            lines["speed"] = rate_toml(speed.samples_per_s)
        peers = [f'{peer} = "{other.address}:{PORT}"' for peer, other in self.hosts.items() if other is not host]
        return "\n".join([*(f"{key} = {value}" for key, value in lines.items()), "", "[peers]", *peers, ""])

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> Router:
        """Start all, carry their packets until all have ended. Raises Fault when a peer does not start."""
        devices = {peer: host.device for peer, host in self.hosts.items()}
        addresses = {peer: host.address for peer, host in self.hosts.items()}
        router = Router(self.plan.topology, addresses, devices, self.queue_s)
        self.start()
        job = self.plan.job
        drain_s = job.node.drain_s * (1 if self.rival else DRAINS_MAX)
        limit = time.monotonic() + START_S + job.job.until_s + drain_s + GRACE_S
        deaths, begins = list(self.deaths), list(self.begins)

        def done() -> bool:
            if self.rival and not began(self.out, len(self.hosts)):
                self.began_s = router.now_s  # some need a minute to begin
            for death in [d for d in deaths if router.now_s - self.began_s >= d.at_s]:
                deaths.remove(death)
                self.kill(death.peer)
            for begin in [b for b in begins if router.now_s - self.began_s >= b.at_s]:
                begins.remove(begin)
                self.begin(self.hosts[begin.peer])
            if time.monotonic() > limit:
                raise Fault(CONFIGURATION, "the peers do not end", str(self.out), "see hosts/*/output.txt")
            return not [host for host in self.hosts.values() if not host.look()]

        with ahead():
            router.serve(done)
        return router

    def kill(self, peer: PeerId) -> None:
        """As a power cut."""
        host = self.hosts[peer]
        if host.process is not None and host.process.poll() is None:
            host.killed = True
            os.killpg(host.process.pid, signal.SIGKILL)

    def stop(self, number: int, _: object) -> None:
        """Signal handler: first all drain, then all is torn down."""
        if self.stopping:
            raise Fault(INTERRUPTED, "interrupted twice")
        self.stopping = signal.Signals(number).name
        for host in self.hosts.values():
            if host.process is not None and host.process.poll() is None:
                # a rival has nothing to drain, and may sit behind one that hears no SIGTERM
                os.killpg(host.process.pid, signal.SIGKILL if self.rival else signal.SIGTERM)

    def gather(self) -> None:
        """Every host's log and model into the run's directory."""
        for host in self.hosts.values():
            for path in (
                *host.directory.glob("*.jsonl"),
                *host.directory.glob("*.json"),
                *host.directory.glob("*.s*s"),
            ):
                if path.name.startswith(f"{host.peer}."):
                    shutil.copy2(path, self.out / path.name)

    def failed(self) -> dict[str, int]:
        """Exit codes of the peers that failed by themselves."""
        codes = {h.peer: h.process.returncode for h in self.hosts.values() if h.process is not None and not h.killed}
        return {peer: code for peer, code in codes.items() if code not in (0, DRAIN_CUT_SHORT)}


@contextmanager
def ahead() -> Iterator[None]:
    """A network waits for no process: we run before all others, also where the system first shares between sessions,
    and where all of them were started at a real-time priority."""
    policy, urgency = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    before = os.getpriority(os.PRIO_PROCESS, 0)
    session = Path("/proc/self/autogroup")

    def prefer(nice: int) -> None:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        with suppress(OSError):
            session.write_text(str(nice))

    if urgency:
        os.sched_setscheduler(0, policy, os.sched_param(urgency + 1))
    prefer(max(before - 10, -20))
    try:
        yield
    finally:
        prefer(before)
        os.sched_setscheduler(0, policy, os.sched_param(urgency))


def congestion(namespace: str, name: str) -> None:
    """TCP's congestion control in ``namespace``. Raises Fault where the system does not lend it to namespaces."""
    order = f"echo {shlex.quote(name)} > /proc/sys/net/ipv4/tcp_congestion_control"
    done = subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", order], capture_output=True, check=False)
    if done.returncode:
        allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
        raise Fault(CONFIGURATION, f"no congestion control {name!r}", str(allowed), allowed.read_text().strip())


def rate_toml(rate: Rate) -> str:
    """``rate`` as a value of a TOML file. Raises Fault for one that a file cannot say."""
    if rate.values == rate.values[:1] * len(rate.values):
        return repr(rate.values[0])
    if rate.origin_s and not rate.looped:
        raise Fault(CONFIGURATION, "a speed that begins in mid-trace and does not loop", advice="loop the trace")
    steps = ", ".join(f"[{start!r}, {value!r}]" for start, value in zip(rate.starts, rate.values, strict=True))
    loop = f", loop = {rate.period_s!r}, offset = {math.fmod(-rate.origin_s, rate.period_s)!r}" if rate.looped else ""
    return f"{{ steps = [{steps}]{loop} }}"


def spawn(words: list[str], output: Any, **more: Any) -> subprocess.Popen[bytes]:
    """A process that a terminal's Ctrl-C does not reach, and that imports the dlion that we do."""
    source = str(Path(dlion.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True, **more)


def end(process: subprocess.Popen[bytes] | None) -> None:
    """Ask, wait, kill."""
    if process is None:
        return
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what a rival started


@contextmanager
def evaluator(out: Path) -> Iterator[None]:
    """Measures snapshots beside the run; leaving waits until none is left."""
    with (out / "evaluate.txt").open("wb") as output:
        process = spawn([sys.executable, "-m", "dlion", "evaluate", str(out)], output, stdin=subprocess.PIPE)
    try:
        yield
        assert process.stdin is not None
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(START_S)
    finally:
        end(process)


@contextmanager
def signals(lab: Lab) -> Iterator[None]:
    """SIGINT and SIGTERM stop the lab while this lasts."""
    before = {number: signal.signal(number, lab.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_lab(lab: Lab) -> tuple[Summary, dict[str, Any]]:
    """Run, gather, summarise: the summary and the router's report."""
    save_plan(lab.plan, lab.out)
    started, before = time.perf_counter(), time.process_time()
    with lab.built(), signals(lab), evaluator(lab.out):
        router = lab.run()
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - before
    lab.gather()
    report = router.report() | {"device": DEVICE, "cpu_share": round(cpu_s / wall_s, 4)}
    report["peers_cpu_s"] = {peer: host.cpu_s for peer, host in lab.hosts.items()}
    (lab.out / "router.json").write_text(json.dumps(report, indent=1) + "\n")
    if (failed := lab.failed()) and lab.stopping:
        raise Fault(INTERRUPTED, f"{lab.stopping} before all had begun", str(lab.out))
    if failed:
        first = next(iter(failed))
        said = (lab.hosts[PeerId(first)].directory / "output.txt").read_text(errors="replace")[-2000:]
        raise Fault(min(c if c > 0 else 1 for c in failed.values()), f"{', '.join(failed)} failed", str(lab.out), said)
    summary = Pride(lab.plan, lab.out, None, click.echo).summary(wall_s)
    if lab.rival:  # whose log says nothing of messages, and who leaves no replica
        summary["wan_bytes"], summary["lan_bytes"] = carried(report, lab.plan.topology)
        summary["replica_disagreement"] = None
    summary["void"] = summary["void"] or router.late_s(0.99) > LATE_S_MAX
    (lab.out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2))
    return summary, report


def carried(report: Mapping[str, Any], topology: Topology) -> tuple[int, int]:
    """Bytes of IP between micro-clouds, and inside them."""
    bytes_of = {True: 0, False: 0}
    for link, counts in report["links"].items():
        source, target = map(PeerId, link.split(">"))
        bytes_of[topology.cloud_of(source) != topology.cloud_of(target)] += counts["bytes"]
    return bytes_of[True], bytes_of[False]


def peer_flags(options: Mapping[str, Any]) -> list[str]:
    """The options of ``dlion peer`` that say the same."""
    sets = [*options["sets"], *([f"job.seed={options['seed']}"] if options["seed"] is not None else [])]
    flags = [word for text in sets for word in ("--set", text)]
    for name in ("until", "exchange"):
        if options[name] is not None:
            flags += [f"--{name}", options[name]]
    return flags


@click.command()
@click.option("--job", default="digits", show_default=True, help="What to train: a packaged name or a TOML file.")
@click.option("--topology", default="hetero-system", show_default=True, help="Who and over what: a name or a file.")
@click.option("--exchange", help="The strategy, in place of the job's.", metavar="NAME")
@click.option("--until", help="How long to train.", metavar="DURATION")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, data order and all chance.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="A key of the job.")
@click.option("--kill", "kills", multiple=True, metavar="PEER@SECONDS", help="SIGKILL to that peer, then.")
@click.option(
    "--begin",
    "begins",
    multiple=True,
    metavar="PEER@SECONDS",
    help="Start that peer only, or after --kill again, then.",
)
@click.option("--rival", type=click.Choice(RIVALS), help="Another framework, in place of dlion.")
@click.option("--option", "settings_of_rival", multiple=True, metavar="KEY=VALUE", help="A setting of the rival.")
@click.option("--queue", default="200ms", show_default=True, help="Of each resource, at its mean rate.")
@click.option("--congestion", default="", help="TCP's congestion control; default: the system's.", metavar="NAME")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="A new directory.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def main(as_json: bool, **options: Any) -> None:
    """Run every peer of a topology as a host of its own, with kernel TCP and a WAN outside the program."""
    if reason := forbidden():
        raise Fault(REFUSED, "no hosts can be made here", why=reason, advice="run as root on Linux, or use dlion up")
    if changes_of(options):
        raise click.BadParameter("only keys of the job; write the network into a topology file", param_hint="--set")
    flags_of(options)
    plan = plan_of(options | {"pace": None, "talk": None, "start": None, "data": None})
    job = str(Path(options["job"]).resolve()) if options["job"].endswith(".toml") else options["job"]
    topology_file = find("topology", options["topology"]).path
    if options["rival"] and (options["begins"] or options["exchange"]):
        raise click.BadParameter("does not go with --begin or --exchange: its clock begins once", param_hint="--rival")
    if options["settings_of_rival"] and not options["rival"]:
        raise click.BadParameter("says something to a --rival, and there is none", param_hint="--option")
    rival = command(options["rival"]) if options["rival"] else ()
    plan = named(plan, options["rival"]) if rival else plan
    out = options["out"] or default_out(plan)
    out.mkdir(parents=True)
    deaths, begins = tuple(map(parse_death, options["kills"])), tuple(map(parse_death, options["begins"]))
    queue_s = seconds(options["queue"])
    lab = Lab(plan, out, job, topology_file, peer_flags(options), deaths, begins, queue_s, options["congestion"], rival)
    if rival:
        save_settings(out, {peer: str(host.address) for peer, host in lab.hosts.items()}, options["settings_of_rival"])
    click.echo(f"dlion {dlion.__version__}  {plan.run}  {len(plan.peers)} hosts; logs: {out}", err=True)
    summary, report = run_lab(lab)
    show_summary(summary, as_json, out)
    late, dropped = report["late_ms"]["p99"], sum(link["dropped"] for link in report["links"].values())
    page = write_report(out)
    click.echo(
        f"router: {report['cpu_share']:.0%} of a core, 99 % of packets at most {late} ms late, {dropped} bursts dropped"
        f"{'; void: the machine was too busy' if summary['void'] else ''}\nreport: {page or 'needs matplotlib'}",
        err=True,
    )


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        click.echo(fault.text(), err=True)
        sys.exit(fault.code)
