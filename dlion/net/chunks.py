"""Chunks: how the streams of a session are cut for one link, and put together again.

Law: bytes in, messages out; no clock, no sockets, no meaning. Every frame opens with the same 16 bytes; only DATA has
a payload. A hostile peer can cause ProtocolError and nothing else, and no memory is taken for a length before that
length was checked.

    u8 kind | u8 stream | u16 held | u32 value | u64 offset        (little endian; held is 0 but in ACK)
    DATA   value = payload bytes, offset = place of the payload in its stream
    ACK    offset = bytes received, value = the receiver's clock in microseconds when the newest of them came,
           held = how long the acknowledgement was held back since then, in units of HELD_UNIT_S
    PING, PONG   offset = the pinger's clock in microseconds, returned untouched
    BYE    value = Bye code

A stream is a sequence of messages, each a u32 length and a body. A chunk never crosses a message boundary, and the one
that opens a message holds its whole length field.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import numpy as np

STREAMS = 3
HEADER = struct.Struct("<BBHIQ")
LENGTH = struct.Struct("<I")
OPENING = struct.Struct("<BBHIQI")
"""A header and the length field of the message that the chunk opens."""
HEADER_BYTES = HEADER.size
LENGTH_BYTES = LENGTH.size
HELD_UNIT_S = 1e-4
HELD_MAX = 2**16 - 1
READ_BYTES = 64 * 1024
DIRECT_BYTES_MIN = 16 * 1024
"""At least so much must be missing of a chunk for the link to read straight into the message."""

DATA, ACK, PING, PONG, BYE = range(5)


class Bye(IntEnum):
    """Why a peer ends a link on purpose."""

    DONE = 0
    LEAVING = 1
    REPLACED = 2
    REFUSED = 3
    PROTOCOL = 4


class ProtocolError(Exception):
    """The other end broke the framing; the link cannot be used any longer. The text is the reason."""


class Received(NamedTuple):
    """One whole message: its stream, its number in that stream (from 1) and its body."""

    stream: int
    seq: int
    body: bytes | memoryview


Frame = tuple[int, int, int, int, int]
"""A frame without payload (ACK, PING, PONG, BYE): kind, stream, held, value, offset."""


class _Inbound:
    """The receiving end of one stream. ``cursor`` is never inside a length field."""

    __slots__ = ("bytes_max", "count", "cursor", "filled", "message")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.cursor = 0
        self.count = 0
        self.message: memoryview | None = None
        self.filled = 0


class ChunkReader:
    """Reads frames from a link through ``get_buffer`` and ``buffer_updated``; survives the loss of that link.

    Whole messages gather in ``messages``, frames without payload in ``frames``; the owner empties both.
    """

    def __init__(self, bytes_max: tuple[int, ...]) -> None:
        self.streams = [_Inbound(limit) for limit in bytes_max]
        self.messages: list[Received] = []
        self.frames: list[Frame] = []
        self.arrived_bytes = 0
        """Bytes of all streams that arrived since the owner last acknowledged."""
        self.chunk_ended = False
        self.between = True
        """No message is half read."""
        self._space = memoryview(bytearray(READ_BYTES))
        self._restart()

    def _restart(self) -> None:
        self._start = self._end = 0
        self._stream = self.streams[0]
        self._index = 0
        self._rest = 0
        self._skip = 0
        self._direct = False

    def cursors(self) -> dict[int, int]:
        """Bytes received of each stream: where the other end has to go on."""
        return {index: stream.cursor for index, stream in enumerate(self.streams)}

    def restart(self) -> None:
        """A new link: forget half-read frames, keep half-read messages."""
        self._restart()
        self.frames.clear()

    def get_buffer(self, size_hint: int) -> memoryview:
        """Where the next bytes of the link belong: in a message if much of one is missing, else in the read buffer."""
        stream = self._stream
        if self._rest >= DIRECT_BYTES_MIN and not self._skip and stream.message is not None:
            self._direct = True
            return stream.message[stream.filled : stream.filled + self._rest]
        left = self._end - self._start
        if left and self._start:
            self._space[:left] = bytes(self._space[self._start : self._end])
        self._start, self._end = 0, left
        return self._space[left:] if left else self._space

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` arrived in the last buffer. Raises ProtocolError."""
        if self._direct:
            self._direct = False
            self._filled(nbytes)
            return
        self._end += nbytes
        while True:
            if self._rest:
                if not self._payload():
                    return
            elif not self._header():
                return

    def _header(self) -> bool:
        """Read one frame header; false when more bytes are needed."""
        start = self._start
        have = self._end - start - HEADER_BYTES
        if have < 0:
            return False
        kind, index, held, value, offset = HEADER.unpack_from(self._space, start)
        if kind > BYE or index >= len(self.streams) or (held and kind != ACK):
            raise ProtocolError(f"unknown frame {kind} on stream {index}")
        self._start = start + HEADER_BYTES
        if kind != DATA:
            self.frames.append((kind, index, held, value, offset))
            return True
        stream = self.streams[index]
        if have >= value and offset == stream.cursor and stream.message is None and self._whole(stream, index, value):
            return True
        if offset > stream.cursor:
            raise ProtocolError(f"gap in stream {index}: {offset} received, {stream.cursor} expected")
        if not value or value > stream.bytes_max + LENGTH_BYTES:
            raise ProtocolError(f"chunk of {value} bytes on stream {index}")
        skip = min(value, stream.cursor - offset)
        if stream.message is not None and value - skip > stream.message.nbytes - stream.filled:
            raise ProtocolError(f"a chunk of stream {index} crosses the end of its message")
        self._stream, self._index, self._rest, self._skip = stream, index, value, skip
        return True

    def _whole(self, stream: _Inbound, index: int, nbytes: int) -> bool:
        """The short way of most small messages: the chunk is a whole message and all of it is here."""
        body = self._start + LENGTH_BYTES
        end = self._start + nbytes
        if (
            not LENGTH_BYTES <= nbytes <= stream.bytes_max
            or LENGTH.unpack_from(self._space, self._start)[0] != end - body
        ):
            return False
        self._start = end
        stream.cursor += nbytes
        stream.count += 1
        self.arrived_bytes += nbytes
        self.chunk_ended = True
        self.messages.append(Received(index, stream.count, self._space[body:end].tobytes()))
        return True

    def _payload(self) -> bool:
        """Take what is there of the current chunk; false when more bytes are needed."""
        have = self._end - self._start
        if self._skip:
            taken = min(have, self._skip)
            self._start += taken
            self._skip -= taken
            self._rest -= taken
            return taken > 0
        stream = self._stream
        if stream.message is None:
            if self._rest < LENGTH_BYTES:
                raise ProtocolError(f"a chunk of stream {self._index} ends inside a length")
            if have < LENGTH_BYTES:
                return False
            self._open(stream)
            have -= LENGTH_BYTES
        message = stream.message
        assert message is not None
        taken = min(have, self._rest)
        if taken:
            message[stream.filled : stream.filled + taken] = self._space[self._start : self._start + taken]
            self._start += taken
        elif self._rest:
            return False
        self._filled(taken)
        return True

    def _open(self, stream: _Inbound) -> None:
        """Read the length field of a new message and make room for its body."""
        (length,) = LENGTH.unpack_from(self._space, self._start)
        if length > stream.bytes_max:
            raise ProtocolError(
                f"message of {length} bytes on stream {self._index}, at most {stream.bytes_max} allowed"
            )
        if self._rest - LENGTH_BYTES > length:
            raise ProtocolError(f"a chunk of stream {self._index} crosses the end of its message")
        self._start += LENGTH_BYTES
        self._rest -= LENGTH_BYTES
        stream.cursor += LENGTH_BYTES
        self.arrived_bytes += LENGTH_BYTES
        stream.filled = 0
        self.between = False
        # Not zeroed: pages of a large message are touched once, by the bytes that arrive.
        stream.message = memoryview(bytearray(length)) if length < READ_BYTES else np.empty(length, np.uint8).data

    def _filled(self, nbytes: int) -> None:
        """``nbytes`` of the current chunk are in the message."""
        stream = self._stream
        message = stream.message
        assert message is not None
        self._rest -= nbytes
        stream.cursor += nbytes
        stream.filled += nbytes
        self.arrived_bytes += nbytes
        if not self._rest:
            self.chunk_ended = True
        if stream.filled == message.nbytes:
            stream.count += 1
            stream.message = None
            self.between = all(other.message is None for other in self.streams)
            self.messages.append(Received(self._index, stream.count, message))
