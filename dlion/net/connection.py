"""A connection: one session on the event loop, bound to whichever link it has now.

Law: callbacks and timers only, no task; knows no message and no peer's name. At most one pump, one acknowledgement
timer and one heartbeat timer are pending, and none after ``close``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from dlion.net.chunks import Bye, ProtocolError
from dlion.net.greeting import Greeting
from dlion.net.link import Link
from dlion.net.session import NEVER, Buffer, Session

HEARTBEAT_S = 3.0
JOIN_BYTES_MAX = 32 * 1024
"""Buffers below this together are joined: one write costs more than the copy."""
OnMessage = Callable[[int, int, bytes | memoryview], None]


class _Ear:
    """Receiver of one link. When the connection has moved on to another link, this one is deaf."""

    __slots__ = ("link", "owner")

    def __init__(self, owner: Connection, link: Link) -> None:
        self.owner: Connection | None = owner
        self.link = link

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.owner.session.get_buffer(size_hint) if self.owner else memoryview(bytearray(4096))

    def buffer_updated(self, nbytes: int) -> None:
        if self.owner:
            self.owner._arrived(nbytes)

    def link_writable(self) -> None:
        if self.owner:
            self.owner._pump_soon()

    def link_lost(self, reason: str) -> None:
        if self.owner:
            self.owner._lose(reason)


class Connection:
    """Sends and receives whole messages over a session; outlives its links.

    ``on_message(stream, seq, body)`` is called for every message once, in order per stream. ``on_writable()`` is called
    when the window opens again after having been full. ``on_lost(reason)`` is called once for each attached link that
    breaks or is given up; not for one ended by ``close`` or replaced by ``attach``. Callbacks run on the loop, are
    never called from inside ``send``, ``attach`` or ``close``, and must not raise: what a message means is judged
    elsewhere.
    """

    def __init__(
        self,
        session: Session,
        *,
        on_message: OnMessage,
        on_writable: Callable[[], None],
        on_lost: Callable[[str], None],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self.session = session
        self.heartbeat_s = heartbeat_s
        self._on_message = on_message
        self._on_writable = on_writable
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._ear: _Ear | None = None
        self._pump_handle: asyncio.Handle | None = None
        self._ack_timer: asyncio.TimerHandle | None = None
        self._ack_timer_at = NEVER
        self._beat_timer: asyncio.TimerHandle | None = None
        self._full = False
        self._full_since = self._full_s = 0.0
        self.moved = True
        """Rate, distance or room may have changed since the owner last set this to False."""
        self.last_heard = self._loop.time()
        """When bytes last came, loop time in seconds."""
        self._last_written = self.last_heard

    # The link --------------------------------------------------------------------------------------------------

    def attach(self, source: Greeting | Link, peer_cursors: Mapping[int, int]) -> None:
        """Go on over this link, where the peer's cursors say; an older link is dropped. Raises ProtocolError."""
        now = self._loop.time()
        self.session.resume(peer_cursors, now)
        self.moved = True
        old = self._detach()
        if old is not None:
            old.abort()
        if isinstance(source, Greeting):
            self._ear = _Ear(self, source.link)
            source.hand_over(self._ear)
        else:
            self._ear = _Ear(self, source)
            source.attach(self._ear)
        self.last_heard = self._last_written = now
        self._beat_timer = self._loop.call_later(self.heartbeat_s, self._beat)
        self._pump_soon()

    def close(self, code: Bye = Bye.DONE) -> None:
        """Tell the peer why, and close. What is queued stays in the session, for another link. Idempotent."""
        link = self._detach()
        if link is not None:
            link.write(self.session.bye(code))
            link.close()

    def abort(self, reason: str) -> None:
        """Give up a link that seems dead: ``on_lost(reason)`` is called, the session waits for another link."""
        link = self._detach()
        if link is not None:
            link.abort()
            self._on_lost(reason)

    def _detach(self) -> Link | None:
        """Let go of the link and of everything pending."""
        for handle in (self._pump_handle, self._ack_timer, self._beat_timer):
            if handle is not None:
                handle.cancel()
        self._pump_handle = self._ack_timer = self._beat_timer = None
        self.moved = True
        ear, self._ear = self._ear, None
        if ear is None:
            return None
        ear.owner = None
        return ear.link

    def _lose(self, reason: str) -> None:
        link = self._detach()
        if link is not None:
            self._on_lost(reason)

    def _part(self, code: int) -> None:
        """The peer ends this link on purpose."""
        link = self._detach()
        if link is not None:
            link.close()
            name = code.name.lower() if isinstance(code, Bye) else f"code {code}"
            self._on_lost(f"the peer said goodbye: {name}")

    def _fail(self, reason: str) -> None:
        """The peer broke the rules on this link."""
        link = self._detach()
        if link is not None:
            link.write(self.session.bye(Bye.PROTOCOL))
            link.close()
            self._on_lost(reason)

    # Out -------------------------------------------------------------------------------------------------------

    def send(self, stream: int, body: Buffer) -> int:
        """Queue one message; returns its number in the stream. ``body`` may not change any more.

        Without a link the message waits for the next one. Raises SessionFullError.
        """
        self.moved = True
        seq = self.session.send(stream, body, self._loop.time())
        if self._pump_handle is None and self._ear is not None:
            self._pump_handle = self._loop.call_soon(self._pump)
        return seq

    def _pump_soon(self) -> None:
        if self._pump_handle is None and self._ear is not None:
            self._pump_handle = self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Put on the link what may go now."""
        self._pump_handle = None
        ear = self._ear
        if ear is None:
            return
        session, link, now = self.session, ear.link, self._loop.time()
        wrote = False
        while not link.congested:
            buffers = session.outgoing(now)
            if not buffers:
                break
            wrote = True
            _write(link, buffers)
            if self._ear is not ear:
                return
            if not session.queued_bytes:
                break
        if wrote:
            self._last_written = now
        if not link.congested:  # else the acknowledgement leaves when the link takes more
            self._arm_ack(now)
        self._watch_window(now)

    def _watch_window(self, now: float) -> None:
        full = self.session.writable_bytes() < max(self.session.chunk_bytes_wanted, 1)
        if full and not self._full:
            self._full, self._full_since = True, now
        elif self._full and not full:
            self._full_s = self.full_s
            self._full = False
            self._on_writable()

    def want_room(self) -> None:
        """The owner saw no room here and has more to say: ``on_writable`` as soon as there is some, be it at once, for
        acknowledgements may have come since it looked."""
        if not self._full and self._ear is not None:
            self.moved = True
            self._full, self._full_since = True, self._loop.time()
            self._pump_soon()

    def _arm_ack(self, now: float) -> None:
        at, timer = self.session.ack_at, self._ack_timer
        if at != NEVER and (timer is None or at < self._ack_timer_at):
            if timer is not None:
                timer.cancel()
            self._ack_timer_at = at  # uvloop's handles cannot say
            self._ack_timer = self._loop.call_at(at, self._ack_due)

    def _ack_due(self) -> None:
        self._ack_timer = None
        if self.session.ack_at <= self._loop.time():
            self._pump()
        else:
            self._arm_ack(self._loop.time())

    def ask(self) -> None:
        """Have the other end acknowledge what it has, now."""
        if self._ear is not None and not self.session.asking:
            self.session.ping()
            self._pump_soon()

    def _beat(self) -> None:
        """Say something if we have been silent, and look again when we may have been."""
        now = self._loop.time()
        silent_until = self._last_written + self.heartbeat_s
        if now >= silent_until:
            self.session.sign(now)
            self._pump_soon()
            silent_until = now + self.heartbeat_s
        self._beat_timer = self._loop.call_at(silent_until, self._beat)

    # In --------------------------------------------------------------------------------------------------------

    def _arrived(self, nbytes: int) -> None:
        session = self.session
        self.last_heard = now = self._loop.time()
        self.moved = True
        fault = ""
        try:
            messages = session.buffer_updated(nbytes, now)
        except ProtocolError as error:
            fault = str(error)
            messages = session.take_messages()
        for stream, seq, body in messages:
            self._on_message(stream, seq, body)
        if fault:
            self._fail(fault)
        elif session.peer_bye is not None:
            self._part(session.peer_bye)
        elif self._ear is not None:
            if self._full or session.queued_bytes or session.owes(now):
                self._pump_soon()
            else:
                self._arm_ack(now)

    # How it stands ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """There is a link."""
        return self._ear is not None

    @property
    def unacked_bytes(self) -> int:
        """Bytes of updates and bulk in flight."""
        return self.session.unacked_bytes

    @property
    def writable_bytes(self) -> int:
        """How much more this link can use now without building a queue; 0 without a link."""
        return self.session.writable_bytes() if self._ear is not None else 0

    @property
    def full_s(self) -> float:
        """Seconds so far in which the window was full."""
        return self._full_s + (self._loop.time() - self._full_since if self._full else 0.0)

    @property
    def rate_bps(self) -> float:
        """Measured delivery rate in bits per second; 0.0 before the first sample."""
        return self.session.estimate.rate * 8

    @property
    def rtt_s(self) -> float:
        """Round-trip time in seconds, our own queue not counted; 0.0 before the first sample."""
        return self.session.estimate.distance_s


def _write(link: Link, buffers: list[Buffer]) -> None:
    """Write buffers in order, small ones joined."""
    if len(buffers) == 1 or sum(map(len, buffers)) <= JOIN_BYTES_MAX:
        link.write(b"".join(buffers) if len(buffers) > 1 else buffers[0])
        return
    small: list[Buffer] = []
    for buffer in buffers:
        if len(buffer) < JOIN_BYTES_MAX // 8:
            small.append(buffer)
            continue
        if small:
            link.write(b"".join(small))
            small = []
        link.write(buffer)
    if small:
        link.write(b"".join(small))
