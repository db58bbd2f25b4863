"""Consistent cuts: what every peer of a run holds at moments that fit together, taken while all of them go on.

Source: Chandy & Lamport, "Distributed Snapshots: Determining Global States of Distributed Systems", TOCS 1985. A peer
that starts a cut, or hears of it first through a mark, saves its own state and at once says a mark on every link. What
it hears afterwards on that link, up to the mark, was under way during the cut and belongs to it. Links are in order, so
all parts together are a state in which the whole run could have been. A restored run begins new sessions, and every
peer first hears again what its part holds; no cursor and no unacknowledged byte is saved.

A link has three streams, each in order for itself. The mark is said on CONTROL and on UPDATE. On BULK it could wait for
ever behind updates; so it says how many bulk messages came before it, and no later one can overtake it.

Law: pure; no clock, no file, no node. A cut is numbered by the life of the run and by its turn in it; two peers that
start the same number at once start one cut. A newer cut ends an older one.
"""

from __future__ import annotations

import base64
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from dlion.blocks import Block, Encoding
from dlion.exchange.base import Add, Update
from dlion.messages import Message, PeerId, Span, Stream
from dlion.tensors import Flat

MARK = "~mark"
MARK_FIELDS: Mapping[str, type] = {"cut": int, "bulk": int}
MARKED = (Stream.CONTROL, Stream.UPDATE)
OPEN_S_MAX = 60.0
"""A cut whose marks have not all come by then is given up; the next one will do."""
_TURN_BITS = 20
LAST_TURN = (1 << _TURN_BITS) - 1
"""Turn of the checkpoint that is taken when a run has drained: nothing is under way then."""

Array = npt.NDArray[np.generic]
Spool = Callable[[Array], Any]
"""Gives an array of the same type and values that nobody changes."""


def life_of(number: int) -> int:
    """How often the run had been resumed when this cut was taken."""
    return number >> _TURN_BITS


def first_of(life: int) -> int:
    """The number before the first cut of a life."""
    return life << _TURN_BITS


def name_of(number: int) -> str:
    """A cut as people call it: ``life.turn``, or ``life.end`` for a drained one."""
    turn = number & LAST_TURN
    return f"{life_of(number)}.{'end' if turn == LAST_TURN else turn}"


def number_of(name: str) -> int:
    """Inverse of ``name_of``; raises ValueError for anything else."""
    life, _, turn = name.partition(".")
    if not (life.isdecimal() and (turn.isdecimal() or turn == "end")):
        raise ValueError(f"checkpoint {name!r}: expected a name such as 0.3 or 1.end")
    return first_of(int(life)) + (LAST_TURN if turn == "end" else int(turn))


class Said(NamedTuple):
    """A message that was under way during a cut."""

    hop: PeerId
    stream: int
    seq: int
    body: bytes


@dataclass
class Part:
    """One peer's part of a cut: with the parts of all others, enough to go on from there."""

    number: int
    t: float
    """Seconds of the node's clock; a resumed run counts on from here."""
    weights: Flat = field(repr=False)
    state: dict[str, Any] = field(repr=False)
    """Lane and strategy: arrays, Blocks, Messages and plain values in nested containers."""
    step: int = 0
    """Own steps done, ``under_way`` included."""
    samples: int = 0
    trainer: Mapping[str, Any] | None = field(default=None, repr=False)
    """None until the step that was being computed when the cut came is handed over."""
    under_way: Update | None = None
    """The outcome of that step: not yet in the weights."""
    heard: list[Said] = field(default_factory=list, repr=False)
    node: dict[str, Any] = field(default_factory=dict)
    """What the loop adds: the batcher's state and the others' samples. Of no consequence for what adds up to what."""


class Cuts:
    """The cut that is open at one peer, if any. ``newest``: the highest number seen in this life.

    ``learner``: what is saved of it.
    """

    def __init__(self, learner: Callable[[], Mapping[str, Any]] = dict, spool: Spool = np.copy) -> None:
        self.newest = 0
        self.spool = spool
        self._learner = learner
        self.part: Part | None = None
        self._awaited: set[tuple[PeerId, int]] = set()
        self._links: tuple[PeerId, ...] = ()
        self._stray = ""
        """Who spoke during the cut though no link to it is part of it: what it still says would be missed."""
        self._bulk_said: Counter[PeerId] = Counter()
        self._bulk_heard: Counter[PeerId] = Counter()
        self._bulk_due: dict[PeerId, int] = {}

    def learnt(self) -> dict[str, Any]:
        """What is saved of the learner, which rests."""
        return dict(frozen(self._learner(), self.spool))

    @property
    def last(self) -> int:
        """Number of the cut that ends this life."""
        return first_of(life_of(self.newest)) + LAST_TURN

    def begin(self, part: Part, links: Iterable[PeerId]) -> None:
        """Our own state is saved; from now on what comes from ``links`` is recorded, until their marks."""
        self.newest = part.number
        self.part = part
        self._links, self._stray = tuple(links), ""
        self._awaited = {(peer, int(stream)) for peer in self._links for stream in Stream}
        self._bulk_due = {}

    def marks(self, links: Iterable[PeerId], me: PeerId) -> Iterator[tuple[PeerId, Message]]:
        """What to say to each of them, at once."""
        for peer, stream in product(links, MARKED):
            fields = {"cut": self.newest, "bulk": self._bulk_said[peer]}
            yield peer, Message(MARK, fields=fields, stream=stream, origin=me)

    def mark(self, number: int, hop: PeerId, stream: int, bulk: int) -> None:
        """``hop`` has said all on ``stream`` that it said before its own part, and ``bulk`` messages on BULK."""
        if self.part is not None and self.part.number == number:
            self._awaited.discard((hop, stream))
            self._bulk_due[hop] = bulk
            self._settle_bulk(hop)

    def said(self, to: Iterable[PeerId], stream: int) -> None:
        """A message goes out."""
        if stream == Stream.BULK:
            self._bulk_said.update(to)

    def count(self, hop: PeerId, stream: int) -> None:
        """A message was dealt with."""
        if stream == Stream.BULK:
            self._bulk_heard[hop] += 1
            self._settle_bulk(hop)

    def _settle_bulk(self, hop: PeerId) -> None:
        if self._bulk_heard[hop] >= self._bulk_due.get(hop, sys.maxsize):
            self._awaited.discard((hop, int(Stream.BULK)))

    def hear(self, hop: PeerId, stream: int, seq: int, body: bytes | memoryview) -> None:
        """A message of the strategy's; recorded if it was said before the cut."""
        if hop not in self._links:
            self._stray = hop
        if self.part is not None and (hop, stream) in self._awaited:
            self.part.heard.append(Said(hop, stream, seq, bytes(body)))

    def done(self) -> Part | None:
        """Our part, once it is whole."""
        part = self.part
        if part is None or self._awaited or part.trainer is None:
            return None
        self.part = None
        return part

    def give_up(self, now: float, links: Iterable[PeerId]) -> str:
        """Why the open cut cannot end any more (it is dropped then), or nothing."""
        if self.part is None:
            return ""
        missing = sorted({peer for peer, _ in self._awaited})
        lost = sorted(set(missing) - set(links))
        if not lost and not self._stray and now - self.part.t <= OPEN_S_MAX:
            return ""
        number, self.part = self.part.number, None
        why = f"no mark of {', '.join(missing)} in {OPEN_S_MAX:g} s"
        if lost or self._stray:
            why = f"{', '.join(lost)} fell silent" if lost else f"{self._stray} spoke over a link that was given up"
        return f"checkpoint {name_of(number)} given up: {why}"


# -- trees of values as text and arrays -----------------------------------------------------------------------------


def frozen(value: Any, spool: Spool = np.copy) -> Any:
    """``value`` with new containers and spooled arrays, one after the other; all else never changes (Blocks,
    Messages)."""
    if isinstance(value, np.ndarray):
        return spool(value)
    if isinstance(value, dict):
        return {key: frozen(each, spool) for key, each in value.items()}
    if type(value) in (list, tuple, deque):
        return type(value)(frozen(each, spool) for each in value)
    return set(value) if isinstance(value, set) else value


def pack(tree: Any) -> tuple[bytes, dict[str, Array]]:
    """``tree`` as JSON text and the arrays that the text refers to. Knows containers, Blocks and Messages; TypeError
    for anything else."""
    arrays: dict[str, Array] = {}
    return json.dumps(_packed(tree, "", arrays)).encode(), arrays


def unpack(text: bytes, arrays: Mapping[str, Array]) -> Any:
    """Inverse of ``pack``."""
    return _unpacked(json.loads(text), arrays)


def _packed(value: Any, path: str, arrays: dict[str, Array]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        name = f"{path.lstrip('/')}#{len(arrays)}"
        arrays[name] = value
        return {"~array": name}
    if isinstance(value, dict) and all(type(key) is str and key[:1] != "~" for key in value):
        return {key: _packed(each, f"{path}/{key}", arrays) for key, each in value.items()}
    for tag, (kind, parts, _) in _KINDS.items():
        if isinstance(value, kind):
            inner = [_packed(each, f"{path}/{i}", arrays) for i, each in enumerate(parts(value))]
            return {tag: inner} if tag else inner
    why = str(value) if isinstance(value, TypeError) else f"a {type(value).__name__} cannot be saved"
    raise TypeError(f"state {path or '/'}: {why}")


def _unpacked(value: Any, arrays: Mapping[str, Array]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    tag, held = next(iter(value.items()), ("", ""))
    if not tag.startswith("~"):
        return {key: _unpacked(each, arrays) for key, each in value.items()}
    return arrays[held] if tag == "~array" else _KINDS[tag].made([_unpacked(each, arrays) for each in held])


def _spans(coverage: Iterable[Span]) -> list[list[Any]]:
    return [list(span) for span in coverage]


def _covers(spans: Iterable[list[Any]]) -> tuple[Span, ...]:
    return tuple(Span(PeerId(origin), first, last) for origin, first, last in spans)


def _of_block(b: Block) -> tuple[Any, ...]:
    return (b.start, b.size, int(b.encoding), b.codes, b.scales, b.indices, b.scanned)


def _block(parts: list[Any]) -> Block:
    start, size, encoding, *rest = parts
    return Block(start, size, Encoding(encoding), *rest)


def _of_message(m: Message) -> tuple[Any, ...]:
    covers = _spans(m.coverage)
    return (m.kind, m.step, m.epoch, dict(m.fields), list(m.blocks), covers, int(m.stream), m.origin, m.hop, m.seq)


def _message(parts: list[Any]) -> Message:
    kind, step, epoch, fields, blocks, covers, stream, *who = parts
    return Message(kind, step, epoch, fields, tuple(blocks), _covers(covers), Stream(stream), *who)


def _of_add(add: Add) -> tuple[Any, ...]:
    """Of the message that caused it only who said it matters now."""
    told = None if add.message is None else replace(add.message, blocks=())
    return (add.values, add.scale, _spans(add.coverage), told)


def _add(parts: list[Any]) -> Add:
    values, scale, covers, message = parts
    return Add(values, scale, _covers(covers), message)


class _Kind(NamedTuple):
    kind: type | tuple[type, ...]
    parts: Callable[[Any], Iterable[Any]]
    made: Callable[[list[Any]], Any]


_KINDS: Mapping[str, _Kind] = {
    "": _Kind(list, list, list),
    "~tuple": _Kind(tuple, tuple, tuple),
    "~deque": _Kind(deque, list, deque),
    "~set": _Kind((set, frozenset), sorted, set),
    "~dict": _Kind(dict, lambda held: held.items(), dict),
    "~bytes": _Kind(bytes, lambda held: [base64.b64encode(held).decode()], lambda parts: base64.b64decode(parts[0])),
    "~block": _Kind(Block, _of_block, _block),
    "~message": _Kind(Message, _of_message, _message),
    "~add": _Kind(Add, _of_add, _add),
}
"""How values that JSON does not know are taken apart and put together again."""
