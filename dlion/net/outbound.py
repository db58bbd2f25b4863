"""The sending end of one stream: messages that wait, messages under way, and where the other end has come to.

Law: places in a stream of bytes; no clock, no window, no frames.
"""

from __future__ import annotations

from collections import deque

from dlion.net.chunks import LENGTH_BYTES
from dlion.net.rate import Flight


class Outbound:
    """The sending end of one stream. A message takes the places ``start`` to ``start + LENGTH_BYTES + body``."""

    __slots__ = ("acked", "count", "end", "flights", "flying", "reached", "sent", "waiting")

    def __init__(self) -> None:
        self.acked = self.sent = self.end = self.count = 0
        self.reached = 0
        """The most that was ever sent: above ``sent`` while a new link repeats what the old one may have delivered."""
        self.waiting: deque[tuple[int, memoryview]] = deque()
        """Messages not wholly sent."""
        self.flying: deque[tuple[int, memoryview]] = deque()
        """Messages wholly sent, not wholly acknowledged."""
        self.flights: deque[tuple[int, Flight]] = deque()

    def drop_acked(self, cursor: int) -> tuple[Flight | None, Flight | None]:
        """The other end has everything before ``cursor``: the newest chunk that lies wholly before it, and the one that
        holds the last byte before it."""
        self.acked = cursor
        _drop_before(self.flying, cursor)
        if cursor > self.sent:
            self.sent = cursor
            _drop_before(self.waiting, cursor)
        flights, end, flight = self.flights, 0, None
        while flights and flights[0][0] <= cursor:
            end, flight = flights.popleft()
        return flight, flights[0][1] if flights and end < cursor else flight

    def inside_length(self, cursor: int) -> bool:
        """No receiver stops inside a length field."""
        return any(start < cursor < start + LENGTH_BYTES for start, _ in (*self.flying, *self.waiting))

    def rewind(self, cursor: int) -> None:
        """Nothing after ``cursor`` arrived: all of it waits again."""
        self.flights.clear()
        self.waiting.extendleft(reversed(self.flying))
        self.flying.clear()
        _drop_before(self.waiting, cursor)
        self.acked = self.sent = cursor


def _drop_before(messages: deque[tuple[int, memoryview]], cursor: int) -> None:
    """Drop the messages that end at or before ``cursor``."""
    while messages and messages[0][0] + LENGTH_BYTES + messages[0][1].nbytes <= cursor:
        messages.popleft()
