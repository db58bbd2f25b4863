"""Whether a decoded message may reach the strategy, and through it the weights.

Law: a pure question about one message; it changes nothing and never raises on what others wrote. The codec has
already made sure of finite numbers, ascending positions and bounded sizes; they are not looked at a second time. This
policy adds what only the receiver knows: which kinds and fields are understood, and how large the model is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dlion.messages import Message, PeerId, Scalar

Kinds = Mapping[str, Mapping[str, type]]


class Admit:
    """``check`` returns why a message is refused, or None when it is welcome.

    ``speaks``: the strategy's kinds with their fields and types. ``node_speaks``: the same for kinds that begin with
    ``~``, which are the node's own; a strategy can neither declare nor shadow them (ValueError). A field declared with
    ``?`` at the end of its name may be left out. ``blocks``: how many a message of a kind must hold.
    """

    def __init__(
        self,
        layout_size: int,
        speaks: Kinds,
        node_speaks: Kinds | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> None:
        own = node_speaks or {}
        for kind in (*speaks, *own):
            if kind.startswith("~") != (kind in own) or (kind in own and kind in speaks):
                raise ValueError(f"message kind {kind!r}: a leading ~ is for the node's kinds, and for all of them")
        self._layout_size = layout_size
        self._blocks = blocks or {}
        self._kinds = {**speaks, **own}
        self._may = {
            kind: {name[:-1]: of for name, of in fields.items() if name.endswith("?")}
            for kind, fields in self._kinds.items()
        }
        self._must = {
            kind: {name: of for name, of in fields.items() if not name.endswith("?")}
            for kind, fields in self._kinds.items()
        }

    def check(self, message: Message) -> str | None:
        declared = self._must.get(message.kind)
        if declared is None:
            return f"kind {message.kind!r} is not understood"
        fields, may = message.fields, self._may[message.kind]
        if len(fields) != len(declared):
            if len(fields) < len(declared) or not fields.keys() - may.keys() <= declared.keys():
                return f"{message.kind}: fields {sorted(fields)}; expected {sorted(self._kinds[message.kind])}"
            declared = {**declared, **{name: may[name] for name in fields.keys() & may.keys()}}
        for name, kind in declared.items():
            if name not in fields:
                return f"{message.kind}: field {name!r} is missing"
            if not _fits(fields[name], kind):
                return f"{message.kind}: field {name!r} is a {type(fields[name]).__name__}; expected {kind.__name__}"
        return self._objection_to_blocks(message)

    def _objection_to_blocks(self, message: Message) -> str | None:
        count = len(message.blocks)
        if count != (expected := self._blocks.get(message.kind, count)):
            return f"{message.kind}: {count} blocks; expected {expected}"
        for block in message.blocks:
            if block.start < 0 or block.start + block.size > self._layout_size:
                return f"{message.kind}: block {block.start} + {block.size} in a model of {self._layout_size}"
        return None


class Known(NamedTuple):
    """Who may speak, and for which micro-clouds."""

    peers: frozenset[PeerId]
    clouds: frozenset[str]


def stranger(message: Message, known: Known | None) -> str | None:
    """Is it said in the name of anybody who is not in the topology? None: anybody may speak."""
    if known is None:
        return None
    peer, cloud = message.fields.get("peer"), message.fields.get("cloud")
    named = peer.split(" ") if isinstance(peer, str) else ()
    for name in (message.origin, message.hop, *named, *(span.origin for span in message.coverage)):
        if name not in known.peers:
            return f"{message.kind}: {name[:64]!r} is not in the topology"
    if isinstance(cloud, str) and cloud not in known.clouds:
        return f"{message.kind}: no micro-cloud is called {cloud[:64]!r}"
    return None


def _fits(value: Scalar, kind: type) -> bool:
    """Exact types, except that a whole number may stand where a float is declared."""
    return type(value) is kind or (kind is float and type(value) is int)
