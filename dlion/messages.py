"""What peers say to each other.

Law: frozen values only; no bytes, no sockets, no clock. ``wire`` turns these into bytes and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple, NewType

import msgspec

from dlion.blocks import Block

PeerId = NewType("PeerId", str)
"""Opaque name of a peer. An identity is neither an address nor a connection."""

Scalar = bool | int | float | str
PROTOCOL_MIN, PROTOCOL_MAX = 1, 1


class Stream(IntEnum):
    """Independent ordered streams of one session; a lower number overtakes a higher one between chunks."""

    CONTROL = 0
    UPDATE = 1
    BULK = 2


class Span(NamedTuple):
    """Steps ``first`` to ``last`` (both included) of ``origin``, summed in the message that names this span."""

    origin: PeerId
    first: int
    last: int


class Message(msgspec.Struct, frozen=True, eq=False):
    """One thing said. A strategy fills in what it means; the node adds who said it (origin, hop, seq).

    ``origin`` made the message, ``hop`` passed it over the last link, ``seq`` is its number in that hop's session.
    ``step`` is the origin's local step, ``epoch`` the strategy's round. ``coverage`` says whose updates are summed.
    Kinds that begin with ``~`` are the node's own and never reach a strategy.
    """

    kind: str
    step: int = 0
    epoch: int = 0
    fields: Mapping[str, Scalar] = {}
    blocks: tuple[Block, ...] = ()
    coverage: tuple[Span, ...] = ()
    stream: Stream = Stream.UPDATE
    origin: PeerId = PeerId("")
    hop: PeerId = PeerId("")
    seq: int = 0


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """First thing said on a link, by both ends; a mismatch is refused with both values shown."""

    protocol_min: int
    protocol_max: int
    run: str
    peer: str
    incarnation: int
    role: str
    job: str
    model: str
    cursors: dict[int, int]
    """Bytes of each stream received so far from the addressee's incarnation ``of``; the addressee resumes there."""
    of: int
    """Incarnation of the addressee that the cursors speak of; 0 when it was never met."""
    capabilities: list[str] = []
    nonce: bytes = b""
    proof: bytes = b""
    to: str = ""
    """Not empty: for whom this is; anybody else is asked to pass the link on."""
    refusal: str = ""
    """Not empty: the link is refused, and this says why."""
