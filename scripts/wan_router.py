"""A small router in user space: one TUN device per namespace, and between them the rates and delays of a topology.

Law: IPv4 packets in, the same packets out, later or not at all. Knows addresses, resources and time; no peer, no TCP.

Every packet books its place on each resource that its link crosses, with the same arithmetic as ``net.shaped``
(``Bottleneck``, so constants, steps and traces alike), and leaves for the other device when the last bit is through
and the delay has passed. A packet that would wait behind more than a queue's worth of bytes is dropped, as is one
whose link is out. What is counted are bytes of IP, headers included: TCP delivers about 3.5 % less than the rate.

Sender and receiver speak to the device in bursts of up to 64 KiB (segmentation offload), sized by TCP to about a
millisecond of its pace; a burst is charged the headers of the segments it stands for. That is what lets Python keep up.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from ipaddress import IPv4Address
from typing import Any

from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.net.shaped import Bottleneck
from dlion.net.wan import Rate

DEVICE = "wan0"
MTU_BYTES = 1500
QUEUE_BYTES_MIN = 128 * 1024
"""Room for two bursts, however slow the resource."""
BURST_BYTES_MAX = 65536 + 64
READS_MAX = 64
"""Packets taken from one device before the others, and what is due, have their turn."""
LATE_STEP_S = 1e-4
LATE_STEPS = 2000

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_OFFLOAD_CSUM, _OFFLOAD_TSO4 = 0x01, 0x02
_VNET = struct.Struct("=BBHHHH")  # flags, segmentation, header bytes, segment bytes, checksum start and offset


def open_device(name: str) -> int:
    """A new TUN device of this name, in this namespace; the device lives as long as the descriptor. Raises OSError."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOAD_CSUM | _OFFLOAD_TSO4)
    except OSError:
        os.close(fd)
        raise
    return fd


def move_device(name: str, namespace: str, address: IPv4Address) -> None:
    """Into ``namespace``, there up as ``wan0`` with ``address``/16. Raises CalledProcessError."""
    _ip("link", "set", "dev", name, "netns", namespace, "name", DEVICE)
    lines = (
        "link set dev lo up",
        f"address add {address}/16 dev {DEVICE}",
        f"link set dev {DEVICE} mtu {MTU_BYTES} txqueuelen 1000 up",
    )
    _ip("-n", namespace, "-batch", "-", stdin="\n".join(lines))


def _ip(*arguments: str, stdin: str = "") -> None:
    subprocess.run(["ip", *arguments], input=stdin, text=True, check=True, capture_output=True)


@dataclass
class Lane:
    """One directed link: what it crosses, and what it carried."""

    crosses: tuple[Queue, ...]
    delay_s: Rate
    up: Rate | None
    fd: int
    arrival_s: float = 0.0
    packets: int = 0
    nbytes: int = 0
    dropped: int = 0


class Queue:
    """A resource with a drop-tail queue in front of it."""

    def __init__(self, rate: Rate, queue_s: float) -> None:
        self.bottleneck = Bottleneck(rate)
        self.bytes_max = max(QUEUE_BYTES_MIN, queue_s * rate.mean / 8)

    def full(self, now_s: float) -> bool:
        free_s = self.bottleneck.free_at_s
        if free_s <= now_s:
            return False
        return free_s == float("inf") or self.bottleneck.rate.integral(now_s, free_s) > self.bytes_max * 8


@dataclass
class Router:
    """``devices`` by address; their packets travel as ``topology`` says. Time 0 of its traces is the first packet."""

    topology: Topology
    addresses: Mapping[PeerId, IPv4Address]
    devices: Mapping[PeerId, int]
    queue_s: float = 0.2
    zero_s: float = float("nan")
    """On the monotonic clock; not a number before the first packet."""
    stray: int = 0
    """Packets between hosts that no link joins."""
    refused: int = 0
    """Packets that the receiver's device did not take."""
    _lanes: dict[bytes, Lane] = field(default_factory=dict)
    _flying: list[tuple[float, int, Lane, bytes]] = field(default_factory=list)
    _number: int = 0
    _late: list[int] = field(default_factory=lambda: [0] * (LATE_STEPS + 1))

    def __post_init__(self) -> None:
        resources = self.topology.resources
        queues = {name: Queue(resource.rate, self.queue_s) for name, resource in resources.items()}
        for (source, target), link in self.topology.links.items():
            key = self.addresses[source].packed + self.addresses[target].packed
            crosses = tuple(queues[name] for name in link.resources)
            self._lanes[key] = Lane(
                crosses, link.delays_s or Rate.constant(link.delay_s), link.up, self.devices[target]
            )

    @property
    def now_s(self) -> float:
        """Seconds since the first packet; not a number before."""
        return time.monotonic() - self.zero_s

    def serve(self, done: Callable[[], bool], every_s: float = 0.1) -> None:
        """Carry packets until ``done()``, which is asked every ``every_s``."""
        fds, ask_at = list(self.devices.values()), 0.0
        while True:
            now = time.monotonic()
            if now >= ask_at:
                if done():
                    return
                ask_at = now + every_s
            wake = ask_at if not self._flying else min(ask_at, self._flying[0][0] + self._epoch)
            for fd in select.select(fds, (), (), max(0.0, wake - time.monotonic()))[0]:
                self._take(fd)
            self._deliver()

    @property
    def _epoch(self) -> float:
        return self.zero_s if self.zero_s == self.zero_s else 0.0

    def _take(self, fd: int) -> None:
        for _ in range(READS_MAX):
            try:
                packet = os.read(fd, BURST_BYTES_MAX)
            except BlockingIOError:
                return
            if packet[10] >> 4 == 4:
                self._carry(packet)

    def _carry(self, packet: bytes) -> None:
        lane = self._lanes.get(packet[22:30])
        if lane is None:
            self.stray += 1
            return
        if self.zero_s != self.zero_s:
            self.zero_s = time.monotonic()
        now = self.now_s
        if (lane.up is not None and lane.up.at(now) == 0) or any(queue.full(now) for queue in lane.crosses):
            lane.dropped += 1
            return
        nbytes = wire_bytes(packet)
        through = now
        for queue in lane.crosses:
            through = max(through, queue.bottleneck.reserve(now, nbytes))
        lane.packets += 1
        lane.nbytes += nbytes
        lane.arrival_s = max(lane.arrival_s, through + lane.delay_s.at(min(through, now + self.queue_s)))
        if lane.arrival_s < float("inf"):
            self._number += 1
            heappush(self._flying, (lane.arrival_s, self._number, lane, packet))

    def _deliver(self) -> None:
        flying = self._flying
        while flying and flying[0][0] <= (now := self.now_s):
            due, _, lane, packet = heappop(flying)
            self._late[min(int((now - due) / LATE_STEP_S), LATE_STEPS)] += 1
            try:
                os.write(lane.fd, packet)
            except OSError:  # the device is down or full: lost, as on any host
                self.refused += 1

    def late_s(self, share: float) -> float:
        """Of all packets, ``share`` were at most this late."""
        wanted, seen = share * sum(self._late), 0
        for step, count in enumerate(self._late):
            seen += count
            if seen >= wanted:
                return (step + 1) * LATE_STEP_S
        return 0.0

    def report(self) -> dict[str, Any]:
        """What each link carried, and how well the router kept its word. JSON values."""
        names = {address.packed: peer for peer, address in self.addresses.items()}
        links = {
            f"{names[key[:4]]}>{names[key[4:]]}": {"packets": x.packets, "bytes": x.nbytes, "dropped": x.dropped}
            for key, x in self._lanes.items()
            if x.packets or x.dropped
        }
        late_ms = {f"p{share:g}": round(1e3 * self.late_s(share / 100), 2) for share in (50, 99, 99.9)}
        return {
            "seconds": round(self.now_s, 3),
            "late_ms": late_ms,
            "stray": self.stray,
            "refused": self.refused,
            "links": links,
        }


def wire_bytes(packet: bytes) -> int:
    """Bytes of IP that a burst is on a wire: each of its segments has headers of its own."""
    header: tuple[int, ...] = _VNET.unpack_from(packet)
    _, segmentation, header_bytes, segment_bytes, _, _ = header
    nbytes = len(packet) - _VNET.size
    if not segmentation or not segment_bytes:
        return nbytes
    segments = -(-(nbytes - header_bytes) // segment_bytes)
    return nbytes + (segments - 1) * header_bytes
