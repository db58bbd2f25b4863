"""Run logs back into memory: typed events, and NumPy columns by event.

Law: reads what ``runlog`` writes, from bytes or from a directory; judges nothing. A torn last line (the peer was
killed in mid-write) is dropped; any other damage is an error that names the file and the line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from dlion.observe import runlog

Column = npt.NDArray[Any]
EVAL_SUFFIX = ".eval.jsonl"
"""Evaluations made outside the peer's process lie beside its log, in NAME + this."""

Name = TypeVar("Name", bound=str)

_KINDS: tuple[type[runlog.Event], ...] = get_args(runlog.AnyEvent)
_DTYPES: Mapping[type, npt.DTypeLike] = {int: np.int64, float: np.float64, bool: np.bool_, str: np.str_}


WROTE_LOGS = "name a directory that dlion up, dlion peer or dlion simulate --out has written"


class DamagedLogError(ValueError):
    """A log cannot be read; the text names the file, the line and what is wrong."""

    exit_code: ClassVar[int] = 65

    def __init__(self, text: str, advice: str = "copy it again from where it was written, or leave it out") -> None:
        self.advice = advice
        super().__init__(text)


def parse(data: bytes, source: str = "log") -> list[runlog.Event]:
    """The events in ``data``, JSON lines; raises DamagedLogError for anything but a torn last line."""
    whole, _, torn = data.rpartition(b"\n")
    decoder = msgspec.json.Decoder(runlog.AnyEvent)
    try:
        events: list[runlog.Event] = list(decoder.decode_lines(whole))
    except msgspec.MsgspecError as fault:
        for number, line in enumerate(whole.split(b"\n"), start=1):
            try:
                decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise DamagedLogError(f"{source}, line {number}: {error}") from error
        raise DamagedLogError(f"{source}: {fault}") from fault
    with suppress(msgspec.MsgspecError):  # nothing, or the half of a line
        events.append(decoder.decode(torn))
    return events


def columns(kind: type[runlog.Event], rows: Sequence[runlog.Event]) -> dict[str, Column]:
    """One array per field over ``rows``, all of them of ``kind``; nested fields as ``waited.pace``."""
    found: dict[str, Column] = {}
    for name, inner in _fields(kind):
        values = list(map(attrgetter(name), rows))
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            for part, leaf in _fields(inner):
                found[f"{name}.{part}"] = np.array(list(map(attrgetter(part), values)), dtype=_DTYPES[leaf])
        else:
            found[name] = np.array(values, dtype=_DTYPES[inner])  # None becomes NaN
    return found


@cache
def _fields(struct: type[msgspec.Struct]) -> list[tuple[str, type]]:
    """Names and plain types of the fields, ``X | None`` counted as X."""
    found = []
    for item in msgspec.structs.fields(struct):
        plain = [option for option in get_args(item.type) if option is not NoneType]
        found.append((item.name, plain[0] if plain else item.type))
    return found


@dataclass(frozen=True)
class PeerLog:
    """All that one peer logged, its lives one after the other."""

    header: runlog.Header
    """Of its first life."""
    events: Mapping[type[runlog.Event], Mapping[str, Column]]
    host: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[runlog.Event], source: str = "log", host: Mapping[str, Any] | None = None) -> PeerLog:
        rows: dict[type[runlog.Event], list[runlog.Event]] = {kind: [] for kind in _KINDS}
        for event in events:
            rows[type(event)].append(event)
        headers = [event for event in rows[runlog.Header] if isinstance(event, runlog.Header)]
        if not headers:
            raise DamagedLogError(f"{source}: no header line; not a run log")
        if headers[-1].format > runlog.FORMAT:
            raise DamagedLogError(f"{source}: format {headers[-1].format}, this version reads up to {runlog.FORMAT}")
        return cls(headers[0], {kind: columns(kind, held) for kind, held in rows.items()}, host or {})

    def __getitem__(self, kind: type[runlog.Event]) -> Mapping[str, Column]:
        """Columns of ``kind`` by field; empty arrays where nothing was logged."""
        return self.events[kind]

    def links(self) -> dict[str, Mapping[str, Column]]:
        """The ``Link`` columns of each neighbour, in peer order."""
        rows = self[runlog.Link]
        return {str(p): {k: c[rows["peer"] == p] for k, c in rows.items()} for p in np.unique(rows["peer"])}


@dataclass(frozen=True)
class Run:
    """One run: its peers by name, in sorted order."""

    name: str
    peers: Mapping[str, PeerLog]

    @property
    def header(self) -> runlog.Header:
        return next(iter(self.peers.values())).header

    @property
    def seconds(self) -> float:
        """Time of the last event of any peer."""
        stamps = [c["t"] for log in self.peers.values() for c in log.events.values()]
        return max((float(t.max()) for t in stamps if t.size), default=0.0)


def from_memory(name: str, logs: Mapping[Name, bytes]) -> Run:
    """A run from the lines of each peer (``runlog.Memory.data``)."""
    return Run(name, {peer: PeerLog.of(parse(logs[peer], peer), peer) for peer in sorted(logs)})


def read_directory(directory: Path) -> Run:
    """All logs below ``directory``; raises DamagedLogError when there are none, OSError when they cannot be read."""
    if not directory.is_dir():
        kind = errno.ENOTDIR if directory.exists() else errno.ENOENT
        raise OSError(kind, os.strerror(kind), str(directory))
    if (directory / "league.html").exists():
        raise DamagedLogError(f"{directory}: the results of dlion compare, no run's logs", "open its league.html")
    lives: dict[str, list[runlog.Event]] = {}
    outside: dict[str, list[runlog.Event]] = {}
    for path in sorted(directory.glob("*.jsonl"), key=lambda p: (p.name.count("."), len(p.name), p.name)):
        events = parse(path.read_bytes(), str(path))
        if path.name.endswith(EVAL_SUFFIX):
            outside[path.name.removesuffix(EVAL_SUFFIX)] = events
        elif events:
            if not isinstance(events[0], runlog.Header):
                raise DamagedLogError(f"{path}, line 1: expected a header; not a run log")
            lives.setdefault(events[0].peer, []).extend(events)
    if not lives:
        raise DamagedLogError(f"{directory}: no run log (*.jsonl) in this directory", WROTE_LOGS)
    return Run(directory.resolve().name, {p: _peer(directory, p, lives[p] + outside.get(p, [])) for p in sorted(lives)})


def _peer(directory: Path, peer: str, events: list[runlog.Event]) -> PeerLog:
    host = directory / f"{peer}.host.json"
    try:
        facts = msgspec.json.decode(host.read_bytes(), type=dict[str, Any]) if host.exists() else {}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedLogError(f"{host}: {error}") from error
    return PeerLog.of(events, str(directory / peer), facts)
