"""What happens to the exchange lane, and what it asks for in return.

Law: values only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from msgspec import Struct

from dlion.cut import Part
from dlion.exchange.base import Action, Timer, Update
from dlion.messages import Message, PeerId
from dlion.observe.runlog import Event
from dlion.tensors import Flat


class Heard(Struct, frozen=True):
    """A whole message arrived from ``hop``."""

    hop: PeerId
    stream: int
    seq: int
    body: bytes | memoryview


class Rest(Struct, frozen=True):
    """What an own update that is added already still asks for: it goes on beside the next step."""

    actions: Iterator[Action]
    step: int


class Writable(Struct, frozen=True):
    peer: PeerId


class Fired(Struct, frozen=True):
    """A strategy's timer."""

    key: str


class MembersChanged(Struct, frozen=True):
    """``ctx.members``, ``ctx.links`` or ``ctx.routes`` are new."""


class Barrier(Struct, frozen=True):
    """All updates up to ``step`` (None: all that will ever come) are here: staged additions become visible."""

    step: int | None


class DrainNow(Struct, frozen=True):
    """Training is over here: ask the strategy for what it still owes, from now on after every batch.

    Staged additions stay staged, so that the last steps too are summed in the same order everywhere.
    """


class Look(Struct, frozen=True):
    """Show the weights to ``observer(view, replica)``; neither may be kept."""

    observer: Callable[[Flat, Flat], Iterable[Event]]


class TakeCut(Struct, frozen=True):
    """Start a cut of all peers, unless one is open; ``last``: everybody has drained, so our own state is a part."""

    last: bool = False


class Resume(Struct, frozen=True):
    """Go on from ``part``: comes before the first step, when all neighbours are there."""

    part: Part


class Enter(Struct, frozen=True):
    """Come into the run under way behind ``sponsor``, in this life of ours: what it sends is who we are to be.
    ``start``: the weights that everybody began with."""

    sponsor: PeerId
    life: int
    start: Flat


class Renewed(Struct, frozen=True):
    """``peer`` lives again: the steps of its former life are not counted on."""

    peer: PeerId


class Conclude(Struct, frozen=True):
    """Take over the view in ``message`` (None: ours is the one), tell it to those, and hear nothing more."""

    message: Message | None
    to: tuple[PeerId, ...]


Item = (
    Update
    | Rest
    | Heard
    | Writable
    | Fired
    | MembersChanged
    | Barrier
    | DrainNow
    | Look
    | TakeCut
    | Resume
    | Enter
    | Renewed
    | Conclude
)


class Entered(Struct, frozen=True):
    """Where the run is that we came into; or why we could not."""

    step: int = 0
    t: float = 0.0
    """Seconds of the sponsor's clock."""
    fault: str = ""


class Spoken(NamedTuple):
    """A message to send: to whom, its bytes, what it was, and how many bytes each link was allowed (() = not said)."""

    to: tuple[PeerId, ...]
    body: bytes
    message: Message
    budgets: tuple[int, ...]


class Outcome(Struct):
    """What a batch of items asks the loop to do, and what it found."""

    left: list[Item] = []
    """Not handled yet: they come next. An own update was added, and the step after it need not wait for them."""
    sends: list[Spoken] = []
    timers: list[Timer] = []
    notices: list[Message] = []
    """Messages of the node's own kinds."""
    refused: list[tuple[PeerId, str]] = []
    events: list[Event] = []
    scanned: int = 0
    """Float32 entries read or written: what the simulation charges for."""
    ready: bool = True
    owes: bool = False
    lags: bool = False
    part: Part | None = None
    """Of a cut that is whole here."""
    entered: Entered | None = None
    """We have what our sponsor had, and may begin."""
