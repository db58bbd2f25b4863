"""A session: every message exactly once and in order per stream, over links that come and go.

Law: a state machine of bytes and times; no loop, no socket, no meaning of a message. One session lives as long as a
pair of incarnations of two peers, each end in its own process. A lost link loses nothing: ``cursors`` tell the other
end where to go on, ``resume`` goes on. What is not acknowledged is kept, what is acknowledged is dropped.

Streams are numbers; a lower one overtakes a higher one between chunks. Stream 0 (control) is small and is not held back
by the window; the others together never have more unacknowledged than the link can use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dlion.net.chunks import (
    ACK,
    BYE,
    DATA,
    HEADER,
    HELD_MAX,
    HELD_UNIT_S,
    LENGTH_BYTES,
    OPENING,
    PING,
    PONG,
    STREAMS,
    Bye,
    ChunkReader,
    Frame,
    ProtocolError,
    Received,
)
from dlion.net.outbound import Outbound
from dlion.net.rate import CLOCK_TICKS, Arrival, RateEstimator

Buffer = bytes | bytearray | memoryview
CONTROL = 0
ACK_BYTES = 32 * 1024
MICROSECONDS = 1_000_000
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Every bound of a session."""

    message_bytes_max: int = 1 << 30
    control_message_bytes_max: int = 1 << 20
    control_queued_bytes_max: int = 16 << 20
    queued_bytes_max: int = 4 << 30
    """What a stream holds: not acknowledged, sent or not."""
    unacked_bytes_max: int = 64 << 20
    """Most bytes in flight, whatever the rate says."""
    window_bytes_initial: int = 64 * 1024
    """In flight until the link has shown its rate."""
    chunk_bytes_min: int = 8 * 1024
    chunk_bytes_max: int = 1 << 20
    chunk_s: float = 0.025
    queue_s: float = 0.09
    """The queue we build in front of the bottleneck; a control message waits so long at most, and a chunk more."""
    ack_held_s_max: float = 0.02
    ack_held_s_min: float = 0.005
    ack_bytes_min: int = 4 * 1024
    """Less than this is acknowledged by what leaves next, be it only a sign of life."""

    def __post_init__(self) -> None:
        if not LENGTH_BYTES < self.chunk_bytes_min <= min(self.chunk_bytes_max, self.unacked_bytes_max):
            raise ValueError("limits of a session: chunk_bytes_min is above chunk_bytes_max or unacked_bytes_max")

    def narrowed(self, bytes_per_s: float) -> SessionLimits:
        """For links of which it is known that they carry so little (0: it is not): no chunk takes longer than a
        quarter of a second, no link is filled for longer than a second before it has shown its rate, and no window
        waits for an acknowledgement that leaves with something else."""
        if not bytes_per_s:
            return self
        chunk = int(min(self.chunk_bytes_min, max(bytes_per_s / 4, 2 * LENGTH_BYTES)))
        window = int(min(self.window_bytes_initial, max(bytes_per_s, 2 * chunk)))
        ack = min(self.ack_bytes_min, window // 4)
        return replace(self, chunk_bytes_min=chunk, window_bytes_initial=window, ack_bytes_min=ack)


class SessionFullError(Exception):
    """A stream already holds as many unacknowledged bytes as it may."""


class Session:
    """Both directions of the talk with one incarnation of one peer. ``now`` is the caller's clock in seconds."""

    def __init__(self, limits: SessionLimits, now: float) -> None:
        self.limits = limits
        self.estimate = RateEstimator(limits.queue_s, now)
        bulk = (limits.message_bytes_max,) * (STREAMS - 1)
        self._reader = ChunkReader((limits.control_message_bytes_max, *bulk))
        self._out = [Outbound() for _ in range(STREAMS)]
        self._paced = False
        """Something waits that may leave only at ``estimate.pace_at``."""
        self._ack_at = NEVER
        """When an acknowledgement must leave; NEVER when none is owed."""
        self._arrived_bytes = 0
        self._acked_cursors = [0] * STREAMS
        self._arrived_at = now
        self._ping: int | None = None
        self._pong: int | None = None
        self._ping_wanted = False
        self._small = False
        """What has arrived is not acknowledged yet, and too little to be worth a frame of its own."""
        self.peer_bye: Bye | int | None = None
        self.queued_bytes = 0
        """Bytes of all streams that wait to be sent, whether or not the window has room."""
        self.unacked_bytes = 0
        """Bytes above control that are on the link or beyond, not acknowledged."""
        self.chunk_bytes = limits.chunk_bytes_min
        """How much leaves in one piece: about ``chunk_s`` of the link's rate."""
        self.window_bytes = limits.window_bytes_initial
        """Most unacknowledged bytes of the streams above control."""
        self.get_buffer = self._reader.get_buffer
        """``get_buffer(size_hint)``: where the next bytes of the link belong."""
        self._tune()

    # What the owner says ---------------------------------------------------------------------------------------

    def send(self, stream: int, body: Buffer, now: float) -> int:
        """Queue one message; its number in the stream, from 1. ``body`` may not change until it is acknowledged.

        Raises SessionFullError, and ValueError for a body above the limit of its stream.
        """
        out = self._out[stream]
        view = memoryview(body)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        limits = self.limits
        if view.nbytes > (limits.message_bytes_max if stream else limits.control_message_bytes_max):
            raise ValueError(f"a message of {view.nbytes} bytes is too long for stream {stream}")
        total = LENGTH_BYTES + view.nbytes
        if out.end - out.acked + total > (limits.queued_bytes_max if stream else limits.control_queued_bytes_max):
            raise SessionFullError(f"stream {stream} holds {out.end - out.acked} bytes that are not acknowledged")
        out.waiting.append((out.end, view))
        out.end += total
        self.queued_bytes += total
        out.count += 1
        return out.count

    def ping(self) -> None:
        """Send a PING with the next bytes: a sign of life, and a round-trip time when it comes back."""
        self._ping_wanted = True

    def sign(self, now: float) -> None:
        """Send a sign of life with the next bytes: what we owe anyway, or a PING."""
        if self._small or self._ack_at != NEVER:
            self._ack_at = now
        else:
            self._ping_wanted = True

    @property
    def asking(self) -> bool:
        """A PING is out that was not answered yet; acknowledgements come with the answer."""
        return self._ping is not None

    def bye(self, code: Bye) -> bytes:
        """The frame that says why the link is closed; nothing may follow it."""
        return HEADER.pack(BYE, 0, 0, code, 0)

    def cursors(self) -> dict[int, int]:
        """Bytes received per stream, for Hello: there the other end goes on."""
        return self._reader.cursors()

    def resume(self, peer_cursors: Mapping[int, int], now: float) -> None:
        """A new link: go on where ``peer_cursors`` (an absent stream is 0) say. Raises ProtocolError if they lie."""
        cursors = [peer_cursors.get(index, 0) for index in range(STREAMS)]
        for index, (out, cursor) in enumerate(zip(self._out, cursors, strict=True)):
            if not out.acked <= cursor <= out.reached or out.inside_length(cursor):
                raise ProtocolError(f"cursor {cursor} of stream {index} is not in {out.acked} to {out.reached}")
        for out, cursor in zip(self._out, cursors, strict=True):
            out.rewind(cursor)
        self._recount()
        self._reader.restart()
        self.estimate.restart(now)
        self._tune()
        self._acked_cursors = [0] * STREAMS
        self._ack_at = now if any(self._reader.cursors().values()) else NEVER
        self._small = False
        self._arrived_at = now
        self._ping = self._pong = None
        self._ping_wanted = True
        self.peer_bye = None

    # What leaves -----------------------------------------------------------------------------------------------

    def outgoing(self, now: float) -> list[Buffer]:
        """What may go on the link now, about one chunk; empty when nothing may. Write it all, then ask again."""
        buffers: list[Buffer] = []
        chunk_bytes = self.chunk_bytes
        self._paced = False
        room = chunk_bytes
        if self.queued_bytes:
            for index, out in enumerate(self._out):
                while out.waiting and room > 0:
                    nbytes = self._cut(index, out, chunk_bytes, now, buffers)
                    if not nbytes:
                        break
                    room -= nbytes
        if room == chunk_bytes and not self.owes(now):
            return buffers
        self._signals(now, buffers)
        if self.queued_bytes or self.unacked_bytes + chunk_bytes >= self.window_bytes:
            self.estimate.filled(self.queued_bytes > 0)
        else:
            self.estimate.starved(self.unacked_bytes + self._out[CONTROL].sent - self._out[CONTROL].acked)
        return buffers

    def _cut(self, index: int, out: Outbound, chunk_bytes: int, now: float, buffers: list[Buffer]) -> int:
        """Append the next chunk of a stream; returns its bytes, 0 when the window has no room for it."""
        start, body = out.waiting[0]
        place = out.sent - start
        rest = LENGTH_BYTES + body.nbytes - place
        nbytes = min(rest, chunk_bytes)
        control = self._out[CONTROL]
        in_flight_bytes = self.unacked_bytes + control.sent - control.acked
        if index != CONTROL:
            if now < self.estimate.pace_at:
                self._paced = True
                return 0
            room = self.window_bytes - self.unacked_bytes
            if room < nbytes:
                if room < min(rest, self.limits.chunk_bytes_min):
                    return 0
                nbytes = room
            self.unacked_bytes += nbytes
        flight = self.estimate.sent(now, in_flight_bytes, nbytes)
        if not place:
            buffers.append(OPENING.pack(DATA, index, 0, nbytes, out.sent, body.nbytes))
            if nbytes > LENGTH_BYTES:
                buffers.append(body if nbytes == rest else body[: nbytes - LENGTH_BYTES])
        else:
            buffers.append(HEADER.pack(DATA, index, 0, nbytes, out.sent))
            buffers.append(body[place - LENGTH_BYTES : place - LENGTH_BYTES + nbytes])
        out.sent += nbytes
        self.queued_bytes -= nbytes
        out.reached = max(out.reached, out.sent)
        out.flights.append((out.sent, flight))
        if nbytes == rest:
            out.flying.append(out.waiting.popleft())
        return nbytes

    def owes(self, now: float) -> bool:
        """A frame without payload must leave now."""
        return self._ack_at <= now or self._pong is not None or self._ping_wanted

    def _signals(self, now: float, buffers: list[Buffer]) -> None:
        """Append what rides along: acknowledgements, PING and PONG."""
        if self._small or self._ack_at != NEVER:
            self._ack_at = NEVER
            self._small = False
            self._reader.arrived_bytes = self._arrived_bytes = 0
            held = min(round((now - self._arrived_at) / HELD_UNIT_S), HELD_MAX)
            arrived_ticks = int(self._arrived_at * MICROSECONDS) % CLOCK_TICKS
            for index, stream in enumerate(self._reader.streams):
                if stream.cursor != self._acked_cursors[index]:
                    self._acked_cursors[index] = stream.cursor
                    buffers.append(HEADER.pack(ACK, index, held, arrived_ticks, stream.cursor))
        if self._pong is not None:
            buffers.append(HEADER.pack(PONG, 0, 0, 0, self._pong))
            self._pong = None
        if self._ping_wanted:
            self._ping_wanted = False
            self._ping = int(now * MICROSECONDS)
            buffers.append(HEADER.pack(PING, 0, 0, 0, self._ping))

    # What arrives ----------------------------------------------------------------------------------------------

    def buffer_updated(self, nbytes: int, now: float) -> list[Received]:
        """``nbytes`` arrived in that buffer; returns the messages they completed. Raises ProtocolError.

        Messages completed before a fault are returned by ``take_messages``: their bytes count as received.
        """
        reader = self._reader
        reader.buffer_updated(nbytes)
        if reader.frames:
            news: dict[int, Arrival] = {}
            for frame in reader.frames:
                self._signal(frame, now, news)
            reader.frames.clear()
            for ticks, arrived in news.items():
                self.estimate.acked(now, arrived, ticks)
            if news:
                self._tune()
        self._owe_ack(now)
        return self.take_messages()

    def take_messages(self) -> list[Received]:
        """The whole messages not yet taken."""
        messages, self._reader.messages = self._reader.messages, []
        return messages

    def _owe_ack(self, now: float) -> None:
        """Say when the bytes that have arrived must be acknowledged."""
        reader, limits = self._reader, self.limits
        if reader.arrived_bytes != self._arrived_bytes:
            self._arrived_bytes = reader.arrived_bytes
            self._arrived_at = now
            if reader.chunk_ended and reader.arrived_bytes >= ACK_BYTES:
                self._ack_at = now
            elif reader.arrived_bytes < limits.ack_bytes_min and reader.between:
                self._small = True
            elif self._ack_at == NEVER:
                self._ack_at = now + min(max(self.estimate.rtt_s / 4, limits.ack_held_s_min), limits.ack_held_s_max)
        reader.chunk_ended = False

    def _signal(self, frame: Frame, now: float, news: dict[int, Arrival]) -> None:
        kind, index, held, value, offset = frame
        if kind == ACK:
            out = self._out[index]
            if offset > out.reached or (offset > out.sent and out.inside_length(offset)):
                raise ProtocolError(f"{offset} bytes of stream {index} acknowledged, {out.reached} sent")
            if offset > out.acked:
                news.setdefault(value, Arrival(held * HELD_UNIT_S)).add(offset - out.acked, *out.drop_acked(offset))
                self._recount()
        elif kind == PING:
            self._pong = offset
        elif kind == PONG:
            if offset == self._ping:
                self._ping = None
                self.estimate.pinged(now - offset / MICROSECONDS)
                self._tune()
        else:
            self.peer_bye = Bye(value) if value in Bye._value2member_map_ else value

    # How it stands ---------------------------------------------------------------------------------------------

    def _tune(self) -> None:
        """The estimate has changed: so do window and chunk."""
        limits, estimate = self.limits, self.estimate
        least = 2 * limits.chunk_bytes_min if estimate.proven else limits.window_bytes_initial
        window, most = estimate.window_bytes(), limits.unacked_bytes_max
        self.window_bytes = int(window if least < window < most else min(max(window, least), most))
        chunk, smallest, largest = estimate.rate * limits.chunk_s, limits.chunk_bytes_min, limits.chunk_bytes_max
        self.chunk_bytes = int(chunk if smallest < chunk < largest else min(max(chunk, smallest), largest))

    def _recount(self) -> None:
        """A stream has moved by what the other end says."""
        control, update, bulk = self._out
        self.queued_bytes = control.end - control.sent + update.end - update.sent + bulk.end - bulk.sent
        self.unacked_bytes = update.sent - update.acked + bulk.sent - bulk.acked

    def writable_bytes(self) -> int:
        """How much more the link can use now without a queue; 0 when the window is full."""
        _, update, bulk = self._out
        room = self.window_bytes - (update.end - update.acked) - (bulk.end - bulk.acked)
        return room if room > 0 else 0

    @property
    def chunk_bytes_wanted(self) -> int:
        """Room in the window that is worth telling the owner of."""
        return min(self.chunk_bytes, self.window_bytes // 4)

    @property
    def sent_bytes(self) -> int:
        """Bytes of all streams sent at least once."""
        return sum(out.reached for out in self._out)

    @property
    def acked_bytes(self) -> int:
        """Bytes of all streams that arrived for certain."""
        return sum(out.acked for out in self._out)

    @property
    def moved_bytes(self) -> int:
        """Bytes of updates and bulk that arrived for certain, in both directions."""
        return sum(out.acked for out in self._out[1:]) + sum(stream.cursor for stream in self._reader.streams[1:])

    @property
    def idle(self) -> bool:
        """Everything sent has been acknowledged."""
        control, update, bulk = self._out
        return control.acked == control.end and update.acked == update.end and bulk.acked == bulk.end

    @property
    def heard(self) -> bool:
        """All updates and bulk have been acknowledged. (Of control, which is mostly news, there may always be more.)"""
        _, update, bulk = self._out
        return update.acked == update.end and bulk.acked == bulk.end

    @property
    def ack_at(self) -> float:
        """When ``outgoing`` should be asked again, at the latest, for an acknowledgement's sake."""
        return min(self._ack_at, self.estimate.pace_at) if self._paced else self._ack_at

    def sent(self, stream: int) -> int:
        """Messages ever queued on a stream."""
        return self._out[stream].count

    def acked(self, stream: int) -> int:
        """Messages of a stream that the other end has whole."""
        out = self._out[stream]
        return out.count - len(out.waiting) - len(out.flying)

    def received(self, stream: int) -> int:
        """Whole messages ever received on a stream."""
        return self._reader.streams[stream].count
