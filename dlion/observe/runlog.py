"""The run log: what one peer did, as typed events, one JSON object per line, in the order in which it happened.

Law: owns the events and how they become bytes. Events hold only what a replay needs: no address, nothing of the host,
of time in the world only when each peer began (virtual in a simulation, whose hash thus means something); other facts
go to ``host.json`` beside it.
Knows no node and no reader (``read``). Times are seconds of the node's clock since the run's start.

The schema, field by field: docs/runlog.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import zstandard

Name = TypeVar("Name", bound=str)
PACKED_BYTES = 1 << 18
"""So much of a log in memory is packed at a time."""
FORMAT = 1
"""Version of the schema, in every header; readers refuse a later one."""
PENDING_EVENTS_MAX = 4096
"""Events held before they are encoded and handed to the sink, whether or not anybody calls ``flush``."""


class Event(msgspec.Struct, frozen=True, gc=False, kw_only=True, tag_field="e", tag=str.lower):
    """Base of all events. ``t`` is rounded to microseconds when it is written, so a line does not grow with the
    clock's digits."""

    t: float


class Header(Event, frozen=True, gc=False, kw_only=True):
    """First line of every log. ``config`` and ``model`` are hashes; ``model_bytes`` the size of the flat buffer."""

    format: int = FORMAT
    version: str
    run: str
    peer: str
    cloud: str = ""
    incarnation: int
    seed: int
    config: str
    exchange: str
    job: str
    topology: str
    model: str
    model_bytes: int


class Begin(Event, frozen=True, gc=False, kw_only=True):
    """Training began, or went on from a checkpoint's time ``t``. ``clock_s``: then, on a clock that all peers share."""

    clock_s: float


class Waited(msgspec.Struct, frozen=True, gc=False):
    """Seconds between two steps in which the peer could have computed, by what held it back."""

    pace: float = 0.0
    strategy: float = 0.0
    room: float = 0.0


class Step(Event, frozen=True, gc=False, kw_only=True):
    """Local step ``n`` (0-based) was computed; ``seconds`` is its duration, ``waited`` what came before it."""

    n: int
    loss: float | None
    """None: not finite."""
    samples: int
    lr: float
    seconds: float
    epoch: int = 0
    position: int = 0
    """Data cursor within the epoch, in samples, before this step."""
    waited: Waited = Waited()


class Send(Event, frozen=True, gc=False, kw_only=True):
    """A message was handed to the session with ``to``. ``bytes`` as encoded; ``budget`` 0: none was set."""

    to: str
    seq: int
    kind: str
    budget: int = 0
    entries: int = 0
    bytes: int
    wan: bool


class Apply(Event, frozen=True, gc=False, kw_only=True):
    """An update of ``origin`` (its step ``step``) changed our weights; we had finished ``mine`` steps."""

    origin: str
    hop: str
    seq: int
    step: int
    mine: int
    entries: int = 0


class Batch(Event, frozen=True, gc=False, kw_only=True):
    """The local (``size``) or global batch size changed; samples."""

    size: int
    global_size: int


class Member(Event, frozen=True, gc=False, kw_only=True):
    """The view of a peer changed (alive, suspect, dead, left ...)."""

    peer: str
    state: str
    incarnation: int
    why: str = ""


class Link(Event, frozen=True, gc=False, kw_only=True):
    """State of one link, once a second. Byte counts are totals of this link since the peer's start."""

    peer: str
    up: bool
    rate_bps: float
    """Measured delivery rate."""
    available_bps: float | None = None
    """What the topology gives at this time; None: it does not say."""
    rtt_s: float
    unacked: int
    queued: int
    sent_bytes: int
    acked_bytes: int
    saturated: float
    """Share of the last interval in which the link had something to send."""
    shown_bytes: int = 0
    shown_s: float = 0.0
    """What was delivered while more stood waiting, and the seconds that took: totals since the session began."""


class Refuse(Event, frozen=True, gc=False, kw_only=True):
    """Something that ``peer`` said, or its connection, was refused."""

    peer: str
    reason: str


class Snapshot(Event, frozen=True, gc=False, kw_only=True):
    """Weights were written after step ``step``; ``path`` is relative to the run directory."""

    step: int
    path: str


class Eval(Event, frozen=True, gc=False, kw_only=True):
    """Held-out accuracy and loss of the weights as they were at ``t``. ``which``: ``view`` or ``replica``."""

    step: int
    accuracy: float
    loss: float | None
    samples: int
    which: str = "view"


class Lag(Event, frozen=True, gc=False, kw_only=True):
    """Lateness of the event loop in seconds, 99th percentile over the last periods. Never in virtual time."""

    p99: float


class End(Event, frozen=True, gc=False, kw_only=True):
    """Last line. ``overrun``: share by which this machine missed the modelled pace; ``void``: not fit for timing."""

    steps: int
    reason: str
    overrun: float = 0.0
    void: bool = False


AnyEvent = Header | Begin | Step | Send | Apply | Batch | Member | Link | Refuse | Snapshot | Eval | Lag | End


class Sink(Protocol):
    """Takes whole lines, in order."""

    def write(self, lines: bytes) -> None: ...

    def close(self) -> None: ...


class File:
    """Appends to ``path``, opened by the first ``write``: who is made and never run holds no file. Every ``write``
    reaches the operating system at once, so a killed peer loses one second. Raises OSError, with the path."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: FileIO | None = None

    def write(self, lines: bytes) -> None:
        self._file = file = self._file or self._path.open("ab", buffering=0)
        view = memoryview(lines)
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:  # which does not say where the disk is full
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Memory:
    """Keeps the lines, packed: a day of many peers is a gigabyte of them. ``data`` is what a file would hold."""

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._open = bytearray()

    def write(self, lines: bytes) -> None:
        self._open += lines
        if len(self._open) >= PACKED_BYTES:
            self._packed.append(zstandard.ZstdCompressor(level=1).compress(self._open))
            self._open = bytearray()

    def close(self) -> None: ...

    @property
    def data(self) -> bytes:
        unpack = zstandard.ZstdDecompressor().decompress
        return b"".join([*map(unpack, self._packed), self._open])


class Digest:
    """sha256 over all lines on their way to another sink, if any."""

    def __init__(self, onward: Sink | None = None) -> None:
        self._sha256 = hashlib.sha256()
        self._onward = onward

    def write(self, lines: bytes) -> None:
        self._sha256.update(lines)
        if self._onward is not None:
            self._onward.write(lines)

    def close(self) -> None:
        if self._onward is not None:
            self._onward.close()

    @property
    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def run_digest(by_peer: Mapping[Name, str]) -> str:
    """One sha256 for a whole run, from the hex digests of its peers' logs; independent of the mapping's order."""
    lines = "".join(f"{peer} {by_peer[peer]}\n" for peer in sorted(by_peer))
    return hashlib.sha256(lines.encode()).hexdigest()


class RunLog:
    """Collects events and hands them to a sink as JSON lines. ``write`` may be called from any lane.

    ``write`` only keeps the (frozen) event; encoding happens in ``flush``, which the node calls once a second.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)
        self._pending: list[Event] = []
        self._flushing = Lock()

    def write(self, event: Event) -> None:
        msgspec.structs.force_setattr(event, "t", round(event.t, 6))
        pending = self._pending
        pending.append(event)
        if len(pending) >= PENDING_EVENTS_MAX:
            self.flush()

    def flush(self) -> None:
        with self._flushing:
            count = len(self._pending)
            if count:
                self._sink.write(self._encoder.encode_lines(self._pending[:count]))
                del self._pending[:count]

    def close(self) -> None:
        self.flush()
        self._sink.close()


def _plain(value: object) -> object:
    """A user's workload may well report its loss as a NumPy scalar."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"run log: cannot write a {type(value).__name__}")


def next_log_path(directory: Path, peer: str) -> Path:
    """Where the next incarnation of ``peer`` logs: NAME.jsonl, then NAME.2.jsonl and so on; never an existing file."""
    path, lives = directory / f"{peer}.jsonl", 1
    while path.exists():
        lives += 1
        path = directory / f"{peer}.{lives}.jsonl"
    return path


def write_host(directory: Path, peer: str, facts: Mapping[str, str | int | float]) -> Path:
    """Facts that differ between hosts (start time, host name, versions), beside the log and outside its hash."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{peer}.host.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2))
    temporary.replace(path)
    return path
