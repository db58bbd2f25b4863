"""The WAN outside the program: the router's arithmetic anywhere, real hosts where this machine permits them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dlion.config.rates import Rates
from dlion.config.reader import Reader, read_toml
from dlion.mesh.topology import LinkSpec, PeerSpec, Resource, Topology
from dlion.messages import PeerId
from dlion.net.wan import Rate

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import wan_lab  # noqa: E402
import wan_router  # noqa: E402

A, B = PeerId("a"), PeerId("b")
ADDRESSES = {A: IPv4Address("10.66.0.1"), B: IPv4Address("10.66.0.2")}
FORBIDDEN = wan_lab.forbidden()
hosts = pytest.mark.skipif(bool(FORBIDDEN), reason=FORBIDDEN or "permitted")


def topology(mbit: float | Rate, delay_s: float = 0.0, up: Rate | None = None) -> Topology:
    """Two hosts; each direction has its own rate."""
    rate = mbit if isinstance(mbit, Rate) else Rate.constant(mbit * 1e6)
    ends = ((A, B), (B, A))
    return Topology(
        name="pair",
        peers={A: PeerSpec(A, "x"), B: PeerSpec(B, "y")},
        links={(s, t): LinkSpec(s, t, (f"{s}{t}",), delay_s, up) for s, t in ends},
        resources={f"{s}{t}": Resource(f"{s}{t}", "path", rate) for s, t in ends},
    )


def packet(payload: bytes, source: PeerId = A, target: PeerId = B) -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, 17, 0, *(ADDRESSES[p].packed for p in (source, target))
    )
    return bytes(10) + head + payload


class Wire:
    """A router whose devices are sockets."""

    def __init__(self, made: Topology, queue_s: float = 0.2) -> None:
        pairs = {peer: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for peer in (A, B)}
        self.ours = {peer: pair[0] for peer, pair in pairs.items()}
        self.theirs = {peer: pair[1] for peer, pair in pairs.items()}
        for end in self.theirs.values():
            end.setblocking(False)
        for end in self.ours.values():
            end.settimeout(5)
        self.router = wan_router.Router(made, ADDRESSES, {p: s.fileno() for p, s in self.theirs.items()}, queue_s)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.router.serve, args=(self.over.is_set, 0.02))

    def __enter__(self) -> Wire:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(5)
        for end in (*self.ours.values(), *self.theirs.values()):
            end.close()


def test_packets_arrive_in_order_at_the_rate_and_no_sooner_than_the_delay() -> None:
    """40 packets of 1250 bytes at 1 Mbit/s: 0.4 s of sending, then 50 ms of distance."""
    with Wire(topology(1, delay_s=0.05), queue_s=10) as wire:
        began = time.monotonic()
        for number in range(40):
            wire.ours[A].send(packet(number.to_bytes(2, "big") + bytes(1228)))
        numbers = [int.from_bytes(wire.ours[B].recv(2000)[30:32], "big") for _ in range(40)]
        took = time.monotonic() - began
    assert numbers == list(range(40))
    assert 0.449 <= took < 0.65
    assert wire.router.report()["links"] == {"a>b": {"packets": 40, "bytes": 50_000, "dropped": 0}}


def test_a_full_queue_and_an_outage_drop_and_strangers_are_counted() -> None:
    """Of 300 kB at once a queue of 128 KiB takes its part; a link that is out takes nothing."""
    with Wire(topology(100), queue_s=0.001) as wire:
        for _ in range(240):
            wire.ours[A].send(packet(bytes(1230)))
        wire.ours[A].send(packet(b"?", A, A))
        wire.ours[B].send(packet(b"end", B, A))
        wire.ours[A].recv(2000)
    link = wire.router.report()["links"]["a>b"]
    assert link["packets"] + link["dropped"] == 240
    assert wire.router.stray == 1
    with Wire(topology(100, up=Rate.constant(0))) as wire:
        wire.ours[A].send(packet(b"lost"))
        while not wire.router.report()["links"]:
            threading.Event().wait(0.01)
    assert wire.router.report()["links"] == {"a>b": {"packets": 0, "bytes": 0, "dropped": 1}}


def test_a_queue_is_full_by_bytes_also_in_an_outage() -> None:
    """8 Mbit/s with an outage from 1 s to 3 s: what fits is what waits, not how long it waits."""
    queue = wan_router.Queue(Rate.steps([0, 1, 3], [8e6, 0, 8e6], loop=True, period_s=4), queue_s=0.2)
    assert not queue.full(0.9)
    queue.bottleneck.reserve(0.9, 200_000)
    assert queue.bottleneck.free_at_s == pytest.approx(3.1)
    assert queue.bytes_max == wan_router.QUEUE_BYTES_MIN
    assert queue.full(1.0) is False
    queue.bottleneck.reserve(1.0, 40_000)
    assert queue.full(1.0)
    assert not queue.full(3.1)


def test_a_burst_counts_the_headers_of_its_segments() -> None:
    """2,896 bytes of payload behind 52 bytes of headers, 1,448 to a segment: two packets of 1,500 bytes."""
    burst = struct.pack("=BBHHHH", 1, 1, 52, 1448, 20, 16) + bytes(52 + 2896)
    assert wan_router.wire_bytes(burst) == 3000
    assert wan_router.wire_bytes(bytes(10) + bytes(700)) == 700


@pytest.mark.parametrize(
    "rate",
    [
        Rate.constant(320.5),
        Rate.steps([0, 60, 120], [320, 160, 160 / 3], loop=True, period_s=180),
        Rate.steps([0, 60, 120], [320, 160, 160 / 3], loop=True, period_s=180, offset_s=70),
    ],
)
def test_a_speed_survives_the_peer_file(rate: Rate, tmp_path: Path) -> None:
    """Written for ``dlion peer`` and read back, it is the same rate."""
    file = tmp_path / "speed.toml"
    file.write_text(f"speed = {wan_lab.rate_toml(rate)}\n")
    again = Rates(Reader(str(file))).read(read_toml(file)["speed"], "number", "speed")
    for t in (0.0, 1.0, 59.0, 61.0, 500.0, 1000.5):
        assert again.finish(t, 1000) == pytest.approx(rate.finish(t, 1000), abs=1e-9)


# -- real hosts -----------------------------------------------------------------------------------------------------


def spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^dlion-\S+", listed, re.MULTILINE))


@pytest.fixture
def tidy() -> Iterator[None]:
    """Nothing is left of what a test made."""
    before = spaces()
    yield
    assert spaces() <= before


class Pair:
    """Two real namespaces joined by a router that runs in a thread."""

    def __init__(self, made: Topology) -> None:
        self.names = {peer: f"dlion-test-{os.getpid()}-{peer}" for peer in (A, B)}
        self.fds: dict[PeerId, int] = {}
        self.made = made
        self.over = threading.Event()

    def __enter__(self) -> Pair:
        for peer, name in self.names.items():
            subprocess.run(["ip", "netns", "add", name], check=True)
            device = f"dlt{os.getpid()}{peer}"
            self.fds[peer] = wan_router.open_device(device)
            wan_router.move_device(device, name, ADDRESSES[peer])
        self.router = wan_router.Router(self.made, ADDRESSES, self.fds)
        self.thread = threading.Thread(target=self.router.serve, args=(self.over.is_set,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        for peer, name in self.names.items():
            os.close(self.fds[peer])
            subprocess.run(["ip", "netns", "del", name], check=True)

    def spawn(self, peer: PeerId, program: str) -> subprocess.Popen[str]:
        words = ["ip", "netns", "exec", self.names[peer], sys.executable, "-c", program]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


SINK = """
import json, socket, time
door = socket.create_server(("10.66.0.2", 7)); print("ready", flush=True)
link, _ = door.accept(); buffer = bytearray(1 << 20); total = 0; now = time.monotonic
while now() and total < WARM: total += link.recv_into(buffer)
began, total = now(), 0
while now() - began < SECONDS: total += link.recv_into(buffer)
print(total * 8 / (now() - began) / 1e6, flush=True)
"""
SOURCE = """
import socket, time
link = socket.create_connection(("10.66.0.2", 7)); data = bytes(1 << 18)
try:
    while True: link.sendall(data)
except OSError: pass
"""
ECHO = """
import socket
door = socket.create_server(("10.66.0.2", 7)); print("ready", flush=True)
link, _ = door.accept(); link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := link.recv(1): link.send(data)
"""
PING = """
import socket, time
link = socket.create_connection(("10.66.0.2", 7)); link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(30):
    began = time.perf_counter(); link.send(b"."); link.recv(1); times.append(time.perf_counter() - began)
print(sorted(times)[15])
"""


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.kill()
        process.communicate()


@hosts
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mbit", "delay_s", "seconds"), [(5, 0.1, 12), (50, 0.03, 4), (200, 0.03, 4), (1000, 0.0002, 2)]
)
def test_kernel_tcp_gets_the_rate_less_its_headers(mbit: float, delay_s: float, seconds: int, tidy: None) -> None:
    """Payload is 1448 of 1500 bytes; a saturated link delivers 90 % to 103 % of that share: what waited behind a
    lost burst is read all at once."""
    with Pair(topology(mbit, delay_s)) as pair:
        warm = int(mbit * 1e6 / 8 * max(0.5, 10 * delay_s))
        sink = pair.spawn(B, SINK.replace("SECONDS", str(seconds)).replace("WARM", str(warm)))
        assert read(sink) == "ready\n"
        source = pair.spawn(A, SOURCE)
        goodput = float(read(sink))
        end(source, sink)
    payload = mbit * 1448 / 1500
    assert 0.90 * payload < goodput < 1.03 * payload, f"{goodput / payload:.3f} of the payload rate"


@hosts
@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0002, 0.03, 0.1])
def test_the_round_trip_is_twice_the_delay(delay_s: float, tidy: None) -> None:
    """Median of 30 within 2 ms."""
    with Pair(topology(100, delay_s)) as pair:
        echo = pair.spawn(B, ECHO)
        assert read(echo) == "ready\n"
        ping = pair.spawn(A, PING)
        rtt_s = float(read(ping))
        end(ping, echo)
    assert 2 * delay_s <= rtt_s < 2 * delay_s + 0.002


def start_lab(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPTS / "wan_lab.py"), "--topology", "demo", "--out", str(out), "--json", *words]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@hosts
@pytest.mark.slow
def test_hosts_train_and_go_on_when_one_dies(tidy: None, tmp_path: Path) -> None:
    """Six hosts over kernel TCP; b1 is killed; the run directory is whole and the accuracy is there."""
    lab = start_lab(tmp_path / "run", "--until", "15s", "--kill", "b1@5")
    said, errors = lab.communicate(timeout=110)
    assert lab.returncode == 0, errors
    summary = json.loads(said)
    assert set(summary["steps"]) == {"a1", "a2", "b1", "b2", "c1", "c2"}
    assert summary["steps"]["b1"] < summary["steps"]["b2"]
    assert summary["accuracy"]["mean"] > 0.8
    router = json.loads((tmp_path / "run" / "router.json").read_text())
    assert router["links"]["a1>b1"]["bytes"] > 100_000
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"plan.json", "summary.json", "a1.jsonl", "c2.jsonl"}


@hosts
@pytest.mark.slow
def test_an_interrupt_drains_and_a_failure_leaves_nothing(tidy: None, tmp_path: Path) -> None:
    """Ctrl-C in mid-run ends with a summary; a peer that cannot start ends with its words. Neither leaves a thing."""
    lab = start_lab(tmp_path / "cut", "--until", "10m")
    while sum('"e":"step"' in log.read_text() for log in (tmp_path / "cut").rglob("??.jsonl")) < 6:  # all have begun
        assert lab.poll() is None
        threading.Event().wait(0.1)
    lab.send_signal(signal.SIGINT)
    said, errors = lab.communicate(timeout=100)
    assert lab.returncode == 0, errors
    assert "steps" in json.loads(said)
    bad = start_lab(tmp_path / "bad", "--set", "data.dir=/nowhere", "--job", "mnist")
    _, errors = bad.communicate(timeout=100)
    assert bad.returncode not in (0, 1)
    assert "failed" in errors
